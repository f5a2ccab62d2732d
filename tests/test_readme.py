"""What README says is what the files and the code say."""

import contextlib
import io
import json
import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest

from minimoe import MoRA
from minimoe.compare import LEARNERS, TOY, learners, table
from minimoe.laws import LAWS, Row
from minimoe.laws import table as laws_table
from minimoe.studies import ATLAS_STREAMS, STUDIES
from minimoe.studies.study import findings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "tutorials" / "results"
STREAMS = re.search(r"^\| final ACC \| (.*) \|$", README, re.M)[1].split(" | ")


def fences(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def stored(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_the_table_is_the_stored_results():
    assert fences("text")[0] == table(stored("compare")) + "\n"


def test_the_stored_result_is_of_the_settings_and_learners_of_today():
    result = stored("compare")
    assert list(result["schemes"]) == learners("permuted-digits", atlas=False)
    assert {key: result["settings"][key] for key in TOY} == TOY
    assert result["stream"] == "permuted-digits" and result["seeds"] == [0]


@cache
def atlas():
    path = ROOT / "tutorials" / "findings" / "atlas.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_streams_tables_are_the_stored_results():
    lines = re.findall(r"^\| (.*) \|$", README, re.M)
    found = {cells[0]: cells[1:] for cells in (line.split(" | ") for line in lines)}
    assert list(ATLAS_STREAMS) == STREAMS and list(atlas()["rows"]) == list(LEARNERS)
    for name, row in atlas()["rows"].items():
        for stream, cell in zip(STREAMS, found[name], strict=True):
            acc = row[f"acc {stream}"]
            mean, std = (float(part) for part in cell.split(" ± "))
            assert abs(mean - acc["mean"]) <= 0.0005 and abs(std - acc["std"]) <= 0.0005


def test_the_atlas_table_names_every_file():
    names = re.findall(r"^\| `(\w+\.py)` \|", README.partition("## The atlas")[2], re.M)
    there = {path.name for path in (ROOT / "minimoe" / "schemes").glob("*.py")}
    assert set(names) == there - {"__init__.py"}
    for name in names:
        said = re.search(rf"^\| `{name}` .*abs/([\d.]+)\) \|$", README, re.M)[1]
        assert said in (ROOT / "minimoe" / "schemes" / name).read_text(encoding="utf-8")


def test_what_readme_concludes_from_the_numbers():
    def mean(stream, name, measure="acc"):
        return atlas()["rows"][name][f"{measure} {stream}"]["mean"]

    forgotten = {stream: mean(stream, "mora", "forgetting") for stream in STREAMS}
    assert forgotten["rotated-digits"] > 10 * forgotten["permuted-digits"]
    mora, moe, joint = (mean("digit-worlds", name) for name in ("mora", "lora_moe", "joint"))
    assert 0 < mora - moe < joint - mora
    ten = [n for n in LEARNERS if LEARNERS[n][0].startswith("atlas")]
    said = re.findall(r"on (\S+) (\w+) \(\.\d+(?:, not told from ([^;)]*))?", atlas()["finding"])
    assert said == [
        ("permuted-digits", "mora", ""),
        ("rotated-digits", "mora", "ewc"),
        ("split-digits", "class_mean", ""),
        ("digit-worlds", "mora", ""),
    ]
    for stream, first in (
        ("permuted-digits", "mor1e"),
        ("digit-worlds", "mor1e"),
        ("split-digits", "olora"),
    ):
        assert max(ten, key=partial(mean, stream)) == first
    assert mean("split-digits", "olora") > mean("split-digits", "mora")
    best = max(mean("split-digits", name) for name in ("lora", "lora_moe", "mora"))
    assert best < 0.3 < 0.7 < mean("split-digits", "class_mean")


def test_the_planted_table_is_the_stored_result():
    result = stored("planted")
    assert result["seeds"] == [0, 1, 2] and {k: result["settings"][k] for k in TOY} == TOY
    head, reachable, learned = (
        re.search(rf"^\| {row} \| (.*) \|$", README, re.M)[1].split(" | ")
        for row in ("planted", "reachable", "learned")
    )
    for name, limit, acc in zip(head, reachable, learned, strict=True):
        scheme = result["schemes"][name]
        assert scheme["reachable"]["limit"] == (not limit.startswith("≥"))
        assert abs(float(limit.removeprefix("≥ ")) - scheme["reachable"]["mean"]) <= 0.0005
        assert abs(float(acc) - scheme["acc"]["mean"]) <= 0.0005

    def forgotten(name):
        return result["schemes"][name]["forgetting"]["mean"]

    first = [m[t + 1][t] for m in result["schemes"]["lora_moe"]["matrix"] for t in range(5)]
    assert min(first) > 0.94 and forgotten("lora_moe") > 0.1 > 0.01 > forgotten("mora")
    assert forgotten("lora_grown") > 0.05


def test_the_bench_table_is_the_stored_result():
    result = stored("bench-cpu")
    found = {(r["part"], r["pass"], r["R"], r["routing"], r["name"]): r for r in result["rows"]}
    shown = [
        ("up-projection", "forward", "auto"),
        ("up-projection", "training", "auto"),
        ("layer", "forward", "mora"),
        ("layer", "training", "mora"),
        ("layer", "training", "mora detached"),
        ("layer", "forward", "dense-masked"),
        ("layer", "training", "dense-masked"),
    ]
    lines = re.findall(r"^\| (\d+) \| (.*) \|$", README, re.M)
    assert [int(R) for R, _ in lines] == [64, 256, 1024, 4096]
    for R, cells in lines:
        for (part, which, name), cell in zip(shown, cells.split(" | "), strict=True):
            median = found[part, which, int(R), "random", name]["ratio"]["median"]
            assert abs(float(cell) - median) <= (0.0005 if median < 0.1 else 0.005)
    peaks = {
        (R, name): found["layer", "training", R, "random", name]["peak"] / 2**20
        for R in (256, 4096)
        for name in ("mora", "dense-masked")
    }
    assert f"holds {peaks[4096, 'mora']:.0f} MiB" in README
    assert f"dense-masked layer's {peaks[4096, 'dense-masked']:.0f}." in README
    assert peaks[256, "dense-masked"] < peaks[256, "mora"]
    assert found["layer", "training", 4096, "random", "mora"]["ratio"]["median"] < 1


def test_the_unseen_seeds_are_the_stored_result():
    result = stored("unseen-seeds")
    assert result["seeds"] == [3, 4, 5, 6, 7] and result["stream"] == "permuted-digits"
    assert {key: result["settings"][key] for key in TOY} == TOY
    for name, scheme in result["schemes"].items():
        mean, std = re.search(rf"\b{name} (\.\d+) ± (\.\d+)", README).groups()
        assert abs(float(mean) - scheme["acc"]["mean"]) <= 0.0005
        assert abs(float(std) - scheme["acc"]["std"]) <= 0.0005


@pytest.mark.parametrize("imports", ["count", "told"])
def test_the_python_examples_run_and_print_what_they_say(imports, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = next(fence for fence in fences("python") if "import adapt, " + imports in fence)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {})
    assert printed.getvalue() == re.search(r"^print\(.*\)  # (.*)$", example, re.M)[1] + "\n"
    assert (tmp_path / "adapters.safetensors").exists() == (imports == "count")


def test_the_dask_example_runs(tmp_path):
    pytest.importorskip("distributed")
    (tmp_path / "example.py").write_text(fences("python")[2])
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "findings" / "grain.json").read_text())
    assert done.stdout == result["finding"] + "\n" and result["quick"]


