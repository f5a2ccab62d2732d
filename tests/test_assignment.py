"""The assignment's grader: what four files earn, and that no file does anything to it."""

import hmac
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "tutorials" / "assignment"
sys.path.insert(0, str(FOLDER))

import grade  # noqa: E402
from inside import reads, takes  # noqa: E402
from isolated import Lost, alone  # noqa: E402

RIGHT = (FOLDER / "examples" / "right.py").read_text(encoding="utf-8")
SECRET = "a secret of the teacher's"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the grader runs on Linux")


def grading(file, **changes):
    how = {"secret": SECRET.encode(), "user": None, "quick": True, "seconds": 600.0}
    how |= changes
    return grade.Grading(file=file, end=time.monotonic() + how["seconds"], **how)


def changed(tmp_path, old, new, text=RIGHT):
    """A file that is right but for this."""
    assert text.count(old) == 1
    path = tmp_path / "scheme.py"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def attacking(tmp_path, attack):
    """A file that is right, and does this when it is imported."""
    path = tmp_path / "scheme.py"
    path.write_text(f"{RIGHT}\n\n{attack}\n", encoding="utf-8")
    return path


def run(file, out, *more):
    """The grade of a file, as main writes it."""
    words = [str(file), "--secret", SECRET, "--out", str(out), "--quick", *more]
    assert grade.main(words) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def broken(found):
    return {row["law"] for row in found["laws"]["laws"] if row["verdict"] == "broken"}


def points(found):
    return {name: found[name]["points"] for name in ("laws", "equation", "stream", "written")}


# What four files earn


@pytest.mark.slow
def test_a_right_file_has_all_that_a_machine_gives(tmp_path):
    report = tmp_path / "report.md"
    report.write_text("It loses where inputs look alike.", encoding="utf-8")
    example = FOLDER / "examples" / "right.py"
    found = run(example, tmp_path / "grade.json", "--report", str(report))
    assert points(found) == {"laws": 40, "equation": 20, "stream": 20, "written": None}
    assert (found["points"], found["of"]) == (80, 80)
    assert broken(found) == set() and found["laws"]["true but not claimed"] == []
    assert found["written"]["words"] == 6 and len(found["written"]["questions"]) == 3
    assert {p.name for p in tmp_path.iterdir()} == {"grade.json", "report.md"}
    assert grade.lost(found) == []


@pytest.mark.slow
def test_a_lazy_file_pays_for_each_true_claim_that_it_drops(tmp_path):
    found = run(FOLDER / "examples" / "lazy.py", tmp_path / "grade.json")
    assert broken(found) == set()
    # of those required zero_at_birth and granularity; of 20 less 4 each for four others
    assert found["laws"]["points"] == 3 * 4 + 4
    assert set(found["laws"]["true but not claimed"]) == {
        "zero_at_birth=True",
        "granularity='token'",
        "equation=True",
        "exact_gradient=True",
        "as_lora={}",
        "active_at_most=False",
    }
    assert found["equation"]["points"] == 20
    assert 4 <= found["stream"]["points"] <= 16  # it is the grown LoRA, but for what it says
    same = [row for row in found["stream"]["differences"] if row["of"].endswith("grown")]
    assert [(row["mean"], row["points"]) for row in same] == [(0, 4), (0, 4)]
    lost = grade.lost(found)
    assert lost[:2] == ["law zero_at_birth is not claimed", "law granularity is not claimed"]
    assert lost[2] == "zero_at_birth=True is true, and not claimed" and len(lost) >= 8


@pytest.mark.slow
def test_a_wrong_file_pays_for_claims_and_for_the_equation(tmp_path):
    found = run(FOLDER / "examples" / "wrong.py", tmp_path / "grade.json")
    assert {"granularity", "simplex"} <= broken(found)
    others = broken(found) - set(grade.REQUIRED)
    assert found["laws"]["points"] == 4 * 4 + max(0, 20 - 4 * len(others)) <= 32
    training = [row["points"] for row in found["equation"]["situations"]]
    assert training == [0, 5, 0, 5] and found["equation"]["points"] == 10
    lost = "\n".join(grade.lost(found))
    assert "law simplex is broken: top_k 2: a token's weights sum to 1 +1; " in lost
    assert "equation, T 5, D 7, O 9, ranks 3, tasks 1, training True: y is off by" in lost
    assert lost.count("equation, ") == 2 and "is true, and not" not in lost


