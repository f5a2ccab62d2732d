"""All streams: those of this package by name, and those of a file of one's own."""

import dataclasses
from collections.abc import Callable, Sequence

from ..tools.load import load_function
from ..tools.seeds import seeded
from .clusters import clusters
from .digits import (
    conflict,
    digit_worlds,
    overlap,
    permuted_digits,
    repeat,
    rotated_digits,
    split_digits,
)
from .docstrings import docstrings
from .planted import planted
from .sequences import sequences
from .stream import Stream, Task
from .subspaces import TASKS, subspaces
from .texts import texts

__all__ = ["STREAMS", "USUAL", "Stream", "Task", "make", "require_seeds", "shows", "usual_tasks"]

MOST_SEED = 2**32 - 1  # scikit-learn's
MOST_TASKS = 1000

# make(tasks, seed): a stream of so many tasks, or, if it has fewer, of all
STREAMS: dict[str, Callable[[int, int], Stream]] = {
    "permuted-digits": permuted_digits,
    "rotated-digits": rotated_digits,
    "split-digits": split_digits,
    "digit-worlds": digit_worlds,
    "repeat": repeat,
    "overlap": overlap,
    "conflict": conflict,
    "planted": planted,
    "subspaces": subspaces,
    "clusters": clusters,
    "sequences": sequences,
    "texts": texts,
    "docstrings": docstrings,
}


def usual_tasks(stream: object) -> int:
    """How many tasks a run takes of a stream, by name or not, if it does not say."""
    return TASKS if stream == "subspaces" else 5


USUAL = "subspaces"  # the stream of a run that names none: a minute, and it needs a gate


def make(name: str, tasks: int = 5, seed: int = 0) -> Stream:
    """The stream of that name, or of a function in a file, file.py:make. The seed decides what the
    tasks draw; of images, passages and pages those that are tested on are always the same.

    Raises ValueError on an unknown name, a number of tasks it cannot have or a seed that cannot be,
    and if somebody's function fails; FileNotFoundError; ModuleNotFoundError where the data comes
    with a package that is not installed.
    """
    require_seeds([seed])
    path, colon, function = name.rpartition(":")
    if not colon and name not in STREAMS:
        raise ValueError(f"stream is {name!r}, allowed: {', '.join(STREAMS)}, file.py:make")
    if not 1 <= tasks <= MOST_TASKS:
        raise ValueError(f"tasks is {tasks}, allowed for {name}: 1 to {MOST_TASKS}")
    make = load_function(path, function) if colon else STREAMS[name]
    made = called(make, name, tasks, seed) if colon else make(tasks, seed)
    if len(made.tasks) < tasks:
        raise ValueError(f"tasks is {tasks}, allowed for {name}: 1 to {len(made.tasks)}")
    return dataclasses.replace(made, tasks=made.tasks[:tasks])


def called(make: Callable[[int, int], Stream], name: str, tasks: int, seed: int) -> Stream:
    """The stream of somebody's function, whose draws the seed decides too. Raises ValueError if it
    fails, or gives something else."""
    try:
        with seeded(seed):
            stream = make(tasks, seed)
    except (Exception, SystemExit) as error:  # whatever somebody's function does
        raise ValueError(f"{name} fails: {type(error).__name__}: {error}") from error
    if not isinstance(stream, Stream):
        raise ValueError(f"{name} gives a {type(stream).__name__}, allowed: a Stream")
    return stream


def require_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError unless there are seeds, and all of them can be."""
    if not len(seeds):
        raise ValueError("seeds are none, allowed: one or more")
    for seed in seeds:
        if not 0 <= seed <= MOST_SEED:
            raise ValueError(f"seeds is {seed}, allowed: 0 to {MOST_SEED}")


def shows(name: str) -> str:
    """What the stream of that name is for, in a line."""
    return " ".join((STREAMS[name].__doc__ or "").split())
