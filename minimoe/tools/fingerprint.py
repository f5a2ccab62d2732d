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
# pictures and words, the commands, and the laws, which decide no number that is kept
OUTSIDE = ("cli.py", "__main__.py", "laws", "tools/console.py", "tools/plots.py", "tools/tables.py")


@functools.cache
def fingerprint() -> str:
    """Of this package, as it was when this was first asked in this process."""
    outside = [PACKAGE / name for name in OUTSIDE]
    return of(
        path
        for path in PACKAGE.rglob("*.py")
        if not any(path.is_relative_to(other) for other in outside)
    )


def of_own(path: Path) -> str:
    """Of somebody's file, and of the files in its folder that it imports, however far."""
    folder, files, todo = path.parent, {path}, [path]
    while todo:
        for name in _imported(todo.pop()):
            parts = name.split(".")
            for n in range(1, len(parts) + 1):
                place = folder.joinpath(*parts[:n])
                for file in (place.with_suffix(".py"), place / "__init__.py"):
                    if file.is_file() and file not in files:
                        files.add(file)
                        todo.append(file)
    return of(files)


def of(files: Iterable[Path]) -> str:
    """12 hexadecimal digits that change with what the files do, or with their names, but not with
    a comment, a docstring or a line's breaks. (By one version of Python; others may differ.)"""
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(f"{path.name}\n{_without_words(path)}\n".encode())
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


def _imported(path: Path) -> set[str]:
    """The dotted names that a source imports, wherever in it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names |= {f"{module}.{alias.name}".strip(".") for alias in node.names}
    return names