def test_the_findings_are_of_the_studies_of_today_and_as_readme_says():
    folder = ROOT / "tutorials" / "findings"
    results = [json.loads((folder / f"{name}.json").read_text()) for name in STUDIES]
    page = (folder / "findings.md").read_text(encoding="utf-8")
    assert page == findings(results)
    for name, result in zip(STUDIES, results, strict=True):
        cells = STUDIES[name].cells(result["seeds"], quick=False)
        assert list(result["rows"]) == list(dict.fromkeys(cell["row"] for cell in cells))
        assert len(result["seeds"]) >= 5 and not result["quick"]
        assert f"{name} {result['core_minutes']:.0f}" in README
    verdicts = [claim["verdict"] for result in results for claim in result["claims"]]
    for verdict in ("holds", "does not hold", "mixed"):
        assert f"{verdicts.count(verdict)} {verdict}" in " ".join(README.split())


def test_the_laws_table_is_of_the_laws_of_today():
    verdicts = {
        law: "held" if claimed(MoRA.claims) else "not claimed" for law, claimed in LAWS.items()
    }
    rows = [Row(law.__name__, verdict, "") for law, verdict in verdicts.items()]
    assert fences("text")[1] == laws_table({"mora": rows}) + "\n"


def test_the_test_of_a_new_scheme_runs_in_a_project_of_its_own(tmp_path):
    (tmp_path / "test_mine.py").write_text(fences("python")[3])
    for command in ("minimoe new-scheme my_gate", "pytest -q"):
        subprocess.run([sys.executable, "-m", *command.split()], cwd=tmp_path, check=True)
    scheme = tmp_path / "my_gate.py"
    broken = scheme.read_text().replace("torch.ones_like(z)", "1 / z.norm(dim=-1, keepdim=True)")
    scheme.write_text(broken)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 1 and b"zero_is_finite: broken" in done.stdout


def test_the_file_tree_is_the_folder():
    tree = fences("text")[-1]
    named = set(re.findall(r"^  (\w+\.py) ", tree, re.M))
    there = {path.name for path in (ROOT / "minimoe").glob("*.py")}
    assert named == there - {"__init__.py", "__main__.py"}
    for path in re.findall(
        r"`((?:minimoe|tests|tutorials)/[\w./]+)`|\]\((tutorials/\S+)\)", README
    ):
        assert (ROOT / "".join(path)).exists()
