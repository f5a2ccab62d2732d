"""Rank-1 Expert Pool: a batch votes for the ranks that learn; the most voted for are kept.

Decomposing and Composing: Towards Efficient Vision-Language Continual Learning via Rank-1 Expert
Pool in a Single LoRA. Fa et al., arXiv 2601.22828. (Reconstructed from the authors' code; the
loss's 1 / (m n) from a summary.)

The one equation, with weights that are the same for a whole batch:

    z = x Aᵀ
    l = x₁ Vᵀ                               x₁: the first token of a sample, in the paper [CLS]
    votes_i = how many samples have l_i among their k largest
    g = 1 for the k live ranks of most votes in the batch               in training
        1 for the `keep` live ranks of most votes in all steps          in evaluation
        1 for the `keep` such of each older task, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

and in training a penalty on values that share directions, n live and m old ones being of the ranks
that count in evaluation:

    penalty = orthogonality / (m n) · Σ |B_i · B_j|                     over old i and live j

The choice is hard and its weights are 1, so no gradient reaches V: it stays as it is drawn, and
what chooses is a random map of the first token.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E tasks, K kept ranks, k
kept live ones. x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, V (r, D). An x of three axes
or more is (samples, tokens..., D); of two or one, each row is a sample.

Life: one task trains r new ranks; older ones are frozen, of which `keep` a task are still used.
(The authors add those to W0, which here stays the model's own, and drop the others: the same
function.)

Departures: V is drawn anew for each task in the authors' code, and has a bias. Their loss is the
mean over layers of sums. Ties go to the first rank. No dropout.
"""

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Gate, require
from ..claims import Claims
from ..sparse import widened
from ..tools.parallel import sum_over_processes
from .smora import chosen


class Rank1Pool(Adapter):
    """Ranks that a batch votes for. Parameters: R (D + O + 1) + r D; active, K (D + O), and r D in
    training if k < r. K is k + keep (E - 1), in evaluation keep E.

    Args beyond Adapter's (the default scale is the authors' alpha / r = 1 / 12):
        top_k: k, at most r.
        keep: of each task, at most r.
        orthogonality: coefficient of the penalty.

    Raises ValueError if top_k < 1, keep < 1 or orthogonality < 0.
    """

    claims = Claims(zero_at_birth=True, as_lora={"top_k": 1000, "keep": 1000})
    buffer_rows = ("votes",)
    V: Tensor
    votes: Tensor

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 12,
        scale: float = 1 / 12,
        top_k: int = 8,
        keep: int = 4,
        orthogonality: float = 0.1,
    ):
        require(top_k >= 1, "top_k", top_k, "1 or more")
        require(keep >= 1, "keep", keep, "1 or more")
        require(orthogonality >= 0, "orthogonality", orthogonality, "0 or more")
        self.top_k, self.keep, self.orthogonality = top_k, keep, orthogonality
        super().__init__(base, rank, scale)
        self.register_buffer("V", self.fresh_router())

    def gate(self, x: Tensor) -> Gate:
        *old, live = self.critical()
        counts = None
        if self.training:  # evaluation looks at no batch
            counts = self.ballot(x)
            live = most(sum_over_processes(counts)[-self.rank :], self.top_k) + len(self.frozen_B)
        idx = torch.cat([*old, live]).expand(*x.shape[:-1], -1)  # (..., K)
        return Gate(idx, 1.0, self.seen(x, idx), counts=counts)

    def critical(self) -> Tensor:
        """The ranks (E, keep) that count in evaluation, task by task."""
        votes = self.rows("votes").view(-1, self.rank)
        first = self.rank * torch.arange(len(votes), device=votes.device)
        return most(votes, self.keep) + first.unsqueeze(-1)

    def ballot(self, x: Tensor) -> Tensor:
        """How many samples of x (..., D) vote for each rank: (R,) int64."""
        mask = self.mask(x)
        if x.ndim > 2:
            x, mask = x.flatten(1, -2)[:, :1], mask.flatten(1)[:, :1]
        with torch.autocast(x.device.type, enabled=False):
            l = widened(x) @ widened(self.V).T
        place = l.topk(min(self.top_k, self.rank)).indices
        return chosen(place + len(self.frozen_B), self.ranks, mask)

    def penalty(self) -> Tensor:
        idx, B = self.critical(), widened(self.rows("B"))
        each = B[idx[-1]] @ B[idx[:-1].flatten()].T
        return self.orthogonality * each.abs().sum() / max(each.numel(), 1)

    def after_step(self) -> None:
        if self.counts is not None:
            self.votes += sum_over_processes(self.counts)[-self.rank :]
            self.end_step()

    def active(self) -> int:
        chooses = self.training and self.top_k < self.rank
        return self.speaking() + chooses * self.rank * self.in_features

    def speaking(self) -> int:
        live = self.top_k if self.training else self.keep
        old = min(self.keep, self.rank) * (self.ranks // self.rank - 1)
        return (min(live, self.rank) + old) * (self.in_features + self.out_features)

    def fresh(self) -> dict[str, Tensor]:
        none = torch.zeros(self.rank, dtype=torch.int64, device=self.base.weight.device)
        return super().fresh() | {"votes": none}


def most(votes: Tensor, k: int) -> Tensor:
    """The k places of most votes (..., r), all if there are no more; the first of equals first."""
    return votes.argsort(descending=True, stable=True)[..., :k]
