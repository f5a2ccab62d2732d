"""Growth: fifty tasks, one after the other: accuracy, drift, and what a step costs by then.

The first twenty are the tasks of a stream of twenty. Beside the gates stand closed forms
(closed.py), which take no steps and have no layers that could drift.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapt import adapt, context, count, grow, parameters
from ..bench.clock import Clock
from ..continual.backbones import Backbone
from ..continual.digits import CLASSES
from ..continual.learn import BATCH, run_stream
from ..continual.metrics import acc, bwt, plasticity
from ..roster import EPOCHS, ROSTER, SCHEMES
from ..tools.results import Panel
from .common import (
    COLUMNS,
    GROWN,
    LORA,
    MOE,
    MORA,
    PERMUTED,
    SHARE,
    beside,
    carried,
    cells_of,
    line,
    mean,
    stream_and_backbone,
    with_settings,
)
from .study import Cell, Rows, Study
from .verdicts import Claim, Comparison

ARMS = {
    "lora": LORA,
    "lora_grown": GROWN,
    "lora_moe": MOE,
    "mora": MORA,
    "mora_detached": with_settings(MORA, detach_gate=True),
}
CLOSED = ("ridge", "own_ridge")
TASKS, EARLY = 50, 20


def cells(seeds: Sequence[int], quick: bool) -> list[Cell]:
    start = {"stream": PERMUTED, "tasks": 4 if quick else TASKS}
    rows = {name: start | arm for name, arm in ARMS.items()}
    rows |= {name: start | {"scheme": name} for name in CLOSED}
    return cells_of("growth", rows, seeds, epochs=3 if quick else EPOCHS)


def sizes(tasks: int) -> list[int]:
    """After how many tasks costs are measured."""
    return sorted({1, *range(5, tasks, 5), tasks})


def measure(cell: Cell) -> dict[str, Any]:
    """What `carried` measures, and what layers that have grown so far cost: parameters read, the
    time of a training step and the memory it holds, as multiples of the plain backbone's. early:
    ACC after EARLY tasks. Of closed forms the accuracies and what is stored."""
    if cell["scheme"] in CLOSED:
        return dict.fromkeys(STUDY.columns, math.nan) | _closed(cell)
    measured = carried(cell)
    grown = sizes(cell["tasks"])
    read, times, peaks = [], [], []
    x = torch.randn(BATCH, 64, generator=torch.Generator().manual_seed(cell["seed"]))
    y = torch.arange(BATCH) % CLASSES
    for tasks in grown:
        model = Backbone()
        adapt(model, SCHEMES[cell["scheme"]], targets=r"fc\d", **cell["settings"])
        for _ in range(tasks - 1 if cell["grows"] else 0):
            grow(model)
        plain = Backbone()
        steps = {
            "plain": _step(plain, list(plain.parameters()), x, y),
            "scheme": _step(model, parameters(model), x, y),
        }
        clock = Clock("cpu")
        for _ in range(3):
            for step in steps.values():
                step()
        rounds = [{name: clock(step) for name, step in steps.items()} for _ in range(31)]
        times.append(statistics.median(once["scheme"] / once["plain"] for once in rounds))
        peaks.append(clock.peak(steps["scheme"]) / clock.peak(steps["plain"]))
        read.append(float(count(model)["read"]))
    return measured | {
        "early": early(measured["seen"]),
        "sizes": [float(size) for size in grown],
        "reads": read,
        "steps": times,
        "peaks": peaks,
        "step": times[-1],
        "peak": peaks[-1],
    }


def early(seen: Sequence[float]) -> float:
    """Of the mean accuracies after each task, that after EARLY, or the last."""
    return seen[min(EARLY, len(seen)) - 1]


def _closed(cell: Cell) -> dict[str, Any]:
    stream, backbone = stream_and_backbone(cell["stream"], cell["tasks"], cell["seed"])
    make = ROSTER[cell["scheme"]].make
    run = run_stream(make, backbone, stream, cell["seed"], cell["epochs"], name=cell["row"])
    seen = [statistics.fmean(row[:t]) for t, row in enumerate(run.matrix) if t]
    return {
        "seen": seen,
        "early": early(seen),
        "acc": acc(run.matrix),
        "bwt": bwt(run.matrix),
        "plasticity": plasticity(run.matrix),
        "stored": run.stored,
        "read": run.read,
        "speaking": run.speaking,
    }


def _step(model: nn.Module, weights: Sequence[Tensor], x: Tensor, y: Tensor) -> Callable[[], Any]:
    """One training step, but for the optimiser's part."""

    def step() -> Any:
        with context(model) as batch:
            loss = F.cross_entropy(model(x), y) + batch.aux_loss
        return torch.autograd.grad(loss, weights, materialize_grads=True)

    return step


def panels(rows: Rows) -> list[Panel]:
    first = rows[next(iter(rows))]
    J = len(first["seen"][0])
    grown = [int(size) for size in first["sizes"][0]]
    made = []
    for title, ylabel, measure, x in (
        ("accuracy", "mean accuracy on the tasks seen so far", "seen", list(range(1, J + 1))),
        ("drift", "drift of old tasks' layer outputs", "drift", list(range(2, J + 1))),
        ("read", "parameters read for one token", "reads", grown),
        ("step", "training step, plain backbone = 1", "steps", grown),
        ("memory", "memory of a step, plain backbone = 1", "peaks", grown),
    ):
        lines = [line(arm, rows[arm][measure]) for arm in rows if measure in rows[arm]]
        made.append(Panel(title, "tasks learned", lines, ylabel, [*x]))
    return made


def finding(rows: Rows) -> str:
    J = len(rows["mora"]["seen"][0])
    parts = [f"{arm} {mean(rows[arm]['early'])} and {mean(rows[arm]['acc'])}" for arm in rows]
    mora = rows["mora"]
    return (
        f"After {min(EARLY, J)} and {J} tasks ACC is {', '.join(parts)}; in the end "
        f"self-activation is {beside(mora['acc'], rows['lora_moe']['acc'])} lora_moe and "
        f"{beside(mora['acc'], rows['own_ridge']['acc'])} each task's own ridge, its outputs for "
        f"old tasks have moved by {mean(mora['interference'])} (lora_moe's by "
        f"{mean(rows['lora_moe']['interference'])}), and a step of it takes {mean(mora['step'])} "
        "plain steps."
    )


def claims(rows: Rows) -> list[Claim]:
    moved = {arm: rows[arm]["interference"] for arm in rows}
    return [
        Claim(
            1,
            "MoRA moves old tasks' outputs less than LoRA and LoRA-MoE do.",
            [
                Comparison(f"interference, {arm} - mora", moved[arm], moved["mora"], SHARE)
                for arm in ("lora", "lora_grown", "lora_moe")
            ],
        ),
        Claim(
            6,
            "New ranks win the top k against trained old keys.",
            [
                Comparison(
                    "weight of the newest ranks on their task - were all ranks alike",
                    rows["mora"]["own"],
                    rows["mora"]["chance"],
                    SHARE,
                )
            ],
        ),
    ]


STUDY = Study(
    asks="What happens as tasks come, to accuracy, drift, time and memory?",
    cells=cells,
    measure=measure,
    columns={"early": f"ACC at {EARLY}", **COLUMNS, "own": "own", "stored": "stored"}
    | {"read": "read", "speaking": "speaking", "step": "step", "peak": "memory"},
    panels=panels,
    finding=finding,
    claims=claims,
)
