"""FlyLoRA: keys that are random, sparse and never trained; the largest products are used.

FlyLoRA: Boosting Task Decoupling and Parameter Efficiency via Implicit Rank-Wise Mixture-of-
Experts. Zou et al., arXiv 2510.08396.

The one equation, with random keys as the router:

    z = x Aᵀ                                A: p of D entries of each row are not 0, and
                                            N(0, 1 / r²); p = D k / r, rounded down
    keep the k largest |z + b|              b moves between steps
    g = 1 for the kept, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, b (R,) biases; each rank is an expert: E = R,
K = k.

Balance, without a loss: after each step, c being how often each rank was chosen since the last,

    b <- b + u · sign(mean(c) - c)          for the live ranks

Life: one task trains the values of r new ranks, with new random keys; all older ones are frozen,
biases too. Random keys of different tasks are nearly orthogonal, which is to keep tasks apart.

Departures: the paper trains tasks apart and merges them; here they come in sequence and compete.
The choice by size is that of the authors' stand-alone file; their training code goes by sign
(`signed`), which is the one of the two under which raising a rank's bias always makes it likelier.
That training code also has z without gradients (so none reaches x through the keys), moves biases
in evaluation too, has p = D // (r // k) (50 for D 100, r 12, k 5, where the stand-alone file and
this have 41), and runs at a rate of .001. Keys are stored dense, zeros and all.
"""

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Gate, require
from ..claims import Claims
from .smora import chosen, rebalance


class FlyLoRA(Adapter):
    """Random keys, trained values. Parameters: R (D + O + 1), R O of them trained in their time;
    active, R (D + 1) + k O if k < R.

    Args beyond Adapter's (the default scale is the paper's alpha / r = 64 / 32):
        top_k: k, ranks kept per token, at most all.
        rate: u, how far a bias moves in a step.
        signed: keep the largest z + b instead, as the authors' training code does.

    Raises ValueError if top_k < 1 or rate < 0.
    """

    claims = Claims(zero_at_birth=True, granularity="token", top_k=True, as_lora={})
    buffer_rows = ("A", "expert_bias")
    expert_bias: Tensor

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 32,
        scale: float = 2.0,
        top_k: int = 8,
        rate: float = 0.01,
        signed: bool = False,
    ):
        require(top_k >= 1, "top_k", top_k, "1 or more")
        require(rate >= 0, "rate", rate, "0 or more")
        self.top_k, self.rate, self.signed = top_k, rate, signed
        super().__init__(base, rank, scale)

    def gate(self, x: Tensor) -> Gate:
        z = self.project(x, "A")  # (..., R)
        score = z + self.rows("expert_bias")
        score = score if self.signed else score.abs()
        idx = score.topk(self.kept).indices  # (..., k)
        counts = chosen(idx, self.ranks, self.mask(x)) if self.training else None
        return Gate(idx, 1.0, z.gather(-1, idx), counts=counts)

    def active(self) -> int:
        D, O = self.in_features, self.out_features
        biases = self.ranks if self.kept < self.ranks else 0  # read where there is a choice
        return self.ranks * D + self.kept * O + biases

    def fresh(self) -> dict[str, Tensor]:
        rows = super().fresh()
        r, D = rows["A"].shape
        p = D * min(self.top_k, r) // r
        places = torch.rand(r, D, device=rows["A"].device).argsort(-1)[:, :p]
        values = rows["A"].new_empty(r, p).normal_(std=1 / r)
        A = torch.zeros_like(rows["A"]).scatter_(1, places, values)
        return {"A": A, "B": rows["B"], "expert_bias": self.empty(r).zero_()}

    def after_step(self) -> None:
        rebalance(self)
