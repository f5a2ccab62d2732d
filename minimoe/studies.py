"""The studies: what is run, what is measured, what the numbers are asked (study.py runs them).

All are carried through toy streams with the settings of `minimoe compare` (compare.TOY), but for
what a row's label says.
"""

import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import streams
from .adapt import adapt, aux_loss, grow, parameters
from .bench import Clock
from .compare import LEARNERS, TOY
from .learn import BATCH, Adapted, Backbone, carry, pretrain
from .lora import Adapter, LoRA
from .lora_moe import LoRAMoE
from .metrics import acc, bwt, forgetting
from .mora import MoRA
from .probe import PROBLEMS
from .study import Cell, Claim, Comparison, Rows, Study

RANK, TAU, DELTA = TOY["rank"], TOY["tau"], TOY["delta"]
LORA: Cell = {"scheme": "lora", "grows": False, "settings": {"rank": RANK}}
GROWN: Cell = {**LORA, "grows": True}
MOE: Cell = {
    "scheme": "lora_moe",
    "grows": True,
    "settings": {"rank": RANK, "top_k": TOY["top_k"]["lora_moe"]},
}
MORA: Cell = {
    "scheme": "mora",
    "grows": True,
    "settings": {"rank": RANK, "top_k": TOY["top_k"]["mora"], "tau": TAU, "delta": DELTA},
}


class AbsoluteMoRA(MoRA):
    """MoRA with the size of s as its score: s = |z| / ‖z‖, so that a rank that x points away from
    speaks as loudly as one that it points to."""

    def gate(self, x: Tensor) -> tuple[Tensor | None, Tensor | float, Tensor]:
        z = self.project(x, "A")  # (..., R)
        s, idx = F.normalize(z, dim=-1).abs().topk(min(self.top_k, self.ranks))
        w = (s / self.tau).softmax(-1)
        if not self.training:
            w = w * (s >= self.delta)
        return idx, w, z.gather(-1, idx)


CLASSES: dict[str, type[Adapter]] = {
    "lora": LoRA,
    "lora_moe": LoRAMoE,
    "mora": MoRA,
    "absolute": AbsoluteMoRA,
}


def cells_of(
    study: str, rows: dict[str, dict[str, Any]], seeds: list[int], epochs: int
) -> list[Cell]:
    """Every row with every seed; seeds in order, so that a study cut short has whole rows."""
    return [
        {"study": study, "row": row, "seed": seed, "epochs": epochs, **rest}
        for seed in seeds
        for row, rest in rows.items()
    ]


@functools.lru_cache(maxsize=4)
def _start(stream: str, tasks: int, seed: int) -> tuple[streams.Stream, Backbone]:
    made = streams.make(stream, tasks, seed)
    return made, pretrain(made, seed)


def carried(cell: Cell) -> dict[str, Any]:
    """Carry the cell's scheme through its stream: ACC, BWT, the three problems, and, after each
    task t, "seen": mean accuracy on the tasks so far; "drift" of the old ones' layer outputs.

    "own": what share of the gate's weight a task's inputs give to the ranks it has just added, mean
    over tasks after the first; "chance", what it were if all ranks weighed the same. "back" and
    "anew": the shares that inputs of the last task give to the first task's ranks and to the last
    one's; "again": accuracy on the last task before it is learned. (On repeat, the last task is the
    first.)
    """
    return _carried(cell)[0]


