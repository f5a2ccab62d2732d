"""Slides of a notebook, from its own cells: python tutorials/slides.py [NAME] [FILE]

A slide for each section, below it one for each exercise, picture and outcome of a prediction.
Speaker's notes (key S) are the section's row in TEACHING.md, of the core. By default of
00_first_hour, in NAME.slides.html. What is shown is the stored notebook, with its outputs. The page
takes reveal.js from the network.
"""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter
from nbformat import NotebookNode

from minimoe.tools.files import write_atomic

HERE = Path(__file__).parent
APART = r"\bfigures\.|\.beside\("  # a picture; what comes out, apart from its prediction


def kind(cell: NotebookNode) -> str:
    """Where a cell stands: it begins a slide, or one below, goes on, or is left out."""
    title = cell.metadata.get("title", "")
    if title == "install":
        return "skip"
    if cell.cell_type == "markdown":
        starts = "slide" if cell.source.startswith("#") else "-"
        return "subslide" if cell.source.startswith("**Predict.**") else starts
    return "subslide" if title.startswith("exercise") or re.search(APART, cell.source) else "-"


def notes(name: str) -> dict[str, str]:
    """Of TEACHING.md: what to say in each section of a notebook, by its number; {} if nothing."""
    guide = (HERE / "TEACHING.md").read_text(encoding="utf-8")
    table = guide.partition(f"## {name[:2]}, step by step")[2].partition("\n## ")[0]
    lines = re.findall(r"^\|.*\|$", table, re.M)
    heads, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines or ["|", "|"]
    )
    return {
        row[1].split()[0]: "\n\n".join(
            f"**{head}**: {words}" for head, words in zip(heads, row, strict=True) if words
        )
        for row in rows
    }


def slides(name: str) -> str:
    """The page. Raises FileNotFoundError if there is no such notebook."""
    notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    said, cells = notes(name), []
    for cell in notebook.cells:
        cell.metadata["slideshow"] = {"slide_type": kind(cell)}
        cells.append(cell)
        section = re.match(r"## (\d+)\.", cell.source)
        if cell.cell_type == "markdown" and section and section[1] in said:
            note = nbformat.v4.new_markdown_cell(said[section[1]])
            note.metadata["slideshow"] = {"slide_type": "notes"}
            cells.append(note)
    notebook.cells = cells
    page: str = SlidesExporter(reveal_scroll=True).from_notebook_node(notebook)[0]
    return page


def main(words: list[str]) -> int:
    name = words[0] if words else "00_first_hour"
    there = sorted(path.stem for path in HERE.glob("*.ipynb"))
    if name not in there or len(words) > 2:
        print(f"slides: error: notebook is {name!r}, allowed: {', '.join(there)}", file=sys.stderr)
        return 2
    file = Path(words[1] if len(words) > 1 else f"{name}.slides.html")
    try:
        write_atomic(file, slides(name).encode())
    except OSError as error:
        print(f"slides: error: {error}", file=sys.stderr)
        return 2
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
