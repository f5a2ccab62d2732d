"""Characters of five texts that every install has: who forgets a text when the next one comes?

The base domain is English, the documentation of Python. The tasks are Python's library without it,
torch's C++ headers and operator tables (YAML), matplotlib's font metrics and NumPy's C headers,
the code without comments. The score is minus the bits per character.

It shows forgetting, and ranks nobody: `trigram`, which counts three characters in a row and trains
nothing, answers better than adapters do. Read its row first. Pages are trained on or tested on, but
code repeats itself: of 32 characters in a row of the test, 1 (Python) to 25 (YAML) in a hundred
stand in what is trained on, too.
"""

import ast
import functools
import importlib.util
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .backbones import Decoder
from .stream import Stream, Task, minus_bits

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # a character that is not in it is left out
LENGTH = 64
PIECES = 32  # of LENGTH + 1 characters in a page; a page is either trained on or tested on
TRAIN, TEST, BASE = 16, 8, 64  # pages
TEST_SEED = 0  # of which pages are tested on
ENOUGH = 400_000  # characters of a text

# the tasks: package, folder, pattern of the files' names, pattern of a comment
FILES = {
    "Python": (None, "", "[a-m]*.py", ""),
    "C++": ("torch", "include/ATen/core", "*.h", r"/\*.*?\*/|//[^\n]*"),
    "YAML": ("torchgen", "packaged", "*.yaml", r"#[^\n]*"),
    "fonts": ("matplotlib", "mpl-data/fonts/afm", "*.afm", ""),
    "C": ("numpy", "_core/include", "*.h", r"/\*.*?\*/|//[^\n]*"),
}


def texts(tasks: int, seed: int) -> Stream:
    """English, then Python, C++, YAML, font metrics and C, by the character, in minus bits: it
    shows forgetting and ranks nobody, as counts of three characters (trigram) do better"""
    draw = torch.Generator().manual_seed(seed)
    names = list(FILES)[:tasks]
    base, *made = [
        Task(name, *_split(read(name), BASE if name == "English" else TRAIN, draw))
        for name in ("English", *names)
    ]
    return Stream(
        "texts",
        made,
        base,
        model=lambda stream: Decoder(len(ALPHABET), LENGTH),
        classes=len(ALPHABET),
        score=minus_bits,
        pretraining={"epochs": 5, "lr": 6e-3},
    )


def _split(text: str, train: int, draw: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """(x, y), both (pieces, LENGTH), of pages to train on, as drawn, and of TEST others, the same
    whatever is drawn; y is what comes next."""
    ids = torch.tensor([ALPHABET.index(c) for c in text])
    page = PIECES * (LENGTH + 1)
    pages = ids[: len(ids) // page * page].view(-1, PIECES, LENGTH + 1)
    pages = pages[torch.randperm(len(pages), generator=torch.Generator().manual_seed(TEST_SEED))]
    test, rest = pages[:TEST], pages[TEST:]
    for some in (rest[torch.randperm(len(rest), generator=draw)[:train]], test):
        pieces = some.flatten(0, 1)
        yield pieces[:, :-1].clone(), pieces[:, 1:].clone()


@functools.cache
def read(name: str) -> str:
    """The text of that name, or "English", of ENOUGH characters at most.

    Raises ModuleNotFoundError where its files are not installed.
    """
    parts: list[str] = []
    for part in _english() if name == "English" else _files(name):
        parts.append("".join(c for c in part if c in ALPHABET))
        if sum(map(len, parts)) >= ENOUGH:
            break
    text = re.sub(r"\n\s*\n+", "\n\n", "\n\n".join(parts))[:ENOUGH]
    pages = TEST + (BASE if name == "English" else TRAIN)
    if len(text) < pages * PIECES * (LENGTH + 1):
        package = FILES[name][0] if name in FILES else None
        raise ModuleNotFoundError(
            f"texts needs {name} from the files of {package or 'the standard library'}, which are "
            "not all here"
        )
    return text


def _files(name: str) -> Iterator[str]:
    """The files of a task without comments (and Python's without docstrings)."""
    package, folder, pattern, comment = FILES[name]
    for path in _paths(package, folder, pattern):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if package is None:
            yield ast.unparse(prose_and_code(text)[1])
        else:
            yield re.sub(comment, "", text, flags=re.S) if comment else text


def _english() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from topics.values()
    for path in _paths(*FILES["Python"][:3]):
        yield from prose_and_code(path.read_text(encoding="utf-8", errors="ignore"))[0]


def _paths(package: str | None, folder: str, pattern: str) -> list[Path]:
    """The files of a package, or of the standard library."""
    if package is None:
        return sorted(Path(sysconfig.get_paths()["stdlib"]).glob(pattern))
    try:
        spec = importlib.util.find_spec(package)  # found, not imported
    except ModuleNotFoundError:
        spec = None
    places = spec.submodule_search_locations if spec else None
    return sorted(path for place in places or () for path in Path(place, folder).rglob(pattern))


def prose_and_code(text: str) -> tuple[list[str], ast.Module]:
    """The docstrings of Python's code, and the code's tree without them and without comments."""
    prose, tree = [], ast.parse(text)
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node)):
            prose.append(docstring)
            node.body = node.body[1:] or [ast.Pass()]
    return prose, tree
