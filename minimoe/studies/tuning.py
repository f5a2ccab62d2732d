"""Tuning: which settings a learner has on a stream, picked where nothing is tested.

In a place every learner has the same number of trials: the roster's own settings, and others drawn
from all that the roster lets it choose from (`tunes`). Where it has fewer, all of them.

A trial is a whole run on the stream of a seed that no other study has. A quarter of each task's
training data is held out, and of the base domain's: nothing trains on it, and a trial's value is
ACC there. Test data are not looked at. The best is what the roster then has on that stream, under
that model: tutorials/pages.py writes it to minimoe/tuned.json.
"""

import dataclasses
import functools
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch

from ..continual import streams
from ..continual.backbones import find
from ..continual.learn import pretrain, run_stream
from ..continual.metrics import acc
from ..continual.stream import Stream, Task
from ..roster import ROSTER
from ..tools.results import Panel, StudyResult
from ..tools.tables import short
from .common import PLACES, cells_of, line
from .study import Cell, Rows, Study
from .verdicts import Claim

HELD_OUT = 0.25
SEED = 1000


def trials(name: str, n: int) -> list[dict[str, Any]]:
    """At most n: the roster's own settings and lr, which are the first of `tunes`, then others,
    each equally likely. Learners that may choose from the same have the same."""
    tunes = ROSTER[name].tunes
    own, *others = (dict(zip(tunes, each, strict=True)) for each in product(*tunes.values()))
    random.Random(repr(tunes)).shuffle(others)
    return [own, *others[: n - 1]]


def cells(seeds: Sequence[int], quick: bool) -> list[Cell]:
    made = []
    for label, place in list(PLACES.items())[: 1 if quick else None]:
        rows = {
            label_of(label, name, trial): {
                **place.setting(quick),
                "place": label,
                "name": name,
                "trial": trial,
            }
            for name in place.names()
            if ROSTER[name].tunes
            for trial in trials(name, 2 if quick else place.trials)
        }
        made += cells_of("tuning", rows, seeds)
    return made


def label_of(place: str, name: str, trial: Mapping[str, Any]) -> str:
    return ", ".join([place, name, *(f"{key} {value:g}" for key, value in trial.items())])


def measure(cell: Cell) -> dict[str, Any]:
    """held: ACC on what is held out; nan if a loss was no number."""
    stream, backbone = held_out(cell["stream"], cell["tasks"], cell["seed"], cell.get("backbone"))
    entry = ROSTER[cell["name"]].with_trial(cell["trial"])
    how = {"lr": entry.lr}
    try:
        run = run_stream(
            entry.make, backbone, stream, cell["seed"], cell["epochs"], name=cell["row"], how=how
        )
    except FloatingPointError:
        return {"held": math.nan}
    return {"held": acc(run.matrix)}


@functools.lru_cache(maxsize=2)
def held_out(name: str, tasks: int, seed: int, backbone: str | None) -> tuple[Stream, Any]:
    """A stream that trains on less and is tested on the rest of that, and its backbone or the one
    of that name, pretrained on less too. Kept for the next cell, so not to be changed."""
    stream = validation(streams.make(name, tasks, seed), seed)
    return stream, pretrain(stream, seed, make=find(backbone) if backbone else None)


def validation(stream: Stream, seed: int) -> Stream:
    """The stream whose tests are a quarter of each task's training data, which is held out. Of
    tasks (and of a base domain) with as many examples these are the same rows; where all examples
    of a task are the base domain's, perhaps turned, those that are held out there."""
    of_base: dict[bytes, bool] = {}

    def split(task: Task) -> Task:
        n = len(task.x_train)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        held = torch.zeros(n, dtype=torch.bool)
        held[order[n - round(HELD_OUT * n) :]] = True
        keys = [x.numpy().tobytes() for x in task.x_train.flatten(1).sort(1).values]
        if task is stream.base:
            of_base.update(zip(keys, held.tolist(), strict=True))
        elif all(key in of_base for key in keys):
            held = torch.tensor([of_base[key] for key in keys])
        train, test = ((task.x_train[rows], task.y_train[rows]) for rows in (~held, held))
        return dataclasses.replace(task, train=train, test=test)

    base = None if stream.base is None else split(stream.base)
    return dataclasses.replace(stream, tasks=[split(task) for task in stream.tasks], base=base)


def chosen(result: StudyResult) -> dict[str, dict[str, dict[str, Any]]]:
    """By place and learner, the trial of the largest mean; of equals the first."""
    best: dict[str, dict[str, dict[str, Any]]] = {}
    top: dict[tuple[str, str], float] = {}
    for cell in cells(result.seeds, result.quick):
        value = result.rows[cell["row"]]["held"].mean if cell["row"] in result.rows else None
        key = cell["place"], cell["name"]
        if value is not None and value > top.get(key, -math.inf):
            top[key] = value
            best.setdefault(cell["place"], {})[cell["name"]] = cell["trial"]
    return best


# What the numbers say


def tried(rows: Rows, place: str) -> dict[str, list[float]]:
    """The mean of each trial of each learner in a place, the roster's own first."""
    found: dict[str, list[float]] = {}
    for row in rows:
        there, name, *_ = row.split(", ")
        if there == place:
            found.setdefault(name, []).append(statistics.fmean(rows[row]["held"]))
    return found


def panels(rows: Rows) -> list[Panel]:
    """The gain over the roster's own settings."""
    made = []
    for place in PLACES:
        if found := tried(rows, place):
            gains = {name: gain(means) for name, means in found.items()}
            made.append(
                Panel(
                    title=place,
                    xlabel="gain of the best trial, ACC held out",
                    lines=[line(name, [[value]]) for name, value in gains.items()],
                    names=list(gains),
                    kinds=[ROSTER[name].kind for name in gains],
                )
            )
    return made


def gain(means: Sequence[float]) -> float:
    """Of the best trial over the first; nan of the first if that is no number."""
    return max((value for value in means if not math.isnan(value)), default=math.nan) - means[0]


def finding(rows: Rows) -> str:
    parts = []
    for place in PLACES:
        gains = {name: gain(means) for name, means in tried(rows, place).items()}
        if gains:
            known = {name: value for name, value in gains.items() if not math.isnan(value)}
            lost = [name for name in gains if name not in known]  # at their own settings
            most = max(known, key=known.__getitem__, default="nobody")
            own = f", mora {short(known['mora'])}" if "mora" in known and most != "mora" else ""
            parts.append(
                f"on {place} {short(statistics.median(known.values() or [math.nan]))} (at most "
                f"{short(known.get(most, math.nan))}, {most}{own}"
                f"{''.join(f'; {name} had diverged' for name in lost)})"
            )
    return (
        "What trials add to ACC on held-out data, over the settings that a learner would have had "
        f"anyway, in the median over learners: {'; '.join(parts)}. Those picked are in "
        "minimoe/tuned.json."
    )


def claims(rows: Rows) -> list[Claim]:
    """Of the paper's list, none."""
    return []


STUDY = Study(
    asks="What do 8 trials of settings give each learner (4 where a run takes minutes)?",
    cells=cells,
    measure=measure,
    columns={"held": "ACC held out"},
    panels=panels,
    finding=finding,
    claims=claims,
    seeds=(SEED,),
)
