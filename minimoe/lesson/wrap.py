"""A student's plain functions of tensors as adapters, for streams, laws and `laws.same`.

    lora(x, W0, A, B)               y, without the bias
    router_gate(x, W, r, k)         g: one weight per expert, for each of its r ranks
    mora_gate(z, k, tau, delta)     g; delta is None in training

A gate gives g for all R ranks, 0 for those that are not kept, so no index is handed on. k is at
most the number of experts.

Axes: x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, W (E, D) router, z and g (..., R).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Gate
from ..lora import LoRA
from ..lora_moe import LoRAMoE
from ..mora import MoRA


class WrittenLoRA(LoRA):
    """LoRA by lora(x, W0, A, B), of which W0 = 0 leaves the update."""

    written: Callable[..., Any]

    def update(self, x: Tensor) -> Tensor:
        nothing = torch.zeros_like(self.cast(self.base.weight))  # in the place of W0
        update: Tensor = self.written(x, nothing, self.keys, self.rows("B"))
        return self.scale * update


class WrittenRouter(LoRAMoE):
    """LoRA-MoE by router_gate(x, W, r, k): one expert a task, no balance."""

    written: Callable[..., Any]

    def __init__(self, base: nn.Linear, rank: int = 16, scale: float = 1.0, top_k: int = 2):
        super().__init__(base, rank, scale, top_k)

    def gate(self, x: Tensor) -> Gate:
        g = self.written(x, self.rows("router"), self.rank, self.kept)
        return Gate(None, g, self.project(x, "A"))


class WrittenMoRA(MoRA):
    """MoRA by mora_gate(z, k, tau, delta)."""

    written: Callable[..., Any]

    def gate(self, x: Tensor) -> Gate:
        z = self.project(x, "A")
        g = self.written(z, self.kept, self.tau, None if self.training else self.delta)
        return Gate(None, g.detach() if self.detach_gate else g, z)


WRITTEN: Mapping[str, type[Adapter]] = {
    "lora": WrittenLoRA,
    "router_gate": WrittenRouter,
    "mora_gate": WrittenMoRA,
}


def adapter_of(name: str, function: Callable[..., Any]) -> type[Adapter]:
    """The scheme whose layers call this function. name: a key of WRITTEN, which says how it is
    called. Raises ValueError on another."""
    if name not in WRITTEN:
        raise ValueError(f"name is {name!r}, allowed: {', '.join(WRITTEN)}")
    body = {"written": staticmethod(function), "__doc__": f"By a function {name}."}
    return type(f"Your{package_of(name).__name__}", (WRITTEN[name],), body)


def package_of(name: str) -> type[Adapter]:
    """The package's own scheme of that name."""
    (scheme,) = WRITTEN[name].__bases__
    return scheme
