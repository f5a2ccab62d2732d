"""What `minimoe check` does with schemes that nobody has looked at: whatever they do, a line or a
verdict comes back, and nothing is left."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimoe import Adapter
from minimoe.laws import LAWS, STEPS, CheckResult, Row, any_shape, hold, table
from minimoe.laws.check import broken
from minimoe.tools.load import load_class

OWN = "import builtins, ctypes, os, re, sys, time, minimoe, torch\n"
CLASS = "class Mine(minimoe.LoRA):\n    "
IN_C = "re.match('(a+)+$', 'a' * 99 + 'b')"  # as good as endless, and Python is not asked
FILES = {
    # what a file does when it is loaded
    "ok": CLASS + "pass",
    "my gate-1.0": CLASS + "pass",
    "naïve": CLASS + "pass",
    "loads_for_ever": CLASS + f"pass\n{IN_C}",
    "leaves": CLASS + "pass\nsys.exit()",
    "leaves_hard": CLASS + "pass\nos._exit(0)",
    "stops": CLASS + "pass\nraise KeyboardInterrupt",
    "sets_dtype": CLASS + "pass\ntorch.set_default_dtype(torch.float64)",
    "moves": CLASS + "pass\nsys.path = [*sys.path[1:]]\nos.chdir('/')\ntorch.manual_seed(0)",
    # when a layer is built
    "builds_for_ever": CLASS + "def __init__(self, *a, **k):\n        while True: pass",
    "built_hard": CLASS + "def __init__(self, *a, **k): os._exit(7)",
    "needs_more": CLASS + "def __init__(self, base, rank, extra): super().__init__(base, rank)",
    "sets_threads": CLASS + "def __init__(self, *a, **k):\n        super().__init__(*a, **k)\n"
    "        torch.set_num_threads(2)",
}
# and what it does for a lone vector, of which any_shape asks and zero_is_finite does not
ACTS = {
    "loops": "while True: time.sleep(1)",
    "loops_in_c": IN_C,
    "exits": "sys.exit(3)",
    "exits_hard": "os._exit(3)",
    "crashes": "ctypes.string_at(0)",
    "closes": "os.closerange(3, 256)",
    "interrupts": "raise KeyboardInterrupt",
    "no_grad": "torch.set_grad_enabled(False)",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "base_exception": "raise type('Odd', (BaseException,), {})('me')",
    "wrong_then_loops": "builtins.n = getattr(builtins, 'n', 0) + 1\n            "
    "while builtins.n > 1: time.sleep(1)\n            return x.new_zeros(99)",
}
FILES |= {
    name: CLASS + f"def forward(self, x):\n        if x.dim() == 1:\n            {act}\n        "
    "return super().forward(x)"
    for name, act in ACTS.items()
}
FILES["once"] = (
    CLASS
    + "def forward(self, x):\n        builtins.been = True\n        return super().forward(x)\n"
    "assert not hasattr(builtins, 'been')"
)
FILES["loud"] = (
    CLASS + "def forward(self, x):\n        print('loud')\n        os.write(1, b'loud')\n        "
    "return super().forward(x)"
)
FILES["function"] = (
    "def loops(x, layer):\n    while len(x) == 0: pass\n    return layer.base(x) + layer.update(x)"
)

HANG = ["loops", "loops_in_c", "wrong_then_loops"]
TIMED = ["--json", "--jobs", "3", "--seconds", "15"]

# several commands in one process, which imports torch once; of two laws, to be quick
SCRIPT = """
import contextlib, io, json, sys
from minimoe import cli, laws
from minimoe.laws import apart
apart.LAWS = {law: laws.LAWS[law] for law in (laws.any_shape, laws.zero_is_finite)}
said = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(words)
    said.append((status, out.getvalue(), err.getvalue()))
