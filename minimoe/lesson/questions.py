"""What a student writes: the cases that it is tried on, and the slips that have a sentence.

What is expected is what the package's own layer answers, given the same numbers. A slip is a
function that is wrong in a known way: whoever answers as it does, in every case, is told so.

Axes: T tokens, D in, O out, R ranks in all, r ranks per expert, E experts, k kept; as in wrap.py.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..continual.probe import dense_gate
from ..lora import LoRA
from ..lora_moe import LoRAMoE
from ..mora import MoRA

Inputs = dict[str, Any]  # arguments, in their order
Function = Callable[..., Any]


@dataclass(frozen=True)
class Question:
    """cases: the first is the one to show, if it is wrong there. expected: the package's answer.
    slips: (sentence, wrong function); of those that fit, the first is said."""

    cases: list[Inputs]
    expected: Callable[..., Tensor]
    slips: list[tuple[str, Function]]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def numbers(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@torch.no_grad()
def filled(layer: Adapter, **rows: Tensor) -> Adapter:
    """The layer, grown until it has these rows."""
    while len(layer.rows("B")) < len(rows["A"]):
        layer.grow()
    for name, values in rows.items():
        frozen = getattr(layer, f"frozen_{name}")
        frozen.copy_(values[: len(frozen)])
        getattr(layer, name).copy_(values[len(frozen) :])
    return layer


def linear(W0: Tensor) -> nn.Linear:
    base = nn.Linear(W0.shape[1], W0.shape[0], bias=False, dtype=torch.float64)
    base.weight.data.copy_(W0)
    return base


# lora(x, W0, A, B)


def lora_of_package(x: Tensor, W0: Tensor, A: Tensor, B: Tensor) -> Tensor:
    y: Tensor = filled(LoRA(linear(W0), rank=len(A)), A=A, B=B)(x)
    return y


LORA = Question(
    cases=[
        {
            "x": numbers(1, 2),
            "W0": numbers((1, 0), (3, 1)),
            "A": numbers((1, 1), (0, 2)),
            "B": numbers((1, 5), (2, 0)),
        },
        {"x": drawn(3, 2), "W0": drawn(2, 2, seed=1), "A": drawn(2, 2), "B": drawn(2, 2, seed=2)},
        {"x": drawn(4, 5), "W0": drawn(6, 5), "A": drawn(3, 5, seed=1), "B": drawn(3, 6)},
        {"x": drawn(2, 3, 5), "W0": drawn(3, 5), "A": drawn(2, 5, seed=1), "B": drawn(2, 3)},
    ],
    expected=lora_of_package,
    slips=[
        ("W0 is left out: the frozen layer's output x W0ᵀ is part of y.",
            lambda x, W0, A, B: x @ A.T @ B),
        ("The update is left out: add (x Aᵀ) B.",
            lambda x, W0, A, B: x @ W0.T),
        ("W0 is (O, D), so it is x @ W0.T: here W0 is not transposed.",
            lambda x, W0, A, B: x @ W0 + x @ A.T @ B),
        ("A is (R, D), so z = x @ A.T: here A is not transposed.",
            lambda x, W0, A, B: x @ W0.T + x @ A @ B),
        ("B is (R, O), so it is z @ B: here B is transposed.",
            lambda x, W0, A, B: x @ W0.T + x @ A.T @ B.T),
        ("A and B are in each other's place: z = x Aᵀ comes first, then z B.",
            lambda x, W0, A, B: x @ W0.T + x @ B @ A.T),
        ("The update is divided by the rank: here the scale is 1.",
            lambda x, W0, A, B: x @ W0.T + x @ A.T @ B / len(A)),
        ("The update is multiplied by the rank: here the scale is 1.",
            lambda x, W0, A, B: x @ W0.T + x @ A.T @ B * len(A)),
    ],
)  # fmt: skip


# router_gate(x, W, r, k)


def router_of_package(x: Tensor, W: Tensor, r: int, k: int) -> Tensor:
    E, D = W.shape
    A = drawn(E * r, D)  # keys do not matter to this gate
    layer = filled(LoRAMoE(linear(drawn(D, D)), rank=r, top_k=k), A=A, router=W)
    return dense_gate(layer, x)


def routed(
    x: Tensor,
    W: Tensor,
    r: int,
    k: int,
    by: Function = lambda l: l,
    weigh: Function = lambda l, kept: softmax_of(l, kept),
) -> Tensor:
    """A router's gate: by what it chooses, and how it weighs the kept of the logits."""
    l = x @ W.T
    return weigh(l, best(by(l), k)).repeat_interleave(r, -1)