def _carried(cell: Cell) -> tuple[dict[str, Any], Backbone, Backbone]:
    """What `carried` says, the model at the end, and the backbone that it started from."""
    stream, backbone = _start(cell["stream"], cell["tasks"], cell["seed"])
    kept: list[Adapted] = []

    def make(model: Backbone, stream: streams.Stream) -> Adapted:
        scheme = CLASSES[cell["scheme"]]
        kept.append(Adapted(model, scheme, grows=cell["grows"], **cell["settings"]))
        return kept[0]

    label = f"{cell['row']}, seed {cell['seed']}"
    run = carry(make, backbone, stream, cell["seed"], cell["epochs"], name=label)
    R, T = np.array(run["matrix"]), cell["tasks"]
    mass, drift = np.array(run["found"]["mass"]), np.array(run["found"]["drift"])
    found = {
        "acc": acc(R),
        "bwt": bwt(R),
        **{name: problem(run["found"]) for name, problem in PROBLEMS.items()},
        "stored": run["stored"],
        "active": run["active"],
        "own": float(np.mean([mass[t, t - 1, t - 1] for t in range(2, T + 1)])),
        "chance": statistics.fmean(1 / t for t in range(2, T + 1)),
        "back": float(mass[T, T - 1, 0]),
        "anew": float(mass[T, T - 1, T - 1]),
        "again": float(R[T - 1, T - 1]),
        "seen": [float(R[t, :t].mean()) for t in range(1, T + 1)],
        "drift": [float(drift[t, : t - 1].mean()) for t in range(2, T + 1)],
    }
    return found, kept[0].model, backbone


# Words and numbers for findings


def mean(values: list[float]) -> str:
    """As in a table: .913"""
    return f"{statistics.fmean(values):.3f}".replace("0.", ".", 1)


def beside(a: list[float], b: list[float] | float) -> str:
    """Where a stands: "above", "below", or "not told from" b, by Comparison's rule."""
    words = {"holds": "above", "does not hold": "below", "mixed": "not told from"}
    return words[Comparison("", a, b).verdict]


def line(label: str, seeds: list[list[float]]) -> dict[str, Any]:
    """One line of a panel: values (seeds, x)."""
    values = np.array(seeds, dtype=float)
    std = values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
    return {"label": label, "mean": values.mean(0).tolist(), "std": std.tolist()}


def across(rows: Rows, labels: list[str], measure: str) -> list[list[float]]:
    """A measure over several rows, as (seeds, rows)."""
    return [list(seed) for seed in zip(*(rows[label][measure] for label in labels), strict=True)]


# routing

SELF = "self-activated ranks"
RANKS_STORED, RANKS_ACTIVE = "router over ranks, = stored", "router over ranks, = active"
LORAS_STORED, LORAS_ACTIVE = "router over LoRAs, = stored", "router over LoRAs, = active"
BALANCED = "router over LoRAs, balance .01"
LONG = "permuted-digits"


def routing_arms(T: int) -> dict[str, dict[str, Any]]:
    """Each arm's scheme, for a stream of T tasks.

    In units of Σ D = Σ O = 320 over the layers, ranks store 2 r a task and a router one row of 1
    per expert: r = 9 self-activated ranks store 18 a task, 6 ranks with a row each 6 · 3 = 18, and
    a LoRA of 9 with its row 19. One token reads 9 T + 9 of the self-activated, K = 9. Of ranks
    under a router 9 T + 2 K: K = 4. Of LoRAs T + 18 k: k = (8 T + 9) / 18.
    """

    def moe(rank: int, top_k: int, experts: int = 1, balance: float = 0.0) -> dict[str, Any]:
        settings = {"rank": rank, "top_k": top_k, "experts": experts, "balance": balance}
        return {"scheme": "lora_moe", "grows": True, "settings": settings}

    own = {"rank": 9, "top_k": 9, "tau": TAU, "delta": DELTA}
    return {
        SELF: {"scheme": "mora", "grows": True, "settings": own},
        RANKS_STORED: moe(6, 9, experts=6),
        RANKS_ACTIVE: moe(9, 4, experts=9),
        LORAS_STORED: moe(9, 3),
        LORAS_ACTIVE: moe(9, max(1, round((8 * T + 9) / 18))),
        BALANCED: moe(9, 3, balance=0.01),
    }


def routing_cells(seeds: list[int], quick: bool) -> list[Cell]:
    lengths = {LONG: 20, "repeat": 4, "overlap": 5, "conflict": 4}
    if quick:
        lengths = dict.fromkeys(lengths, 3)
    rows = {
        f"{stream}, {arm}": {"stream": stream, "tasks": tasks, **rest}
        for stream, tasks in lengths.items()
        for arm, rest in routing_arms(tasks).items()
        if stream == LONG or arm != BALANCED
    }
    return cells_of("routing", rows, seeds, epochs=6 if quick else TOY["epochs"])


