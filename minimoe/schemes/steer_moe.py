"""Steer-MoE: vectors that are added to a frozen layer's output, under a dense router.

SteerMoE: Efficient Audio-Language Models with Preserved Reasoning Capabilities. As the authors'
code has it (forfrt/SteerMoE).

The one equation, but for the keys, of which there are none: z is 1, whatever x is:

    u = x W0ᵀ + b                           what the frozen layer says
    g = softmax(u Wᵀ + c)                   one weight per vector; they sum to 1
    y = u + scale · (g ⊙ 1) B               a weighted mean of the vectors

So an expert's update is no product with x: a key has D numbers for a value's O, and here the router
alone reads, and not x, but what the layer says of it.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), B (R, O) vectors, W (R, O) router, c (R,) `router_bias`. Each vector is an
expert: E = R = K.

Life: one task trains r new vectors and their router rows; all older ones are frozen, and their
weights fall.

Departures: the paper trains once and never grows. Its vectors stand behind the layers of an audio
encoder, under one router for all layers; here each linear layer has its own. Its vectors start at
N(0, .01), here at 0, and `scale`, which it trains from .1 on, is fixed: the vectors can grow.
"""

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Claims, Gate


class SteerMoE(Adapter):
    """Vectors, mixed by what the layer says. Parameters: R (2 O + 1), all of them active. (And the
    base layer is computed twice.) Args and errors: Adapter's."""

    claims = Claims(zero_at_birth=True, granularity="token", simplex=True, equation=False)

    def __init__(self, base: nn.Linear, rank: int = 8, scale: float = 0.1):
        super().__init__(base, rank, scale)

    @property
    def keys(self) -> Tensor:
        """(R, 1): what stands for x is a 1, which all ranks see alike."""
        return torch.ones_like(self.rows("B")[:, :1])

    def gate(self, x: Tensor) -> Gate:
        g = self.logits(self.of_base(x)).softmax(-1)  # (..., R)
        return Gate(None, g, torch.ones_like(g))

    def of_base(self, x: Tensor) -> Tensor:
        """u (..., O) of x (..., D), to compute with."""
        dtype = self.base.weight.dtype
        return self.cast(self.call_base(x.to(dtype) if dtype.is_floating_point else x))

    def logits(self, u: Tensor) -> Tensor:
        return self.project(u, "router") + self.rows("router_bias")

    def active(self) -> int:
        return self.ranks * (2 * self.out_features + 1)

    def speaking(self) -> int:
        return self.ranks * self.out_features

    def fresh(self) -> dict[str, Tensor]:
        O = self.out_features
        rows = {"router": self.empty(self.rank, O), "router_bias": self.empty(self.rank)}
        for tensor in rows.values():
            tensor.uniform_(-(O**-0.5), O**-0.5)  # as torch's linear layers start
        return {"B": super().fresh()["B"], **rows}
