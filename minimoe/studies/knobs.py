"""Knobs: MoRA's settings, one turned at a time, the sign of its score, and its gate's gradient."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..adapter import Adapter, Gate
from ..mora import MoRA
from ..roster import EPOCHS, SCHEMES
from ..sparse import TINY, widened
from ..tools.results import Panel
from .common import (
    COLUMNS,
    MORA,
    TWO_STREAMS,
    across,
    beside,
    carried,
    cells_of,
    line,
    mean,
    with_settings,
)
from .study import Cell, Claim, Comparison, Rows, Study

KNOBS: dict[str, list[float]] = {
    "tau": [0.01, 0.03, 0.1, 0.3, 1.0],
    "top_k": [1, 2, 4, 8, 16, 40],
    "delta": [-1.0, 0.1, 0.2, 0.3, 0.4],
    "rank": [2, 4, 8, 16],
}
USUAL, ABSOLUTE, DETACHED = "as compare has it", "absolute score", "detached gate"


class AbsoluteMoRA(MoRA):
    """MoRA with the size of s as its score, |z| / ‖z‖: a rank that x points away from speaks as
    loudly as one that x points to."""

    def gate(self, x: Tensor) -> Gate:
        z = self.project(x, "A")  # (..., R)
        s = F.normalize(widened(z), dim=-1, eps=TINY).abs()  # eq. 5, without its sign
        s, idx = s.topk(self.kept)  # eq. 6, (..., k)
        w = (s / self.tau).softmax(-1)  # eq. 7
        if not self.training:
            w = w * (s >= self.delta)  # eq. 8
        return Gate(idx, w, z.gather(-1, idx))


CLASSES: Mapping[str, type[Adapter]] = SCHEMES | {"absolute": AbsoluteMoRA}


def cells(seeds: Sequence[int], quick: bool) -> list[Cell]:
    rows = {}
    for stream in TWO_STREAMS[: 1 if quick else 2]:
        usual = MORA | {"stream": stream, "tasks": 3 if quick else 5}
        rows[f"{stream}, {USUAL}"] = usual
        for knob, values in KNOBS.items():
            for value in values:
                if value != usual["settings"][knob]:
                    rows[f"{stream}, {knob} {value:g}"] = with_settings(usual, **{knob: value})
        rows[f"{stream}, {ABSOLUTE}"] = usual | {"scheme": "absolute"}
        rows[f"{stream}, {DETACHED}"] = with_settings(usual, detach_gate=True)
    return cells_of("knobs", rows, seeds, epochs=6 if quick else EPOCHS)


def measure(cell: Cell) -> dict[str, Any]:
    """What `carried` measures; "absolute" is AbsoluteMoRA."""
    return carried(cell, CLASSES)


def label_of(rows: Rows, stream: str, knob: str, value: float) -> str:
    """The row in which a knob has that value: one of its own, or the usual one."""
    label = f"{stream}, {knob} {value:g}"
    return label if label in rows else f"{stream}, {USUAL}"


def streams_of(rows: Rows) -> list[str]:
    return [stream for stream in TWO_STREAMS if f"{stream}, {USUAL}" in rows]


def panels(rows: Rows) -> list[Panel]:
    made = []
    for knob, values in KNOBS.items():
        lines = [
            line(
                f"{stream}, {words}",
                across(rows, [label_of(rows, stream, knob, v) for v in values], measure),
            )
            for stream in streams_of(rows)
            for measure, words in (("acc", "ACC"), ("interference", "interference"))
        ]
        made.append(
            Panel(
                title=knob,
                xlabel=f"{knob}{' (0: none)' * (knob == 'delta')}, the rest as compare has it",
                lines=lines,
                ylabel="ACC, and interference",
                x=[max(value, 0.0) for value in values],
                log=knob != "delta",
            )
        )
    return made


def finding(rows: Rows) -> str:
    parts = []
    for stream in streams_of(rows):
        best = []
        for knob, values in KNOBS.items():
            accs = {v: rows[label_of(rows, stream, knob, v)]["acc"] for v in values}
            means = {value: statistics.fmean(acc) for value, acc in accs.items()}
            top = max(means, key=means.__getitem__)
            best.append(f"{knob} {top:g} ({mean(accs[top])})")
        usual, absolute, detached = (
            rows[f"{stream}, {arm}"]["acc"] for arm in (USUAL, ABSOLUTE, DETACHED)
        )
        parts.append(
            f"on {stream}, turning one knob at a time, ACC is highest at {', '.join(best)}, and "
            f"from {mean(usual)} an absolute score makes {mean(absolute)} "
            f"({beside(absolute, usual)} the signed one), a detached gate {mean(detached)} "
            f"({beside(detached, usual)} the exact one)"
        )
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def claims(rows: Rows) -> list[Claim]:
    def turned(label: str, measure: str, knob: str, more: float, less: float) -> list[Comparison]:
        return [
            Comparison(
                f"{stream}: {label}",
                rows[label_of(rows, stream, knob, more)][measure],
                rows[label_of(rows, stream, knob, less)][measure],
            )
            for stream in streams_of(rows)
        ]

    def arms(label: str, more: str, less: str) -> list[Comparison]:
        return [
            Comparison(f"{s}: {label}", rows[f"{s}, {more}"]["acc"], rows[f"{s}, {less}"]["acc"])
            for s in streams_of(rows)
        ]

    return [
        Claim(
            4,
            "A lower tau makes routing more decided.",
            turned("ambiguity, tau .1 - .01", "ambiguity", "tau", 0.1, 0.01)
            + turned("ambiguity, tau 1 - .1", "ambiguity", "tau", 1.0, 0.1),
        ),
        Claim(
            4,
            "A signed score does better than an absolute one.",
            arms("ACC, signed - absolute", USUAL, ABSOLUTE),
        ),
        Claim(
            4,
            "The gradient through the gate helps (nothing is detached).",
            arms("ACC, exact - detached", USUAL, DETACHED),
        ),
        Claim(
            4,
            "A few ranks do better than all of them.",
            turned("ACC, top_k 8 - 40", "acc", "top_k", 8, 40),
        ),
    ]


STUDY = Study(
    asks="What do tau, top_k, delta, rank, the score's sign and the gate's gradient do?",
    cells=cells,
    measure=measure,
    columns=COLUMNS | {"read": "read", "speaking": "speaking"},
    panels=panels,
    finding=finding,
    claims=claims,
)
