"""Many tasks: does a mixture gain more than one dense update from being tuned on many tasks?

Mixture-of-Experts Meets Instruction Tuning: A Winning Combination for Large Language Models. Shen
et al., arXiv 2305.14705. Reconstructed from its abstract.

    tune      on n of the stream's nine rotations of digits, all at once: n = 0, 1, 2, 4, 8
    fine-tune on the rotation that is left, of which SHOTS images of each digit are shown
    gap(n)    accuracy there, the mixture's - the dense update's, equally many ranks speaking

Whatever n, tuning takes as many steps, but for 4 %: 40 epochs of one rotation are 5 of eight. Which
rotations come first, and which is left, the seed draws; those of a smaller n are among those of a
larger one. The same ranks learn in both stages, and nothing is frozen between them.

    lora            8 ranks
    lora_moe        32 ranks, 8 LoRAs of which 2 are used: 8 ranks
    mora            32 ranks, of which 8 are used
    lora, = stored  32 ranks: as much stored as those two, four times as much speaking

The paper's: without such tuning (n = 0; the nearest with one task, n = 1) a mixture does worse than
a dense model of as much computation, with it better. Here the claims are gap(0), gap(1) ≤ 0, and
gap(8) > 0, each up to what matters; and gap(1) < gap(8).

Fixed before any run: sizes, steps, arms. Settings are the roster's but for ranks and how many are
kept; MoRA has no delta, as no input is of no task.

Departures: the paper tunes language models by instructions, and then trains all weights; here
adapters beside a frozen network that knows upright digits are tuned, and digits are turned.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapt import adapt, count, parameters
from ..continual.learn import train
from ..continual.stream import Task, evaluate, usual_score
from ..roster import EPOCHS, SCHEMES
from ..tools.results import Panel
from ..tools.seeds import seeded
from .common import ACC, across, beside, cells_of, line, mean, settings_of, stream_and_backbone
from .study import Cell, Rows, Study
from .verdicts import Claim, Comparison

STREAM, ROTATIONS = "rotated-digits", 9
TUNED = (0, 1, 2, 4, 8)
SHOTS, BATCH = 5, 10  # of each digit; what is shown at once of so few
RANK, SPEAK, BLOCK = 32, 8, 4
DENSE, MOE = "lora", "lora_moe"
WIDE: dict[str, Any] = {"rank": RANK}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    DENSE: ("lora", {"rank": SPEAK}),
    MOE: ("lora_moe", WIDE | {"experts": RANK // BLOCK, "top_k": SPEAK // BLOCK}),
    "mora": ("mora", settings_of("mora") | WIDE | {"top_k": SPEAK, "delta": -1.0}),
    "lora, = stored": ("lora", WIDE),
}


def cells(seeds: Sequence[int], quick: bool) -> list[Cell]:
    rows = {
        label_of(arm, n): {"scheme": scheme, "settings": settings, "n": n}
        for n in TUNED
        for arm, (scheme, settings) in ARMS.items()
    }
    return cells_of("many_tasks", rows, seeds, epochs=1 if quick else EPOCHS)


def label_of(arm: str, n: int) -> str:
    return f"{arm}, tuned on {n}"


def pooled(tasks: Sequence[Task]) -> Task:
    """All that several tasks train and test on, as one."""
    data = [(t.x_train, t.y_train, t.x_test, t.y_test) for t in tasks]
    x, y, x_test, y_test = (torch.cat(part) for part in zip(*data, strict=True))
    return Task(", ".join(t.name for t in tasks), (x, y), (x_test, y_test))


def few(task: Task, seed: int) -> Task:
    """SHOTS images of each digit to train on."""
    order = torch.randperm(len(task.x_train), generator=torch.Generator().manual_seed(seed))
    x, y = task.x_train[order], task.y_train[order]
    chosen = torch.cat([(y == c).nonzero().flatten()[:SHOTS] for c in y.unique()])
    return Task(task.name, (x[chosen], y[chosen]), task.test)


def drawn(seed: int) -> Tensor:
    """The order in which the rotations are tuned on, and at its end the one that is left."""
    return torch.randperm(ROTATIONS, generator=torch.Generator().manual_seed(seed))


def measure(cell: Cell) -> dict[str, Any]:
    """acc: on the rotation left, after its few images. before: without them. tuned: on those tuned
    on, just after; nan of none. And numbers of parameters."""
    seed, n = cell["seed"], cell["n"]
    stream, backbone = stream_and_backbone(STREAM, ROTATIONS, seed)
    *order, left = (stream.tasks[t] for t in drawn(seed))
    model = copy.deepcopy(backbone)
    tuned = math.nan

    def acc(task: Task) -> float:
        with torch.no_grad():
            return evaluate(model, task.test, usual_score)

    with seeded(seed):
        adapt(model, SCHEMES[cell["scheme"]], model.targets, **cell["settings"])
        if n:
            together = pooled(order[:n])
            train(model, parameters(model), together, max(2 * cell["epochs"] // n, 1), seed)
            tuned = acc(together)
        before = acc(left)
        train(model, parameters(model), few(left, seed), cell["epochs"], seed, batch=BATCH)
    counted = {name: count(model)[name] for name in ("stored", "speaking")}
    return {"acc": acc(left), "before": before, "tuned": tuned, **counted}


# What the numbers say


def panels(rows: Rows) -> list[Panel]:
    return [
        Panel(
            title=title,
            xlabel="rotations tuned on",
            lines=[
                line(arm, across(rows, [label_of(arm, n) for n in TUNED], measure)) for arm in ARMS
            ],
            ylabel="accuracy on the rotation left",
            x=[*map(float, TUNED)],
        )
        for measure, title in (("acc", "after its few images"), ("before", "before them"))
    ]


def gap(rows: Rows, n: int) -> list[float]:
    """By seed."""
    both = (rows[label_of(arm, n)]["acc"] for arm in (MOE, DENSE))
    return [more - less for more, less in zip(*both, strict=True)]


def finding(rows: Rows) -> str:
    parts = []
    for n in TUNED:
        accs = {arm: rows[label_of(arm, n)]["acc"] for arm in ARMS}
        each = ", ".join(f"{arm} {mean(values)}" for arm, values in accs.items())
        parts.append(f"{n} ({each}: {MOE} {beside(accs[MOE], accs[DENSE])} {DENSE})")
    return f"Accuracy on a rotation of few images, by rotations tuned on: {'; '.join(parts)}."


def claims(rows: Rows) -> list[Claim]:
    accs = {(arm, n): rows[label_of(arm, n)]["acc"] for arm in (DENSE, MOE) for n in TUNED}
    most = TUNED[-1]
    return [
        Claim(
            13,
            "Tuned on no other task, or on one, a mixture does no better than a dense update.",
            [
                Comparison(
                    f"tuned on {n}: ACC, lora + .02 - lora_moe",
                    [v + ACC for v in accs[DENSE, n]],
                    accs[MOE, n],
                )
                for n in (0, 1)
            ],
        ),
        Claim(
            13,
            "Tuned on many tasks, it does better.",
            [
                Comparison(
                    f"tuned on {most}: ACC, lora_moe - lora",
                    accs[MOE, most],
                    accs[DENSE, most],
                    ACC,
                )
            ],
        ),
        Claim(
            13,
            "A mixture gains more from many tasks than a dense update does.",
            [Comparison(f"gap({most}) - gap(1)", gap(rows, most), gap(rows, 1), ACC)],
        ),
    ]


STUDY = Study(
    asks="Does a mixture gain more than a dense update from being tuned on many tasks?",
    cells=cells,
    measure=measure,
    columns={
        "acc": "ACC",
        "before": "before",
        "tuned": "tuned",
        "stored": "stored",
        "speaking": "speaking",
    },
    panels=panels,
    finding=finding,
    claims=claims,
)
