"""SMoRA: single ranks as experts, each with a row of a learned router.

Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning.
Zhao et al., arXiv 2501.15103.

The one equation, with sigmoid scores of a router, and biases that even out its choices:

    z = x Aᵀ
    s = sigmoid(x Wᵀ) + b                   one score per rank; b moves between steps
    keep the k largest s
    g = k · s / Σ s over the kept           weights that sum to k
    y = x W0ᵀ + scale · (g ⊙ z) B

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, W (R, D) router, b (R,) biases; each rank is
an expert: E = R, K = k.

Balance, without a loss: after each step, c being how often each rank was chosen since the last,

    b <- b + u · sign(mean(c) - c)          for the live ranks

Life: one task trains r new ranks and their router rows; all older ones are frozen, biases too.

Departures: the paper trains one task mixture and never grows. The bias is part of the weight, as in
the authors' code (DeepSeek's, from which it is taken, only moves the choice). The router's rows are
drawn from N(0, .02), which the paper does not give.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Gate, require
from ..claims import Claims
from ..sparse import widened
from ..tools.parallel import sum_over_processes


class SMoRA(Adapter):
    """Single ranks under a router. Parameters: R (2 D + O + 1); active, R (D + 1) + k (D + O).

    Args beyond Adapter's (the default scale is the paper's alpha / k = 16 / 8):
        top_k: k, ranks kept per token, at most all.
        rate: u, how far a bias moves in a step.

    Raises ValueError if top_k < 1 or rate < 0.
    """

    claims = Claims(
        zero_at_birth=True,
        granularity="token",
        top_k=True,
        simplex="kept",
        as_lora={"router": 0.0, "expert_bias": 0.0},
    )
    buffer_rows = ("expert_bias",)
    expert_bias: Tensor

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 64,
        scale: float = 2.0,
        top_k: int = 8,
        rate: float = 1e-5,
    ):
        require(top_k >= 1, "top_k", top_k, "1 or more")
        require(rate >= 0, "rate", rate, "0 or more")
        self.top_k, self.rate = top_k, rate
        super().__init__(base, rank, scale)

    def gate(self, x: Tensor) -> Gate:
        l = self.project(x, "router")  # (..., R), of which 16 bits lose the small sigmoids
        s = widened(l).sigmoid()
        top, idx = (s + self.rows("expert_bias")).topk(self.kept)  # (..., k)
        total = top.sum(-1, keepdim=True)
        g = top.shape[-1] * top / total.where(total != 0, 1)  # 0 where all s are
        counts = chosen(idx, self.ranks, self.mask(x)) if self.training else None
        z = self.seen(x, idx)
        return Gate(idx, g, z, counts=counts)

    def active(self) -> int:
        D, O = self.in_features, self.out_features
        return self.ranks * (D + 1) + self.kept * (D + O)

    def fresh(self) -> dict[str, Tensor]:
        rows = super().fresh()
        return rows | {"router": self.fresh_router(), "expert_bias": self.empty(self.rank).zero_()}

    def after_step(self) -> None:
        rebalance(self)


def chosen(idx: Tensor, R: int, mask: Tensor) -> Tensor:
    """c (R,) int64: how often each rank is in idx (..., K), where mask (...) is 1."""
    each = mask.long().unsqueeze(-1).expand_as(idx).flatten()
    return torch.zeros(R, dtype=torch.int64, device=idx.device).scatter_add(0, idx.flatten(), each)


@torch.no_grad()
def rebalance(layer: Any) -> None:
    """b <- b + u · sign(mean(c) - c) for a layer's live ranks, c (R,) being its `counts` since the
    last step, summed over processes, and u its `rate`. Twice after a step is once."""
    if layer.counts is not None:
        c = sum_over_processes(layer.counts)
        layer.end_step()
        live = layer.expert_bias
        live += layer.rate * (c.sum() - len(c) * c).sign()[-len(live) :]
