"""Which experts stay: by how much each is used, by what its loss costs; and who takes others in.

Axes, errors: those of rules/__init__.py.
"""

from collections.abc import Iterable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, require
from ..continual.probe import dense_gate
from ..frozen import with_room
from ..schemes.mmoe import MMoE
from ..sparse import TINY
from .parts import copied, known, rows_of, these, update_of


@torch.no_grad()
def use(layer: Adapter, x: Tensor) -> Tensor:
    """(E,): each expert's share of the gate's weight on x, Σ |g_e| / Σ |g|; 0 if all g are."""
    counts = known(layer).mask(layer.samples_first(x)) > 0
    g = dense_gate(layer, x)[counts].unflatten(-1, (-1, layer.block)).abs().sum((0, -1))
    return g / g.sum().clamp_min(TINY)


def keep(layer: Adapter, experts: Iterable[int]) -> Any:
    """The layer with these experts only: keys, values, router rows, biases, and whatever else there
    is of each, in the order they had. The gate is computed anew among them, as in 2402.14800: one
    that was never chosen is not missed where each is scored for itself; in MoRA it still stood in
    ‖z‖. What counts experts, a label or DSelectK's bits, counts those kept.

    As many are live as before, the last ones, even if they were frozen (call `grow` to freeze all);
    so settings stay as they are. Where fewer are kept, all are live, and rank is theirs.

    Raises ValueError if experts are none, repeated, or not in 0 to E - 1; or some of MMoE's, whose
    routers, a task's each, are over all of them.
    """
    new, S, E = copied(layer), these(layer, experts), layer.n_experts
    require(not isinstance(layer, MMoE) or len(S) == E, "experts", S, f"all {E} of MMoE's")
    live = min(layer.rank // layer.block, len(S))
    for name in rows_of(layer):
        if len(layer.rows(name)) < E:
            continue  # a task has a row, as CoDyRA's count of steps, and no expert
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
    S = tuple(range(known(layer).n_experts))
    require(1 <= n <= len(S) and n % 1 == 0, "n", n, f"1 to {len(S)}")
    before, drop = update_of(layer, x), len(S) - n if len(S) <= 12 else 1

    def change(S: Iterable[int]) -> float:
        one = keep(layer, S)
        one.step = layer.step  # where its context is
        return float((update_of(one, x) - before).norm())

    while len(S) > n:
        S = min(combinations(S, len(S) - drop), key=change)
    return keep(layer, S)


@torch.no_grad()
def merge(layer: Adapter, experts: Iterable[int]) -> Any:
    """`keep`, and every other rank i is taken in by the kept rank j whose key is most like its own:

        B_j <- B_j + (A_i · A_j / ‖A_j‖²) B_i        j = argmax |cos(A_i, A_j)|

    the nearest to B_i A_iᵀ that key A_j can say; all of it if the keys are parallel. So duplicates
    merge without change under g = 1; a gate weighs what j took in as j. (Rank form of Zhou et al.,
    2509.10377, who recombine neurons by what is "most compatible": reconstructed.) Errors: keep's.
    """
    S = [*experts]
    new, A, B = keep(layer, S), layer.keys, layer.rows("B")
    kept = layer.of_ranks(torch.tensor([e in S for e in range(layer.n_experts)], device=B.device))
    norm = A[kept].norm(dim=-1).clamp_min(TINY)
    inner = A[~kept] @ A[kept].T / norm  # (others, kept)
    j = inner.abs().argmax(-1, keepdim=True)
    taken = inner.gather(-1, j) / norm[j] * B[~kept]
    frozen, live = B[kept].index_add(0, j.flatten(), taken).split([len(new.frozen_B), len(new.B)])
    new.frozen_B.copy_(frozen)
    new.B.copy_(live)
    return new
