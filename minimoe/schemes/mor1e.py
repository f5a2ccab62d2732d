"""Intuition-MoR1E: single ranks, weighted by a router and by what the whole sample is like.

Intuition-aware Mixture-of-Rank-1-Experts for Parameter Efficient Finetuning. Liu et al., arXiv
2404.08985; since its later versions called T-REX.

The one equation, with weights of two kinds, one per token and one per sample:

    z = x Aᵀ
    c = C e / ‖e‖                           e, an embedding of the sample, is given; C: one cluster
                                            centre per rank; the "intuition"
    o = sigmoid(100 w1),  q = sigmoid(100 w2)
    g = q · (R · o · softmax(x Wᵀ) + 4 · (1 - o) · c)
    y = x W0ᵀ + scale · (g ⊙ z) B

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept, F width
of an embedding. x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, W (R, D) router, C (R, F)
centres, e (B, F), w1 and w2 (1,); each rank is an expert: E = R, and all are used.

W, w1 and w2 are 0 at first, so g = 1/2 · (1/2 + 2 c): the router's part sums to R · o.

Life: one task trains r new ranks and their router rows, and w1 and w2 go on; all older rows are
frozen. Its r centres, random at first, are set to k-means centres of its samples' embeddings, of
length 1, when the data are there: `MoR1ELearner`.

Departures: the paper trains one mixture, with one set of centres from all data, shared by all
layers; here each layer has its own copy. T-REX's default is 4 × 8.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapt import adapters
from ..adapter import Adapter, Gate, require
from ..claims import Claims
from ..continual.learn import Fit
from ..continual.learners import SampleLearner
from ..continual.stream import Stream, Task


class MoR1E(Adapter):
    """Rank-1 experts with intuition. Parameters: R (2 D + O + F) + 2, all of them active.

    Args beyond Adapter's:
        embedding: F, the width of the embedding that it is given; 64 is the toy backbone's.

    Needs the context embedding (..., F), one per sample.
    Raises ValueError if embedding < 1.
    """

    claims = Claims(zero_at_birth=True, granularity="token")
    buffer_rows = ("centres",)
    centres: Tensor
    w1: Tensor
    w2: Tensor

    def __init__(self, base: nn.Linear, rank: int = 16, scale: float = 1.0, embedding: int = 64):
        require(embedding >= 1, "embedding", embedding, "1 or more")
        self.embedding = embedding
        super().__init__(base, rank, scale)

    def gate(self, x: Tensor) -> Gate:
        e = self.given("embedding", x).to(self.centres.dtype)  # (..., F)
        c = F.linear(F.normalize(e, dim=-1), self.rows("centres"))  # (..., R)
        router = self.project(x, "router").softmax(-1)
        token = self.ranks * (100 * self.w1).sigmoid() * router
        sample = 4 * (-100 * self.w1).sigmoid() * c  # sigmoid(-a) = 1 - sigmoid(a)
        g = (100 * self.w2).sigmoid() * (token + sample)
        return Gate(None, g, self.project(x, "A"))

    def active(self) -> int:
        D, O = self.in_features, self.out_features
        return self.ranks * (2 * D + O + self.embedding) + 2

    def fresh(self) -> dict[str, Tensor]:
        rows = super().fresh()
        centres = F.normalize(torch.randn(self.rank, self.embedding), dim=-1).to(rows["A"])
        return rows | {"router": torch.zeros_like(rows["A"]), "centres": centres}

    def task_agnostic(self) -> dict[str, Tensor]:
        return {name: self.empty(1).zero_() for name in ("w1", "w2")}

    def needs(self) -> dict[str, range | int]:
        return {"embedding": self.embedding}


class MoR1ELearner(SampleLearner):
    """Life in a stream: every layer's new ranks get the centres of the new task's clusters."""

    def __init__(self, model: nn.Module, scheme: type[MoR1E] = MoR1E, **settings: Any):
        super().__init__(model, scheme, **settings)

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        def fit_with_centres(model: nn.Module, weights: Any, task: Task) -> None:
            layers = [cast(MoR1E, layer) for _, layer in adapters(model)]
            self.clusters = layers[0].rank
            centres = F.normalize(self.centres(task), dim=-1)
            for layer in layers:
                layer.centres = centres.clone()
            fit(model, weights, task)

        super().learn(stream, t, fit_with_centres)