def routing_panels(rows: Rows) -> list[dict[str, Any]]:
    panels = []
    for measure, first, ylabel in (
        ("seen", 1, "mean accuracy on the tasks seen so far"),
        ("drift", 2, "drift of old tasks' layer outputs"),
    ):
        lines = [line(arm, rows[f"{LONG}, {arm}"][measure]) for arm in routing_arms(1)]
        x = list(range(first, first + len(lines[0]["mean"])))
        panel = {"title": LONG, "xlabel": "tasks learned", "ylabel": ylabel, "x": x, "lines": lines}
        panels.append(panel)
    return panels


def routing_finding(rows: Rows) -> str:
    own, ranks, loras = (
        rows[f"{LONG}, {arm}"]["acc"] for arm in (SELF, RANKS_ACTIVE, LORAS_ACTIVE)
    )
    T = len(rows[f"{LONG}, {SELF}"]["seen"][0])
    conflict = [mean(rows[f"conflict, {arm}"]["acc"]) for arm in (SELF, RANKS_ACTIVE, LORAS_ACTIVE)]
    return (
        f"After {T} tasks of {LONG}, with equal parameters active, self-activated ranks reach "
        f"{mean(own)}, {beside(own, ranks)} a router over ranks ({mean(ranks)}) and "
        f"{beside(own, loras)} a router over LoRAs ({mean(loras)}); the router over ranks is "
        f"{beside(ranks, loras)} that over LoRAs; on conflict, where no router that sees the input "
        f"alone can win, the three reach {', '.join(conflict)}."
    )


def routing_claims(rows: Rows) -> list[Claim]:
    def row(arm: str, stream: str = LONG) -> dict[str, Any]:
        return rows[f"{stream}, {arm}"]

    routers = (RANKS_STORED, RANKS_ACTIVE, LORAS_STORED, LORAS_ACTIVE)
    again = row(SELF, "repeat")
    return [
        Claim(
            1,
            "Self-activated ranks interfere less with old tasks than routed experts do.",
            [
                Comparison(
                    f"interference, {arm} - self-activated",
                    row(arm)["interference"],
                    row(SELF)["interference"],
                )
                for arm in routers
            ],
        ),
        Claim(
            2,
            "A repeated task is served by the ranks that learned it, not learned a second time.",
            [
                Comparison(
                    "weight on the first time's ranks - on the second's",
                    again["back"],
                    again["anew"],
                )
            ],
        ),
        Claim(
            3,
            "As experts accumulate, old tasks' routing changes less than with a learned router.",
            [
                Comparison(
                    f"instability, {arm} - self-activated",
                    row(arm)["instability"],
                    row(SELF)["instability"],
                )
                for arm in routers
            ],
        ),
        Claim(
            7,
            "A learned router over ranks is worse than one over whole LoRAs.",
            [
                Comparison("ACC, LoRAs - ranks, = stored", *_acc(row, LORAS_STORED, RANKS_STORED)),
                Comparison("ACC, LoRAs - ranks, = active", *_acc(row, LORAS_ACTIVE, RANKS_ACTIVE)),
            ],
        ),
        Claim(
            8,
            "Self-activated ranks do better than routed experts.",
            [Comparison(f"ACC, self-activated - {arm}", *_acc(row, SELF, arm)) for arm in routers],
        ),
        Claim(
            9,
            "A balance loss on the router hurts.",
            [Comparison("ACC, without - with", *_acc(row, LORAS_STORED, BALANCED))],
        ),
    ]


def _acc(row: Callable[[str], dict[str, Any]], *arms: str) -> list[Any]:
    return [row(arm)["acc"] for arm in arms]


# knobs

KNOBS: dict[str, list[Any]] = {
    "tau": [0.01, 0.03, 0.1, 0.3, 1.0],
    "top_k": [1, 2, 4, 8, 16, 40],
    "delta": [-1.0, 0.1, 0.2, 0.3, 0.4],
    "rank": [2, 4, 8, 16],
}
KNOB_STREAMS = ("permuted-digits", "rotated-digits")