def best(s: Tensor, k: int) -> Tensor:
    """True at the k largest."""
    return torch.zeros_like(s, dtype=torch.bool).scatter(-1, s.topk(k).indices, True)


def softmax_of(s: Tensor, kept: Tensor) -> Tensor:
    return s.where(kept, -math.inf).softmax(-1)


BEFORE = (
    "The softmax is over all, before the top k: take it over the kept ones, so that they sum to 1."
)
ZEROS = (
    "What is not kept is 0 when the softmax is taken, and e⁰ = 1 is a weight: take the softmax of "
    "the kept ones alone, and then put them in their places."
)

ROUTER_GATE = Question(
    cases=[
        {"x": numbers(1, 2), "W": numbers((1, 0), (-2, -1), (0, 1)), "r": 2, "k": 2},
        *(
            {"x": drawn(*shape, 6), "W": drawn(E, 6, seed=k), "r": r, "k": k}
            for shape, E, r, k in (((4,), 4, 3, 2), ((2, 3), 5, 2, 3), ((3,), 3, 1, 1))
        ),
    ],
    expected=router_of_package,
    slips=[
        (BEFORE, partial(routed, weigh=lambda l, kept: l.softmax(-1) * kept)),
        (ZEROS, partial(routed, weigh=lambda l, kept: (l * kept).softmax(-1))),
        ("These are the weights of the kept experts alone: put them in their places among all E, "
            "with torch.zeros_like(l).scatter(-1, expert, w).",
            lambda x, W, r, k: (x @ W.T).topk(k).values.softmax(-1).repeat_interleave(r, -1)),
        ("All experts have a weight: keep the k of largest logit, l.topk(k).",
            partial(routed, weigh=lambda l, kept: l.softmax(-1))),
        ("The k largest by size are kept: sign decides, l.topk(k).",
            partial(routed, by=torch.abs)),
        ("The k smallest are kept.",
            partial(routed, by=torch.neg)),
        ("The logits are the weights: a softmax over the kept ones is missing.",
            partial(routed, weigh=lambda l, kept: l * kept)),
        ("All that are kept weigh the same: use the softmax of their logits.",
            partial(routed, weigh=lambda l, kept: kept / kept.sum(-1, keepdim=True))),
        ("There is one weight per expert: repeat each r times, w.repeat_interleave(r, -1).",
            lambda x, W, r, k: routed(x, W, 1, k)),
        ("Ranks of one expert follow one another: repeat_interleave, not repeat.",
            lambda x, W, r, k: routed(x, W, 1, k).repeat(*[1] * (x.ndim - 1), r)),
        ("The softmax is over tokens: use dim=-1.",
            partial(routed, weigh=lambda l, kept:
                l.where(kept, -math.inf).softmax(0).nan_to_num())),
    ],
)  # fmt: skip


# mora_gate(z, k, tau, delta)


def mora_of_package(z: Tensor, k: int, tau: float, delta: float | None) -> Tensor:
    R = z.shape[-1]
    eye = torch.eye(R, dtype=torch.float64)  # as keys: z = x
    layer = MoRA(linear(eye), rank=R, top_k=k, tau=tau, delta=delta or 0.0).train(delta is None)
    return dense_gate(filled(layer, A=eye), z)


def length(z: Tensor) -> Tensor:
    return z.norm(dim=-1, keepdim=True)


def scored(
    z: Tensor,
    k: int,
    tau: float,
    delta: float | None,
    norm: Function = lambda z, kept: length(z),
    by: Function = lambda s: s,
    weigh: Function = lambda s, kept, tau: softmax_of(s / tau, kept),
    prune: Function = lambda w, s, delta: w if delta is None else w * (s >= delta),
) -> Tensor:
    """A self-scoring gate: the norm of its scores, by what it chooses, how it weighs the kept, and
    how it prunes."""
    s = z / norm(z, best(z, k))
    pruned: Tensor = prune(weigh(s, best(by(s), k), tau), s, delta)
    return pruned


