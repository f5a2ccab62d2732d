"""AdaMoLE: a router over whole LoRAs; each token sets how likely an expert must be to be used.

AdaMoLE: Fine-Tuning Large Language Models with Adaptive Mixture of Low-Rank Adaptation Experts. Liu
and Luo, arXiv 2405.00361.

The one equation, with one weight per block of ranks, and a threshold in place of a top k:

    z = x Aᵀ
    p = softmax(x Wᵀ)
    θ = sigmoid(x vᵀ + b) / E               below 1 / E: one expert is used, at least
    w = [p - θ]₊ / Σ over experts of [p - θ]₊
    g = w_e for each rank of expert e
    y = x W0ᵀ + scale · (g ⊙ z) B

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, W (E, D) router, v (1, D) `threshold`, b its
bias; one expert per task: R = E·r.

Life: one task trains one new expert and its router row; all older ones are frozen. v and b belong
to no task, and train on.

Departures: the paper trains one task mixture and never grows. Its balance loss, lora_moe.py's with
p - θ for p, is left out.
"""

import math
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lora_moe import LoRAMoE
from ..sparse import TINY, widened


class Thresholded(LoRAMoE):
    """A router that gives each expert a weight, which may be 0: how many are used is the rule's to
    say, not a top k's. A subclass gives the `weights`. Parameters: R (D + O) + E D, all active."""

    claims = replace(LoRAMoE.claims, top_k=False, active_at_most=True)

    def __init__(self, base: nn.Linear, rank: int = 16, scale: float = 1.0):
        super().__init__(base, rank, scale, top_k=sys.maxsize)

    def choose(self, x: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
        w = self.weights(x, widened(l)).to(l.dtype)
        return torch.arange(w.shape[-1], device=w.device).expand_as(w), w

    def weights(self, x: Tensor, l: Tensor) -> Tensor:
        """w (..., E) of x (..., D) and its logits l (..., E)."""
        raise NotImplementedError


class AdaMoLE(Thresholded):
    """A threshold that the token sets. Parameters: R (D + O) + E D + D + 1, all active. Args and
    errors: Adapter's."""

    threshold: Tensor
    threshold_bias: Tensor

    def weights(self, x: Tensor, l: Tensor) -> Tensor:
        u = widened(F.linear(x, self.threshold, self.threshold_bias))  # (..., 1)
        above = l.shape[-1] * l.softmax(-1) - 1 + (-u).sigmoid()  # E (p - θ), where u is large too
        return above.relu() / above.relu().sum(-1, keepdim=True).clamp_min(TINY)

    def active(self) -> int:
        return super().active() + self.in_features + 1

    def task_agnostic(self) -> dict[str, Tensor]:
        v = nn.init.kaiming_uniform_(self.empty(1, self.in_features), a=math.sqrt(5))
        return {"threshold": v, "threshold_bias": self.empty(1).zero_()}
