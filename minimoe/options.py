"""What a run of `compare` is asked for: kept in its folder, given again, typed as a command."""

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .continual import streams
from .continual.learn import BATCH
from .roster import EPOCHS, ROSTER, entry_on, under
from .tools.results import EXACT, parse, read

RUN = "run.json"  # a run's options, in its folder
# what a run cannot change when it goes on
FIXED = ("stream", "epochs", "lr", "batch", "optimiser", "backbone", "targets", "device")


@dataclass(frozen=True)
class Options:
    """What a user asks a run for, as run.json holds it.

    stream, schemes, backbone: as compare.compare takes them, a file by its whole path. lr: None for
    each learner's own. changes: settings other than the roster's, for all schemes that have them.
    """

    stream: str = streams.USUAL
    schemes: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    tasks: int = streams.usual_tasks(streams.USUAL)
    epochs: int = EPOCHS
    lr: float | None = None
    batch: int = BATCH
    optimiser: str = "AdamW"
    backbone: str | None = None
    targets: str | None = None
    device: str = "cpu"
    changes: dict[str, int | float] = field(default_factory=dict)
    __pydantic_config__ = EXACT

    @classmethod
    def of(cls, folder: Path) -> "Options":
        """Those of the run in a folder. Raises FileNotFoundError if there is none, and ValueError
        if its run.json is damaged."""
        path, mend = folder / RUN, "a run in another folder starts anew"
        if not path.exists():
            raise FileNotFoundError(f"{folder}: no run there to go on with")
        return read(path, "run", partial(parse, cls), mend)

    def extended(self, given: Mapping[str, Any]) -> "Options":
        """With options given again. They may add schemes, seeds and tasks; all others must agree.

        Raises ValueError on one that does not.
        """
        tasks = given.get("tasks", self.tasks)
        if tasks < self.tasks:
            raise ValueError(f"tasks is {tasks}, allowed in this run: {self.tasks} or more")
        for name in FIXED:
            had = getattr(self, name)
            each = name == "lr" and had is None
            _require_same(name, given.get(name), {"each learner's own" if each else had})
        place = None if self.targets else under(self.stream, self.backbone)
        ran = [name for name in ROSTER if name in self.schemes] or list(ROSTER)
        for name, value in given.get("changes", {}).items():
            entries = [entry_on(scheme, place).settings for scheme in ran]
            usual = {settings[name] for settings in entries if name in settings}
            _require_same(name, value, {self.changes[name]} if name in self.changes else usual)
        seed = self.seeds[0]
        before, after = (streams.make(self.stream, n, seed).tasks for n in (self.tasks, tasks))
        for task, other in zip(before, after, strict=False):
            if task.name != other.name:
                raise ValueError(
                    f"tasks is {tasks}, allowed in this run: {self.tasks} ({self.stream} "
                    f"of {tasks} tasks has {other.name} in the place of {task.name})"
                )
        return dataclasses.replace(
            self,
            schemes=list(dict.fromkeys([*self.schemes, *given.get("schemes", [])])),
            seeds=list(dict.fromkeys([*self.seeds, *given.get("seeds", [])])),
            tasks=tasks,
        )

    def command(self, usual: list[str]) -> str:
        """What a user types to have this run; `usual` are the schemes of one that names none."""
        default = Options(schemes=usual, tasks=streams.usual_tasks(self.stream))
        words = ["minimoe", "compare"]
        for name in ("stream", "schemes", "seeds", "tasks", *FIXED[1:]):
            value = getattr(self, name)
            if value not in (getattr(default, name), []):  # no schemes: the usual ones
                values = value if isinstance(value, list) else [value]
                words += [f"--{name}", *map(short_name, values)]
        for name, value in self.changes.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        return shlex.join(words)


def canonical(name: str) -> str:
    """A name as Options hold it: a file by its whole path."""
    path, colon, in_file = name.rpartition(":")
    return f"{Path(path).resolve()}:{in_file}" if colon else name


def short_name(value: Any) -> str:
    """A word of a command; a file by its path from here, if it is below."""
    path, colon, in_file = str(value).rpartition(":")
    if colon and Path(path).is_relative_to(Path.cwd()):
        return f"{Path(path).relative_to(Path.cwd())}:{in_file}"
    return str(value)


def _require_same(name: str, given: Any, there: set[Any]) -> None:
    if given is not None and {given} != there:
        allowed = ", ".join(map(str, sorted(there)))
        raise ValueError(
            f"{name} is {given}, allowed in this run: {allowed}; another --out starts anew"
        )
