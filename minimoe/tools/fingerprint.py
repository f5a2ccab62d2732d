"""Which code made a number: a fingerprint of the sources that decide it.

A result that is kept, a study's cell or a run's checkpoint, holds the fingerprint of the code that
made it, so that no number of other code is taken for one of today's.
"""

import ast
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
# pictures and words, the commands, the laws, the lesson, others' files and loops: they decide no
# number that is kept
WORDS = ("tools/console.py", "tools/exercise.py", "tools/plots.py", "tools/tables.py")
OUTSIDE = ("cli.py", "__main__.py", "laws", "lesson", "peft", "trainer.py", *WORDS)


@functools.cache
def fingerprint() -> str:
    """The fingerprint of this package without OUTSIDE, as it was when a process first asked."""
    outside = [PACKAGE / name for name in OUTSIDE]
    every = PACKAGE.rglob("*.py")
    files = {path for path in every if not any(path.is_relative_to(other) for other in outside)}
    return of(files, PACKAGE)


def of_own(path: Path) -> str:
    """The fingerprint of somebody's file, with its `own_files`."""
    return of(own_files(path), path.parent)


def own_files(path: Path) -> set[Path]:
    """A file, with all in its folder, or below, that it imports, also by way of each other."""
    files, todo = {path}, [path]
    while todo:
        for file in _imported(todo.pop(), path.parent) - files:
            files.add(file)
            todo.append(file)
    return files


def of(files: Iterable[Path], folder: Path) -> str:
    """12 hexadecimal digits that change with the code of the files and with their names in the
    folder, but not with comments, docstrings and where lines end. (By one version of Python.)"""
    total = hashlib.sha256()
    for path in sorted(files):
        name = path.relative_to(folder).as_posix()
        total.update(f"{name}\n{_without_words(path)}\n".encode())
    return total.hexdigest()[:12]


def _without_words(path: Path) -> str:
    """A source's syntax tree as text, without docstrings. A file that is no Python: its text."""
    data = path.read_bytes()
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError):
        return data.decode(errors="backslashreplace")
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                del body[0]
    return ast.dump(tree)


def _imported(path: Path, folder: Path) -> set[Path]:
    """The files that a source imports, wherever in it, as far as they are in this folder."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    names = set()  # (folder to look in, dotted name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(folder, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1] if node.level else folder
            module = f"{node.module}." if node.module else ""
            names |= {(base, f"{module}{alias.name}") for alias in node.names}
    files = set()
    for base, name in names:
        parts = name.split(".")
        for n in range(len(parts) + 1):
            place = base.joinpath(*parts[:n])
            candidates = [place / "__init__.py"] + [place.with_suffix(".py")] * (n > 0)
            files |= {file for file in candidates if file.is_file()}
    return {file for file in files if file.is_relative_to(folder)}