@pytest.mark.slow
def test_a_hostile_file_gains_nothing(tmp_path):
    found = run(FOLDER / "examples" / "hostile.py", tmp_path / "grade.json")
    rows = found["laws"]["laws"]
    evidence = [row["evidence"] for row in rows if row["verdict"] == "broken"]
    assert sum("changes minimoe." in text and ".drawn" in text for text in evidence) > 10
    assert found["laws"]["points"] < 20
    assert points(found) | {"laws": 0} == {"laws": 0, "equation": 0, "stream": 0, "written": None}
    assert {p.name for p in tmp_path.iterdir()} == {"grade.json"}


# What a file may do to its process


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        ("import time; time.sleep(99)", "takes longer than 1 s"),
        ("while True: pass", "takes longer than 1 s"),
        ("import os; os._exit(0)", "ends its process with status 0"),
        ("import os; os.kill(os.getpid(), 9)", "has its process killed by signal 9"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("np.empty(2**30)", "Unable to allocate"),
        ("torch.empty(2**31)", "allocate memory"),
        ("open('x', 'wb').write(bytes(2**27))", "File too large"),
        ("import os; os.mkfifo('handed'); os._exit(0)", "ends its process with status 0"),
        ("import os; os.symlink('/dev/zero', 'handed'); os._exit(0)", "ends its process"),
        ("import os; os.mkfifo('handed'); os.open('handed', os.O_RDWR); os._exit(0)", "ends its"),
        ("import os; os.mkdir('handed')", "ends its process with status 1"),
        ("torch.Tensor.abs = torch.Tensor.neg", "changes torch.Tensor.abs"),
        ("torch.equal = lambda *_: True", "changes torch.equal"),
        ("from minimoe.laws import laws\nlaws.max = min", "changes minimoe.laws.laws.max"),
        (
            "from minimoe.laws import same\nfrom minimoe.laws.case import Case\nCase.y = same",
            "changes minimoe.laws.case.Case.y",
        ),
        (
            "from minimoe.laws import laws\nlaws.same_bits.__code__ = (lambda *_: 0).__code__",
            ".same_bits",
        ),
        (
            "from minimoe.laws.case import Case\nCase.run = lambda *_: 0",
            "changes minimoe.laws.case.Case.run",
        ),
    ],
)
def test_whatever_it_does_is_evidence(attack, reason, tmp_path):
    file = attacking(tmp_path, attack)
    with pytest.raises(Lost) as lost:
        alone(takes, file, seconds=1.0 if "longer" in reason else 20.0)
    assert reason in str(lost.value)
    assert {p.name for p in tmp_path.iterdir()} == {"scheme.py"}


def test_what_is_handed_over_without_the_token_is_nothing(tmp_path):
    forged = b'[null, [{"zero_at_birth": true}, []], "<f8", [0]]\n'
    attack = f"import os\nopen('handed', 'wb').write(b'0' * 32 + b'\\n' + {forged!r})\nos._exit(0)"
    with pytest.raises(Lost, match="ends its process with status 0"):
        alone(takes, attacking(tmp_path, attack), seconds=20)


def test_what_it_prints_and_writes_is_not_read(tmp_path, capfd):
    attack = "print('{}')\nimport os\nos.write(2, b'{}')\nopen('grade.json', 'w').write('{}')"
    (claims, _), _ = alone(takes, attacking(tmp_path, attack), seconds=20)
    assert claims["zero_at_birth"] is True
    assert capfd.readouterr() == ("", "")
    assert {p.name for p in tmp_path.iterdir()} == {"scheme.py"}


def test_what_it_starts_ends_with_it(tmp_path):
    pid = tmp_path / "pid"
    fork = (
        f"import os, time\nif os.fork() == 0:\n    open({str(pid)!r}, 'w').write(str(os.getpid()))"
    )
    attack = f"{fork}\n    time.sleep(99)\ntime.sleep(0.3)"
    file = attacking(tmp_path, attack)
    if os.geteuid():  # only root may start one
        with pytest.raises(Lost, match="temporarily unavailable"):
            alone(takes, file, seconds=20)
        return
    alone(takes, file, seconds=20)
    assert ends(pid)


