"""The notebooks run, are what their sources say, and their exercises tell right from wrong."""

import ast
import importlib
import json
import pkgutil
import re
import sys
from pathlib import Path

import nbformat
import pytest

import minimoe

TUTORIALS = Path(__file__).parent.parent / "tutorials"
sys.path.insert(0, str(TUTORIALS))
import build  # noqa: E402


def test_they_are_numbered_and_each_has_solutions():
    assert [name[:2] for name in build.NAMES] == [f"{i + 1:02}" for i in range(len(build.NAMES))]
    answers = {path.stem for path in (TUTORIALS / "solutions").glob("*.py")}
    assert answers == set(build.NAMES) == {path.stem for path in TUTORIALS.glob("*.ipynb")}


@pytest.mark.slow
@pytest.mark.parametrize("name", build.NAMES)
def test_a_notebook_runs_and_its_exercises_tell_undone_from_solved(name):
    said = build.printed(build.run(build.answered(name)))
    titles = build.exercises(build.source(name))
    assert len(titles) in (2, 3)
    verdicts = re.findall(r"(exercise \d): (not yet|right)", said)
    assert verdicts == [(title, said) for title in titles for said in ("not yet", "right")]


@pytest.mark.parametrize("name", build.NAMES)
def test_the_stored_notebook_is_the_built_source(name):
    path = TUTORIALS / f"{name}.ipynb"
    assert path.stat().st_size < build.LARGEST
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    cells = [(cell.cell_type, cell.source, cell.id) for cell in stored.cells]
    assert cells == [(c.cell_type, c.source, c.id) for c in build.source(name).cells]
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "image/png" in str(stored)  # it has a picture
    assert str(TUTORIALS.parent) not in str(stored) and "Warning" not in build.printed(stored)


def public():
    """Names that the package's modules define, but for its tests' and the command's."""
    found = set()
    for info in pkgutil.walk_packages(minimoe.__path__, "minimoe."):
        if not info.name.endswith(("__main__", ".template", ".kernels")):
            module = importlib.import_module(info.name)
            found |= {
                name
                for name, value in vars(module).items()
                if getattr(value, "__module__", None) == info.name and not name.startswith("_")
            }
    return found


@pytest.mark.parametrize("name", build.NAMES)
def test_a_notebook_defines_nothing_that_the_package_has(name):
    text = (TUTORIALS / f"{name}.py").read_text(encoding="utf-8")
    made = {n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert not made & public()


# what a user needs, by the room it is in
NEEDED = {
    "": minimoe.__all__,
    "adapt": "adapt survey grow parameters count context after_step save load unwrap",
    "lora_moe": "switch_balance",
    "sparse": "rank_sparse rank_scores top_scores",
    "roster": "ROSTER SCHEMES",
    "compare": "compare",
    "continual.streams": "make",
    "continual.learn": "pretrain run_stream AdapterLearner",
    "continual.baselines": "Oracle",
    "continual.metrics": "acc bwt forgetting fwt transfer average",
    "continual.probe": "Recorder interference intrusion redundancy ambiguity instability",
    "continual.planted": "reachable",
    "laws": "check hold table",
    "studies.verdicts": "Comparison",
    "tools.exercise": "exercise",
}


def test_a_reader_of_the_first_six_meets_what_a_user_needs():
    text = "\n".join(
        (TUTORIALS / f"{name}.py").read_text(encoding="utf-8") for name in build.NAMES[:6]
    )
    met = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            met.add(node.id)
        if isinstance(node, ast.Attribute):
            met.add(node.attr)
        if isinstance(node, ast.ImportFrom):
            met |= {alias.name for alias in node.names}
    for name in build.NAMES[:6]:  # or in what a cell prints
        stored = nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)
        met |= set(re.findall(r"\w+", build.printed(stored)))
    for room, names in NEEDED.items():
        module = importlib.import_module(f"minimoe.{room}".removesuffix("."))
        for name in names.split() if isinstance(names, str) else names:
            assert hasattr(module, name) and name in met, f"minimoe.{room}: {name}"


def test_the_readmes_table_has_the_measured_times():

    times = json.loads((TUTORIALS / "times.json").read_text())
    assert list(times) == build.NAMES and max(times.values()) < 120
    assert build.table(times) in (TUTORIALS / "README.md").read_text(encoding="utf-8")
