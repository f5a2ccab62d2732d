"""Intuition-MoR1E: single ranks, weighted by a router and by what the whole sample is like.

Intuition-aware Mixture-of-Rank-1-Experts for Parameter Efficient Finetuning. Liu et al., arXiv
2404.08985.

The one equation, with weights of two kinds, one per token and one per sample:

    z = x Aᵀ
    c = C e / ‖e‖                           e, an embedding of the sample, is told; C: one cluster
                                            centre per rank; the "intuition"
    o = sigmoid(100 w1),  q = sigmoid(100 w2)
    g = q · (R · o · softmax(x Wᵀ) + 4 · (1 - o) · c)
    y = x W0ᵀ + scale · (g ⊙ z) B

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept, F width
of an embedding. x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, W (R, D) router, C (R, F)
centres, e (B, F), w1 and w2 (1,); each rank is an expert: E = R, and all speak.

W, w1 and w2 are 0 at first, so g = 1/2 · (1/2 + 2 c): the router's part sums to R · o.

Life: one task trains r new ranks and their router rows, and w1 and w2 go on; all older rows are
frozen. Its r centres are k-means centres of its samples' embeddings, of length 1, and are the
caller's to set (`centres`, random until then): that is when the data are there.

Departures: the paper trains one mixture, with one set of centres from all data, shared by all
layers; here each layer has its own copy.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lora import Adapter, Claims


class MoR1E(Adapter):
    """Rank-1 experts with intuition. Parameters: R (2 D + O + F) + 2, all of them active.

    Args beyond Adapter's:
        embedding: F, the width of the embedding that it is told; 64 is the toy backbone's.

    Must be told: embedding (..., F), one per sample.
    Raises ValueError if embedding < 1.
    """

    claims = Claims(zero_at_birth=True, granularity="token")
    fixed = ("centres",)
    centres: Tensor
    w1: Tensor
    w2: Tensor

    def __init__(self, base: nn.Linear, rank: int = 16, scale: float = 1.0, embedding: int = 64):
        if embedding < 1:
            raise ValueError(f"embedding is {embedding}, allowed: 1 or more")
        self.embedding = embedding
        super().__init__(base, rank, scale)

    def gate(self, x: Tensor) -> tuple[Tensor | None, Tensor | float, Tensor]:
        e = self.hear("embedding", x).to(self.centres.dtype)  # (..., F)
        c = F.linear(F.normalize(e, dim=-1), self.rows("centres"))  # (..., R)
        router = self.project(x, "router").softmax(-1)
        token = self.ranks * (100 * self.w1).sigmoid() * router
        sample = 4 * (-100 * self.w1).sigmoid() * c  # sigmoid(-a) = 1 - sigmoid(a)
        return None, (100 * self.w2).sigmoid() * (token + sample), self.project(x, "A")

    def active(self) -> int:
        D, O = self.base.in_features, self.base.out_features
        return self.ranks * (2 * D + O + self.embedding) + 2

    def fresh(self) -> dict[str, Tensor]:
        rows = super().fresh()
        centres = F.normalize(torch.randn(self.rank, self.embedding), dim=-1).to(rows["A"])
        return rows | {"router": torch.zeros_like(rows["A"]), "centres": centres}

    def shared(self) -> dict[str, Tensor]:
        return {name: self.base.weight.new_zeros(1) for name in ("w1", "w2")}

    def hears(self) -> dict[str, range | int]:
        return {"embedding": self.embedding}
