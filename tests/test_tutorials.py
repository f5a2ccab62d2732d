"""The notebooks run, are what their sources say, keep the rules of a lesson, and their exercises
tell right from wrong."""

import ast
import importlib
import io
import json
import math
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path
from statistics import median

import nbformat
import pytest
import torch
from torch import nn

import minimoe
from minimoe import MoRA
from minimoe.continual.probe import dense_gate
from minimoe.tools.results import StudyResult
from minimoe.tools.tables import short

TUTORIALS = Path(__file__).parent.parent / "tutorials"
DEPTH = ("D1", "D2", "D3", "D4")
sys.path.insert(0, str(TUTORIALS))
import build  # noqa: E402
import slides  # noqa: E402


def test_they_are_numbered_and_each_has_solutions():
    assert [name[:2] for name in build.NAMES] == [*(f"0{i}" for i in range(6)), *DEPTH]
    answers = {path.stem for path in (TUTORIALS / "solutions").glob("*.py")}
    assert answers == {path.stem for path in (TUTORIALS / "checks").glob("*.py")}
    assert answers == set(build.NAMES) == {path.stem for path in TUTORIALS.glob("*.ipynb")}


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """A folder in which the package's wheel is installed."""
    pip, folder = [sys.executable, "-m", "pip"], tmp_path_factory.mktemp("wheel")
    there, root = folder / "installed", folder / "source"
    # a copy, as pip leaves a folder in what it builds
    shutil.copytree(TUTORIALS.parent / "minimoe", root / "minimoe")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TUTORIALS.parent / file, root)
    subprocess.run([*pip, "wheel", str(root), "--no-deps", "-q", "-w", str(folder)], check=True)
    (wheel,) = folder.glob("minimoe-*.whl")
    install = [*pip, "install", "-q", "--no-deps", "--no-index", "--target", str(there), str(wheel)]
    subprocess.run(install, check=True)
    return there


def run_from(installed, notebook, empty):
    """What it prints, run in an empty folder by the installed package; it leaves nothing there but
    hypothesis's notes."""
    empty.mkdir()
    where = nbformat.v4.new_code_cell("import minimoe; print(minimoe.__file__)")
    notebook.cells.insert(0, where)
    said = build.printed(build.run(notebook, empty))
    assert said.startswith(str(installed)) and {*os.listdir(empty)} <= {".hypothesis"}
    return said


@pytest.mark.slow
@pytest.mark.parametrize("name", build.NAMES)
def test_a_notebook_runs_anywhere_and_its_exercises_tell_undone_from_solved(
    name, installed, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(installed))
    notebook = build.checked(build.answered(name), name)
    said = run_from(installed, notebook, tmp_path / "empty")
    titles = build.exercises(build.source(name))
    assert 3 <= len(titles) <= 6
    verdicts = re.findall(r"(exercise \d): (not yet|right)", said)
    assert verdicts == [(title, said) for title in titles for said in ("not yet", "right")]


@pytest.mark.slow
def test_the_first_hour_goes_on_where_nothing_was_written(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(installed))
    said = run_from(installed, build.source("00_first_hour"), tmp_path / "empty")
    assert said.count(": not yet") == 3 and said.count("runs in its place") >= 3


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


