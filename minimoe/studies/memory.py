"""Memory: what a method scores after the last task, by what it must store to go on learning.

A method is a curve over the size that it may choose:

    mora, lora_moe, ...     the ranks that a task adds
    ridge, own_ridge        random features
    own_subspace            directions of a task's inputs
    lda                     none; it answers classes alone
    replay                  examples kept of a task

Sizes are such that each method has some that store just no more than MoRA's do.

Stored is all that must be kept to learn the next task and to answer: adapters, their frozen rows,
buffers, sums; and the frozen backbone, where a method needs it. Closed forms on inputs need none.
On subspaces and clusters W0 is 0, and the backbone costs nothing. All have the settings that were
tuned at the roster's size (tuning.py); by size and of blocks those of mora, replay those of
replay_80.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..continual import streams
from ..continual.closed import LDA
from ..continual.learn import AdapterLearner, Learner, make_backbone, run_stream
from ..continual.metrics import acc
from ..roster import EPOCHS, ROSTER, entry_on, names
from ..tools.results import Line, Panel, half_interval
from .common import beside, cells_of, mean, stream_and_backbone
from .study import Cell, Rows, Study
from .verdicts import Claim, Values
from .why import Factored

TASKS = {"subspaces": 8, "clusters": 5, "rotated-digits": 5, "split-digits": 5}


@dataclass(frozen=True)
class Method:
    """A learner at each of the sizes. name: of the roster, whose settings tuned on the stream it
    has; make(model, stream, **settings): if not as the roster does; knob: the setting that is its
    size; frozen: whether it needs the backbone."""

    name: str
    knob: str
    sizes: Sequence[int]
    make: Callable[..., Learner] | None = None
    frozen: bool = True

    def learner(self, size: int, settings: Mapping[str, Any]) -> Callable[..., Learner]:
        settings = {**settings, self.knob: size}
        if self.make is None:
            return dataclasses.replace(ROSTER[self.name], settings=settings).make
        return partial(self.make, **settings)


def by_size(model: Any, stream: Any, **settings: Any) -> Learner:
    """MoRA, its score the size of s and not s."""
    return AdapterLearner(model, Factored, score="size", **settings)


def of_blocks(model: Any, stream: Any, **settings: Any) -> Learner:
    """MoRA of whole LoRAs: a task's block is one expert, and scores ‖z_e‖ / ‖z‖; two are used."""
    return AdapterLearner(model, Factored, grain="block", **{**settings, "top_k": 2})


def lda(model: Any, stream: Any, means: int, shrink: float) -> Learner:
    """It has no size to choose: a mean for each class and task."""
    return LDA(model, stream, shrink=shrink)


RANKS = (2, 8, 16)
ROUTED = tuple(
    rank - 1 for rank in RANKS
)  # as a row to choose by is stored besides: no more than mora
METHODS: dict[str, Method] = {
    "lora": Method("lora", "rank", (8,)),
    "lora_moe": Method("lora_moe", "rank", ROUTED),
    "mora": Method("mora", "rank", RANKS),
    "mora by size": Method("mora", "rank", RANKS, by_size),
    "mora of blocks": Method("mora", "rank", RANKS, of_blocks),
    "mora_detached": Method("mora_detached", "rank", RANKS),
    "alone": Method("alone", "rank", ROUTED),
    "replay": Method("replay_80", "keep", (5, 20, 80)),
    "ridge": Method("ridge", "M", (0, 20, 50, 80, 150, 300, 1000), frozen=False),
    "own_ridge": Method("own_ridge", "M", (0, 20, 50, 200, 400), frozen=False),
    "own_subspace": Method("own_subspace", "m", (2, 4, 8, 16), frozen=False),
    "lda": Method("lda", "means", (1,), lda, frozen=False),
    "oracle": Method("oracle", "rank", (8,)),
    "joint": Method("joint", "rank", (8,)),
}


def cells(seeds: Sequence[int], quick: bool) -> list[Cell]:
    made = []
    for stream, tasks in list(TASKS.items())[: 1 if quick else None]:
        rows, known = {}, names(make_backbone(streams.make(stream, 1)))
        for name, method in METHODS.items():
            if method.name in known:
                entry = entry_on(method.name, stream)
                for size in method.sizes:
                    rows[label_of(stream, name, size)] = {
                        "stream": stream,
                        "tasks": 3 if quick else tasks,
                        "method": name,
                        "size": size,
                        "settings": dict(entry.settings),
                        "lr": entry.lr,
                    }
        made += cells_of("memory", rows, seeds, epochs=2 if quick else EPOCHS)
    return made


