"""Grain: the same ranks, as a few whole LoRAs or as many fine experts."""

from collections.abc import Sequence

from ..roster import EPOCHS
from ..tools.results import Panel
from .common import (
    ACC,
    COLUMNS,
    MOE,
    TWO_STREAMS,
    across,
    beside,
    carried,
    cells_of,
    line,
    mean,
    with_settings,
)
from .study import Cell, Rows, Study
from .verdicts import Claim, Comparison

GRAINS = (1, 2, 4, 8)  # experts a task
RANK = 8  # ranks a task, so that the finest expert is a single rank


def cells(seeds: Sequence[int], quick: bool) -> list[Cell]:
    """A LoRA of 8 ranks a task, as 1, 2, 4 or 8 experts; 16 ranks speaking whatever the cut."""
    rows = {}
    for stream in TWO_STREAMS[: 1 if quick else 2]:
        start = {"stream": stream, "tasks": 3 if quick else 5}
        for experts in GRAINS:
            cut = with_settings(MOE, rank=RANK, experts=experts, top_k=2 * experts)
            rows[label_of(stream, experts)] = start | cut
    return cells_of("grain", rows, seeds, epochs=6 if quick else EPOCHS)


def label_of(stream: str, experts: int) -> str:
    return f"{stream}, {experts} of {RANK // experts} rank{'s' * (experts < RANK)}"


def streams_of(rows: Rows) -> list[str]:
    return [stream for stream in TWO_STREAMS if label_of(stream, 1) in rows]


def panels(rows: Rows) -> list[Panel]:
    return [
        Panel(
            title=measure,
            xlabel="experts a task, 8 ranks in all",
            lines=[
                line(stream, across(rows, [label_of(stream, e) for e in GRAINS], measure))
                for stream in streams_of(rows)
            ],
            ylabel=ylabel,
            x=[*GRAINS],
            log=True,
        )
        for measure, ylabel in (("acc", "ACC"), ("interference", "interference"))
    ]


def finding(rows: Rows) -> str:
    parts = []
    for stream in streams_of(rows):
        accs = {experts: rows[label_of(stream, experts)]["acc"] for experts in GRAINS}
        means = ", ".join(f"{mean(accs[experts])} ({experts})" for experts in GRAINS)
        parts.append(
            f"on {stream} ACC is {means}, single ranks {beside(accs[8], accs[1])} whole LoRAs"
        )
    return f"By experts a task: {'; '.join(parts)}."


def claims(rows: Rows) -> list[Claim]:
    return [
        Claim(
            10,
            "The same ranks cut into more experts do better (SMoRA's claim).",
            [
                Comparison(
                    f"{stream}: ACC, 8 experts a task - 1",
                    rows[label_of(stream, 8)]["acc"],
                    rows[label_of(stream, 1)]["acc"],
                    ACC,
                )
                for stream in streams_of(rows)
            ],
        )
    ]


STUDY = Study(
    asks="The same ranks, cut into fewer or more experts: which is better?",
    cells=cells,
    measure=carried,
    columns=COLUMNS | {name: name for name in ("stored", "read", "speaking")},
    panels=panels,
    finding=finding,
    claims=claims,
)
