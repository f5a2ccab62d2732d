"""Atlas: all that the roster lists, in all places where it can live, at its tuned settings.

The main table. Settings are those of tuned.json, which test data had no part in (tuning.py). own is
the share of the gate's weight that a task's inputs give in the end to its ranks, mean over tasks:
1 if the gate knows the task, 1 in as many as there are tasks if it knows nothing.

Schemes of the atlas, but those of common.SIMPLE, have the first five of the seeds, all others all;
two of them are compared over the seeds that both have.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..continual.learn import run_stream
from ..continual.metrics import acc, forgetting, plasticity
from ..roster import ROSTER, entry_on
from ..tools.results import Panel
from .common import ACC, PLACES, SIMPLE, cells_of, line, mean, stream_and_backbone, sums
from .study import Cell, Rows, Study
from .verdicts import Claim, Comparison, judged, shared

# Where the order of sums moves a mean by more than the seeds show, and whom: gates that jump.
REPEATED, ROUGH = "digit-worlds", ("lora_moe", "mora", "mora_detached")
REPEATS = 2
FEW = 5  # seeds of the atlas, but for SIMPLE, which README's table has


def cells(seeds: Sequence[int], quick: bool) -> list[Cell]:
    """The settings are in the cell, so that others are another cell. Of ROUGH, REPEATED is run
    again, its sums in other orders."""
    made = []
    for label, place in list(PLACES.items())[: 1 if quick else None]:
        rows = {}
        for name in place.names():
            entry = entry_on(name, label)
            rows[label_of(label, name)] = {
                **place.setting(quick),
                "name": name,
                "settings": dict(entry.settings),
                "lr": entry.lr,
            }
        many = {row: cell for row, cell in rows.items() if not few(cell["name"])}
        made += cells_of("atlas", rows, seeds[:FEW]) + cells_of("atlas", many, seeds[FEW:])
    again = [cell for cell in made if cell["stream"] == REPEATED and cell["name"] in ROUGH]
    return made + [cell | {"repeat": n} for n in range(1, REPEATS + 1) for cell in again]


def few(name: str) -> bool:
    """Whether it has FEW seeds."""
    return ROSTER[name].kind == "atlas" and name not in SIMPLE


def label_of(place: str, name: str) -> str:
    return f"{place}, {name}"


def measure(cell: Cell) -> dict[str, Any]:
    """What `compare` has of the same names."""
    repeat = cell.get("repeat", 0)
    stream, backbone = stream_and_backbone(
        cell["stream"], cell["tasks"], cell["seed"], cell.get("backbone"), repeat
    )
    entry = dataclasses.replace(ROSTER[cell["name"]], settings=cell["settings"])
    run = run_stream(
        entry.make,
        backbone,
        stream,
        cell["seed"],
        cell["epochs"],
        name=f"{cell['row']}, seed {cell['seed']}",
        how={"lr": cell["lr"], **sums(repeat)},
    )
    return {
        "acc": acc(run.matrix),
        "plasticity": plasticity(run.matrix),
        "forgetting": forgetting(run.matrix),
        "own": float(np.mean(np.diagonal(run.records["mass"][-1]))),
        "stored": run.stored,
        "read": run.read,
        "speaking": run.speaking,
    }


# What the numbers say


def names_in(rows: Rows, place: str) -> list[str]:
    """Who has a row in a place, in the roster's order."""
    return [name for name in ROSTER if label_of(place, name) in rows]


def places_of(rows: Rows) -> list[str]:
    return [place for place in PLACES if names_in(rows, place)]


def panels(rows: Rows) -> list[Panel]:
    made = []
    for place in places_of(rows):
        known = names_in(rows, place)
        accs = [rows[label_of(place, name)]["acc"] for name in known]
        made.append(
            Panel(
                title=place,
                xlabel="ACC",
                lines=[
                    line(name, [[v] for v in values])
                    for name, values in zip(known, accs, strict=True)
                ],
                names=known,
                kinds=[ROSTER[name].kind for name in known],
            )
        )
    return made


def finding(rows: Rows) -> str:
    """Who of the others than the privileged is first in each place, and over whom its lead is not
    supported (in a place, all these leads are one family of verdicts.py)."""
    parts = []
    for place in places_of(rows):
        own = [name for name in names_in(rows, place) if not ROSTER[name].privileged]
        runs = {name: rows.runs(label_of(place, name), "acc") for name in own}
        means = {name: statistics.fmean(runs[name][0]) for name in own}
        best, *others = order = sorted(means, key=means.__getitem__, reverse=True)
        leads = judged([shared(name, runs[best], runs[name], ACC) for name in others])
        near = [lead.label for lead in leads if lead.verdict != "supported"]
        level = f", its lead not supported over {', '.join(near)}" if near else ""
        at = order.index("mora") + 1
        mora = f"; mora {mean(runs['mora'][0])}, no. {at} of {len(order)}" if at > 1 else ""
        parts.append(f"on {place} {best} ({mean(runs[best][0])}{level}{mora})")
    return f"First of those that are not told the task or shown all at once: {'; '.join(parts)}."


def claims(rows: Rows) -> list[Claim]:
    def against(more: str, less: str) -> list[Comparison]:
        found = []
        for place in places_of(rows):
            ours, theirs = (rows.runs(label_of(place, name), "acc") for name in (more, less))
            found.append(Comparison(f"{place}: ACC, {more} - {less}", ours, theirs, ACC))
        return found

    return [
        Claim(
            8,
            "Self-activated ranks do better than routed LoRAs, each at its tuned settings.",
            against("mora", "lora_moe"),
        ),
        Claim(
            4,
            "The gradient through the gate helps, each at its tuned settings.",
            against("mora", "mora_detached"),
        ),
    ]


STUDY = Study(
    asks="Every learner in every place, at its tuned settings.",
    cells=cells,
    measure=measure,
    columns={
        "acc": "ACC",
        "plasticity": "plasticity",
        "forgetting": "forgetting",
        "own": "own",
        "stored": "stored",
        "read": "read",
        "speaking": "speaking",
    },
    panels=panels,
    finding=finding,
    claims=claims,
    seeds=range(10),
)
