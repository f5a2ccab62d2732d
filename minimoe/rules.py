"""Rules: what can be done with trained experts, without training. A layer in, a changed one out.

use, keep, prune         how much each expert is used; some of them; the best of them

An expert is what has one weight: a rank, or a block of them (Claims.expert). The layer given stays
as it is. The new one stands on the same base, and may take its place: `net.fc1 = keep(net.fc1, S)`.
minimoe.adapt saves and loads it. x is what the layer is given, (..., D), in the mode that it is in;
what its gate needs beside x comes from an open `context`. Padding does not count.

Axes: D in, O out, R ranks in all, E experts. A (R, D) keys, B (R, O) values: ΔW = Σ B_i A_iᵀ.

All raise ValueError if layer is no adapter of the one equation (MoCLE has a term more), and
RuntimeError if it is merged.
"""

import copy
from collections.abc import Iterable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, require
from .continual.probe import dense_gate
from .frozen import with_room
from .sparse import TINY, rank_sparse


@torch.no_grad()
def use(layer: Adapter, x: Tensor) -> Tensor:
    """(E,): each expert's share of the gate's weight on x, Σ |g_e| / Σ |g|; 0 if all g are."""
    counts = _known(layer).mask(layer.samples_first(x)) > 0
    g = dense_gate(layer, x)[counts].unflatten(-1, (-1, layer.block)).abs().sum((0, -1))
    return g / g.sum().clamp_min(TINY)


def keep(layer: Adapter, experts: Iterable[int]) -> Any:
    """The layer with these experts only: keys, values, router rows, biases, and whatever else there
    is of each, in the order they had. The gate is computed anew among them, as in 2402.14800: one
    that was never chosen is not missed where each is scored for itself; in MoRA it still stood in
    ‖z‖. What counts experts, a label or DSelectK's bits, counts those kept.

    As many are live as before, the last ones, even if they were frozen (call `grow` to freeze all);
    so settings stay as they are. Where fewer are kept, all are live, and rank is theirs.

    Raises ValueError if experts are none, repeated, or not in 0 to E - 1.
    """
    new, S, E = _copy(layer), _these(layer, experts), layer.n_experts
    live = min(layer.rank // layer.block, len(S))
    for name in _rows(layer):
        rows = layer.rows(name).detach().unflatten(0, (E, -1))[S]  # (kept, those of one, ...)
        old, own = rows[:-live].flatten(0, 1), rows[-live:].flatten(0, 1).clone()
        setattr(new, f"frozen_{name}", with_room(old, len(own)))
        setattr(new, name, own if name in layer.buffer_rows else nn.Parameter(own))
    new.rank = live * layer.block
    if "experts" in layer.settings():
        new.experts = live
    return new


@torch.no_grad()
def prune(layer: Adapter, x: Tensor, n: int) -> Any:
    """`keep` the n experts with which the output on x changes least, ‖y - y'‖_F: of all subsets if
    E <= 12, else dropping one at a time (Lu et al., 2402.14800). Of equals the first stay.

    To drop those used least (Chen et al., 2206.00277, do so step by step while training):
    keep(layer, use(layer, x).topk(n).indices). Raises ValueError if n is not 1 to E.
    """
    S = tuple(range(_known(layer).n_experts))
    require(1 <= n <= len(S) and n % 1 == 0, "n", n, f"1 to {len(S)}")
    before, drop = _said(layer, x), len(S) - n if len(S) <= 12 else 1

    def change(S: Iterable[int]) -> float:
        one = keep(layer, S)
        one.step = layer.step  # where its context is
        return float((_said(one, x) - before).norm())

    while len(S) > n:
        S = min(combinations(S, len(S) - drop), key=change)
    return keep(layer, S)


def _said(layer: Adapter, x: Tensor) -> Tensor:
    """The update (tokens, O) of x; nothing is left beside it."""
    x = layer.samples_first(layer.cast(x))
    idx, g, z, *_ = layer.gate(x)
    u = rank_sparse(layer.scale * g * z, idx, layer.frozen_B, layer.B, layer.path)
    return u[layer.mask(x) > 0]


def _these(layer: Adapter, experts: Iterable[int]) -> list[int]:
    """Some of the layer's experts, in their order."""
    given, every = [int(e) if e == int(e) else e for e in experts], range(layer.n_experts)
    S = [e for e in every if e in given]
    require(0 < len(S) == len(given), "experts", given, f"some of 0 to {every[-1]}, each once")
    return S


def _rows(layer: Adapter) -> list[str]:
    """What each expert has rows of, by name."""
    names = [name for name, _ in layer.named_buffers(recurse=False)]
    return [name.removeprefix("frozen_") for name in names if name.startswith("frozen_")]


def _known(layer: Adapter) -> Adapter:
    """The layer, if it is one of which the rules know."""
    known = isinstance(layer, Adapter) and layer.claims.equation
    require(known, "layer", type(layer).__name__, "adapters of the one equation")
    layer.stop_if_merged()
    return layer


def _copy(layer: Adapter) -> Any:
    """The layer again, on the same base, with the same hooks."""
    same = (_known(layer).base, layer.use)  # hooks of the base know its use
    return copy.deepcopy(layer, {id(part): part for part in same})