def knob_cells(seeds: list[int], quick: bool) -> list[Cell]:
    rows = {}
    for stream in KNOB_STREAMS[: 1 if quick else 2]:
        start = {"stream": stream, "tasks": 3 if quick else 5}
        rows[f"{stream}, as compare has it"] = start | MORA
        for knob, values in KNOBS.items():
            for value in values:
                if value != MORA["settings"][knob]:
                    settings = MORA["settings"] | {knob: value}
                    rows[f"{stream}, {knob} {value:g}"] = start | MORA | {"settings": settings}
        detached = MORA["settings"] | {"detach_gate": True}
        rows[f"{stream}, absolute score"] = start | MORA | {"scheme": "absolute"}
        rows[f"{stream}, detached gate"] = start | MORA | {"settings": detached}
    return cells_of("knobs", rows, seeds, epochs=6 if quick else TOY["epochs"])


def _knob_row(rows: Rows, stream: str, knob: str, value: float) -> str:
    label = f"{stream}, {knob} {value:g}"
    return label if label in rows.found else f"{stream}, as compare has it"


def _knob_streams(rows: Rows) -> list[str]:
    return [stream for stream in KNOB_STREAMS if f"{stream}, as compare has it" in rows.found]


def knob_panels(rows: Rows) -> list[dict[str, Any]]:
    panels = []
    for knob, values in KNOBS.items():
        lines = [
            line(
                f"{stream}, {words}",
                across(rows, [_knob_row(rows, stream, knob, v) for v in values], measure),
            )
            for stream in _knob_streams(rows)
            for measure, words in (("acc", "ACC"), ("interference", "interference"))
        ]
        panels.append(
            {
                "title": knob,
                "xlabel": f"{knob}{' (0: none)' * (knob == 'delta')}, the rest as compare has it",
                "ylabel": "ACC, and interference",
                "x": [max(value, 0.0) for value in values],
                "log": knob != "delta",
                "lines": lines,
            }
        )
    return panels


def knob_finding(rows: Rows) -> str:
    parts = []
    for stream in _knob_streams(rows):
        best = []
        for knob, values in KNOBS.items():
            top = max(
                values,
                key=lambda v: statistics.fmean(rows[_knob_row(rows, stream, knob, v)]["acc"]),
            )
            best.append(f"{knob} {top:g} ({mean(rows[_knob_row(rows, stream, knob, top)]['acc'])})")
        usual, absolute, detached = (
            rows[f"{stream}, {arm}"]["acc"]
            for arm in ("as compare has it", "absolute score", "detached gate")
        )
        parts.append(
            f"on {stream}, turning one knob at a time, ACC is highest at {', '.join(best)}, and "
            f"from {mean(usual)} an absolute score makes {mean(absolute)} "
            f"({beside(absolute, usual)} the signed one), a detached gate {mean(detached)} "
            f"({beside(detached, usual)} the exact one)"
        )
    said = "; ".join(parts)
    return f"{said[0].upper()}{said[1:]}."


def knob_claims(rows: Rows) -> list[Claim]:
    def compared(says: str, measure: str, more: tuple[str, float], less: tuple[str, float]):
        return [
            Comparison(
                f"{stream}: {says}",
                rows[_knob_row(rows, stream, *more)][measure],
                rows[_knob_row(rows, stream, *less)][measure],
            )
            for stream in _knob_streams(rows)
        ]

    def arms(says: str, more: str, less: str) -> list[Comparison]:
        return [
            Comparison(f"{s}: {says}", rows[f"{s}, {more}"]["acc"], rows[f"{s}, {less}"]["acc"])
            for s in _knob_streams(rows)
        ]

    usual = "as compare has it"
    return [
        Claim(
            4,
            "A lower tau makes routing more decided.",
            compared("entropy, tau .1 - .01", "ambiguity", ("tau", 0.1), ("tau", 0.01))
            + compared("entropy, tau 1 - .1", "ambiguity", ("tau", 1.0), ("tau", 0.1)),
        ),
        Claim(
            4,
            "A signed score does better than an absolute one.",
            arms("ACC, signed - absolute", usual, "absolute score"),
        ),
        Claim(
            4,
            "The gradient through the gate helps (nothing is detached).",
            arms("ACC, exact - detached", usual, "detached gate"),
        ),
        Claim(
            4,
            "A few ranks do better than all of them.",
            compared("ACC, top_k 8 - 40", "acc", ("top_k", 8), ("top_k", 40)),
        ),
    ]


