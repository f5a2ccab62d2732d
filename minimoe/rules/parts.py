"""What the rules share: a layer again, some of its experts, what it adds."""

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..adapter import Adapter, require
from ..hooks import move_hooks
from ..sparse import rank_sparse


def known(layer: Adapter) -> Adapter:
    """The layer, if it is one of which the rules know."""
    ours = isinstance(layer, Adapter) and layer.claims.equation
    require(ours, "layer", type(layer).__name__, "adapters of the one equation")
    layer.stop_if_merged()
    return layer


def copied(layer: Adapter) -> Any:
    """The layer again, on the same base, with the same hooks."""
    same = (known(layer).base, layer.use)  # hooks of the base know its use
    return copy.deepcopy(layer, {id(part): part for part in same})


def instead(layer: Adapter, scheme: type[Adapter], A: Tensor, B: Tensor, **settings: Any) -> Any:
    """A layer of another scheme with these ranks, to take this one's place."""
    one = copied(layer)
    new = scheme(one.base, rank=len(A), scale=one.scale, **settings)
    for name in ("name", "tied", "warned", "use", "path", "batch_first", "training"):
        setattr(new, name, getattr(one, name))
    for tensor in (*new.parameters(recurse=False), *new.buffers(recurse=False)):
        tensor.data = tensor.data.to(one.dtype if tensor.is_floating_point() else tensor.dtype)
    new.A.data, new.B.data = A.detach().clone(), B.detach().clone()
    move_hooks(one, new)
    return new


def rows_of(layer: Adapter) -> list[str]:
    """What each expert has rows of, by name."""
    names = [name for name, _ in layer.named_buffers(recurse=False)]
    return [name.removeprefix("frozen_") for name in names if name.startswith("frozen_")]


def these(layer: Adapter, experts: Iterable[int]) -> list[int]:
    """Some of the layer's experts, in their order."""
    given, every = [int(e) if e == int(e) else e for e in experts], range(layer.n_experts)
    S = [e for e in every if e in given]
    require(0 < len(S) == len(given), "experts", given, f"some of 0 to {every[-1]}, each once")
    return S


def delta_of(layer: Adapter, g: Tensor | float = 1.0) -> Tensor:
    """scale · Σ over ranks of g_i B_i A_iᵀ (O, D)."""
    return layer.scale * (g * layer.rows("B").T) @ layer.keys


def update_of(layer: Adapter, x: Tensor) -> Tensor:
    """The update (tokens, O) of x; nothing is left beside it."""
    x = layer.samples_first(layer.cast(x))
    idx, g, z, *_ = layer.gate(x)
    u = rank_sparse(layer.scale * g * z, idx, layer.frozen_B, layer.B, layer.path)
    return u[layer.mask(x) > 0]
