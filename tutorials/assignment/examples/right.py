"""Energy: the k ranks with the largest |z|, each weighing its share of the energy.

An idea of tutorial 06: MoRA's scores are z / ‖z‖, whose squares sum to 1. They are weights already,
without a softmax and its temperature.

    z = x Aᵀ
    keep the k largest |z|
    g = z² / Σ z² over the kept             0 elsewhere, and where all z are 0
    y = x W0ᵀ + scale · (g ⊙ z) B

Axes: T tokens, D in, O out, R ranks in all, r ranks per task, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values.
"""

import numpy as np
import torch
from torch import Tensor, nn

from minimoe import Adapter, Claims, Gate


def stated(x, rows, settings, training):
    """g (T, R) of x (T, D), in NumPy: the equation above, in training and in evaluation."""
    z = x @ rows["A"].T
    g = np.zeros_like(z)
    for t in range(len(z)):
        kept = np.argsort(-np.abs(z[t]))[: settings["top_k"]]
        g[t, kept] = z[t, kept] ** 2 / (z[t, kept] ** 2).sum()
    return g


class Scheme(Adapter):
    """Energy. Parameters: R (D + O); active, R D + k O."""

    claims = Claims(zero_at_birth=True, granularity="token", top_k=True, simplex=True)

    def __init__(self, base: nn.Linear, rank: int = 16, scale: float = 1.0, top_k: int = 16):
        self.top_k = top_k
        super().__init__(base, rank, scale)

    def gate(self, x: Tensor) -> Gate:
        z = self.project(x, "A")  # (..., R)
        idx = z.abs().topk(self.kept).indices  # (..., k)
        z = z.gather(-1, idx)
        norm = z.norm(dim=-1, keepdim=True)
        s = z / norm.clamp_min(torch.finfo(norm.dtype).tiny)  # squared, it would overflow float16
        return Gate(idx, s.square(), z)

    def active(self) -> int:
        return self.ranks * self.in_features + self.kept * self.out_features