def kept_alone(z: Tensor, k: int, tau: float, delta: float | None) -> Tensor:
    s = (z / length(z)).topk(k).values
    w = (s / tau).softmax(-1)
    return w if delta is None else w * (s >= delta)


IN_TRAINING = (
    "delta is applied in training: there delta is None, and every kept rank keeps its weight."
)

BY_HAND = {"z": numbers(2, -3, 6), "k": 2, "tau": 4 / (7 * math.log(3))}  # weights .25, 0, .75

MORA_GATE = Question(
    cases=[
        {**BY_HAND, "delta": None},
        {**BY_HAND, "delta": 0.5},
        {"z": numbers(3, 4, 0), "k": 2, "tau": 1.0, "delta": 0.6},  # s is (.6, .8, 0)
        *(
            {"z": 3 * drawn(*shape, seed=k), "k": k, "tau": tau, "delta": delta}
            for shape, k, tau in (((4, 5), 4, 0.5), ((2, 3, 8), 5, 0.3), ((3, 6), 6, 1.0))
            for delta in (None, 0.2)
        ),
    ],
    expected=mora_of_package,
    slips=[
        ("The k largest by size are kept: sign decides, s.topk(k) and not s.abs().topk(k).",
            partial(scored, by=torch.abs)),
        ("The norm is over the kept ranks only: divide by the norm of all R numbers of z.",
            partial(scored, norm=lambda z, kept: length(z * kept))),
        ("The norm is over all tokens: each token has its own, z.norm(dim=-1, keepdim=True).",
            partial(scored, norm=lambda z, kept: z.norm())),
        ("The norm is the sum of sizes: use the root of the sum of squares, z.norm(dim=-1, ...).",
            partial(scored, norm=lambda z, kept: z.abs().sum(-1, keepdim=True))),
        ("There is no norm: the scores are s = z / ‖z‖, not z.",
            partial(scored, norm=lambda z, kept: 1.0)),
        ("tau is left out: the softmax is of s / tau.",
            partial(scored, weigh=lambda s, kept, tau: softmax_of(s, kept))),
        ("s is multiplied by tau: divide, so that a small tau is sharp.",
            partial(scored, weigh=lambda s, kept, tau: softmax_of(s * tau, kept))),
        (BEFORE, partial(scored, weigh=lambda s, kept, tau: (s / tau).softmax(-1) * kept)),
        (ZEROS, partial(scored, weigh=lambda s, kept, tau: (s / tau * kept).softmax(-1))),
        *((IN_TRAINING, partial(scored, prune=lambda w, s, delta, other=other:
            w * (s >= (other if delta is None else delta)))) for other in (0.0, 0.2)),
        (IN_TRAINING, partial(scored, prune=lambda w, s, delta: w * (s >= delta))),
        ("delta is on the weight w: it is on the score, w * (s >= delta).",
            partial(scored, prune=lambda w, s, delta:
                w if delta is None else w * (w >= delta))),
        ("delta is on the size of s: sign counts, s >= delta.",
            partial(scored, prune=lambda w, s, delta:
                w if delta is None else w * (s.abs() >= delta))),
        ("A score equal to delta keeps its weight: s >= delta, not s > delta.",
            partial(scored, prune=lambda w, s, delta:
                w if delta is None else w * (s > delta))),
        ("delta is left out: where it is a number, ranks with s < delta get weight 0.",
            partial(scored, prune=lambda w, s, delta: w)),
        ("What delta leaves is rescaled to sum to 1: it is not, so that the update may be small.",
            partial(scored, prune=lambda w, s, delta: w if delta is None else
                (w * (s >= delta) / (w * (s >= delta)).sum(-1, keepdim=True)).nan_to_num())),
        ("These are the weights of the kept ranks alone: put them in their places among all R, "
            "with torch.zeros_like(s).scatter(-1, kept, w).", kept_alone),
    ],
)  # fmt: skip

QUESTIONS: Mapping[str, Question] = {
    "lora": LORA,
    "router_gate": ROUTER_GATE,
    "mora_gate": MORA_GATE,
}