sys.__stdout__.write(json.dumps(said))
"""


def run(folder, *commands):
    """(status, stdout, stderr) of each."""
    command = [sys.executable, "-W", "error", "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(OWN + text + "\n", encoding="utf-8")
    return folder


REFUSED = {
    "loads_for_ever": "loads_for_ever.py:Mine takes longer than 3 s when it is loaded",
    "leaves": "leaves.py fails: SystemExit:",
    "leaves_hard": "leaves_hard.py:Mine ends its process with status 0 when it is loaded",
    "stops": "stops.py:Mine raises KeyboardInterrupt when it is loaded",
    "sets_dtype": "sets_dtype.py changes torch's default dtype from torch.float32 to torch.float64 "
    "when it is loaded",
    "builds_for_ever": "builds_for_ever.py:Mine takes longer than 3 s when a layer is built",
    "built_hard": "built_hard.py:Mine ends its process with status 7 when a layer is built",
    "needs_more": "Mine(nn.Linear(8, 8), rank=2) raises TypeError: Mine.__init__() missing 1",
    "sets_threads": "Mine(nn.Linear(8, 8), rank=2) changes torch's number of threads from 1 to 2",
}


def test_what_cannot_be_loaded_or_built_is_one_line(folder):
    words = (["check", "ok.py:Mine", f"{name}.py:Mine", "--seconds", "3"] for name in REFUSED)
    for message, (status, out, err) in zip(REFUSED.values(), run(folder, *words), strict=True):
        assert (status, out) == (2, "")
        (line,) = err.splitlines()
        assert line.startswith(f"minimoe: error: {message}")


@pytest.fixture(scope="module")
def found(folder):
    """What --json prints of all others."""
    before = {p.name for p in folder.iterdir()}
    names = [name for name in FILES if name not in ("function", *REFUSED, *HANG)]
    both = (["--json", "--jobs", "2"], names), (TIMED, HANG)
    words = (["check", *more, *(f"{name}.py:Mine" for name in names)] for more, names in both)
    (status, most, _), (_, hang, _) = run(folder, *words)
    assert status == 1
    assert {p.name for p in folder.iterdir()} - {"__pycache__"} == before
    most, hang = json.loads(most), json.loads(hang)
    return most | {"schemes": most["schemes"] | hang["schemes"]}


def verdicts(entry, name):
    """{law or step: (verdict, evidence)}"""
    return {row["name"]: (row["verdict"], row["evidence"]) for row in entry["schemes"][name]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "evidence"),
    [
        ("loops", "takes longer than 15 s; T 1, D 1, "),
        ("loops_in_c", "takes longer than 15 s; T 1, D 1, "),
        ("exits", "SystemExit: 3 (exits.py:"),
        ("exits_hard", "ends its process with status 3; T 1, D 1, "),
        ("crashes", "has its process killed by SIGSEGV; T 1, D 1, "),
        ("closes", "ends its process with status 1; T 1, D 1, "),
        ("interrupts", "raises KeyboardInterrupt; T 1, D 1, "),
        ("no_grad", "changes torch's grad mode from True to False; T 1, D 1, "),
        ("deterministic", "changes torch's deterministic mode from False to True; T 1, D 1, "),
        ("base_exception", "Odd: me (base_exception.py:"),
    ],
)
def test_whatever_a_scheme_does_is_evidence(name, evidence, found):
    rows = verdicts(found, f"{name}.py:Mine")
    assert rows["any_shape"][0] == "broken" and rows["any_shape"][1].startswith(evidence)
    # of the same file: nothing is left
    assert rows["zero_is_finite"] == ("held", "30 cases, 2 large ones")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ok", "my gate-1.0", "naïve", "moves", "once", "loud"])
def test_what_is_only_odd_is_held_to_the_laws(name, found):
    rows = verdicts(found, f"{name}.py:Mine")
    assert rows == dict.fromkeys(
        ("any_shape", "zero_is_finite"), ("held", "30 cases, 2 large ones")
    )


@pytest.mark.slow
def test_a_layer_that_is_built_but_once_breaks_every_law(tmp_path):
    once = "def __init__(self, *a, **k):\n        open('built', 'x')\n        "
    text = OWN + CLASS + once + "super().__init__(*a, **k)\n"
    (tmp_path / "own.py").write_text(text)
    ((status, out, _),) = run(tmp_path, ["check", "own.py:Mine", "--json"])
    assert status == 1
    for verdict, evidence in verdicts(json.loads(out), "own.py:Mine").values():
        assert verdict == "broken"
        assert evidence.startswith("says Mine(nn.Linear(8, 8), rank=2) raises FileExistsError")


def test_a_message_is_short_and_printable():
    row = broken("law", ValueError("\x1b[31m" + "y" * 10**6), None)
    assert row.evidence.startswith("ValueError: \\x1b[31myyy") and len(row.evidence) < 520


def test_an_error_is_placed_in_the_schemes_own_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN + CLASS + "def gate(self, x):\n        return self.nothing\n")
    row = hold(any_shape, load_class(path, "Mine", Adapter))
    assert row.evidence.startswith(
        "AttributeError: 'Mine' object has no attribute 'nothing' (own.py:4); T 1, "
    )


def test_what_breaks_several_laws_is_printed_once():
    names = [law.__name__ for law in LAWS]
    rows = [Row(name, "broken", f"it fails; T {i}, D 1") for i, name in enumerate(names)]
    rows[1] = Row(names[1], "broken", "it fails otherwise; T 1, D 1")
    said = " ".join(table({"own": rows}).partition("–:")[2].split())
    assert said.count("own breaks") == 2
    assert f"own breaks {', '.join([names[0], *names[2:]])}: it fails; T 0, D 1" in said
    assert f"own breaks {names[1]}: it fails otherwise; T 1, D 1" in said


@pytest.mark.slow
def test_what_broke_a_law_before_it_hung_is_not_lost(found):
    verdict, evidence = verdicts(found, "wrong_then_loops.py:Mine")["any_shape"]
    assert verdict == "broken" and evidence.endswith("; then it takes longer than 15 s")
    assert evidence.startswith("x (1,) gives y (99,), not (1,); T 1, D 1, ")


@pytest.mark.slow
def test_a_step_that_takes_too_long_differs_and_those_before_it_are_kept(folder):
    ((status, out, _),) = run(folder, ["check", "function.py:loops", "--as", "lora", *TIMED])
    entry = json.loads(out)
    rows = verdicts(entry, "function.py:loops")
    assert status == 1 and entry["held_to"] == "lora"
    assert list(rows) == [step.__name__ for step in STEPS]
    at = list(rows).index("y")
    assert {verdict for verdict, _ in list(rows.values())[:at]} == {"held"}
    assert rows["y"][0] == "broken" and rows["y"][1].startswith("takes longer than 15 s; T 1, D 1")
    assert set(list(rows.values())[at + 1 :]) == {("not claimed", "not looked at")}


@pytest.fixture(scope="module")
def jobs(folder):
    """(status, stdout, stderr) with one job, and with three."""
    wrong = Path(__file__).parents[1] / "broken" / "samples_flattened.py"
    words = ["check", f"{wrong}:Scheme", "ok.py:Mine", "--json", "--jobs"]
    return run(folder, [*words, "1"], [*words, "3"])


def test_the_same_rows_in_the_same_order_whatever_the_number_of_jobs(jobs):
    one, three = jobs
    assert one[1] == three[1] and one[0] == 1
    for rows in json.loads(one[1])["schemes"].values():
        assert [row["name"] for row in rows] == ["any_shape", "zero_is_finite"]


def test_the_json_is_what_is_documented(jobs, tmp_path):
    path = tmp_path / "check.json"
    path.write_text(jobs[0][1])  # minimoe check ... --json >check.json
    read, entry = CheckResult.read(path), json.loads(jobs[0][1])
    assert read.held_to == "laws" and read.schemes["ok.py:Mine"][0].verdict == "held"
    assert (entry["minimoe"]["kind"], entry["minimoe"]["version"]) == ("check", 1)
    page = (Path(__file__).parents[2] / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = (part for part in page.split("```") if part.startswith("json\n"))
    shown = json.loads(example.removeprefix("json\n"))
    assert [*shown, *shown["minimoe"]] == [*entry, *entry["minimoe"]]
    del shown["minimoe"]
    rows = [row for rows in CheckResult.from_json(shown).schemes.values() for row in rows]
    assert {row.verdict for row in rows} == {"held", "broken", "not claimed"}
    assert {row.name for row in rows} <= {law.__name__ for law in LAWS}
    right = {"name": "simplex", "verdict": "held", "evidence": ""}
    for wrong in ({"verdict": "fine"}, {"name": 3}, {"more": ""}):
        with pytest.raises(ValueError, match=r"schemes\.mora\.0\."):
            CheckResult.from_json({"held_to": "laws", "schemes": {"mora": [right | wrong]}})


SLEEPS = """
import subprocess, minimoe