def blocks_of(page):
    """The Python of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def test_a_reader_of_the_core_of_d4_and_of_two_pages_meets_what_a_user_needs():
    notebooks = [name for name in build.NAMES if name[:2] not in ("D2", "D3")]
    text = "\n".join((TUTORIALS / f"{name}.py").read_text(encoding="utf-8") for name in notebooks)
    pages = (TUTORIALS / "HOWTO.md", TUTORIALS.parent / "README.md")
    blocks = [block for page in pages for block in blocks_of(page)]
    text, met = "\n".join([text, *blocks]), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            met.add(node.id)
        if isinstance(node, ast.Attribute):
            met.add(node.attr)
        if isinstance(node, ast.ImportFrom):
            met |= {alias.name for alias in node.names}
    for name in notebooks:  # or in its words, or in what a cell prints
        met |= set(re.findall(r"`(\w+)[`(]", "\n".join(cell.source for cell in prose(name))))
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


# The rules of a lesson

every = pytest.mark.parametrize("name", build.NAMES)
MINUTES = re.compile(r"^## (.*) \((\d+) min\)$", re.M)
# what a heading, or a picture's title, would give away
OUTCOMES = re.compile(
    r"\b(beats?|best|better|break\w*|cannot|collapse\w*|does\w*|fail\w*|falls?|forg[eo]\w*|gone|good|"
    r"keeps?|los[et]\w*|nearly|needs?|not|only|overwrit\w*|saves?|still|wins?|worse|worst|wrong)\b",
    re.I,
)


def code(name):
    return [cell for cell in build.source(name).cells if cell.cell_type == "code"]


def prose(name):
    return [cell for cell in build.source(name).cells if cell.cell_type == "markdown"]


@every
def test_cells_of_code_are_short(name):
    lengths = [sum(bool(line.strip()) for line in c.source.splitlines()) for c in code(name)]
    assert median(lengths) <= 8 and max(lengths) <= 25


@every
def test_asserts_in_sight_are_few(name):
    asserts = [n for c in code(name) for n in ast.walk(ast.parse(c.source))]
    assert sum(isinstance(n, ast.Assert) for n in asserts) <= 10


@every
def test_sections_have_their_minutes_and_an_exercise_comes_within_ten(name):
    headings = [h for c in prose(name) for h in re.findall(r"^## .*$", c.source, re.M)]
    minutes, before, first = [], 0, None
    for cell in build.source(name).cells:
        if cell.cell_type == "markdown":
            minutes += [int(m) for _, m in MINUTES.findall(cell.source)]
        elif first is None and cell.metadata.get("title", "").startswith("exercise"):
            first = before = sum(minutes[:-1])
    assert len(headings) == len(minutes) and sum(minutes) <= 60
    assert all(cell.source.count("\n## ") == 0 for cell in prose(name)), "it begins a cell"
    assert first is not None and before <= 10


DOING = re.compile(r"predict\(|with exercise\(")


@every
def test_nobody_only_listens_for_more_than_ten_minutes(name):
    idle = 0
    for cell in build.source(name).cells:
        for _, minutes in MINUTES.findall(cell.source) if cell.cell_type == "markdown" else ():
            assert idle <= 10, f"before {cell.source.splitlines()[0]}"
            idle += int(minutes)
        if cell.cell_type == "code" and DOING.search(cell.source):
            idle = 0


@every
def test_a_stub_raises_that_it_is_not_implemented(name):
    for title, cell in build.exercises(build.source(name)).items():
        (function,) = ast.parse(cell.source).body
        assert isinstance(function, ast.FunctionDef), title
        assert ast.unparse(function.body) == "raise NotImplementedError", title


def words():
    """The glossary's words."""
    text = (TUTORIALS / "GLOSSARY.md").read_text(encoding="utf-8")
    return re.findall(r"^\| (?!word |-)([^|]+?) \|", text, re.M)


def said(cell):
    """What a cell says to its reader: of code the comments and the strings."""
    if cell.cell_type == "markdown":
        return cell.source
    tokens = tokenize.generate_tokens(io.StringIO(cell.source).readline)
    return "\n".join(t.string for t in tokens if t.type in (tokenize.COMMENT, tokenize.STRING))


def undefined(cells):
    """The glossary's words whose first use in these cells is not in bold."""
    text, found = "\n".join(said(cell) for cell in cells), []
    text = re.sub(r"`[^`\n]*`|https?://\S+", " ", text)  # names of code are no words
    for word in words():
        case = 0 if word.isupper() else re.I
        first = re.search(rf"(\*\*)?\b{word}s?\b(\*\*)?", text, case)
        if first and not (first[1] and first[2]):
            found.append(word)
    return found


def test_the_glossary_is_short_sorted_and_has_what_a_lesson_is_about():
    assert words() == sorted(words(), key=str.lower) and 20 <= len(words()) <= 30
    needed = "stream task backbone rank key value gate expert router token live frozen ACC BWT"
    assert {*needed.split(), "forgetting", "drift", "law", "claim"} <= {*words()}


@every
def test_a_word_of_the_glossary_is_defined_where_it_is_used_first(name):
    assert undefined(build.source(name).cells) == []


