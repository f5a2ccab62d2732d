"""MoRA: rank-1 experts that score themselves.

Little By Little: Continual Learning via Self-Activated Sparse Mixture-of-Rank Adaptive
Learning; from version 3 on, via Incremental Mixture of Rank-1 Associative Memory Experts (MoRAM).
Lu et al., arXiv 2506.21035, eq. 2-8. (Not the MoRA of "High-Rank Updating", arXiv 2405.12130.)

The one equation, with what the ranks see as the gate's logits:

    z = x Aᵀ
    s = z / ‖z‖₂                            over all R ranks, old and new; 0 where z = 0   (eq. 5)
    keep the k largest s                    by sign, not by size                           (eq. 6)
    w = softmax over the kept of s / tau    one weight per kept rank; they sum to 1        (eq. 7)
    g = w, and in evaluation 0 where s < delta, not renormalised                           (eq. 8)
    y = x W0ᵀ + scale · (g ⊙ z) B           the raw z, not s

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values. Each rank is an expert: E = R and K = k.

Life: one task trains r new ranks; all older ones are frozen. New ranks change old inputs' outputs
even before they are trained (they enter ‖z‖, and compete for the k places).

Departures: k is capped at R, as in one of the authors' two code bases; no least k of 2, no dropout
on x, no alpha / r lost where ranks freeze (their TRACE code). `detach_gate` is ours.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from .adapter import Adapter, Gate, require
from .claims import Claims
from .sparse import TINY, is_plain, top_scores, widened


class MoRA(Adapter):
    """Rank-1 experts that score themselves. Parameters: R (D + O); active, R D + k O.

    Args beyond Adapter's:
        top_k: k, ranks kept per token, at most all.
        tau: temperature of the softmax; the smaller, the sharper.
        delta: threshold on s, in evaluation only; -1: none (in both authors' codes: 0 or less).
        detach_gate: no gradient through w.

    Raises ValueError if top_k < 1, if tau is not above 0, or if delta is no number.
    """

    claims = Claims(
        zero_at_birth=True,
        granularity="token",
        expert="rank",
        top_k=True,
        simplex=True,
        as_lora={"tau": 1e12},
    )

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 16,
        scale: float = 1.0,
        top_k: int = 16,
        tau: float = 0.01,
        delta: float = 0.2,
        detach_gate: bool = False,
    ):
        require(top_k >= 1, "top_k", top_k, "1 or more")
        require(tau > 0, "tau", tau, "above 0")
        require(delta == delta, "delta", delta, "any number")
        self.top_k, self.tau, self.delta, self.detach_gate = top_k, tau, delta, detach_gate
        super().__init__(base, rank, scale)
        self.claims = replace(self.claims, exact_gradient=not detach_gate)

    def gate(self, x: Tensor) -> Gate:
        if is_plain(self.path, x, self.ranks):
            z = self.project(x, "A")  # (..., R)
            norm = torch.linalg.vector_norm(widened(z), dim=-1, keepdim=True)
            z, idx = z.topk(self.kept)  # eq. 6, (..., k): the largest z have the largest s
        else:  # the same in one pass, which pays in large layers
            rows = self.frozen_A, self.A
            z, idx, norm = top_scores(x, *rows, self.kept, self.path, self.detach_gate)
        s = z / norm.clamp_min(TINY)  # eq. 5
        w = (s / self.tau).softmax(-1)  # eq. 7
        if not self.training:
            w = w * (s >= self.delta)  # eq. 8
        return Gate(idx, w.detach() if self.detach_gate else w, z)

    def active(self) -> int:
        D, O = self.in_features, self.out_features
        return self.ranks * D + self.kept * O
