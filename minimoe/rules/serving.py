"""What changes answers alone: fewer bits, a second expert that gets weight 0, some preferred ones.

Axes, errors: those of rules/__init__.py.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter, Gate, require
from ..sparse import TINY
from .parts import copied, rows_of, these


@torch.no_grad()
def skip(layer: Adapter, x: Tensor) -> Any:
    """In evaluation, of two kept experts with weights w1 >= w2, the second gets weight 0 where w2 <
    beta w1, and the first has the weight of both; beta: the median of w2 / w1 on x (2402.14800).
    No file holds this. Raises ValueError if the gate does not keep two, with weights >= 0."""
    new, kind = copied(layer), layer.claims
    two = kind.top_k and kind.simplex and layer.kept == 2
    require(bool(two), "layer", type(layer).__name__, "a simplex of two kept experts")
    x = layer.samples_first(layer.cast(x))
    w = torch.as_tensor(layer.gate(x).weight)[layer.mask(x) > 0].unflatten(-1, (2, -1))[..., 0]
    beta = (w.amin(-1) / w.amax(-1).clamp_min(TINY)).median()
    vars(new)["gate"] = partial(_skipping, new, beta.item())
    return new


def _skipping(layer: Adapter, beta: float, x: Tensor) -> Gate:
    gate = type(layer).gate(layer, x)
    if layer.training:
        return gate
    w = torch.as_tensor(gate.weight).unflatten(-1, (2, -1))  # (..., 2, ranks of one)
    first, second = w.amax(-2, keepdim=True), w.amin(-2, keepdim=True)
    alone = (w == first) * (first + second)
    return gate._replace(weight=alone.where(second < beta * first, w).flatten(-2))


@torch.no_grad()
def quantise(layer: Adapter, bits: int) -> Any:
    """Keys and values at steps of equal size; routers and biases stay (MoQE, 2310.02410):

        v' = s · round(v / s),    s = max |v| / (2^(bits - 1) - 1)      so |v - v'| <= s / 2

    v is one rank's key, or its value: a column of a LoRA's two matrices as its paper writes them,
    and the same for a rank as an expert as for a block. A second time changes nothing. Raises
    ValueError if bits is not a whole number, 2 or more.
    """
    new = copied(layer)
    require(bits >= 2 and bits % 1 == 0, "bits", bits, "whole numbers from 2 on")
    for name in ("frozen_A", "A", "frozen_B", "B"):
        if (v := new._parameters.get(name, new._buffers.get(name))) is not None:
            most, steps = v.abs().amax(-1, keepdim=True), 2 ** (bits - 1) - 1
            v.copy_(most * ((v / most.where(most > 0, 1) * steps).round() / steps))
    return new


def nudge(layer: Adapter, experts: Iterable[int], delta: float) -> Any:
    """In evaluation, a router that prefers the experts S, its rows as they were:

        l_e <- l_e - delta    for e not in S

    which is l_e + delta in S to a softmax; at inf only S are used. Bandarkar et al., 2510.04694,
    take for S what a task uses in one domain more than text in general does (reconstructed from the
    abstract): (use(layer, task) - use(layer, general)).topk(n).indices. No file holds this.

    Raises ValueError if there is no router (MoRA's logits are what ranks see), if delta < 0, or for
    experts as `keep`.
    """
    new, S = copied(layer), these(layer, experts)
    require("router" in rows_of(layer), "layer", type(layer).__name__, "schemes with a router")
    require(delta >= 0, "delta", delta, "0 or more")
    vars(new)["project"] = partial(_nudged, new, S, delta)
    return new


def _nudged(layer: Adapter, S: list[int], delta: float, x: Tensor, name: str) -> Tensor:
    l = type(layer).project(layer, x, name)
    if layer.training or name != "router":
        return l
    less = l.new_full((layer.n_experts, 1), -delta)
    less[S] = 0
    return (l.unflatten(-1, (len(less), -1)) + less).flatten(-2)  # an expert may have several rows