@pytest.mark.parametrize(
    ("cells", "found"),
    [
        ([("markdown", "A **task** is one thing. All tasks are things.")], []),
        ([("markdown", "Tasks are many. A **task** is one thing.")], ["task"]),
        ([("code", "task = 1  # a number"), ("markdown", "A **task**.")], []),
        ([("code", "x = 1  # the task"), ("markdown", "A **task**.")], ["task"]),
        ([("code", "print('ACC', acc)")], ["ACC"]),
        ([("markdown", "Call `stream.tasks` or `acc`.")], []),
    ],
)
def test_a_word_that_is_not_defined_is_seen(cells, found):
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    assert undefined([make[kind](text) for kind, text in cells]) == found


def titles(name):
    """Headings, and what pictures are given as their titles."""
    for cell in prose(name):
        yield from re.findall(r"^#+ (.*)$", cell.source, re.M)
    for cell in code(name):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("figures."):
                every = [*node.args, *(keyword.value for keyword in node.keywords)]
                yield from (a.value for a in every if isinstance(a, ast.Constant))


@every
def test_no_heading_and_no_title_of_a_picture_gives_away_what_comes_out(name):
    for title in map(str, titles(name)):
        assert not OUTCOMES.search(title), title


def test_a_title_that_gives_it_away_is_seen():
    for title in ("Task 1 is not gone: the new ranks talk over it", "A router loses the choice"):
        assert OUTCOMES.search(title)
    assert not OUTCOMES.search("Accuracy after each task")


@every
def test_a_picture_is_one_call_with_words_for_who_does_not_see_it_and_a_caption(name):
    cells = build.source(name).cells
    drawn = [i for i, cell in enumerate(cells) if "figures." in cell.source]
    assert len(drawn) >= 3
    for i in drawn:
        calls = re.findall(r"^figures\.", cells[i].source, re.M)
        assert len(calls) == cells[i].source.count("figures.") == 1
        assert len(cells[i].metadata.get("alt", "")) > 20, cells[i].source
        assert cells[i + 1].cell_type == "markdown"
    assert "plt." not in "".join(cell.source for cell in cells)


@every
def test_a_number_is_written_down_in_a_cell_of_its_own_before_the_run(name):
    cells = code(name)
    noted = {}
    for i, cell in enumerate(cells):
        for target in re.findall(r"^(\w+) = predict\(", cell.source, re.M):
            assert len(ast.parse(cell.source).body) == 1, "nothing else is run there"
            noted[target] = i
    assert len(noted) >= 3
    for target, i in noted.items():
        shown = [j for j, c in enumerate(cells) if f"{target}.beside(" in c.source]
        assert len(shown) == 1 and shown[0] > i, target


@every
def test_it_opens_with_goals_time_and_needs_and_ends_with_three_folded_answers(name):
    first, *_, last = prose(name)
    for what in ("**Goals.**", "**Time.**", "**You need**", "\n1. ", "\n2. ", "\n3. "):
        assert what in first.source, what
    assert "\n4. " not in first.source and "picture" in code(name)[2].metadata.title
    assert "**Summary.**" in last.source
    folded = r"^\*\*(\d)\.\*\* [^<]*\n\n<details><summary>Answer</summary>"
    assert re.findall(folded, last.source, re.M) == ["1", "2", "3"]


@every
def test_its_first_cell_installs_no_torch_and_asks_for_what_the_package_needs(name):
    install = code(name)[0]
    assert install.metadata.title == "install"
    assert install.source == code(build.NAMES[0])[0].source
    assert "install -q --no-deps {SOURCE}" in install.source
    assert 'if find_spec("minimoe") is None:' in install.source
    project = tomllib.loads((TUTORIALS.parent / "pyproject.toml").read_text())["project"]
    needed = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    asked = {
        word for line in re.findall(r'NEEDED \+?= "(.*)"', install.source) for word in line.split()
    }
    assert asked == needed - {"torch"}


@every
def test_authors_checks_are_run_and_not_seen(name):
    there = build.source(name, TUTORIALS / "checks").cells
    assert there and all("assert" in cell.source for cell in there)
    notebook = build.checked(build.source(name), name)
    assert len(notebook.cells) == len(build.source(name).cells) + len(there)
    before = {cell.id: at for at, cell in enumerate(notebook.cells)}
    for cell in notebook.cells:
        if cell.metadata.get("unseen"):
            above = notebook.cells[before[cell.id] - 1]
            assert above.metadata.title == cell.metadata.title
    stored = nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)
    for cell in there:
        assert cell.source not in [c.source for c in stored.cells]