# growth


def growth_cells(seeds: list[int], quick: bool) -> list[Cell]:
    arms = {"lora": LORA, "lora_grown": GROWN, "lora_moe": MOE, "mora": MORA}
    start = {"stream": LONG, "tasks": 4 if quick else 30}
    rows = {name: start | arm for name, arm in arms.items()}
    return cells_of("growth", rows, seeds, epochs=3 if quick else TOY["epochs"])


def growth_measure(cell: Cell) -> dict[str, Any]:
    """What `carried` says; and what a layer set that has grown so far costs: parameters active, the
    time of a training step and the memory it holds, as multiples of the plain backbone's."""
    found = carried(cell)
    sizes = growth_sizes(cell["tasks"])
    active, times, peaks = [], [], []
    x = torch.randn(BATCH, 64, generator=torch.Generator().manual_seed(cell["seed"]))
    y = torch.arange(BATCH) % streams.CLASSES
    for tasks in sizes:
        model = Backbone()
        adapt(model, CLASSES[cell["scheme"]], targets=r"fc\d", **cell["settings"])
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
        adapters_read = sum(m.active() for m in model.modules() if isinstance(m, Adapter))
        active.append(float(adapters_read))
    return found | {
        "sizes": [float(size) for size in sizes],
        "actives": active,
        "steps": times,
        "peaks": peaks,
        "step": times[-1],
        "peak": peaks[-1],
    }


def growth_sizes(tasks: int) -> list[int]:
    return sorted({1, *range(5, tasks, 5), tasks})


def _step(model: nn.Module, weights: list[nn.Parameter], x: Tensor, y: Tensor) -> Callable[[], Any]:
    """One training step, but for the optimiser's part."""

    def step() -> Any:
        loss = F.cross_entropy(model(x), y) + aux_loss(model)
        return torch.autograd.grad(loss, weights, materialize_grads=True)

    return step


def growth_panels(rows: Rows) -> list[dict[str, Any]]:
    first = next(iter(rows))
    T = len(rows[first]["seen"][0])
    sizes = [int(size) for size in rows[first]["sizes"][0]]
    return [
        {
            "title": title,
            "xlabel": "tasks learned",
            "ylabel": ylabel,
            "x": x,
            "lines": [line(arm, rows[arm][measure]) for arm in rows],
        }
        for title, ylabel, measure, x in (
            ("accuracy", "mean accuracy on the tasks seen so far", "seen", list(range(1, T + 1))),
            ("drift", "drift of old tasks' layer outputs", "drift", list(range(2, T + 1))),
            ("active", "parameters read for one token", "actives", sizes),
            ("step", "training step, plain backbone = 1", "steps", sizes),
            ("memory", "memory of a step, plain backbone = 1", "peaks", sizes),
        )
    ]


def growth_finding(rows: Rows) -> str:
    T = len(rows["mora"]["seen"][0])
    said = [
        f"{arm} {mean(rows[arm]['acc'])} (drift {mean(rows[arm]['interference'])}, "
        f"{mean(rows[arm]['step'])} plain steps)"
        for arm in rows
    ]
    return (
        f"After {T} tasks ACC is {', '.join(said)}; self-activation is "
        f"{beside(rows['mora']['acc'], rows['lora_moe']['acc'])} lora_moe, and has lost "
        f"{mean([seen[0] - seen[-1] for seen in rows['mora']['seen']])} of what it had after the "
        f"first task."
    )


def growth_claims(rows: Rows) -> list[Claim]:
    moved = {arm: rows[arm]["interference"] for arm in rows}
    return [
        Claim(
            1,
            "MoRA moves old tasks' outputs less than LoRA and LoRA-MoE do.",
            [
                Comparison(f"interference, {arm} - mora", moved[arm], moved["mora"])
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
                )
            ],
        ),
    ]


# silence