def label_of(stream: str, name: str, size: int) -> str:
    return f"{stream}, {name}, {METHODS[name].knob} {size}"


def measure(cell: Cell) -> dict[str, Any]:
    """acc; stored, without the backbone; whole, with it where it is needed."""
    stream, backbone = stream_and_backbone(cell["stream"], cell["tasks"], cell["seed"])
    method = METHODS[cell["method"]]
    run = run_stream(
        method.learner(cell["size"], cell["settings"]),
        backbone,
        stream,
        cell["seed"],
        cell["epochs"],
        name=f"{cell['row']}, seed {cell['seed']}",
        how={"lr": cell["lr"]},
    )
    frozen = sum(int(p.count_nonzero() > 0) * p.numel() for p in backbone.parameters())
    return {
        "acc": acc(run.matrix),
        "stored": run.stored,
        "whole": run.stored + frozen * method.frozen,
    }


# What the numbers say

SELF = ("mora", "mora by size", "mora of blocks", "mora_detached")
PRIVILEGED = ("oracle", "joint")


def points(rows: Rows, stream: str) -> dict[str, dict[str, Any]]:
    """The rows of a stream, by method and size."""
    start = f"{stream}, "
    return {row.removeprefix(start): rows[row] for row in rows if row.startswith(start)}


def streams_of(rows: Rows) -> list[str]:
    return [stream for stream in TASKS if points(rows, stream)]


def best_rival(found: Mapping[str, Mapping[str, Values]], ours: str) -> str | None:
    """Of all methods that are not self-activated and have no privilege, which scores most of those
    that store no more than `ours`, the backbone counted."""
    least = {row: statistics.fmean(values["whole"]) for row, values in found.items()}
    rivals = [
        row
        for row in found
        if row.split(",")[0] not in (*SELF, *PRIVILEGED) and least[row] <= least[ours]
    ]
    return max(rivals, key=lambda row: statistics.fmean(found[row]["acc"]), default=None)


def panels(rows: Rows) -> list[Panel]:
    made = []
    for stream in streams_of(rows):
        found, lines = points(rows, stream), []
        for name in METHODS:
            curve = [found[row] for row in found if row.split(",")[0] == name]
            curve.sort(key=lambda point: statistics.fmean(point["whole"]))
            if curve:
                means = [statistics.fmean(point["acc"]) for point in curve]
                half = [half_interval(point["acc"]) for point in curve]
                x = [statistics.fmean(point["whole"]) for point in curve]
                lines.append(Line(name, means, half, x))
        made.append(
            Panel(stream, "numbers stored to go on, backbone included", lines, "ACC", log=True)
        )
    return made


def finding(rows: Rows) -> str:
    parts = []
    for stream in streams_of(rows):
        found, said = points(rows, stream), []
        for name in SELF:
            ours = f"{name}, rank 8"
            acc, whole = found[ours]["acc"], statistics.fmean(found[ours]["whole"])
            rival = best_rival(found, ours)
            if rival is None:
                said.append(f"{name} {mean(acc)} ({whole:,.0f} numbers) has no rival tried")
                continue
            other = found[rival]["acc"]
            said.append(
                f"{name} {mean(acc)} ({whole:,.0f} numbers) is {beside(acc, other)} {rival} "
                f"{mean(other)} ({statistics.fmean(found[rival]['whole']):,.0f})"
            )
        parts.append(f"on {stream} {', '.join(said)}")
    return (
        "Self-activated ranks, 8 a task, against the best other method that stores no more, of all "
        f"sizes tried, and is not told the task: {'; '.join(parts)}."
    )


def claims(rows: Rows) -> list[Claim]:
    """Of the paper's list, none: it has no such comparison."""
    return []


STUDY = Study(
    asks="What does a method score, by all the numbers that it must store?",
    cells=cells,
    measure=measure,
    columns={"acc": "ACC", "stored": "stored", "whole": "with the backbone"},
    panels=panels,
    finding=finding,
    claims=claims,
    seeds=range(10),
)
