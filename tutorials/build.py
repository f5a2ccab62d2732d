"""Build the notebooks from their sources: python tutorials/build.py [NAME ...]

A notebook's source is NAME.py, in jupytext's percent format; nothing else is edited by hand. Each
is run from its first cell to its last, and stored with its outputs as NAME.ipynb; how long that
took goes to times.json, and from there into the table of README.md.

An exercise is a cell with the title "exercise N"; solutions/NAME.py has cells of the same titles.
checks/NAME.py, where there is one, has the authors' checks: each is run after the cell of its
title, and never shown.
"""

import base64
import copy
import io
import json
import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image  # matplotlib brings it

from minimoe.tools.files import write_atomic

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("[0D][0-9]_*.py"))
LARGEST = 250_000  # bytes of a notebook
COLOURS = (
    128  # of a picture that is stored: a third of the bytes, and nothing that an eye would miss
)


def source(name: str, folder: Path = HERE) -> NotebookNode:
    """The notebook of a source, without outputs, its cells numbered."""
    notebook = jupytext.read(folder / f"{name}.py")
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    return notebook


def solved(name: str) -> NotebookNode:
    """The notebook with every exercise replaced by its solution. Raises ValueError if one lacks
    the other."""
    notebook, answers = source(name), exercises(source(name, HERE / "solutions"))
    if exercises(notebook).keys() != answers.keys():
        alone = min(exercises(notebook).keys() ^ answers.keys())
        raise ValueError(f"{name}: {alone} is in the notebook or in its solutions, and not in both")
    for title, cell in exercises(notebook).items():
        cell.source = answers[title].source
    return notebook


def answered(name: str) -> NotebookNode:
    """The notebook in which every exercise is checked twice: as it stands, and then solved."""
    notebook, answers = source(name), exercises(solved(name))
    cells, solution = [], None
    for cell in notebook.cells:
        cells.append(cell)
        solution = answers.get(cell.metadata.get("title", ""), solution)
        if solution is not None and 'with exercise("' in cell.source:
            cells += [copy.deepcopy(solution), copy.deepcopy(cell)]
            cells[-2].id, cells[-1].id, solution = f"{cell.id}-solved", f"{cell.id}-again", None
    notebook.cells = cells
    return notebook


def checked(notebook: NotebookNode, name: str) -> NotebookNode:
    """The notebook with each of its authors' checks after the cell of the same title. Raises
    ValueError if there is no such cell."""
    if not (HERE / "checks" / f"{name}.py").exists():
        return notebook
    checks = {c.metadata.title: c for c in source(name, HERE / "checks").cells}
    if alone := checks.keys() - {cell.metadata.get("title") for cell in notebook.cells}:
        raise ValueError(f"{name}: the check {min(alone)} is of no cell")
    notebook, cells = copy.deepcopy(notebook), []
    for cell in notebook.cells:
        cells.append(cell)
        if (check := checks.get(cell.metadata.get("title"))) is not None:
            check.id, check.metadata.unseen = f"{cell.id}-check", True
            cells.append(check)
    notebook.cells = cells
    return notebook


def shown(notebook: NotebookNode) -> NotebookNode:
    """A notebook that has run, without its authors' checks, its cells counted as if alone, its
    pictures smaller."""
    notebook = copy.deepcopy(notebook)
    notebook.cells = [cell for cell in notebook.cells if not cell.metadata.get("unseen")]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, 1):
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    return notebook


def smaller(png: str) -> str:
    """A picture in base64, in at most COLOURS colours."""
    picture, written = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(written, "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def exercises(notebook: NotebookNode) -> dict[str, NotebookNode]:
    """Its cells that are exercises, by their titles."""
    cells = {cell.metadata.get("title", ""): cell for cell in notebook.cells}
    return {title: cell for title, cell in cells.items() if title.startswith("exercise")}


def run(notebook: NotebookNode, folder: Path = HERE) -> NotebookNode:
    """The notebook with its outputs, run in a folder. Raises CellExecutionError."""
    done = copy.deepcopy(notebook)
    client = NotebookClient(done, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute()
    for cell in done.cells:
        cell.metadata.pop("execution", None)  # times of day
    return done


def printed(notebook: NotebookNode) -> str:
    """All that its cells print."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    return "".join(out.text for out in outputs if out.output_type == "stream")


def build(name: str) -> float:
    """Run a notebook and store it; returns the seconds that it took."""
    start = time.perf_counter()
    done = shown(run(checked(source(name), name)))
    seconds = time.perf_counter() - start
    data = (nbformat.writes(done) + "\n").encode()
    if len(data) > LARGEST:
        raise ValueError(f"{name}.ipynb has {len(data):,} bytes, allowed: {LARGEST:,}")
    write_atomic(HERE / f"{name}.ipynb", data)
    return seconds


def table(times: dict[str, float]) -> str:
    """The rows of README.md's table: each notebook, its title, its seconds."""
    rows = []
    for name in NAMES:
        title = re.search(r"^# # (.*)$", (HERE / f"{name}.py").read_text(encoding="utf-8"), re.M)
        rows.append(f"| [{name}]({name}.ipynb) | {title[1]} | {times[name]:.0f} s |")
    return "\n".join(["| notebook | what it teaches | run time |", "|---|---|---|", *rows])


def main(names: list[str]) -> int:
    if unknown := [name for name in names if name not in NAMES]:
        there = ", ".join(NAMES)
        print(f"build: error: no notebook {unknown[0]!r}; there are: {there}", file=sys.stderr)
        return 2
    path = HERE / "times.json"
    times = json.loads(path.read_text()) if path.exists() else {}
    for name in names or NAMES:
        times[name] = round(build(name), 1)
        print(f"{name}.ipynb  {times[name]} s", flush=True)
    times = {name: times[name] for name in NAMES if name in times}
    write_atomic(path, (json.dumps(times, indent=1) + "\n").encode())
    readme = HERE / "README.md"
    if readme.exists() and len(times) == len(NAMES):
        text = readme.read_text(encoding="utf-8")
        text = re.sub(r"\| notebook \|.*?(?=\n\n)", lambda _: table(times), text, flags=re.S)
        write_atomic(readme, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
