"""The command as a user has it: in a process of its own."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimoe.cli import main
from minimoe.compare import restore
from minimoe.continual.backbones import Backbone
from minimoe.continual.streams import STREAMS
from minimoe.laws import LAWS, says
from minimoe.roster import ROSTER, SCHEMES, entry_on, names
from minimoe.tools import tables

SMALL = ["--stream", "permuted-digits", "--tasks", "3", "--epochs", "2", "--rank", "4"]


def minimoe(*args, cwd):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-W", "error", "-m", "minimoe", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


def result(folder):
    """compare.json without its timings."""
    found = json.loads((folder / "compare.json").read_text())
    for scheme in found["schemes"].values():
        del scheme["seconds"], scheme["step"]
    del found["minimoe"]
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Every scheme, two seeds, in the folder that the command names by itself."""
    folder = tmp_path_factory.mktemp("small")
    done = minimoe("compare", *SMALL, "--seeds", 0, 1, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_compare_prints_a_table_and_writes_json_and_picture(small):
    folder, done = small
    found = json.loads((folder / "minimoe-compare" / "compare.json").read_text())
    held = ["minimoe", "stream", "device", "torch", "code", "seeds", "settings", "schemes"]
    assert list(found) == held
    assert (found["stream"], found["device"], found["seeds"]) == ("permuted-digits", "cpu", [0, 1])
    assert list(found["schemes"])[:3] == ["lora", "lora_moe", "mora"]
    assert list(found["schemes"]) == names(Backbone(), "scheme", "baseline", "privileged")
    for name, scheme in found["schemes"].items():
        assert len(scheme["matrix"]) == 2 and len(scheme["matrix"][0]) == 4
        last = [sum(matrix[-1]) / 3 for matrix in scheme["matrix"]]
        assert abs(scheme["acc"]["mean"] - sum(last) / 2) < 1e-12
        assert abs(scheme["acc"]["std"] - abs(last[0] - last[1]) / 2**0.5) < 1e-12
        assert scheme["last"] == scheme["acc"]
        for measure in ("bwt", "forgetting", "fwt", "transfer", "average"):
            assert (scheme[measure]["mean"] is None) == (name == "joint")
        assert f"\n{name} " in done.stdout
        assert f"{scheme['trainable']:,}" in done.stdout
        for array in ("drift", "undecided", "turnover", "silent", "said", "chance"):
            assert len(scheme["found"][array]) == 4
    problems = done.stdout.partition("interference  intrusion")[2]
    for name in ("lora", "lora_moe", "mora", "lora_grown", "joint", "oracle"):
        assert f"\n{name} " in problems
    told = found["schemes"]["oracle"]
    assert told["interference"]["mean"] < 1e-6 and told["intrusion"]["mean"] == 0
    assert told["ambiguity"]["mean"] == 0 and abs(told["instability"]["mean"]) < 1e-6
    even = found["schemes"]["lora_grown"]  # all weigh the same, and new ones say something too
    assert abs(even["ambiguity"]["mean"] - 1) < 1e-9
    assert 0 < even["intrusion"]["mean"] <= even["instability"]["mean"] + 1e-9 < 1
    assert found["schemes"]["zero_shot"]["interference"]["mean"] is None
    assert found["schemes"]["mora"]["stored"] == 3 * found["schemes"]["mora"]["trainable"]
    picture = folder / "minimoe-compare" / "compare.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    assert str(picture.relative_to(folder)) in done.stdout
    assert (picture.parent / "gates.png").stat().st_size > 20_000
    assert str(picture.with_name("gates.png").relative_to(folder)) in done.stdout
    assert "task" in done.stderr  # the progress bar
    assert done.stderr.startswith("writing to minimoe-compare\n")


@pytest.mark.slow
def test_a_second_run_takes_a_new_folder_and_resume_the_latest(small):
    folder, _ = small
    args = ["compare", "--schemes", "zero_shot", *SMALL]
    assert "writing to minimoe-compare-2" in minimoe(*args, cwd=folder).stderr
    again = minimoe("compare", "--resume", cwd=folder)
    assert "writing to minimoe-compare-2" in again.stderr
    assert not (folder / "minimoe-compare-3").exists()


@pytest.mark.slow
def test_resume_extends_a_finished_run_and_keeps_what_is_there(small, tmp_path):
    run = ["--out", tmp_path / "run"]
    start = ["compare", "--stream", "permuted-digits", "--schemes", "mora", "--tasks", 2]
    start += ["--epochs", 2, "--rank", 4]
    assert minimoe(*start, *run, cwd=tmp_path).returncode == 0
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "checkpoints").iterdir()}
    for more in (["--seeds", 1], ["--schemes", "lora", "joint", "--tasks", 3], []):
        done = minimoe("compare", "--resume", *more, *run, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in first} == first
    mine, whole = result(tmp_path / "run"), result(small[0] / "minimoe-compare")
    assert mine["schemes"] == {name: whole["schemes"][name] for name in ("mora", "lora", "joint")}
    assert list(mine["schemes"]) == ["mora", "lora", "joint"]
    page = (tmp_path / "run" / "compare.md").read_text()
    again = "minimoe compare --stream permuted-digits --schemes mora lora joint --seeds 0 1 "
    again += "--tasks 3 --epochs 2 --rank 4"
    assert f"`{again}`" in page
    other = minimoe(*again.split()[1:], "--out", "other", cwd=tmp_path)
    assert other.returncode == 0 and result(tmp_path / "other") == mine
    turned = ["compare", "--stream", "rotated-digits", "--tasks", 2, "--epochs", 1]
    turned += ["--schemes", "lora", "--out", "turned"]
    assert minimoe(*turned, cwd=tmp_path).returncode == 0
    before = (tmp_path / "turned" / "run.json").read_bytes()
    done = minimoe("compare", "--resume", "--tasks", 3, "--out", "turned", cwd=tmp_path)
    assert "tasks is 3, allowed in this run: 2 (rotated-digits of 3 tasks has 60°" in done.stderr
    assert (tmp_path / "turned" / "run.json").read_bytes() == before


