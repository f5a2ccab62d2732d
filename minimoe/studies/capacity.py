"""Capacity: do more ranks, as many of them speaking, help to remember, and do they help to reason?

Mixture of Parrots: Experts improve memorization more than reasoning. Jelassi et al., arXiv
2410.19034; and on the same question arXiv 2508.18672. Reconstructed from their abstracts.

    x ~ N(0, I) (D,)                N inputs, N ≫ D
    memory       y drawn at random of O classes; what counts is accuracy on these same inputs
    reasoning    y = x V P          V (D, Q) and P (Q, O) orthonormal, Q > K; what counts is the
                                    share explained on other inputs

Both train with the same number of steps, on one linear layer with W0 = 0, beside which R ranks are
stored and K of them are used for an input: those of MoRA, or single ranks under LoRA-MoE's router.
All R are live at once. At R = K all ranks are used for all inputs.

By algebra one linear map of K ranks explains K / Q of the reasoning: what a gate adds is all above
that. It is no limit of a gate, as each region of inputs may have K ranks of its own; but in Q
dimensions there are many regions, so much more of R should gain little more. That "the second moves
with K alone" is what is tested.

Fixed before any run: sizes, steps, R and K. Settings are the roster's but for ranks; MoRA has no
delta: of 512 scores whose norm is 1 nearly none would reach it.

Axes: N inputs, D in, O out, R ranks in all, r = 8 ranks at birth, K kept, Q rank of the teacher.
Departures: the papers train transformers, and let them reason in graphs, in mathematics and in
words. Here reasoning is one linear rule for all inputs, wider than what is used for any one of
them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..adapt import adapt, adapters, count, parameters
from ..adapter import Adapter
from ..continual.learn import train
from ..continual.linear import Linear
from ..continual.stream import Task, evaluate, usual_score
from ..roster import SCHEMES
from ..tools.results import Panel
from ..tools.seeds import seeded
from .common import ACC, SHARE, across, cells_of, line, mean, settings_of
from .study import Cell, Rows, Study
from .verdicts import Claim, Comparison

D, O, Q, N = 32, 32, 16, 2048
BIRTH = 8
STORED, SPEAKING = (8, 32, 128, 512), (4, 8)
EPOCHS = 40  # 1,280 steps
KINDS = ("memory", "reasoning")
GATES: dict[str, dict[str, Any]] = {
    "mora": settings_of("mora") | {"delta": -1.0},
    "lora_moe": settings_of("lora_moe") | {"experts": BIRTH},
}


def cells(seeds: Sequence[int], quick: bool) -> list[Cell]:
    rows = {
        label_of(kind, gate, K, R): {
            "kind": kind,
            "scheme": gate,
            "settings": settings | {"rank": BIRTH, "top_k": K},
            "R": R,
        }
        for kind in KINDS
        for gate, settings in GATES.items()
        for K in SPEAKING
        for R in (STORED[:2] if quick else STORED)
    }
    return cells_of("capacity", rows, seeds, epochs=2 if quick else EPOCHS)


def label_of(kind: str, gate: str, K: int, R: int) -> str:
    return f"{kind}, {gate}, {K} of {R}"


def asked(kind: str, seed: int) -> Task:
    """What is to be remembered, or worked out."""
    draw = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=draw)
    x, x_test = normal(N, D), normal(N, D)
    if kind == "memory":
        shown = x, torch.randint(O, (N,), generator=draw)
        return Task(kind, shown, shown)
    V, P = torch.linalg.qr(normal(D, Q)).Q, torch.linalg.qr(normal(O, Q)).Q.T
    return Task(kind, (x, x @ V @ P), (x_test, x_test @ V @ P))


def widen(layer: Adapter, R: int) -> None:
    """Give a layer without frozen ranks R of them, all live, as R / r tasks would add them."""
    parts = [layer.fresh() for _ in range(R // layer.rank)]
    for name in parts[0]:
        setattr(layer, name, nn.Parameter(torch.cat([part[name] for part in parts])))


def measure(cell: Cell) -> dict[str, Any]:
    """score: accuracy, or the share explained; and numbers of parameters."""
    task = asked(cell["kind"], cell["seed"])
    with seeded(cell["seed"]):
        model = Linear(D, O)
        nn.init.zeros_(model.fc1.weight)
        adapt(model, SCHEMES[cell["scheme"]], model.targets, **cell["settings"])
        for _, layer in adapters(model):
            widen(layer, cell["R"])
        train(model, parameters(model), task, cell["epochs"], cell["seed"])
    with torch.no_grad():
        score = evaluate(model, task.test, usual_score)
    counted = count(model)
    return {"score": score, "stored": counted["stored"], "speaking": counted["speaking"]}


# What the numbers say


def sizes(rows: Rows) -> list[int]:
    return [R for R in STORED if label_of("memory", "mora", SPEAKING[0], R) in rows]


def panels(rows: Rows) -> list[Panel]:
    x = sizes(rows)
    return [
        Panel(
            title=f"{gate}, single ranks",
            xlabel="ranks stored, R",
            lines=[
                line(
                    f"{kind}, {K} speak",
                    across(rows, [label_of(kind, gate, K, R) for R in x], "score"),
                )
                for kind in KINDS
                for K in SPEAKING
            ],
            ylabel="accuracy on what was shown; share explained",
            x=[*map(float, x)],
            log=True,
        )
        for gate in GATES
    ]


def finding(rows: Rows) -> str:
    x, parts = sizes(rows), []
    for kind, gate, K in ((k, g, s) for g in GATES for k in KINDS for s in SPEAKING):
        ends = (mean(rows[label_of(kind, gate, K, R)]["score"]) for R in (x[0], x[-1]))
        parts.append(f"{gate}'s {kind}, {K} speaking, from {' to '.join(ends)}")
    least = ", ".join(f"{K / Q:.3f}"[1:] for K in SPEAKING)
    return (
        f"From {x[0]} to {x[-1]} ranks stored goes {'; '.join(parts)}. (One linear map of as many "
        f"ranks explains {least} of the reasoning.)"
    )


def claims(rows: Rows) -> list[Claim]:
    least, *_, most = sizes(rows)

    def scores(kind: str, gate: str, K: int, R: int) -> list[float]:
        return rows[label_of(kind, gate, K, R)]["score"]

    every = [(gate, K) for gate in GATES for K in SPEAKING]
    few, many = SPEAKING
    return [
        Claim(
            12,
            "More experts, as many of them active, memorise more.",
            [
                Comparison(
                    f"{gate}, {K} speak: accuracy, {most} stored - {least}",
                    scores("memory", gate, K, most),
                    scores("memory", gate, K, least),
                    ACC,
                )
                for gate, K in every
            ],
        ),
        Claim(
            12,
            "They do not reason better.",
            [
                Comparison(
                    f"{gate}, {K} speak: explained, {least} stored + .05 - {most}",
                    [v + SHARE for v in scores("reasoning", gate, K, least)],
                    scores("reasoning", gate, K, most),
                )
                for gate, K in every
            ],
        ),
        Claim(
            12,
            "To reason better takes more that is active.",
            [
                Comparison(
                    f"{gate}, {R} stored: explained, {many} speak - {few}",
                    scores("reasoning", gate, many, R),
                    scores("reasoning", gate, few, R),
                    SHARE,
                )
                for gate in GATES
                for R in (least, most)
            ],
        ),
    ]


STUDY = Study(
    asks="Do ranks that are stored and not used help to remember, or to reason?",
    cells=cells,
    measure=measure,
    columns={"score": "score", "stored": "stored", "speaking": "speaking"},
    panels=panels,
    finding=finding,
    claims=claims,
)
