"""Mixture of Routers: several routers over whole LoRAs, and one that says whom to believe.

Mixture of Routers. Zhang et al., arXiv 2503.23362. (Reconstructed from the abstract: "multiple
sub-routers for joint selection", "a learnable main router to determine the weights of the
sub-routers". Its code was not to be had.)

The one equation, with one weight per block of ranks, from M sub-routers W_j and a main one, Q:

    z = x Aᵀ
    s = Σ over j of q_j softmax(x W_jᵀ)     q = softmax(x Qᵀ)
    keep the k largest s
    w = s / Σ s over the kept               one weight per kept expert; they sum to 1
    g = w_e for each rank of a kept expert e, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, k kept experts, M
sub-routers. x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, W (E·M, D), Q (M, D); one expert
per task: R = E·r and K = k·r.

Life: one task trains one new expert and its row of each sub-router; all older ones are frozen. The
main router belongs to no task, and trains on.

Departures: the paper trains one task mixture and never grows. M is not in the abstract.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..adapter import require
from ..lora_moe import LoRAMoE
from ..sparse import widened


class MixtureOfRouters(LoRAMoE):
    """A router over routers. Parameters: R (D + O) + (E + 1) M D; active, (E + 1) M D + k (R / E)
    (D + O).

    Args beyond LoRAMoE's:
        routers: M.

    Raises ValueError if routers < 1.
    """

    claims = replace(LoRAMoE.claims, as_lora={"router": 0.0}, active_at_most=True)
    Q: Tensor

    def __init__(
        self, base: nn.Linear, rank: int = 16, scale: float = 1.0, top_k: int = 2, routers: int = 3
    ):
        require(routers >= 1, "routers", routers, "1 or more")
        self.routers = routers
        super().__init__(base, rank, scale, top_k)

    def logits(self, x: Tensor) -> Tensor:
        """ln s, of which a softmax over the kept is s / Σ s."""
        l = widened(super().logits(x)).unflatten(-1, (-1, self.routers))  # (..., E, M)
        q = widened(nn.functional.linear(x, self.Q)).log_softmax(-1).unsqueeze(-2)
        return (l.log_softmax(-2) + q).logsumexp(-1).to(x.dtype)

    def active(self) -> int:
        more = (self.n_experts * (self.routers - 1) + self.routers) * self.in_features
        return super().active() + more

    def fresh(self) -> dict[str, Tensor]:
        rows = super().fresh()
        return rows | {"router": torch.cat([self.fresh_router() for _ in range(self.routers)])}

    def task_agnostic(self) -> dict[str, Tensor]:
        return {"Q": self.empty(self.routers, self.in_features).normal_(std=0.02)}
