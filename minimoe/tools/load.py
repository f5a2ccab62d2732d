"""A class or a function of somebody's Python file."""

import functools
import itertools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

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
        wrong = none if name in classes else "is not there"
        raise ValueError(f"{path}: {name} {wrong}; schemes there: {', '.join(fit) or 'none'}")
    return fit[name]


def load_function(path: str | Path, name: str) -> Callable[..., Any]:
    """The function `name` of a Python file, which is run once while it stays as it is.

    Raises FileNotFoundError; ValueError if the file fails or holds nothing of that name to call.
    """
    path = Path(path)
    at = path.stat().st_mtime_ns if path.is_file() else None
    names = _run_once(path.resolve(), at)
    if not callable(names.get(name)):
        own = [n for n, f in names.items() if isinstance(f, types.FunctionType)]
        raise ValueError(f"{path}: no function {name}; functions there: {', '.join(own) or 'none'}")
    return names[name]


def _run(path: Path) -> dict[str, Any]:
    """The names in a Python file that was run."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    alias = f"{path.stem}_{next(_loads)}"  # two files of one name, or one file twice, are two
    module = types.ModuleType(alias)
    module.__file__ = str(path)
    sys.modules[alias] = module  # pickle looks a class up there
    sys.path.insert(0, str(path.parent))  # as Python does for a script
    try:
        exec(compile(path.read_bytes(), path, "exec"), vars(module))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever somebody's file does
        sys.modules.pop(alias, None)
        raise ValueError(f"{path} fails: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    return vars(module)


@functools.lru_cache(maxsize=16)
def _run_once(path: Path, at: int | None) -> dict[str, Any]:
    return _run(path)