DELTAS = (-1.0, 0.1, 0.2, 0.3, 0.4, 0.5)
FOREIGN = {
    "upright": "upright digits, the base domain",
    "unseen": "digits under an unseen permutation",
    "noise": "uniform noise",
    "tasks": "the tasks themselves",
}


def silence_cells(seeds: list[int], quick: bool) -> list[Cell]:
    rows = {"lora": LORA, "lora_moe": MOE} | {
        f"mora, {'no delta' if delta < 0 else f'delta {delta:g}'}": MORA
        | {"settings": MORA["settings"] | {"delta": delta}}
        for delta in DELTAS
    }
    start = {"stream": LONG, "tasks": 2 if quick else 5}
    rows = {label: start | rest for label, rest in rows.items()}
    return cells_of("silence", rows, seeds, epochs=6 if quick else TOY["epochs"])


@torch.no_grad()
def silence_measure(cell: Cell) -> dict[str, Any]:
    """What `carried` says; and the mean of ‖f(x) - f₀(x)‖ / ‖f₀(x)‖, f the features now and f₀ the
    backbone's, on inputs of no task; and the accuracy that is left on the base domain."""
    with torch.enable_grad():
        found, model, backbone = _carried(cell)
    seen = streams.make(LONG, cell["tasks"], cell["seed"])
    beyond = streams.make(LONG, cell["tasks"] + 1, cell["seed"]).tasks[-1]
    noise = torch.rand(
        len(beyond.x_test), 64, generator=torch.Generator().manual_seed(cell["seed"])
    )
    inputs = {
        "upright": seen.base.x_test,
        "unseen": beyond.x_test,
        "noise": 2 * noise - 1,
        "tasks": torch.cat([task.x_test for task in seen.tasks]),
    }
    for name, x in inputs.items():
        then = backbone.features(x)
        distance = (model.features(x) - then).norm(dim=-1) / then.norm(dim=-1)
        found[name] = distance.mean().item()
    right = model(seen.base.x_test).argmax(-1) == seen.base.y_test
    return found | {"base_acc": right.double().mean().item()}


def silence_panels(rows: Rows) -> list[dict[str, Any]]:
    labels = [label for label in rows if label.startswith("mora")]
    x = [max(delta, 0.0) for delta in DELTAS]
    distances = [line(FOREIGN[name], across(rows, labels, name)) for name in FOREIGN]
    accuracies = [
        line("the tasks learned", across(rows, labels, "acc")),
        line("the base domain", across(rows, labels, "base_acc")),
    ]
    return [
        {"title": title, "xlabel": "delta (0: none)", "ylabel": ylabel, "x": x, "lines": lines}
        for title, ylabel, lines in (
            ("distance", "distance of features from the base model's", distances),
            ("accuracy", "accuracy", accuracies),
        )
    ]


def silence_finding(rows: Rows) -> str:
    without, paper = rows["mora, no delta"], rows["mora, delta 0.2"]
    loras = rows["lora_moe"]
    parts = [
        f"{FOREIGN[name]} from {mean(without[name])} to {mean(paper[name])}"
        for name in ("upright", "unseen", "noise")
    ]
    return (
        f"With delta .2 the distance from the base model goes, on {'; on '.join(parts)} (lora_moe: "
        f"{', '.join(mean(loras[name]) for name in ('upright', 'unseen', 'noise'))}); accuracy on "
        f"the base domain goes from {mean(without['base_acc'])} to {mean(paper['base_acc'])}, on "
        f"the tasks learned from {mean(without['acc'])} to {mean(paper['acc'])}."
    )


def silence_claims(rows: Rows) -> list[Claim]:
    without, paper = rows["mora, no delta"], rows["mora, delta 0.2"]
    kinds = ("upright", "unseen", "noise")
    return [
        Claim(
            5,
            "delta .2 keeps the model nearer to its base on inputs of no task.",
            [
                Comparison(f"{FOREIGN[name]}: without - with", without[name], paper[name])
                for name in kinds
            ],
        ),
        Claim(
            5,
            "With delta .2 MoRA is nearer to the base there than LoRA and LoRA-MoE.",
            [
                Comparison(f"{FOREIGN[name]}: {arm} - mora", rows[arm][name], paper[name])
                for name in kinds
                for arm in ("lora", "lora_moe")
            ],
        ),
        Claim(
            5,
            "delta .2 costs the tasks learned nothing.",
            [
                Comparison(
                    "ACC, with - without, + .01", [a + 0.01 for a in paper["acc"]], without["acc"]
                )
            ],
        ),
    ]


