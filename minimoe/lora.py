"""LoRA: one low-rank update of a frozen linear layer.

LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., arXiv 2106.09685, section 4.1.

The one equation, with every rank on at full weight:

    z = x Aᵀ                                what every rank sees
    g = 1                                   every rank speaks
    y = x W0ᵀ + scale · (g ⊙ z) B           what the ranks say

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values: rank i is the pair (A[i], B[i]).

Life: without `grow` every task trains the same ranks; with it, a task adds r ranks, older ones are
frozen, and all are on.

Departures: the paper writes B as (O, r) and its scale as alpha / r; here scale is given as it
is. No dropout on the adapter's input.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, Claims, Gate


class LoRA(Adapter):
    """Dense LoRA. Parameters: R (D + O), all of them active. Args and errors: Adapter's."""

    claims = Claims(zero_at_birth=True, granularity="token", as_lora={}, mergeable=True)

    def __init__(self, base: nn.Linear, rank: int = 16, scale: float = 1.0):
        super().__init__(base, rank, scale)
        self.unmerged: Tensor | None
        self.register_buffer("unmerged", None, persistent=False)  # W0 while merged

    def gate(self, x: Tensor) -> Gate:
        return Gate(None, 1.0, self.project(x, "A"))

    def active(self) -> int:
        return self.ranks * (self.base.in_features + self.base.out_features)

    # What a gate of 1 allows and no other gate does: one matrix holds the whole update.

    def merge(self) -> None:
        """W0 <- W0 + scale · (Aᵀ B)ᵀ. For use only: a merged layer does not train, grow or save."""
        self._stop_if_merged()
        W0 = self.base.weight
        self.unmerged = W0.detach().clone()
        with torch.no_grad():
            W0 += self.scale * (self.rows("B").T @ self.keys)

    def unmerge(self) -> None:
        """Put W0 back, bit for bit. Raises RuntimeError if the layer is not merged."""
        if self.unmerged is None:
            raise RuntimeError("the layer is not merged")
        self.base.weight.data.copy_(self.unmerged)
        self.unmerged = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.unmerged is None else self.base(x)

    def grow(self) -> None:
        self._stop_if_merged()
        super().grow()

    def _save_to_state_dict(self, *args: Any) -> None:
        self._stop_if_merged()
        super()._save_to_state_dict(*args)

    def _stop_if_merged(self) -> None:
        if self.unmerged is not None:
            raise RuntimeError("the layer is merged: call unmerge() first")