def test_a_check_that_fails_stops_a_build_and_one_without_a_cell_too(tmp_path, monkeypatch):
    from nbclient.exceptions import CellExecutionError

    monkeypatch.setattr(build, "HERE", tmp_path)
    (tmp_path / "checks").mkdir()
    (tmp_path / "00_x.py").write_text("# %% one\nx = 1\n\n# %%\nx\n")
    (tmp_path / "checks" / "00_x.py").write_text("# %% one\nassert x == 1\n")
    here = build.source("00_x", tmp_path)
    done = build.shown(build.run(build.checked(here, "00_x"), tmp_path))
    assert [cell.source for cell in done.cells] == ["x = 1", "x"]
    assert [cell.execution_count for cell in done.cells] == [1, 2]
    assert done.cells[1].outputs[0].execution_count == 2
    (tmp_path / "checks" / "00_x.py").write_text("# %% one\nassert x == 2\n")
    with pytest.raises(CellExecutionError):
        build.run(build.checked(here, "00_x"), tmp_path)
    (tmp_path / "checks" / "00_x.py").write_text("# %% two\nassert x == 1\n")
    with pytest.raises(ValueError, match="00_x: the check two is of no cell"):
        build.checked(here, "00_x")


# For those who teach


def test_what_the_guide_answers_is_so():
    """TEACHING.md's answers that are numbers, and the cells that they stand on."""
    guide = " ".join((TUTORIALS / "TEACHING.md").read_text(encoding="utf-8").split())
    layer = MoRA(nn.Linear(3, 3), rank=3, top_k=2, tau=4 / (11 * math.log(9)), delta=0.2)
    layer.A.data = torch.eye(3)
    z, weights = torch.tensor([[6.0, 2.0, -9.0]]), []
    for training in (True, False):
        g = dense_gate(layer.train(training), z)[0]
        weights.append(", ".join(f"{w:.1f}".removeprefix("0") for w in g.tolist()))
    training, evaluation = (each.replace(".0", "0") for each in weights)
    assert f"one weight is 9 times the other: {training}. " in guide
    assert f"2/11 is below delta: in evaluation {evaluation}. " in guide
    rows = StudyResult.read(TUTORIALS / "findings" / "atlas.json").rows
    names = ("lora", "class_mean", "own_ridge")
    lora, class_mean, ridge = (short(rows[f"rotated-digits, {name}"]["acc"].mean) for name in names)
    assert f"where LoRA has {lora} and the nearest class mean {class_mean}. " in guide
    assert f"chosen by the nearest mean of the inputs, has {ridge}. " in guide
    for link in re.findall(r"\]\((?!https:)([^)#]+)\)", guide):
        assert (TUTORIALS / link).exists(), link


@pytest.mark.parametrize("name", [name for name in build.NAMES if name[0] == "0"])
def test_slides_are_the_notebooks_cells_with_notes_of_the_guide(name, tmp_path, capsys):
    assert slides.main([name, str(tmp_path / "s.html")]) == 0
    page = (tmp_path / "s.html").read_text(encoding="utf-8")
    sections = [h for c in prose(name) for h in MINUTES.findall(c.source)]
    assert page.count('<aside class="notes">') == len(sections) >= 7
    told = [int(row.split()[1]) for row in slides.notes(name).values()]
    assert told == [int(m) for _, m in sections]
    stored = nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)
    below = sum(slides.kind(cell) == "subslide" for cell in stored.cells)
    apart = [cell for cell in stored.cells if ".beside(" in cell.source]
    assert len(apart) >= 3 and {slides.kind(cell) for cell in apart} == {"subslide"}
    assert below >= 7 and "SOURCE = " not in page and "<svg" not in page.partition("</head>")[0]
    if name == "00_first_hour":  # whose sections are cells
        assert page.count("<section") == 2 * (1 + len(sections)) + below
    capsys.readouterr()


def test_slides_of_another_notebook_have_no_notes_and_of_none_are_refused(tmp_path, capsys):
    assert slides.notes("D1_sparse") == {}
    assert slides.main(["09_none"]) == 2
    assert "notebook is '09_none', allowed: 00_first_hour, 01_lora" in capsys.readouterr().err


def test_how_to_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks_of(TUTORIALS / "HOWTO.md"):
        exec(block, names)
        said = [line[2:] for line in block.splitlines() if line.startswith("# ")]
        assert capsys.readouterr().out.splitlines() == said
