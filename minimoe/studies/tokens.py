"""Tokens: does MoRA's lead hold where a gate sees one token, and not the whole image?

Under the MLP a gate reads all of an image, and a task moves all of its images: whose image it is
can be read from it. Under attention a gate reads 4 pixels of 64, or one letter.

The three schemes pick their learning rate and their scale of four pairs, on images or sequences
that are neither trained on nor tested on: a quarter of each task's training data, held out. Each
seed picks anew, so the spread over seeds is that of the whole procedure. All others have the
roster's settings.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..continual.learn import LEARNING_RATE, Learner, Run, run_stream
from ..continual.metrics import acc, forgetting, plasticity
from ..continual.stream import Stream
from ..roster import EPOCHS, ROSTER
from ..tools.results import Panel
from .common import ACC, beside, cells_of, line, mean, stream_and_backbone
from .study import Cell, Rows, Study
from .verdicts import Claim, Comparison

RATES, SCALES = (3e-3, 1e-2), (1.0, 4.0)
HELD_OUT = 0.25
UNTRAINED = ("zero_shot", "class_mean", "trigram")
SCHEMES = ("lora", "lora_moe", "mora")
OTHERS = ("lora_grown", "zero_shot", "head_only", "joint", "oracle")

# where a gate sees an image, a patch, a letter: the stream, its model, epochs, who lives there
PLACES: dict[str, tuple[str, str | None, int, tuple[str, ...]]] = {
    "image": ("permuted-digits", "mlp", 10, (*SCHEMES, *OTHERS, "class_mean")),
    "patch": ("permuted-digits", "attention", 10, (*SCHEMES, *OTHERS, "class_mean")),
    "letter": ("sequences", None, EPOCHS, (*SCHEMES, *OTHERS, "trigram")),
}


def cells(seeds: Sequence[int], quick: bool) -> list[Cell]:
    """A row for each learner in each place. What it may pick is in the cell."""
    rows = {}
    for place, (stream, backbone, epochs, learners) in list(PLACES.items())[: 1 if quick else 3]:
        for name in learners:
            picks = name in SCHEMES and not quick
            rates, scales = (RATES, SCALES) if picks else ([LEARNING_RATE], [1.0])
            rows[f"{place}, {name}"] = {
                "stream": stream,
                "backbone": backbone,
                "tasks": 2 if quick else 3,
                "scheme": name,
                "settings": dict(ROSTER[name].settings),
                "epochs": 2 if quick else epochs,
                "rates": list(rates),
                "scales": list(scales),
            }
    return cells_of("tokens", rows, seeds, epochs=EPOCHS)  # where a row does not say otherwise


def measure(cell: Cell) -> dict[str, Any]:
    """On the test data, at the learning rate and the scale that are best on what is held out.

    acc, forgetting; learned: plasticity, mean accuracy on a task just after it came; own: the share
    of the gate's weight that a task's inputs give to its ranks in the end, chance being 1 in as
    many as there are tasks; lr, scale: what was picked, of what there is; held: mean accuracy on
    what is held out.
    """
    pairs = [(lr, scale) for lr in cell["rates"] for scale in cell["scales"]]
    tried = {pair: trial for pair in pairs if (trial := _trial(cell, *pair)) is not None}
    if not tried:
        raise FloatingPointError(f"{cell['row']}, seed {cell['seed']}: no setting can be trained")
    picked = max(tried, key=lambda pair: tried[pair][0])
    held, run = tried[picked]
    a, mass, J = np.array(run.matrix), np.array(run.records["mass"]), cell["tasks"]
    return {
        "acc": acc(a),
        "learned": plasticity(a),
        "forgetting": forgetting(a),
        "own": float(np.mean([mass[J, t, t] for t in range(J)])),
        "lr": math.nan if cell["scheme"] in UNTRAINED else picked[0],
        "scale": picked[1] if "scale" in cell["settings"] else math.nan,
        "held": held,
    }


def _trial(cell: Cell, lr: float, scale: float) -> tuple[float, Run] | None:
    """Mean accuracy on what is held out, and the run; None if a loss was no number."""
    whole, backbone = stream_and_backbone(
        cell["stream"], cell["tasks"], cell["seed"], cell["backbone"]
    )
    stream, held_out = split(whole, cell["seed"])
    learners: list[Learner] = []

    def make(model: Any, stream: Stream) -> Learner:
        changes = cell["settings"] | {"scale": scale}  # of which it takes those that it has
        learners.append(ROSTER[cell["scheme"]].make(model, stream, **changes))
        return learners[0]

    try:
        run = run_stream(make, backbone, stream, cell["seed"], cell["epochs"], how={"lr": lr})
    except FloatingPointError:
        return None
    return statistics.fmean(learners[0].row(held_out, cell["tasks"])), run


def split(stream: Stream, seed: int) -> tuple[Stream, Stream]:
    """The stream with less to train on, and with the rest of that to be tested on."""
    kept, held_out = [], []
    for task in stream.tasks:
        n = len(task.x_train)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        rest, some = order.split([n - round(HELD_OUT * n), round(HELD_OUT * n)])
        train, held = ((task.x_train[rows], task.y_train[rows]) for rows in (rest, some))
        kept.append(dataclasses.replace(task, train=train))
        held_out.append(dataclasses.replace(task, train=train, test=held))
    return dataclasses.replace(stream, tasks=kept), dataclasses.replace(stream, tasks=held_out)


def places_of(rows: Rows) -> list[str]:
    return [place for place in PLACES if f"{place}, mora" in rows]


def panels(rows: Rows) -> list[Panel]:
    found = []
    for place in places_of(rows):
        names = [name for name in PLACES[place][-1] if f"{place}, {name}" in rows]
        found.append(
            Panel(
                title=f"a gate sees a{'n' if place == 'image' else ''} {place}",
                xlabel="ACC",
                lines=[line(n, [[v] for v in rows[f"{place}, {n}"]["acc"]]) for n in names],
                names=names,
                kinds=[ROSTER[name].kind for name in names],
            )
        )
    return found


def finding(rows: Rows) -> str:
    parts = []
    for place in places_of(rows):
        accs = {name: rows[f"{place}, {name}"]["acc"] for name in (*SCHEMES, "oracle")}
        own = rows[f"{place}, mora"]["own"]
        parts.append(
            f"{place}: mora {mean(accs['mora'])} is {beside(accs['mora'], accs['lora_moe'])} "
            f"lora_moe {mean(accs['lora_moe'])} and {beside(accs['mora'], accs['lora'])} lora "
            f"{mean(accs['lora'])}, told LoRAs reach {mean(accs['oracle'])}, and {mean(own)} of "
            "MoRA's weight is on the task's own ranks"
        )
    return f"By what a gate sees, ACC after the last task: {'; '.join(parts)}."


def claims(rows: Rows) -> list[Claim]:
    return [
        Claim(
            8,
            "Self-activated ranks do better than routed experts, each at its own lr and scale.",
            [
                Comparison(
                    f"{place}: ACC, mora - lora_moe",
                    rows[f"{place}, mora"]["acc"],
                    rows[f"{place}, lora_moe"]["acc"],
                    ACC,
                )
                for place in places_of(rows)
            ],
        )
    ]


STUDY = Study(
    asks="Does MoRA's lead hold where a gate sees a patch or a letter, and not the whole image?",
    cells=cells,
    measure=measure,
    columns={
        "acc": "ACC",
        "learned": "learned",
        "forgetting": "forgetting",
        "own": "own",
        "lr": "lr",
        "scale": "scale",
    },
    panels=panels,
    finding=finding,
    claims=claims,
)
