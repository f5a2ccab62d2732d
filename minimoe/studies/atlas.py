"""Atlas: all that the roster lists, each through four streams, at the roster's settings."""

import functools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from ..continual.backbones import Backbone
from ..continual.learn import run_stream
from ..continual.metrics import acc, forgetting
from ..roster import EPOCHS, ROSTER, names
from ..tools.results import Panel
from .common import ACC, cells_of, line, mean, stream_and_backbone, sums
from .study import Cell, Rows, Study
from .verdicts import Claim, Comparison, judged

STREAMS = {
    "permuted-digits": "permuted",
    "rotated-digits": "rotated",
    "split-digits": "split",
    "digit-worlds": "worlds",
}


REPEATED = "digit-worlds"  # where the order of sums moves a mean by more than the seeds show
REPEATS = 2


def cells(seeds: Sequence[int], quick: bool) -> list[Cell]:
    """One row for each name of the roster that can live in a Backbone. Its settings
    are in the cell, so that other settings are another cell. REPEATED is run again, its sums in
    other orders."""
    tasks = dict.fromkeys(list(STREAMS)[: 2 if quick else 4], 2 if quick else 5)
    rows = {
        name: {"streams": tasks, "settings": dict(ROSTER[name].settings)}
        for name in names(Backbone())
    }
    made = cells_of("atlas", rows, seeds, epochs=2 if quick else EPOCHS)
    if quick:
        return made
    return made + [
        cell | {"streams": {REPEATED: tasks[REPEATED]}, "repeat": repeat}
        for repeat in range(1, REPEATS + 1)
        for cell in made
    ]


def measure(cell: Cell) -> dict[str, Any]:
    """Final accuracy and forgetting on each stream, of those that the cell names."""
    measured = {}
    for name in STREAMS:
        measured[f"acc {name}"] = measured[f"forgetting {name}"] = math.nan
    make = functools.partial(ROSTER[cell["row"]].make, **cell["settings"])
    for name, tasks in cell["streams"].items():
        repeat = cell.get("repeat", 0)
        stream, backbone = stream_and_backbone(name, tasks, cell["seed"], repeat=repeat)
        label = f"{cell['row']}, {name}, seed {cell['seed']}"
        a = run_stream(
            make, backbone, stream, cell["seed"], cell["epochs"], name=label, how=sums(repeat)
        ).matrix
        measured[f"acc {name}"], measured[f"forgetting {name}"] = acc(a), forgetting(a)
    return measured


def streams_of(rows: Rows) -> list[str]:
    one = rows[next(iter(rows))]
    return [name for name in STREAMS if not any(map(math.isnan, one[f"acc {name}"]))]


def panels(rows: Rows) -> list[Panel]:
    return [
        Panel(
            title=name,
            xlabel="ACC",
            lines=[line(row, [[value] for value in rows[row][f"acc {name}"]]) for row in rows],
            names=list(rows),
            kinds=[ROSTER[row].kind for row in rows],
        )
        for name in streams_of(rows)
    ]


def finding(rows: Rows) -> str:
    """Who of the others than the privileged is first on each stream, and over whom its lead is not
    supported (on a stream, all these leads are one family of verdicts.py)."""
    parts = []
    for name in streams_of(rows):
        accs = {row: rows[row][f"acc {name}"] for row in rows if ROSTER[row].kind != "privileged"}
        means = {row: statistics.fmean(values) for row, values in accs.items()}
        order = sorted(means, key=means.__getitem__, reverse=True)
        best = order[0]
        runs = {row: rows.runs(row, f"acc {name}") for row in accs}
        leads = judged([Comparison(row, runs[best], runs[row], ACC) for row in accs if row != best])
        near = [lead.label for lead in leads if lead.verdict != "supported"]
        level = f", its lead not supported over {', '.join(near)}" if near else ""
        place = order.index("mora") + 1
        own = f"; mora {mean(accs['mora'])}, no. {place}" if best != "mora" else ""
        parts.append(f"on {name} {best} ({mean(accs[best])}{level}{own})")
    return (
        f"First of {len(accs)} that are not told the task or shown all at once: {'; '.join(parts)}."
    )


def claims(rows: Rows) -> list[Claim]:
    """Of the paper's list, none: claim 8 is put at equal parameters, in routing."""
    return []


STUDY = Study(
    asks="Every scheme on four streams: final accuracy, and forgetting (F).",
    cells=cells,
    measure=measure,
    columns={
        f"{measure} {name}": f"{mark}{short}"
        for measure, mark in (("acc", ""), ("forgetting", "F "))
        for name, short in STREAMS.items()
    },
    panels=panels,
    finding=finding,
    claims=claims,
)
