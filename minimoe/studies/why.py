"""Why: what carries MoRA's gain over a router. Its gate is taken apart into factors, and each arm
has one of them changed; but a cosine router has its own norm, and scores without one, whose size
is what it is, have several tau.

    s = what an expert scores            self     z, what the rank sees; of a block, ‖z_e‖
                                         size     |z|
                                         linear   x Wᵀ, a router's logits
                                         cosine   cos(x, W_e)
    s = s / ‖s‖ over all experts         norm     MoRA's eq. 5
    keep the k largest                   top_k
    w = softmax over the kept of s / tau
    w = 0 in evaluation where s < delta
    g = w for the ranks of the expert    grain    rank: each rank is one; block: a task's ranks are
    no gradient through w                detach

MoRA is self, rank, norm; LoRA-MoE is linear, block, no norm, tau 1. A task has 8 ranks, and 16
are used in every arm that does not say otherwise: the arms differ in which, not in how many.
A router's rows are stored besides; the arms "= stored" have fewer ranks, so that they store what
MoRA does, to 6 %. Weights sum to 1 over ranks, and to 1 over blocks of 8: hence the arm "scale 8".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Adapter, Gate
from ..claims import Claims
from ..roster import EPOCHS, SCHEMES
from ..sparse import TINY, widened
from ..tools.results import Line, Panel
from .common import ACC, COLUMNS, SHARE, TWO_STREAMS, carried, cells_of, mean
from .study import Cell, Rows, Study
from .verdicts import Claim, Comparison


class Factored(Adapter):
    """An adapter whose gate is put together from the factors above; E experts."""

    claims = Claims(zero_at_birth=True, granularity="token", top_k=True, simplex=True)

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 8,
        scale: float = 1.0,
        top_k: int = 8,
        score: Literal["self", "size", "linear", "cosine"] = "self",
        grain: Literal["rank", "block"] = "rank",
        norm: bool = True,
        tau: float = 0.1,
        delta: float = -1e9,
        detach: bool = False,
    ):
        self.top_k, self.score, self.grain = top_k, score, grain
        self.norm, self.tau, self.delta, self.detach = norm, tau, delta, detach
        self.claims = dataclasses.replace(type(self).claims, expert=grain)
        super().__init__(base, rank, scale)

    def scores(self, x: Tensor) -> Tensor:
        """s (..., E) of x (..., D), before eq. 5."""
        if self.score == "linear":
            return self.project(x, "router")
        if self.score == "cosine":
            W = F.normalize(self.rows("router"), dim=-1)
            return F.linear(F.normalize(x, dim=-1), W)
        z = self.project(x, "A")
        if self.grain == "block":
            return z.unflatten(-1, (-1, self.block)).norm(dim=-1)
        return z.abs() if self.score == "size" else z

    def gate(self, x: Tensor) -> Gate:
        s = widened(self.scores(x))
        s = F.normalize(s, dim=-1, eps=TINY) if self.norm else s
        s, expert = s.topk(self.kept)
        w = (s / self.tau).softmax(-1)
        if not self.training:
            w = w * (s >= self.delta)
        return self.gate_blocks(x, expert, w.detach() if self.detach else w)

    def fresh(self) -> dict[str, Tensor]:
        routed = self.score in ("linear", "cosine")
        return super().fresh() | ({"router": self.fresh_router()} if routed else {})

    def active(self) -> int:
        D, O = self.in_features, self.out_features
        if self.score in ("linear", "cosine"):
            return self.n_experts * D + self.speaking()
        return self.ranks * D + self.kept * self.block * O


RANK, SPEAK = 8, 16
BLOCKS: Mapping[str, Any] = {"grain": "block", "top_k": SPEAK // RANK}
ROUTED = {"score": "linear", "norm": False, "tau": 1.0}
USUAL, MOE = "mora", "lora_moe"
# each arm: what it has other than MoRA
ARMS: dict[str, Mapping[str, Any]] = {
    USUAL: {},
    "score by size": {"score": "size"},
    "no norm, tau .3": {"norm": False, "tau": 0.3},
    "no norm, tau 1": {"norm": False, "tau": 1.0},
    "no norm, tau 3": {"norm": False, "tau": 3.0},
    "tau .03": {"tau": 0.03},
    "tau .3": {"tau": 0.3},
    "8 speak": {"top_k": 8},
    "all speak": {"top_k": 1000},
    "detached gate": {"detach": True},
    "delta .2": {"delta": 0.2},
    "scale 8": {"scale": 8.0},
    "blocks": BLOCKS,
    "linear router": {"score": "linear"},
    "cosine router": {"score": "cosine", "norm": False},
    "cosine router, = stored": {"score": "cosine", "norm": False, "rank": 5},
    "cosine router, blocks": {"score": "cosine", "norm": False, **BLOCKS},
    MOE: {**ROUTED, **BLOCKS},
    "lora_moe of ranks": ROUTED,
    "lora_moe of ranks, = stored": {**ROUTED, "rank": 5},
}
TASKS = {"subspaces": 8, "clusters": 5, **dict.fromkeys(TWO_STREAMS, 5)}
CLASSES: Mapping[str, type[Adapter]] = SCHEMES | {"factored": Factored}


def cells(seeds: Sequence[int], quick: bool) -> list[Cell]:
    made = []
    for stream, tasks in list(TASKS.items())[: 1 if quick else None]:
        start = {"stream": stream, "tasks": 3 if quick else tasks, "scheme": "factored"}
        rows = {
            f"{stream}, {arm}": {
                **start,
                "grows": True,
                "settings": {"rank": RANK, "top_k": SPEAK, **changes},
            }
            for arm, changes in ARMS.items()
        }
        made += cells_of("why", rows, seeds, epochs=2 if quick else EPOCHS)
    return made


def measure(cell: Cell) -> dict[str, Any]:
    """What `carried` measures; "factored" is Factored."""
    return carried(cell, CLASSES)


# What the numbers say


def streams_of(rows: Rows) -> list[str]:
    return [stream for stream in TASKS if f"{stream}, {USUAL}" in rows]


def against(rows: Rows, stream: str, more: str, less: str, measure: str = "acc") -> Comparison:
    """One arm against another on a stream."""
    label = f"{stream}: {'ACC' if measure == 'acc' else measure}, {more} - {less}"
    ours, theirs = (rows[f"{stream}, {arm}"][measure] for arm in (more, less))
    return Comparison(label, ours, theirs, ACC if measure == "acc" else SHARE)


def panels(rows: Rows) -> list[Panel]:
    made = []
    for stream in streams_of(rows):
        lines = []
        for arm in ARMS:
            effect = against(rows, stream, arm, USUAL)
            low, high = effect.interval
            lines.append(Line(arm, [effect.effect], [(high - low) / 2]))
        made.append(
            Panel(
                title=f"{stream}, from mora's {mean(rows[f'{stream}, {USUAL}']['acc'])}",
                xlabel="ACC, arm - mora, 95 % interval",
                lines=lines[1:],
                names=[*ARMS][1:],
                kinds=[kind_of(changes) for changes in ARMS.values()][1:],
            )
        )
    return made


def kind_of(changes: Mapping[str, Any]) -> str:
    """Who scores in an arm."""
    score = changes.get("score", "self")
    return {"size": "self"}.get(score, score)


def told_apart(comparison: Comparison) -> bool:
    """Whether its interval leaves 0 out, and its effect matters."""
    low, high = comparison.interval
    return (low > 0 or high < 0) and abs(comparison.effect) >= ACC


def finding(rows: Rows) -> str:
    """For each stream the arms that are told from mora, by at least what matters."""
    parts = []
    for stream in streams_of(rows):
        effects = {arm: against(rows, stream, arm, USUAL) for arm in ARMS if arm != USUAL}
        told = [a for a in effects if told_apart(effects[a])]
        told.sort(key=lambda arm: effects[arm].effect, reverse=True)
        each = ", ".join(f"{arm} {effects[arm].effect:+.3f}" for arm in told)
        usual = mean(rows[f"{stream}, {USUAL}"]["acc"])
        parts.append(f"on {stream}, from mora's {usual}: {each or 'nothing'}")
    return f"What moves ACC by {ACC:g} or more, its 95 % interval without 0: {'; '.join(parts)}."


def claims(rows: Rows) -> list[Claim]:
    def on_all(more: str, less: str, measure: str = "acc") -> list[Comparison]:
        return [against(rows, stream, more, less, measure) for stream in streams_of(rows)]

    return [
        Claim(
            4,
            "A lower tau makes routing more decided.",
            on_all("tau .3", USUAL, "ambiguity") + on_all(USUAL, "tau .03", "ambiguity"),
        ),
        Claim(4, "A signed score does better than one by size.", on_all(USUAL, "score by size")),
        Claim(
            4,
            "The gradient through the gate helps (nothing is detached).",
            on_all(USUAL, "detached gate"),
        ),
        Claim(4, "A few ranks do better than all of them.", on_all(USUAL, "all speak")),
        Claim(
            4,
            "Normalising the scores helps (eq. 5), whatever tau they have without.",
            [c for arm in ARMS if arm.startswith("no norm") for c in on_all(USUAL, arm)],
        ),
        Claim(
            7,
            "A learned router over ranks is worse than one over whole LoRAs.",
            on_all(MOE, "lora_moe of ranks"),
        ),
        Claim(
            8,
            "Self-activated ranks do better than routed experts, as many ranks speaking.",
            [
                comparison
                for arm in ("cosine router", "linear router", MOE, "lora_moe of ranks")
                for comparison in on_all(USUAL, arm)
            ],
        ),
        Claim(
            8,
            "Self-activated ranks do better than routed ones that store as much.",
            on_all(USUAL, "cosine router, = stored") + on_all(USUAL, "lora_moe of ranks, = stored"),
        ),
        Claim(
            10,
            "The same ranks cut into more experts do better (SMoRA's claim).",
            on_all("lora_moe of ranks", MOE) + on_all(USUAL, "blocks"),
        ),
    ]


STUDY = Study(
    asks="What carries MoRA's gain over a router: who scores, what, how sharply?",
    cells=cells,
    measure=measure,
    columns=COLUMNS | {name: name for name in ("stored", "read", "speaking")},
    panels=panels,
    finding=finding,
    claims=claims,
    seeds=range(10),
)
