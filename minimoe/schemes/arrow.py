"""Arrow: LoRAs trained alone; those whose strongest direction an input lies along are used.

Towards Modular LLMs by Building and Reusing a Library of LoRAs. Ostapenko et al., arXiv 2405.11157.

The one equation, with one weight per block of ranks, and a router made of the LoRAs themselves:

    z = x Aᵀ
    e = the last, at weight 1, in training
    v_e = the first right singular vector of the update of e, A_eᵀ B_e seen from x
    l = |x · v_e| / tau                     what v_e changes most; its sign says nothing
    keep the k largest l
    w = softmax over the kept of l          one weight per kept expert; they sum to 1
    g = w_e for each rank of a kept expert e, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

At r = 1, v is A / ‖A‖: MoRA's score by size, without ‖z‖, of keys that no gate has trained.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, k kept experts.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values; one expert per task: R = E·r and K = k·r.

Life: one task trains one new expert; all older ones are frozen. Nothing is fitted afterwards.

Departures: v is made anew in each pass (of r by r numbers), where the authors keep it. No gradient
goes through it.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..adapter import require
from ..sparse import widened
from .alone import TrainedAlone


class Arrow(TrainedAlone):
    """Whole LoRAs, chosen by their own directions. Parameters: R (D + O); active, R (D + O) in
    evaluation, r (D + O) in training.

    Args beyond Adapter's:
        top_k: k, experts kept per token, at most all.
        tau: temperature of the softmax.

    Raises ValueError if top_k < 1, or tau is not above 0.
    """

    claims = replace(TrainedAlone.claims, top_k=True, exact_gradient=False)

    def __init__(
        self, base: nn.Linear, rank: int = 16, scale: float = 1.0, top_k: int = 4, tau: float = 1.0
    ):
        require(top_k >= 1, "top_k", top_k, "1 or more")
        require(tau > 0, "tau", tau, "above 0")
        self.top_k, self.tau = top_k, tau
        super().__init__(base, rank, scale)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        A, B = (widened(self.rows(n).detach()).unflatten(0, (-1, self.block)) for n in "AB")
        l = (widened(x) @ directions(A, B).T).abs() / self.tau  # (..., E)
        top, expert = l.topk(self.kept)
        return expert, top.softmax(-1).to(x.dtype)

    def active(self) -> int:
        experts = 1 if self.training else self.n_experts
        return experts * self.block * (self.in_features + self.out_features)


def directions(A: Tensor, B: Tensor) -> Tensor:
    """v (E, D) of length 1, which ‖v Aᵀ B‖ is largest for, of A (E, r, D) and B (E, r, O)."""
    Q, R = torch.linalg.qr(A.mT)  # A = Rᵀ Qᵀ
    first = torch.linalg.svd(R @ B, full_matrices=False).U[..., :1]  # (E, r, 1)
    return (Q @ first).squeeze(-1)
