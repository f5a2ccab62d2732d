"""A run on disk: what its learner knew after each task, a file each.

A run that goes on reads these files one after the other, and measures anew what the learner could
do after each task. So no accuracy is read from a file, and a run can go on to more tasks than it
had.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..tools.files import read_tensors, write_tensors
from ..tools.results import EXACT, parse
from . import data
from .stream import Stream


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself.

    run: all that decided its numbers, but for the data. learned: how many tasks, the last of them
    `task`. data: a digest of what was trained on. For all these tasks together: seconds spent
    learning, those spent training, and steps of training.
    """

    run: dict[str, Any]
    task: str
    data: str
    learned: int
    seconds: float
    training: float
    steps: int
    __pydantic_config__ = EXACT


@dataclass(frozen=True)
class Checkpoints:
    """The files STEM-task1.safetensors, ... of one learner's run.

    run: what the files must be of (settings, the code; anything that JSON holds).
    """

    stem: Path
    run: dict[str, Any]

    def file(self, learned: int) -> Path:
        return self.stem.with_name(f"{self.stem.name}-task{learned}.safetensors")

    def of_all(self, J: int) -> "Checkpoints":
        """The files of a learner of the whole stream (Learner.whole_stream): of J tasks only."""
        return Checkpoints(self.stem.with_name(f"{self.stem.name}-of{J}"), self.run)

    def learned(self, stream: Stream) -> int:
        """How many tasks are learned in these files. Raises ValueError as `read` does."""
        t = 0
        while t < len(stream.tasks) and self.file(t + 1).exists():
            t += 1
            self.read(t, stream)
        return t

    def read(self, learned: int, stream: Stream) -> tuple[dict[str, Tensor], Header]:
        """What the learner knew after so many tasks. Raises ValueError, naming the file, on one
        that is damaged or of another run."""
        path = self.file(learned)
        mend = "delete it to learn its task again"
        tensors, facts = read_tensors(path, "checkpoint", mend=mend)
        try:
            header = parse(Header, facts)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {mend}") from None
        own = ("task", "data", "learned")
        here = self.run | trained_on(stream, learned) | {"learned": learned}
        there = header.run | {name: getattr(header, name) for name in own}
        keys = [key for key in there | here if there.get(key) != here.get(key)]
        if keys:
            differ = [f"{key} {there.get(key)} there, {here.get(key)} here" for key in keys]
            raise ValueError(
                f"{path}: a checkpoint of another run ({'; '.join(differ)}); "
                "a run in another folder starts anew"
            )
        return tensors, header

    def write(self, tensors: dict[str, Tensor], header: Header) -> None:
        facts = {name: getattr(header, name) for name in Header.__dataclass_fields__}
        write_tensors(self.file(header.learned), "checkpoint", tensors, facts)


def trained_on(stream: Stream, learned: int) -> dict[str, str]:
    """The name of the last of so many tasks, and a digest of the data of them all, and of the base
    domain."""
    tasks = [*filter(None, [stream.base]), *stream.tasks[:learned]]
    every = " ".join(data.digest(task.train) for task in tasks)
    digest = hashlib.sha256(every.encode()).hexdigest()[:12]
    return {"task": stream.tasks[learned - 1].name, "data": digest}
