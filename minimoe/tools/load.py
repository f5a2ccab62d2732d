"""A class or a function of somebody's Python file."""

import contextlib
import functools
import itertools
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from .fingerprint import PACKAGE, of_own, own_files

T = TypeVar("T")
_loads = itertools.count()


def load_class(path: str | Path, name: str, base: type[T]) -> type[T]:
    """The subclass `name` of `base` in a Python file, which is run.

    Raises FileNotFoundError; ValueError if the file fails, holds no such class, or the class is no
    subclass of base.
    """
    names = _run(Path(path))
    classes = {n: c for n, c in names.items() if isinstance(c, type) and c is not base}
    fit = {n: c for n, c in classes.items() if issubclass(c, base)}
    if name not in fit:
        none = f"is no scheme (a subclass of minimoe.{base.__name__})"
        wrong = none if name in names else "is not there"
        raise ValueError(f"{path}: {name} {wrong}; schemes there: {', '.join(fit) or 'none'}")
    return fit[name]


def load_name(path: str | Path, name: str) -> Any:
    """What `name` stands for in a Python file, which is run.

    Raises FileNotFoundError; ValueError if the file fails or holds no such name.
    """
    names = _run(Path(path))
    if name not in names:
        own = [n for n in names if not n.startswith("_")]
        raise ValueError(f"{path}: {name} is not there; names there: {', '.join(own) or 'none'}")
    return names[name]


def load_function(path: str | Path, name: str) -> Callable[..., Any]:
    """The function `name` of a Python file, which is run once while its code stays as it is.

    Raises FileNotFoundError; ValueError if the file fails or holds nothing of that name to call.
    """
    path = Path(path)
    names = _run_once(path.resolve(), of_own(path.resolve()) if path.is_file() else "")
    if not callable(function := names.get(name)):
        own = [n for n, f in names.items() if isinstance(f, types.FunctionType)]
        raise ValueError(f"{path}: no function {name}; functions there: {', '.join(own) or 'none'}")

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _as_a_script(path.resolve()):  # for what it imports only now
            return function(*args, **kwargs)

    return call


def _run(path: Path) -> dict[str, Any]:
    """The names in a Python file that was run."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    for module in _helpers(path) & sys.modules.keys():
        del sys.modules[module]  # edited since, or of a file elsewhere
    # two files of one name, or one file twice, are two; and a dot would ask for a package
    alias = re.sub(r"\W", "_", f"{path.stem}_{next(_loads)}")
    own = types.ModuleType(alias)
    own.__file__ = str(path)
    own.__package__ = _package(path)[1]  # what relative imports start from
    sys.modules[alias] = own  # pickle looks a class up there
    try:
        with _as_a_script(path):
            exec(compile(path.read_bytes(), path, "exec"), vars(own))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever somebody's file does
        sys.modules.pop(alias, None)
        raise ValueError(f"{path} fails: {type(error).__name__}: {error}") from error
    return vars(own)


@functools.lru_cache(maxsize=16)
def _run_once(path: Path, code: str) -> dict[str, Any]:
    return _run(path)


@contextlib.contextmanager
def _as_a_script(path: Path) -> Iterator[None]:
    """Imports find what is in the file's folder first, as Python does for a script; and the package
    that the file stands in, if any. Where one stands is as before, whatever the file does."""
    folders = [str(path.parent), *([str(_package(path)[0])] if _package(path)[1] else [])]
    sys.path[:0] = folders
    try:
        with contextlib.chdir(Path.cwd()):
            yield
    finally:
        for folder in folders:
            with contextlib.suppress(ValueError):  # the file has changed sys.path
                sys.path.remove(folder)


def _package(path: Path) -> tuple[Path, str]:
    """The folder that the package of a file is in, and its dotted name; "" if there is none."""
    root, names = path.absolute().parent, list[str]()
    while (root / "__init__.py").is_file():
        names.insert(0, root.name)
        root = root.parent
    return root, ".".join(names)


def _helpers(path: Path) -> set[str]:
    """The modules that the file imports from its folder, as they are called there, or in its
    package. (Not this package, if it is there.)"""
    path = path.resolve()
    files = {file for file in own_files(path) if not file.is_relative_to(PACKAGE)} - {path}
    parts = [file.relative_to(path.parent).with_suffix("").parts for file in files]
    names = {".".join(part).removesuffix(".__init__") for part in parts}
    package = _package(path)[1]
    return names | {f"{package}.{name}" for name in names if package}