class Mine(minimoe.LoRA):
    def forward(self, x):
        open("started", "a").close()
        subprocess.run(["sleep", "98765"])
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize(
    ("stop", "status"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_a_stop_ends_all_at_once(stop, status, tmp_path):
    (tmp_path / "sleeps.py").write_text(SLEEPS)
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "minimoe", "check", "sleeps.py:Mine"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

    def others():
        """Processes that stand in this folder."""
        here = []
        for link in Path("/proc").glob("[0-9]*/cwd"):
            with contextlib.suppress(OSError):
                if link.readlink() == tmp_path and link.parent.name != str(process.pid):
                    here.append(int(link.parent.name))
        return here

    try:
        until = time.monotonic() + 120
        while not (tmp_path / "started").exists() and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(0.5)
        on_linux = sys.platform == "linux"
        assert not on_linux or len(others()) >= 2  # a law's process, and what it started
        process.send_signal(stop)
        out, said = process.communicate(timeout=30)  # not as long as a law may take
        assert process.returncode == status and out == b"", said
        last = said.decode().replace("\r", "\n").splitlines()[-1]
        word = {130: "interrupted", 143: "terminated"}[status]
        assert last == f"minimoe: error: {word}" and b"Traceback" not in said
        assert others() == []
    finally:
        process.kill()
        for left in others():
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)


@pytest.mark.slow
def test_where_a_fork_is_not_safe(folder, tmp_path):
    """As on other systems: processes that import all anew."""
    code = (
        "import multiprocessing, sys\n"
        "from minimoe.laws import LAWS, apart\n"
        "if __name__ == '__main__':\n"
        "    apart.CONTEXT, apart.FORK = multiprocessing.get_context('spawn'), False\n"
        "    apart.LAWS = {law: LAWS[law] for law in list(LAWS)[1:3]}\n"
        "    print(*apart.check_apart([sys.argv[1]], 2)[sys.argv[1]], sep='; ')\n"
    )
    (tmp_path / "main.py").write_text(code)
    command = [sys.executable, "-W", "error", "main.py", f"{folder / 'ok.py'}:Mine"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    held = "held (30 cases, 2 large ones)"
    assert done.stdout == f"any_shape: {held}; equation: {held}\n", done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"main.py"}


def test_a_file_of_a_package_imports_from_it(tmp_path):
    deep = tmp_path / "pkg" / "deep"
    deep.mkdir(parents=True)
    for place in (tmp_path / "pkg", deep):
        (place / "__init__.py").write_text("")
    (tmp_path / "pkg" / "top.py").write_text("TOP = 1\n")
    (deep / "near.py").write_text("from ..top import TOP\nNEAR = TOP + 1\n")
    (deep / "helper.py").write_text("")
    text = "from .near import NEAR\nfrom ..top import TOP\nimport pkg.top, helper, minimoe\n"
    (deep / "own.py").write_text(text + CLASS + "seen = NEAR, TOP\n")
    before = [*sys.path]
    assert load_class(deep / "own.py", "Mine", Adapter).seen == (2, 1)
    (deep / "near.py").write_text("NEAR = 5  # edited\n")
    assert load_class(deep / "own.py", "Mine", Adapter).seen == (5, 1)
    assert sys.path == before
    (tmp_path / "bare.py").write_text("from .near import NEAR\n")
    with pytest.raises(ValueError, match=r"bare\.py fails: ImportError: attempted relative import"):
        load_class(tmp_path / "bare.py", "Mine", Adapter)
