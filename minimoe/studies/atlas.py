"""Atlas: all that the roster lists, each on every stream where it can live, at its tuned settings.

The main table. Settings are those of tuned.json, which test data had no part in (tuning.py). The
streams of real answers have no class means; else all learners are everywhere.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from ..continual import streams
from ..continual.learn import make_backbone, run_stream
from ..continual.metrics import acc, forgetting, plasticity
from ..roster import EPOCHS, ROSTER, entry_on, names
from ..tools.results import Panel
from .common import ACC, STREAMS, cells_of, line, mean, stream_and_backbone, sums
from .study import Cell, Rows, Study
from .verdicts import Claim, Comparison, judged

REPEATED = "digit-worlds"  # where the order of sums moves a mean by more than the seeds show
REPEATS = 2


def cells(seeds: Sequence[int], quick: bool) -> list[Cell]:
    """The settings are in the cell, so that others are another cell. REPEATED is run again, its
    sums in other orders."""
    made = []
    for stream, tasks in list(STREAMS.items())[: 1 if quick else None]:
        rows = {}
        for name in names(make_backbone(streams.make(stream, 1))):
            entry = entry_on(name, stream)
            rows[label_of(stream, name)] = {
                "stream": stream,
                "tasks": 2 if quick else tasks,
                "name": name,
                "settings": dict(entry.settings),
                "lr": entry.lr,
            }
        made += cells_of("atlas", rows, seeds, epochs=2 if quick else EPOCHS)
    again = [cell for cell in made if cell["stream"] == REPEATED]
    return made + [cell | {"repeat": n} for n in range(1, REPEATS + 1) for cell in again]


def label_of(stream: str, name: str) -> str:
    return f"{stream}, {name}"


def measure(cell: Cell) -> dict[str, Any]:
    """What `compare` has of the same names."""
    repeat = cell.get("repeat", 0)
    stream, backbone = stream_and_backbone(
        cell["stream"], cell["tasks"], cell["seed"], repeat=repeat
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
        "stored": run.stored,
        "read": run.read,
        "speaking": run.speaking,
    }


# What the numbers say


def names_on(rows: Rows, stream: str) -> list[str]:
    """Who has a row on a stream, in the roster's order."""
    return [name for name in ROSTER if label_of(stream, name) in rows]


def streams_of(rows: Rows) -> list[str]:
    return [stream for stream in STREAMS if names_on(rows, stream)]


def panels(rows: Rows) -> list[Panel]:
    made = []
    for stream in streams_of(rows):
        known = names_on(rows, stream)
        accs = [rows[label_of(stream, name)]["acc"] for name in known]
        made.append(
            Panel(
                title=stream,
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
    """Who of the others than the privileged is first on each stream, and over whom its lead is not
    supported (on a stream, all these leads are one family of verdicts.py)."""
    parts = []
    for stream in streams_of(rows):
        own = [name for name in names_on(rows, stream) if ROSTER[name].kind != "privileged"]
        runs = {name: rows.runs(label_of(stream, name), "acc") for name in own}
        means = {name: statistics.fmean(runs[name][0]) for name in own}
        best, *others = order = sorted(means, key=means.__getitem__, reverse=True)
        leads = judged([Comparison(name, runs[best], runs[name], ACC) for name in others])
        near = [lead.label for lead in leads if lead.verdict != "supported"]
        level = f", its lead not supported over {', '.join(near)}" if near else ""
        place = order.index("mora") + 1
        mora = f"; mora {mean(runs['mora'][0])}, no. {place} of {len(order)}" if place > 1 else ""
        parts.append(f"on {stream} {best} ({mean(runs[best][0])}{level}{mora})")
    return f"First of those that are not told the task or shown all at once: {'; '.join(parts)}."


def claims(rows: Rows) -> list[Claim]:
    def against(more: str, less: str) -> list[Comparison]:
        found = []
        for stream in streams_of(rows):
            ours, theirs = (rows.runs(label_of(stream, name), "acc") for name in (more, less))
            found.append(Comparison(f"{stream}: ACC, {more} - {less}", ours, theirs, ACC))
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
    asks="Every learner on every stream, at its tuned settings.",
    cells=cells,
    measure=measure,
    columns={
        "acc": "ACC",
        "plasticity": "plasticity",
        "forgetting": "forgetting",
        "stored": "stored",
        "read": "read",
        "speaking": "speaking",
    },
    panels=panels,
    finding=finding,
    claims=claims,
    seeds=range(10),
)
