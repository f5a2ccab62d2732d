"""MoSLD: whole LoRAs that share their keys, under a router; the keys are thinned out in training.

MoSLD: An Extremely Parameter-Efficient Mixture-of-Shared LoRAs for Multi-Task Learning. Zhao et
al., arXiv 2412.08946. The authors released no code.

The one equation, with the same r keys for every expert, and one weight per block of ranks:

    z = x Aᵀ                                A: the shared keys, once for each expert
    l = x Wᵀ                                router logits, one per expert
    w = softmax(l), the top k of it, renormalised: the softmax over the top k of l
    g = w_e for each rank of a kept expert e, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

In training each entry of the shared keys is 0 with probability p, and else divided by 1 - p.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (r, D) shared keys, B (R, O) values, W (E, D) router; one expert per task:
R = E·r and K = k·r.

Life: one task trains the values of one new expert and its router row; older ones are frozen. The
shared keys train on, so an old expert's answers move: that drift is the method's own.

Departures: the paper trains all experts at once. Its balance loss is left out, since the paper does
not give the coefficient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Adapter, Gate, require
from ..claims import Claims


class MoSLD(Adapter):
    """A router over LoRAs with shared keys. Parameters: r D + R O + E D; active, r D + E D + k r O.

    Args beyond Adapter's (the default scale is the paper's alpha / r = 16 / 8):
        top_k: k, experts kept per token, at most all.
        dropout: p, of the shared keys' entries, in training only.

    Raises ValueError if top_k < 1, or dropout is not in [0, 1).
    """

    claims = Claims(
        zero_at_birth=True,
        granularity="token",
        expert="block",
        top_k=True,
        simplex=True,
        as_lora={"router": 0.0, "dropout": 0.0},
    )

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 8,
        scale: float = 2.0,
        top_k: int = 2,
        dropout: float = 0.1,
    ):
        require(top_k >= 1, "top_k", top_k, "1 or more")
        require(0 <= dropout < 1, "dropout", dropout, "0 to below 1")
        self.top_k, self.dropout = top_k, dropout
        super().__init__(base, rank, scale)

    @property
    def keys(self) -> Tensor:
        return self.A.repeat(self.n_experts, 1)

    def gate(self, x: Tensor) -> Gate:
        l = self.project(x, "router")  # (..., E)
        top, expert = l.topk(self.kept)  # (..., k)
        w = top.softmax(-1)
        A, p = self.A, self.dropout
        if self.training and p:
            A = A * ((torch.rand(A.shape, device=A.device) >= p) / (1 - p)).to(A.dtype)
        ranks = torch.arange(self.block, device=x.device)
        idx = (expert.unsqueeze(-1) * self.block + ranks).flatten(-2)  # (..., K)
        z = F.linear(x, A).repeat(*[1] * (x.ndim - 1), top.shape[-1])  # the same for all experts
        return Gate(idx, self.of_ranks(w), z)

    def active(self) -> int:
        D, O = self.in_features, self.out_features
        return self.block * D + self.n_experts * D + self.kept * self.block * O

    def speaking(self) -> int:
        return self.block * self.in_features + self.kept * self.block * self.out_features

    def fresh(self) -> dict[str, Tensor]:
        return {"B": super().fresh()["B"], "router": self.fresh_router()}

    def task_agnostic(self) -> dict[str, Tensor]:
        return {"A": super().fresh()["A"]}