# grain

GRAINS = (1, 2, 4, 8)


def grain_cells(seeds: list[int], quick: bool) -> list[Cell]:
    """A LoRA of 8 ranks a task, as 1, 2, 4 or 8 experts; 16 ranks active whatever the cut."""
    rows = {}
    for stream in KNOB_STREAMS[: 1 if quick else 2]:
        for experts in GRAINS:
            settings = {"rank": 8, "experts": experts, "top_k": 2 * experts}
            rest = {"scheme": "lora_moe", "grows": True, "settings": settings}
            tasks = {"stream": stream, "tasks": 3 if quick else 5}
            rows[_grain(stream, experts)] = tasks | rest
    return cells_of("grain", rows, seeds, epochs=6 if quick else TOY["epochs"])


def _grain(stream: str, experts: int) -> str:
    return f"{stream}, {experts} of {8 // experts} rank{'s' * (experts < 8)}"


def _grain_streams(rows: Rows) -> list[str]:
    return [stream for stream in KNOB_STREAMS if _grain(stream, 1) in rows.found]


def grain_panels(rows: Rows) -> list[dict[str, Any]]:
    return [
        {
            "title": measure,
            "xlabel": "experts a task, 8 ranks in all",
            "ylabel": ylabel,
            "x": list(GRAINS),
            "log": True,
            "lines": [
                line(stream, across(rows, [_grain(stream, e) for e in GRAINS], measure))
                for stream in _grain_streams(rows)
            ],
        }
        for measure, ylabel in (("acc", "ACC"), ("interference", "interference"))
    ]


def grain_finding(rows: Rows) -> str:
    parts = []
    for stream in _grain_streams(rows):
        accs = {experts: rows[_grain(stream, experts)]["acc"] for experts in GRAINS}
        said = ", ".join(f"{mean(accs[experts])} ({experts})" for experts in GRAINS)
        parts.append(
            f"on {stream} ACC is {said}, single ranks {beside(accs[8], accs[1])} whole LoRAs"
        )
    return f"By experts a task: {'; '.join(parts)}."


def grain_claims(rows: Rows) -> list[Claim]:
    return [
        Claim(
            10,
            "The same ranks cut into more experts do better (SMoRA's claim).",
            [
                Comparison(
                    f"{stream}: ACC, 8 experts a task - 1",
                    rows[_grain(stream, 8)]["acc"],
                    rows[_grain(stream, 1)]["acc"],
                )
                for stream in _grain_streams(rows)
            ],
        )
    ]


# atlas

ATLAS_STREAMS = {
    "permuted-digits": "permuted",
    "rotated-digits": "rotated",
    "split-digits": "split",
    "digit-worlds": "worlds",
}


def atlas_cells(seeds: list[int], quick: bool) -> list[Cell]:
    """All that `compare` knows, each through four streams, at its settings."""
    tasks = dict.fromkeys(list(ATLAS_STREAMS)[: 2 if quick else 4], 2 if quick else 5)
    settings = TOY | {"epochs": 2 if quick else TOY["epochs"]}
    rows = {name: {"streams": tasks, "settings": settings} for name in LEARNERS}
    return cells_of("atlas", rows, seeds, epochs=settings["epochs"])


def atlas_measure(cell: Cell) -> dict[str, Any]:
    """Final accuracy and forgetting on each stream, of those that the cell names."""
    found = {}
    for name in ATLAS_STREAMS:
        found[f"acc {name}"] = found[f"forgetting {name}"] = math.nan
    for name, tasks in cell["streams"].items():
        stream, backbone = _start(name, tasks, cell["seed"])
        make = functools.partial(LEARNERS[cell["row"]][1], settings=cell["settings"])
        label = f"{cell['row']}, {name}, seed {cell['seed']}"
        R = carry(make, backbone, stream, cell["seed"], cell["epochs"], name=label)["matrix"]
        found[f"acc {name}"], found[f"forgetting {name}"] = acc(R), forgetting(R)
    return found