def ends(pid):
    """Whether the process that wrote its number there ends within 5 s."""
    status = Path("/proc", pid.read_text(), "status")
    for _ in range(100):
        if not status.exists() or "Z (zombie)" in status.read_text():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_it_does_not_outlive_a_grader_that_is_killed(tmp_path):
    pid = tmp_path / "pid"
    attack = f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(99)"
    words = [attacking(tmp_path, attack), "--secret", SECRET, "--out", tmp_path / "grade.json"]
    with subprocess.Popen([sys.executable, FOLDER / "grade.py", *words]) as grader:
        while not (pid.exists() and pid.read_text()):
            assert grader.poll() is None
            time.sleep(0.05)
        grader.kill()
    assert ends(pid)
    assert {p.name for p in tmp_path.iterdir()} == {"scheme.py", "pid"}


def whoami(path):
    return [os.getuid(), os.getgid(), os.getgroups(), path.name], np.zeros(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can be somebody else")
def test_root_can_have_it_run_as_nobody(tmp_path):
    who, _ = alone(whoami, attacking(tmp_path, ""), seconds=20, user=65534)
    assert who == [65534, 65534, [], "scheme.py"]


def test_what_a_user_cannot_read_is_named(tmp_path, monkeypatch):
    file = attacking(tmp_path, "")
    assert alone(reads, file, seconds=20)[0] == []
    monkeypatch.setattr(os, "access", lambda path, mode: path != os.__file__)
    assert reads(file)[0] == [os.__file__]


@pytest.mark.slow
def test_a_file_that_hangs_has_a_grade_within_its_time(tmp_path):
    file, out = attacking(tmp_path, "import time\ntime.sleep(99)"), tmp_path / "grade.json"
    words = [file, "--secret", SECRET, "--out", out, "--seconds", "20"]
    start = time.monotonic()
    command = [sys.executable, FOLDER / "grade.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    said = f"0 of 80 points: {out}\n  takes longer than 1 s"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{said}\n", "")
    assert time.monotonic() - start < 60  # of which all but 1 s to start
    found = json.loads(out.read_text(encoding="utf-8"))
    assert points(found) == {"laws": 0, "equation": 0, "stream": 0, "written": None}
    assert found["laws"]["evidence"] == "takes longer than 1 s"


def test_nothing_is_looked_at_when_no_time_is_left(tmp_path):
    over = grading(attacking(tmp_path, ""), seconds=0.0)
    assert grade.graded(over, None)["equation"]["evidence"] == "no time was left"


# The equation


def test_a_gate_without_its_gradient_is_seen_in_dx_alone(tmp_path):
    file = changed(tmp_path, "Gate(idx, s.square(), z)", "Gate(idx, s.square().detach(), z)")
    rows = grade.equation(grading(file))["situations"]
    # of one task also, as two of its three ranks speak
    assert [row["points"] for row in rows] == [grade.SAME_Y] * 4


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("def stated", "def other", "no function stated"),
        ("    z = x @", "    import torch\n    z = x @", "stated imports something"),
        ("    z = x @", "    z = torch.ones(1) @", "name 'torch' is not defined"),
        ("    z = x @", "    __import__('scheme')\n    z = x @", "stated imports scheme"),
        ("    z = x @", "    open('scheme.py')\n    z = x @", "name 'open' is not defined"),
        ("    return g\n", "    return g[:1]\n", "allowed: (5, 3)"),
        ("    return g\n", "    return g / 0\n", "of finite numbers"),
    ],
)
def test_what_is_stated_stands_alone(old, new, reason, tmp_path):
    found = grade.equation(grading(changed(tmp_path, old, new)))
    assert found["points"] == 0 and reason in found["situations"][0]["evidence"]


# The stream


@pytest.mark.slow
def test_who_learns_nothing_has_nothing_though_it_forgets_nothing(tmp_path):
    file = changed(tmp_path, "Gate(idx, s.square(), z)", "Gate(idx, 0 * s, z)")
    how = grading(file)
    (claims, names), _ = how.alone(takes)
    found = grade.learned(how, claims, names, sparse=True)
    assert found["points"] == 0
    assert found["means"]["scheme"]["bwt"] == [0, 0, 0]  # above both baselines


