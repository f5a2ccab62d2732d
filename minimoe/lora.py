"""LoRA: one low-rank update of a frozen linear layer.

LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., arXiv 2106.09685, section 4.1.

The one equation, with every rank on at full weight:

    z = x Aᵀ                                what every rank sees
    g = 1                                   every rank is added
    y = x W0ᵀ + scale · (g ⊙ z) B           what the ranks say

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values: rank i is the pair (A[i], B[i]).

Life: without `grow` every task trains the same ranks; with it, a task adds r ranks, older ones are
frozen, and all are on.

Departures: the paper writes B as (O, r) and its scale as alpha / r; here scale is given as it
is. No dropout on the adapter's input.
"""

import torch
from torch import Tensor

from .adapter import Adapter, Claims, Gate


class LoRA(Adapter):
    """Dense LoRA. Parameters: R (D + O), all of them active. Args and errors: Adapter's."""

    claims = Claims(
        zero_at_birth=True, granularity="token", expert="block", as_lora={}, mergeable=True
    )

    def gate(self, x: Tensor) -> Gate:
        return Gate(None, 1.0, self.project(x, "A"))

    def active(self) -> int:
        return self.ranks * (self.in_features + self.out_features)

    # What a gate of 1 allows and no other gate does: one matrix holds the whole update.

    def merge(self) -> None:
        """W0 <- W0 + scale · (Aᵀ B)ᵀ, until `unmerge`. For use only: a merged layer does not train,
        grow, save or load. Raises RuntimeError as `require_plain_weight` does."""
        with torch.no_grad():
            self.replace_weight(self.scale * (self.rows("B").T @ self.keys))