def test_what_a_finished_run_knew_can_be_used(small):
    folder = small[0] / "minimoe-compare"
    matrices = result(folder)["schemes"]
    for name in ("mora", "joint", "class_mean", "oracle"):
        learner, stream = restore(folder, name, seed=1)
        for j, task in enumerate(stream.tasks):
            right = learner.predict(task.x_test, j).argmax(-1) == task.y_test
            assert abs(right.double().mean().item() - matrices[name]["matrix"][1][3][j]) < 1e-6
    for args, message in (
        (("moar",), "scheme is 'moar', allowed in this run: lora, lora_moe"),
        (("mora", 7), "seed is 7, allowed in this run: 0, 1"),
    ):
        with pytest.raises(ValueError, match=message):
            restore(folder, *args)
    with pytest.raises(FileNotFoundError, match="no run there to go on with"):
        restore(folder / "none", "mora")


def test_stored_results_are_drawn_and_printed_again(small, tmp_path, capsys):
    folder = small[0] / "minimoe-compare"
    path = folder / "compare.json"
    pictures = {name: (folder / name).read_bytes() for name in ("compare.png", "gates.png")}
    assert main(["plot", str(path), "--out", str(tmp_path / "drawn")]) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "drawn").iterdir()} == pictures
    capsys.readouterr()
    assert main(["table", str(path)]) == 0
    assert capsys.readouterr().out.strip() in small[1].stdout
    assert main(["table", str(path), "--format", "csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    stored = json.loads(path.read_text())["schemes"]
    assert [row["scheme"] for row in rows] == list(stored)
    for row in rows:
        acc = stored[row["scheme"]]["acc"]
        assert (float(row["acc"]), float(row["acc std"])) == (acc["mean"], acc["std"])
    for form, start in (("latex", r"\begin{tabular}{lrrr"), ("markdown", "| scheme | acc |")):
        assert main(["table", str(path), "--format", form]) == 0
        assert capsys.readouterr().out.startswith(start)


@pytest.mark.parametrize("name", ["findings/silence", "findings/atlas", "results/bench-cpu"])
def test_every_kind_of_result_is_drawn_and_printed_again(name, tmp_path, capsys):
    path = Path(__file__).parent.parent / "tutorials" / f"{name}.json"
    assert main(["plot", str(path), "--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.iterdir())) == (2 if name.startswith("results/bench") else 1)
    assert all(picture.stat().st_size > 20_000 for picture in tmp_path.iterdir())
    for form in ("text", "csv", "latex", "markdown"):
        assert main(["table", str(path), "--format", form]) == 0
        assert len(capsys.readouterr().out.splitlines()) > 8


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path):
    args = ["compare", "--stream", "permuted-digits", "--schemes", "lora_moe", "mora"]
    args += ["--tasks", 3, "--epochs", 12]
    assert minimoe(*args, "--out", "whole", cwd=tmp_path).returncode == 0
    killed = tmp_path / "killed"
    again = ["compare", "--resume"]
    # once as soon as a task's checkpoint is there (between tasks), once well into the next task
    for learned, wait, words in ((1, 0.0, args), (2, 0.2, again)):
        watched = killed / "checkpoints" / f"mora-seed0-task{learned}.safetensors"
        process = subprocess.Popen(
            [sys.executable, "-m", "minimoe", *map(str, words), "--out", killed],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not watched.exists():
            time.sleep(0.005)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (killed / "compare.json").exists()
    assert minimoe(*again, "--out", killed, cwd=tmp_path).returncode == 0
    assert result(killed) == result(tmp_path / "whole")
    assert (killed / "compare.png").exists()


BAD = [
    (["compare", "--schemes", "moar"], "scheme is 'moar', allowed: lora, lora_moe, mora"),
    (["compare", "--stream", "digits"], "stream is 'digits', allowed: permuted-digits"),
    (["compare", "--device", "gpu"], "device is 'gpu', allowed here: cpu"),
    (["compare", "--device", "cuda:99"], "device is 'cuda:99', allowed here: cpu"),
    (["compare", "--top-k", "0"], "top_k is 0, allowed: 1 or more"),
    (["compare", "--top-k", "-2"], "top_k is -2, allowed: 1 or more"),
    (["compare", "--rank", "65"], "rank is 65, allowed: 1 to 32 for this layer"),
    (["compare", "--tau", "0"], "tau is 0.0, allowed: above 0"),
    (["compare", "--tau", "-1"], "tau is -1.0, allowed: above 0"),
    (["compare", "--tau", "warm"], "argument --tau: invalid float value: 'warm'"),
    (["compare", "--tasks", "0"], "tasks is 0, allowed for subspaces"),
    (
        ["compare", "--stream", "split-digits", "--tasks", "6"],
        "tasks is 6, allowed for split-digits",
    ),
    (["compare", "--epochs", "0"], "epochs is 0, allowed: 1 or more"),
    (["compare", "--seeds", "-1"], "seeds is -1, allowed: 0 to 4294967295"),
    (["compare", "--out", "file/run"], "Not a directory"),
    (["compare", "--wat"], "unrecognized arguments: --wat"),
    (["bench", "--device", "gpu"], "device is 'gpu', allowed here: cpu"),
    (["bench", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    (["bench", "--ranks", "15"], "ranks is 15, allowed: 16 or more"),
    (["bench", "--tokens", "0"], "tokens is 0, allowed: 1 or more"),
    (["bench", "--routing", "hot"], "routing is 'hot', allowed: random, pool, recorded"),
    (["bench", "--routing", "pool", "--ranks", "64"], "none of the routings pool is made for"),
    (["bench", "--repeats", "0"], "repeats is 0, allowed: 1 or more"),
    (["bench", "--threads", "0"], "threads is 0, allowed: 1 or more"),
    (["bench", "--out", "file/run"], "Not a directory"),
    (["study", "routes"], "study is 'routes', allowed: memory, why, routing, growth, silence"),
    (["study", "grain", "--jobs", "0"], "jobs is 0, allowed: 1 or more"),
    (["study", "grain", "--seeds", "-1"], "seeds is -1, allowed: 0 to 4294967295"),
    (["study", "grain", "--out", "file/run"], "Not a directory"),
    (["check"], "the following arguments are required: NAME"),
    (["compare", "--schemes", "gone.py:Mine"], "gone.py: no such file"),
    (["compare", "--schemes", "mora", "file:Mine"], "file fails: NameError: name 'mine'"),
    (["check", "moar"], "scheme is 'moar', allowed: lora, lora_moe, mora, smora"),
    (["check", "mora", "gone.py:Mine"], "gone.py: no such file"),
    (["check", "file:Mine"], "file fails: NameError: name 'mine' is not defined"),
    (["check", "lora", "--jobs", "0"], "jobs is 0, allowed: 1 or more"),
    (["check", "lora", "--seconds", "0"], "seconds is 0, allowed: above 0"),
    (["check", "lora", "--seconds", "nan"], "seconds is nan, allowed: above 0"),
    (["check", "lora", "--as", "moar"], "scheme is 'moar', allowed: lora, lora_moe, mora, smora"),
    (["new-scheme", "my-gate"], "name is 'my-gate', allowed: a module's name, as in my_gate"),
    (["new-scheme", "../gate"], "name is '../gate', allowed: a module's name"),
    (["new-scheme", "lambda"], "name is 'lambda', allowed: one that Python does not know yet"),
    (["new-scheme", "none"], "name is 'none', allowed: one that Python does not know yet"),
    (["new-scheme", "torch"], "name is 'torch', allowed: one that Python does not know yet"),
    (["new-scheme", "_"], "name is '_', allowed: a module's name, as in my_gate"),
    (["new-scheme", "gate"], "name is 'gate', allowed: one whose class, Gate, is no name yet"),
    (["compare", "--schemes", "all", "nope"], "scheme is 'nope', allowed: lora, lora_moe"),
    (["compare", "--device", "cpu:99"], "device is 'cpu:99', allowed here: cpu"),
    (["compare", "--device", "meta"], "device is 'meta', allowed here: cpu"),
    (["compare", "--seeds", "0", "4294967296"], "seeds is 4294967296, allowed: 0 to 4294967295"),
    (["study", "grain", "--seeds", "0", "-3"], "seeds is -3, allowed: 0 to 4294967295"),
    (["compare", "--tau", "nan"], "tau is nan, allowed: a finite number"),
    (["compare", "--tau", "inf"], "tau is inf, allowed: a finite number"),
    (["compare", "--delta=-inf"], "delta is -inf, allowed: a finite number"),
    (["compare", "--resume"], "minimoe-compare: no run there to go on with"),
    (["compare", "--resume", "--out", "file"], "file: no run there to go on with"),
    (["plot", "gone.json"], "gone.json: no such file"),
    (["plot", "file"], "file: truncated, or no JSON"),
    (["table", "file", "--format", "csv"], "file: truncated, or no JSON"),
    (["table", "file", "--format", "pdf"], "argument --format: invalid choice: 'pdf'"),
]


def one_line(lines, message):
    assert len(lines) == 1 and lines[0].startswith("minimoe") and message in lines[0], lines


@pytest.mark.parametrize(("args", "message"), BAD)
def test_bad_input_gets_one_line_and_status_2(args, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    try:
        status = main(args)
    except SystemExit as stop:  # argparse's own
        status = stop.code
    assert status == 2
    one_line(capsys.readouterr().err.splitlines(), message)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
@pytest.mark.parametrize(("args", "message"), BAD)
def test_bad_input_in_a_process_of_its_own_leaves_nothing(args, message, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = minimoe(*args, cwd=tmp_path)
    assert done.returncode == 2
    one_line(done.stderr.splitlines(), message)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


OWN = """
from minimoe import Gate, LoRA, MoRA
from minimoe.continual.learn import AdapterLearner

class Mine(MoRA):
    pass

class Learner(AdapterLearner):
    def learn(self, stream, t, fit):
        pass

class Idle(MoRA):
    learner = Learner
    toy_settings = {"rank": 4, "top_k": 2}

class Needy(MoRA):
    def needs(self):
        return {"label": range(3)}

    def gate(self, x):
        self.given("label", x)
        return super().gate(x)

class mora(MoRA):
    pass

class Odd(LoRA):
    claims = 3
"""


def test_compare_takes_a_scheme_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    args = ["compare", *SMALL, "--out", "run", "--schemes", "mora", "own.py:Mine", "own.py:Idle"]
    args += ["own.py:Mine", "mora"]  # twice is once
    assert main(args) == 0
    shown = capsys.readouterr().out
    schemes = json.loads(Path("run/compare.json").read_text())["schemes"]
    assert list(schemes) == ["mora", "Mine", "Idle"] and "\nMine " in shown
    assert schemes["Mine"]["matrix"] == schemes["mora"]["matrix"]  # MoRA's toy settings and life
    idle = schemes["Idle"]["matrix"][0]  # its own learner: it never learns, and has two experts
    assert all(row == idle[0] for row in idle)
    assert schemes["Idle"]["trainable"] == schemes["Mine"]["trainable"]  # --rank is for all
    assert "own.py:Mine" in Path("run/compare.md").read_text()
    Path("own.py").write_text(OWN + "# changed\n")
    assert main(["compare", "--resume", "--out", "run"]) == 0  # a comment
    Path("own.py").write_text(OWN.replace("    pass", "    extra = 1", 1))
    assert main(["compare", "--resume", "--out", "run"]) == 2
    assert "a checkpoint of another run (source" in capsys.readouterr().err
    assert main([*args, "--resume"]) == 2
    assert "a checkpoint of another run (source" in capsys.readouterr().err
    for name, message in (
        (
            "Needy",
            "Needy fails: RuntimeError: fc1 (Needy) needs the label: with context(model, label=",
        ),
        ("mora", "scheme 'own.py:mora': there is another of the name mora"),
        ("Odd", "Odd fails: TypeError: claims is 3, allowed: a minimoe.Claims"),
        ("Gone", "own.py: Gone is not there; schemes there: "),
    ):
        assert main(["compare", *SMALL, "--schemes", f"own.py:{name}"]) == 2
        one_line(capsys.readouterr().err.splitlines(), message)


@pytest.mark.slow
def test_a_run_is_neither_overwritten_nor_mixed_with_another(small):
    folder, _ = small
    run = folder / "minimoe-compare"
    checkpoint = run / "checkpoints" / "mora-seed0-task2.safetensors"
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}

    def refused(*args):
        done = minimoe("compare", *SMALL, "--out", run, *args, cwd=folder)
        assert done.returncode == 2
        return done.stderr.splitlines()[-1]

    ran = json.loads((run / "compare.json").read_text())["schemes"]

    def tuned(knob):
        settings = [entry_on(name, "permuted-digits").settings for name in ran]
        return ", ".join(str(value) for value in sorted({s[knob] for s in settings if knob in s}))

    assert "holds a run already: --resume goes on" in refused()
    for option, value, there in (
        ("tau", "0.33", tuned("tau")),
        ("epochs", "3", "2"),
        ("stream", "planted", "permuted-digits"),
        ("rank", "5", "4"),
        ("top-k", "9", tuned("top_k")),
    ):
        another = refused("--resume", f"--{option}", value)
        name = option.replace("-", "_")
        assert f"{name} is {value}, allowed in this run: {there}; another --out" in another
    fewer = minimoe("compare", "--tasks", 2, "--resume", "--out", run, cwd=folder)
    assert "tasks is 2, allowed in this run: 3 or more" in fewer.stderr
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    checkpoint.write_bytes(before[checkpoint][:-1])
    assert "mora-seed0-task2.safetensors: changed or cut short since" in refused("--resume")
    assert checkpoint.read_bytes() == before[checkpoint][:-1]
    checkpoint.write_bytes(before[checkpoint])


@pytest.mark.slow
def test_a_diverging_run_is_named_and_fails_with_status_1(tmp_path):
    args = ["--schemes", "mora", "--tau", "1e-44", *SMALL, "--out", "run"]
    done = minimoe("compare", *args, cwd=tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "mora, seed 0, task 1 (permutation 1), step 1: the loss is nan" in last


@pytest.mark.slow
def test_bench_times_every_part_and_writes_json_and_picture(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    small = ["--ranks", 16, 128, "--tokens", 400, "--width", 32, "--top-k", 4, "--repeats", 2]
    done = minimoe("bench", *small, "--threads", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr and "profiler" not in done.stderr
    folder = tmp_path / "minimoe-bench"
    found = json.loads((folder / "bench.json").read_text())
    assert (folder / "bench.png").stat().st_size > 10_000
    page = (folder / "bench.md").read_text()
    assert "minimoe bench --ranks 16 128" in page and "bench.png" in page
    assert (found["device"], found["threads"], found["dtype"]) == ("cpu", 1, "float32")
    places = {(r["part"], r["pass"], r["R"], r["routing"]) for r in found["rows"]}
    for part in ("up-projection", "layer"):
        for which in ("forward", "training"):
            assert {(R, name) for p, w, R, name in places if (p, w) == (part, which)} == {
                (16, "random"), (128, "random"), (128, "pool"), (128, "recorded")
            }  # fmt: skip
    named = {part: {r["name"] for r in found["rows"] if r["part"] == part} for part, *_ in places}
    assert named["up-projection"] == {"dense", "plain", "gather", "compact", "auto"}
    layer = {"GEMMs", "GEMMs and top-k", "dense-masked", "mora", "mora detached"}
    assert named["layer"] == layer
    assert named["top-k"] == {"GEMM", "norm", "topk", "topk unsorted"}
    assert named["sddmm"] == named["spmm_t"] == {"dense", "gather"}
    assert named["small layers"] == {"plain", "dense", "gather"}
    assert named["toy backbone"] == {"plain", *SCHEMES}
    parts = {"base", "scoring", "top-k", "up", "gradients", "step", "dense-masked"}
    assert named["growth"] == parts and (folder / "growth.png").stat().st_size > 10_000
    assert {"linear", "lora_moe"} < named["beside"]
    assert named["weight gradient"] == {"R 16", "R 128"}
    for T in (1, 16, 64):
        assert named[f"8 adapters, T {T}"] == {"loop", "one batch"}
        assert f"| 8 adapters, T {T} |" in page
    for row in found["rows"]:
        assert row["ms"]["median"] > 0
    firsts = {"up-projection": "dense", "layer": "GEMMs", "beside": "linear", "growth": "base"}
    for row in found["rows"]:
        if row["name"] == firsts.get(row["part"]):
            assert row["ratio"] == {"median": 1.0, "iqr": 0.0}
    assert found["complete"] and found["suggested"].keys() == {"spmm", "sddmm", "spmm_t", "small"}
    assert all(row["error"] <= row["allowed"] for row in found["errors"])
    # 400 tokens of 128 ranks are more than `auto` computes plainly
    peaks = {r["name"]: r["peak"] for r in found["rows"] if "peak" in r and r["R"] == 128}
    assert peaks["mora detached"] <= peaks["mora"] < peaks["dense-masked"]
    assert "layer, training; ratios to GEMMs" in done.stdout
    assert "`auto` by these times: spmm " in done.stdout
    again = minimoe("bench", *small, "--out", "minimoe-bench", cwd=tmp_path)
    assert again.returncode == 2 and "holds a run already: another --out" in again.stderr


@pytest.mark.slow
def test_bench_of_a_device_runs_whole_in_tritons_interpreter(tmp_path):
    """What `--device cuda` runs, but for the device's own clock."""
    pytest.importorskip("triton", reason="triton is not installed (Linux only)")
    small = ["--ranks", 16, "--tokens", 3, "--width", 16, 24, "--top-k", 4, "--repeats", 1]
    small += ["--routing", "random", "--dtype", "bfloat16"]
    done = minimoe("bench", *small, "--threads", 1, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "bench.json").read_text())
    for part in ("up-projection", "sddmm", "spmm_t"):
        assert "triton" in {row["name"] for row in found["rows"] if row["part"] == part}, part
    assert "row pass" in {row["name"] for row in found["rows"] if row["part"] == "top-k"}
    assert {row["D"] for row in found["rows"] if row["part"] == "layer"} == {16, 24}
    paths = {row["path"] for row in found["errors"]}
    assert paths == {"plain", "dense", "gather", "compact", "triton"}
    # and auto goes by what it suggests
    environment = {**os.environ, "MINIMOE_BENCH": str(tmp_path / "run" / "bench.json")}
    ask = "from minimoe.sparse import threshold; print(threshold('sddmm', False))"
    asked = subprocess.run(
        [sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True
    )
    assert int(asked.stdout) == found["suggested"]["sddmm"]


@pytest.mark.slow
def test_check_prints_all_laws_and_leaves_nothing(tmp_path):
    done = minimoe("check", "mora", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    for law in LAWS:
        verdict = "–" if law.__name__ == "merge_is_equal" else "held"
        assert lines[law.__name__].split()[1] == verdict
        assert lines[law.__name__].endswith(says(law))
    assert max(map(len, lines.values())) <= 100  # a terminal's width
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_check_names_what_a_wrong_scheme_breaks(tmp_path):
    wrong = f"{Path(__file__).parent / 'broken' / 'softmax_before_top_k.py'}:Scheme"
    done = minimoe("check", "lora", wrong, "--json", cwd=tmp_path)
    assert done.returncode == 1
    found = json.loads(done.stdout)["schemes"]
    assert list(found) == ["lora", wrong]
    for rows in found.values():
        assert [row["name"] for row in rows] == [law.__name__ for law in LAWS]
    assert "broken" not in {row["verdict"] for row in found["lora"]}
    (row,) = [row for row in found[wrong] if row["verdict"] == "broken"]
    assert row["name"] == "simplex"
    assert "a token's weights sum to 1 -" in row["evidence"] and "seed" in row["evidence"]


ODD = """
import minimoe

class Plain:
    pass

class Raises(minimoe.Adapter):
    def __init__(self, base, rank):
        raise RuntimeError("not today")

class Odd(minimoe.Adapter):
    claims = minimoe.Claims(granularity="batches")

class Odder(minimoe.Adapter):
    claims = {"top_k": True}

class Unsigned(minimoe.Adapter):
    __signature__ = 3
"""


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("Mine", "class Mine(", "odd.py fails: SyntaxError: '(' was never closed"),
        ("Mine", "import nothing_of_this_name", "odd.py fails: ModuleNotFoundError: No module"),
        ("Mine", ODD + "raise SystemExit('gone')", "odd.py fails: SystemExit: gone"),
        ("Mine", ODD, "odd.py: Mine is not there; schemes there: Raises, Odd, Odder, Unsigned"),
        ("Plain", ODD, "odd.py: Plain is no scheme (a subclass of minimoe.Adapter)"),
        ("Raises", ODD, "Raises(nn.Linear(8, 8), rank=2) raises RuntimeError: not today"),
        ("Odd", ODD, "Odd claims granularity 'batches', allowed: token, sample, batch"),
        ("Mine", "class X(BaseException): ...\nraise X('me')", "odd.py fails: X: me"),
        ("Unsigned", ODD, "Unsigned has no signature: "),
        ("Odder", ODD, "Odder.claims is {'top_k': True}, allowed: a minimoe.Claims"),
    ],
)
def test_a_file_that_holds_no_working_scheme_gets_one_line(name, text, message, tmp_path):
    (tmp_path / "odd.py").write_text(text)
    done = minimoe("check", "lora", f"odd.py:{name}", cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("minimoe: error: ") and message in line
    assert [p.name for p in tmp_path.iterdir()] == ["odd.py"]


@pytest.mark.slow
def test_a_new_scheme_is_a_short_file_that_keeps_the_laws(tmp_path):
    done = minimoe("new-scheme", "my_gate", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "my_gate.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40 and "class MyGate(Adapter):" in text
    *_, command = done.stdout.splitlines()
    assert command in text
    assert minimoe(*command.split()[1:], cwd=tmp_path).returncode == 0
    again = minimoe("new-scheme", "my_gate", cwd=tmp_path)
    assert again.returncode == 2 and "my_gate.py is there already" in again.stderr
    assert (tmp_path / "my_gate.py").read_text(encoding="utf-8") == text
    for rule in (["check", "--select", "E,F,W"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *rule, "--isolated", "--line-length", "100"]
        subprocess.run([*ruff, "my_gate.py"], cwd=tmp_path, check=True)


def test_list_names_all_that_compare_takes(small):
    listed = minimoe("list", cwd=small[0]).stdout
    for name in [*ROSTER, *STREAMS]:
        assert f"\n  {name} " in listed


@pytest.mark.slow
def test_all_are_in_one_table_with_their_parameters_and_time(tmp_path):
    args = ["--stream", "permuted-digits", "--schemes", "all", "--tasks", 2, "--epochs", 1]
    args += ["--out", "all"]
    done = minimoe("compare", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    head, _, *rows = done.stdout.split("\n\n")[1].splitlines()
    assert head.split()[-6:] == [*tables.COUNTS, "seconds", "ms/step"]
    assert [row.split()[0] for row in rows] == [name for name in ROSTER if name != "trigram"]
    for row in rows:
        name, trainable, step = row.split()[0], row.split()[-6], row.split()[-1]
        learns = ROSTER[name].scheme is not None or name in ("head_only", "joint")
        assert (step != "–") == learns and (int(trainable.replace(",", "")) > 0) == learns
    found = result(tmp_path / "all")["schemes"]
    assert found["flylora"]["trainable"] < found["lora"]["trainable"] < found["smora"]["trainable"]
    for scheme in found.values():
        if scheme["intrusion"]["mean"] is not None:
            assert scheme["intrusion"]["mean"] <= scheme["instability"]["mean"] + 1e-9
    assert (tmp_path / "all" / "gates.png").stat().st_size > 20_000


def test_a_run_that_was_killed_before_it_had_options_can_start(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run/checkpoints").mkdir(parents=True)
    assert main(["compare", "--resume", "--out", "run"]) == 2
    one_line(capsys.readouterr().err.splitlines(), "run: no run there to go on with")
    assert main(["compare", *SMALL, "--schemes", "zero_shot", "--out", "run"]) == 0
    assert main(["compare", "--resume", "--out", "run"]) == 0


@pytest.mark.parametrize("option", ["tokens", "ranks", "width"])
def test_bench_of_what_no_machine_holds_is_one_line(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for value in ("9223372036854775807", "9" * 30):
        args = ["bench", "--routing", "random", "--tokens", "8", "--ranks", "16", "--width", "16"]
        assert main([*args, f"--{option}", value]) == 2
        wrong = f"{option} is {value}, allowed: up to 16777216"
        one_line(capsys.readouterr().err.splitlines(), wrong)
        assert not list(tmp_path.iterdir())