@pytest.mark.slow
def test_one_stream_that_cannot_be_learned_is_said(tmp_path):
    file = changed(tmp_path, "Gate(idx, s.square(), z)", "Gate(idx, s / 0, z)")
    how = grading(file)
    (claims, names), _ = how.alone(takes)
    found = grade.learned(how, claims, names, sparse=True)
    assert found["points"] == 0 and found["evidence"].startswith("scheme: FloatingPointError")


def test_no_process_of_the_file_has_labels_or_the_seed_of_the_data(tmp_path, monkeypatch):
    how = grading(attacking(tmp_path, ""))
    given = []

    def recorded(call, file, *args, seconds, user):
        given.append(args)
        return None, np.zeros(0)

    monkeypatch.setattr(grade, "alone", recorded)
    claims = {"expert": "rank"}
    found = grade.learned(how, claims, ["rank", "top_k"], sparse=True)
    assert found["evidence"].startswith("scheme: answers of (0,)")
    stream, seed = grade.hidden(how)[2][0]
    (args,) = given
    whole = pickle.dumps(args)
    for task in stream.tasks:
        assert task.x_test.numpy().tobytes() in whole
        assert task.y_train.numpy().tobytes() in whole
        assert task.y_test[:2].numpy().tobytes() not in whole
    assert seed in args and how.number("data 0") not in args


def test_the_derivation_is_the_one_that_readme_gives(tmp_path):
    digest = hmac.new(SECRET.encode(), b"data 0", "sha256").hexdigest()
    assert grading(tmp_path).number("data 0") == int(digest[:8], 16)


def test_the_secret_decides_the_stream(tmp_path):
    file = attacking(tmp_path, "")
    secrets = [f"secret number {i}".encode() for i in range(20)]
    kinds = {grade.hidden(grading(file, secret=secret))[:2] for secret in secrets}
    assert {family for family, _ in kinds} == {"subspaces", "clusters"} and len(kinds) > 3
    (_, _, one), (_, _, again), (_, _, other) = (
        grade.hidden(grading(file, secret=secret)) for secret in (b"a" * 8, b"a" * 8, b"b" * 8)
    )
    x, y, z = (made[0][0].tasks[0].x_train for made in (one, again, other))
    assert x.equal(y) and not x.equal(z)
    seeds = [seed for _, seed in one]
    assert len(set(seeds)) == len(seeds) == 3
    assert len(grade.hidden(grading(file, quick=False))[2]) == 5


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.py", "--secret", SECRET], "missing.py: no such file"),
        (["scheme.py", "--secret", "short"], "secret is 5 bytes, allowed: 8 or more"),
        (["scheme.py", "--secret-file", "none"], "none: no such file"),
        (["scheme.py", "--secret-file", "empty"], "secret is 0 bytes, allowed: 8 or more"),
        (["scheme.py", "--secret", SECRET, "--report", "none.md"], "none.md: no such file"),
        (
            ["scheme.py", "--secret", SECRET, "--out", "no/grade.json"],
            "no/grade.json: a folder, or in no",
        ),
        (["scheme.py", "--secret", SECRET, "--out", "."], ".: a folder, or in no"),
        (["scheme.py", "--secret", SECRET, "--out", "scheme.py"], "out is scheme.py, allowed"),
        (["scheme.py", "--secret", SECRET, "--seconds", "0"], "seconds is 0, allowed: above 0"),
        (["scheme.py", "--secret", SECRET, "--seconds", "nan"], "seconds is nan, allowed"),
        (["scheme.py", "--secret", SECRET, "--user", "-1"], "user is -1, allowed"),
    ],
)
def test_bad_input_is_a_line_and_status_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    attacking(tmp_path, "")
    (tmp_path / "empty").touch()
    assert grade.main(words) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith(f"grade.py: error: {message}")
    assert {p.name for p in tmp_path.iterdir()} == {"scheme.py", "empty"}


@pytest.mark.parametrize(
    "words", [["scheme.py"], ["scheme.py", "--secret", "a", "--secret-file", "b"]]
)
def test_one_secret_is_needed(words, capsys):
    with pytest.raises(SystemExit) as stop:
        grade.main(words)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
