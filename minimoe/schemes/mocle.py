"""MoCLE: whole LoRAs, chosen by which cluster the sample is in; one more for what is common.

Mixture of Cluster-Conditional LoRA Experts for Vision-Language Instruction Tuning. Gou et al.,
arXiv 2312.12379.

The one equation for the chosen expert, and a universal expert beside it:

    z = x Aᵀ
    p = softmax(W C[c] / tau)               c, the cluster of the sample, is given
    G = the largest p                       one expert e per sample, not renormalised
    g = G for each rank of e, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B + scale · (1 - G) · (x UAᵀ) UB

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept, M width
of a cluster's embedding. x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, UA (r, D) and
UB (r, O) the universal expert, W (E, M) router, C (clusters, M); one expert per task: R = E·r and
K = r.

Life: one task trains one new expert and its router row, and the embeddings of the new clusters that
it brings; older ones are frozen. The universal expert trains on, from the second task on: a single
expert has G = 1. Clusters are k-means clusters of the samples' embeddings, and are found by
`MoCLELearner`: the layer is given which one a sample is in.

Departures: nothing makes a new cluster prefer the new expert: if its embedding first falls to an
old one, which is frozen, it stays there. The paper clusters all data once and trains four experts
at once. The authors' code multiplies the chosen expert by G twice, has M = 384 (here 16) and
alpha / r = 4 (here `scale` 1), adds noise N(0, .1) to the logits in training, and gives the
router a bias.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Adapter, Gate, require
from ..claims import Claims
from ..continual.data import Inputs
from ..continual.learn import Fit
from ..continual.learners import ClusterLearner
from ..continual.stream import Stream


class MoCLE(Adapter):
    """Cluster-conditional LoRAs. Parameters: (R + r) (D + O) + E M + C M; active, 2 r (D + O) + E M
    + M.

    Args beyond Adapter's:
        clusters: how many a task brings.
        tau: temperature of the softmax; towards 0 it silences the universal expert.
        embedding: M.

    Needs the context cluster (...), that of each sample, from 0 on, over all tasks.
    Raises ValueError if clusters < 1, embedding < 1, or tau is not above 0.
    """

    claims = Claims(zero_at_birth=True, granularity="token", expert="block", equation=False)
    UA: Tensor
    UB: Tensor

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 8,
        scale: float = 1.0,
        clusters: int = 64,
        tau: float = 0.05,
        embedding: int = 16,
    ):
        require(clusters >= 1, "clusters", clusters, "1 or more")
        require(embedding >= 1, "embedding", embedding, "1 or more")
        require(tau > 0, "tau", tau, "above 0")
        self.clusters, self.tau, self.embedding = clusters, tau, embedding
        super().__init__(base, rank, scale)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(e, G, 1 - G), each (..., 1) with an axis of 1 for each of x's token axes."""
        C = F.embedding(self.given("cluster", x), self.rows("C"))  # (..., M)
        p = (self.project(C, "router") / self.tau).softmax(-1)  # (..., E)
        G, e = p.max(-1, keepdim=True)
        return e, G, p.scatter(-1, e, 0.0).sum(-1, keepdim=True)  # exact where 1 - G rounds to 0

    def gate(self, x: Tensor) -> Gate:
        e, G, _ = (t.expand(*x.shape[:-1], 1) for t in self.choose(x))
        return self.gate_blocks(x, e, G)

    def update(self, x: Tensor) -> Tensor:
        _, _, rest = self.choose(x)
        universal = self.scale * rest * F.linear(F.linear(x, self.UA), self.UB.T)
        return super().update(x) + universal

    def active(self) -> int:
        D, O = self.in_features, self.out_features
        return 2 * self.block * (D + O) + (self.n_experts + 1) * self.embedding

    def speaking(self) -> int:
        return 2 * self.block * (self.in_features + self.out_features)

    def fresh(self) -> dict[str, Tensor]:
        rows = super().fresh()
        C = nn.init.normal_(rows["A"].new_empty(self.clusters, self.embedding))
        router = rows["A"].new_empty(1, self.embedding)
        return rows | {"C": C, "router": nn.init.kaiming_uniform_(router, a=math.sqrt(5))}

    def task_agnostic(self) -> dict[str, Tensor]:
        rows = super().fresh()
        return {"UA": rows["A"], "UB": rows["B"]}

    def needs(self) -> dict[str, range | int]:
        return {"cluster": range(len(self.rows("C")))}


class MoCLELearner(ClusterLearner):
    """Life in a stream: an input's cluster is the nearest of all that the tasks have brought."""

    def __init__(
        self, model: nn.Module, clusters: int, scheme: type[MoCLE] = MoCLE, **settings: Any
    ):
        super().__init__(model, scheme, clusters=clusters, **settings)
        self.clusters = clusters

    def context(self, x: Inputs) -> dict[str, Tensor]:
        return {"cluster": self.nearest(x)}

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        centres = self.centres(stream.tasks[t])
        self.known = torch.cat([self.known.to(centres), centres]) if len(self.known) else centres
        super().learn(stream, t, fit)
