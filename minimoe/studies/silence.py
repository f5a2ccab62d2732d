"""Silence: how near to its base a model stays on inputs of no task, at each threshold delta."""

from collections.abc import Sequence
from typing import Any

import torch

from ..continual import streams
from ..roster import EPOCHS
from ..tools.results import Panel
from .common import (
    ACC,
    LORA,
    MOE,
    MORA,
    PERMUTED,
    SHARE,
    across,
    cells_of,
    line,
    mean,
    run_cell,
    with_settings,
)
from .study import Cell, Rows, Study
from .verdicts import Claim, Comparison

DELTAS = (-1.0, 0.1, 0.2, 0.3, 0.4, 0.5)
INPUTS = {
    "upright": "upright digits, the base domain",
    "unseen": "digits under an unseen permutation",
    "noise": "uniform noise",
    "tasks": "the tasks themselves",
}
FOREIGN = ("upright", "unseen", "noise")  # of no task


def cells(seeds: Sequence[int], quick: bool) -> list[Cell]:
    arms = {"lora": LORA, "lora_moe": MOE}
    for delta in DELTAS:
        label = f"mora, {'no delta' if delta < 0 else f'delta {delta:g}'}"
        arms[label] = with_settings(MORA, delta=delta)
    start = {"stream": PERMUTED, "tasks": 2 if quick else 5}
    rows = {label: start | arm for label, arm in arms.items()}
    return cells_of("silence", rows, seeds, epochs=6 if quick else EPOCHS)


def measure(cell: Cell) -> dict[str, Any]:
    """What `carried` measures; the mean of ‖f(x) - f₀(x)‖ / ‖f₀(x)‖, f the features now and f₀ the
    backbone's, for each of INPUTS; and the accuracy that is left on the base domain."""
    measured, model, backbone = run_cell(cell)
    seen = streams.make(PERMUTED, cell["tasks"], cell["seed"])
    beyond = streams.make(PERMUTED, cell["tasks"] + 1, cell["seed"]).tasks[-1]
    assert seen.base is not None
    noise = torch.rand(
        len(beyond.x_test), 64, generator=torch.Generator().manual_seed(cell["seed"])
    )
    inputs = {
        "upright": seen.base.x_test,
        "unseen": beyond.x_test,
        "noise": 2 * noise - 1,
        "tasks": torch.cat([task.x_test for task in seen.tasks]),
    }
    with torch.no_grad():
        for name, x in inputs.items():
            base = backbone.features(x)
            distance = (model.features(x) - base).norm(dim=-1) / base.norm(dim=-1)
            measured[name] = distance.mean().item()
        right = model(seen.base.x_test).argmax(-1) == seen.base.y_test
    return measured | {"base_acc": right.double().mean().item()}


def panels(rows: Rows) -> list[Panel]:
    labels = [label for label in rows if label.startswith("mora")]
    x = [max(delta, 0.0) for delta in DELTAS]
    distances = [line(words, across(rows, labels, name)) for name, words in INPUTS.items()]
    accuracies = [
        line("the tasks learned", across(rows, labels, "acc")),
        line("the base domain", across(rows, labels, "base_acc")),
    ]
    return [
        Panel(title, "delta (0: none)", lines, ylabel, x)
        for title, ylabel, lines in (
            ("distance", "distance of features from the base model's", distances),
            ("accuracy", "accuracy", accuracies),
        )
    ]


def finding(rows: Rows) -> str:
    without, paper = rows["mora, no delta"], rows["mora, delta 0.2"]
    loras = rows["lora_moe"]
    parts = [
        f"{INPUTS[name]} from {mean(without[name])} to {mean(paper[name])}" for name in FOREIGN
    ]
    return (
        f"With delta .2 the distance from the base model goes, on {'; on '.join(parts)} (lora_moe: "
        f"{', '.join(mean(loras[name]) for name in FOREIGN)}); accuracy on "
        f"the base domain goes from {mean(without['base_acc'])} to {mean(paper['base_acc'])}, on "
        f"the tasks learned from {mean(without['acc'])} to {mean(paper['acc'])}."
    )


def claims(rows: Rows) -> list[Claim]:
    without, paper = rows["mora, no delta"], rows["mora, delta 0.2"]
    return [
        Claim(
            5,
            "delta .2 keeps the model nearer to its base on inputs of no task.",
            [
                Comparison(f"{INPUTS[name]}: without - with", without[name], paper[name], SHARE)
                for name in FOREIGN
            ],
        ),
        Claim(
            5,
            "With delta .2 MoRA is nearer to the base there than LoRA and LoRA-MoE.",
            [
                Comparison(f"{INPUTS[name]}: {arm} - mora", rows[arm][name], paper[name], SHARE)
                for name in FOREIGN
                for arm in ("lora", "lora_moe")
            ],
        ),
        Claim(
            5,
            "delta .2 costs the tasks learned nothing that matters.",
            [
                Comparison(
                    "ACC, with - without, + .02", [a + ACC for a in paper["acc"]], without["acc"]
                )
            ],
        ),
    ]


STUDY = Study(
    asks="How far from the base model are the answers to inputs of no task?",
    cells=cells,
    measure=measure,
    columns={"acc": "ACC", "base_acc": "base ACC", **{name: name for name in INPUTS}},
    panels=panels,
    finding=finding,
    claims=claims,
)