def _atlas_kind(name: str) -> str:
    """One of "scheme", "atlas", "baseline", "bound"."""
    return LEARNERS[name][0].partition(":")[0]


def _atlas_streams(rows: Rows) -> list[str]:
    one = rows[next(iter(rows))]
    return [name for name in ATLAS_STREAMS if not any(map(math.isnan, one[f"acc {name}"]))]


def atlas_panels(rows: Rows) -> list[dict[str, Any]]:
    return [
        {
            "title": name,
            "xlabel": "ACC",
            "names": list(rows),
            "kinds": [_atlas_kind(row) for row in rows],
            "lines": [line(row, [[value] for value in rows[row][f"acc {name}"]]) for row in rows],
        }
        for name in _atlas_streams(rows)
    ]


def atlas_finding(rows: Rows) -> str:
    """Who is first on each stream but for the bounds, and whom the numbers do not tell from it."""
    parts = []
    for name in _atlas_streams(rows):
        accs = {row: rows[row][f"acc {name}"] for row in rows if _atlas_kind(row) != "bound"}
        best = max(accs, key=lambda row: statistics.fmean(accs[row]))
        near = [row for row in accs if row != best and beside(accs[best], accs[row]) != "above"]
        level = f", not told from {', '.join(near)}" if near else ""
        place = sorted(accs, key=lambda row: -statistics.fmean(accs[row])).index("mora") + 1
        own = f"; mora {mean(accs['mora'])}, no. {place}" if best != "mora" else ""
        parts.append(f"on {name} {best} ({mean(accs[best])}{level}{own})")
    return (
        f"First of {len(accs)} that are not told the task or shown all at once: {'; '.join(parts)}."
    )


def atlas_claims(rows: Rows) -> list[Claim]:
    """Of the paper's list, none: claim 8 is put at equal parameters, in routing."""
    return []


COLUMNS = {"acc": "ACC", "bwt": "BWT", **{name: name for name in PROBLEMS}}
STUDIES = {
    "routing": Study(
        "Who should choose the ranks: they themselves, a router over ranks, one over LoRAs?",
        routing_cells,
        carried,
        COLUMNS
        | {
            "back": "back",
            "anew": "anew",
            "again": "again",
            "stored": "stored",
            "active": "active",
        },
        routing_panels,
        routing_finding,
        routing_claims,
    ),
    "knobs": Study(
        "What do tau, top_k, delta, rank, the score's sign and the gate's gradient do?",
        knob_cells,
        carried,
        COLUMNS | {"active": "active"},
        knob_panels,
        knob_finding,
        knob_claims,
    ),
    "growth": Study(
        "What happens as tasks come, to accuracy, drift, time and memory?",
        growth_cells,
        growth_measure,
        COLUMNS | {"own": "own", "active": "active", "step": "step", "peak": "memory"},
        growth_panels,
        growth_finding,
        growth_claims,
    ),
    "silence": Study(
        "How far from the base model are the answers to inputs of no task?",
        silence_cells,
        silence_measure,
        {"acc": "ACC", "base_acc": "base ACC", **{name: name for name in FOREIGN}},
        silence_panels,
        silence_finding,
        silence_claims,
    ),
    "grain": Study(
        "The same ranks, cut into fewer or more experts: which is better?",
        grain_cells,
        carried,
        COLUMNS | {"stored": "stored", "active": "active"},
        grain_panels,
        grain_finding,
        grain_claims,
    ),
    "atlas": Study(
        "Every scheme on four streams: final accuracy, and forgetting (F).",
        atlas_cells,
        atlas_measure,
        {
            f"{measure} {name}": f"{mark}{short}"
            for measure, mark in (("acc", ""), ("forgetting", "F "))
            for name, short in ATLAS_STREAMS.items()
        },
        atlas_panels,
        atlas_finding,
        atlas_claims,
    ),
}
