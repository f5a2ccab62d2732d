"""Cartesian: keys and values are chosen apart, so that E of each make E² experts.

CartesianMoE: Boosting Knowledge Sharing among Experts via Cartesian Product Routing in
Mixture-of-Experts. Su et al., arXiv 2410.16077. (Reconstructed from a summary; this is our linear
reduction of it.)

Two routers with one rule, one over blocks of keys and one over blocks of values:

    z_i = x A_iᵀ                            what block i of keys sees
    l = x Uᵀ                                router logits, one per block of keys
    g = softmax over the k largest l        one weight per kept block; they sum to 1
    g' the same, from x Wᵀ                  of the blocks of values
    y = x W0ᵀ + scale · (Σ over i of g_i z_i) (Σ over j of g'_j B_j)
      = x W0ᵀ + scale · Σ over i, j of g_i g'_j z_i B_j

So an expert is a pair (i, j) of a block of keys and one of values. The weights g_i g'_j of all
pairs sum to 1 too, and as a table they are of rank 1. Pairs of one key block share what they see,
pairs of one value block what they say.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E blocks, k kept blocks.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, U (E, D) `key_router`, W (E, D) `router`; one
block of each per task: R = E·r.

Life: one task trains one new block of keys and one of values, and their router rows; all older ones
are frozen. The E-th task so adds 2 E - 1 experts, of which all but one are half an older task's.

Departures: the paper's experts are FFNs in two layers of experts, one behind the other, with a
residual, a norm and a shared expert in each: a path is a pair of them. Here nothing stands between
the halves, so that a pair is one LoRA. The paper trains once and never grows.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..lora_moe import LoRAMoE


class Cartesian(LoRAMoE):
    """A router over keys and one over values. Parameters: R (D + O) + 2 E D; active, 2 E D + k
    (R / E) (D + O). Args and errors: LoRAMoE's, without balance and experts."""

    claims = replace(LoRAMoE.claims, as_lora=None, equation=False)

    def __init__(self, base: nn.Linear, rank: int = 16, scale: float = 1.0, top_k: int = 2):
        super().__init__(base, rank, scale, top_k)

    def seen(self, x: Tensor, idx: Tensor) -> Tensor:
        """Σ g_i z_i, once for each kept block of values: (..., K)."""
        i, g = self.choose(x, self.project(x, "key_router"))
        ranks = torch.arange(self.block, device=x.device)
        z = super().seen(x, (i.unsqueeze(-1) * self.block + ranks).flatten(-2))
        mean = (self.of_ranks(g) * z).unflatten(-1, (-1, self.block)).sum(-2)  # (..., r)
        return mean.repeat(*[1] * (x.ndim - 1), self.kept)

    def active(self) -> int:
        return super().active() + self.n_experts * self.in_features

    def fresh(self) -> dict[str, Tensor]:
        return super().fresh() | {"key_router": self.fresh_router()}
