"""The atlas: one file per further paper, with its layer, its loss and its life in a stream.

`minimoe.schemes.NAME` is the module of that name, imported when it is asked for.
"""

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from error
