"""LoRAMoE: whole LoRAs under a dense router, and a loss that tells it which are for what.

LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin. Dou et
al., arXiv 2312.09979. (Not lora_moe.py, which is the router over LoRAs in general; the paper's
name for this is LoRAMoE.)

The one equation, with one weight per block of ranks, none of them 0:

    z = x Aᵀ
    w = softmax(x Wᵀ)                       one weight per expert; they sum to 1
    g = w_e for each rank of expert e
    y = x W0ᵀ + scale · (g ⊙ z) B

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, W (E, D) router; one expert per task, so
R = E·r.

Localized balancing, in training: experts and samples are of types, and weight is balanced with
regard to whether they are the same. With m a sample and n an expert,

    Q[m, n] = Σ over the sample's tokens of w_n
    I[m, n] = 1 + delta if the types are the same, 1 - delta if not
    aux = balance · var(Z) / mean(Z)        Z = I ⊙ Q, over all samples and experts

which is 0 iff Q is proportional to 1 / I. (So by itself it draws weight away from a sample's own
type, where I is large. That is the paper's sign, and this one's.)

Life: one task trains one new expert and its router row; all older ones are frozen. Types are tasks:
the `label` that it is given in training is the task of each sample.

Departures: the paper has two types, world knowledge and all other tasks, three experts of each, all
trained at once. The authors' code has the sample variance over mean(Z)² + 1e-10 instead.
"""

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Gate, require
from ..claims import Claims
from ..sparse import widened
from ..tools.parallel import sum_over_processes


class LoRAMoEPlugin(Adapter):
    """A dense router over whole LoRAs. Parameters: R (D + O) + E D, all of them active.

    Args beyond Adapter's (the default scale is the paper's alpha / r = 32 / 4):
        balance: coefficient of the localized balancing, in training; 0 needs no label.
        delta: how far the importance of an expert's own type is from that of others, in [0, 1].

    Needs, in training, the context label (...), the task of each sample, from 0 to E - 1.
    Raises ValueError if balance < 0, or delta is not in [0, 1].
    """

    claims = Claims(
        zero_at_birth=True,
        granularity="token",
        expert="block",
        simplex=True,
        as_lora={"router": 0.0},
    )

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 4,
        scale: float = 8.0,
        balance: float = 0.1,
        delta: float = 0.1,
    ):
        require(balance >= 0, "balance", balance, "0 or more")
        require(0 <= delta <= 1, "delta", delta, "0 to 1")
        self.balance, self.delta = balance, delta
        super().__init__(base, rank, scale)

    def gate(self, x: Tensor) -> Gate:
        w = self.project(x, "router").softmax(-1)  # (..., E)
        loss = None
        if self.training and self.balance:
            label, mask = self.given("label", x).flatten(), self.mask(x)  # (samples,)
            m = mask.reshape(len(label), mask.numel() // max(len(label), 1), 1)
            Q = (m * widened(w).reshape(*m.shape[:2], w.shape[-1])).sum(1)  # (samples, E)
            loss = self.balance * localized_balance(Q, label, self.delta, (m.sum((1, 2)) > 0).to(Q))
        return Gate(None, self.of_ranks(w), self.project(x, "A"), loss)

    def active(self) -> int:
        D, O = self.in_features, self.out_features
        return self.n_experts * D + self.ranks * (D + O)

    def fresh(self) -> dict[str, Tensor]:
        return super().fresh() | {"router": self.fresh_router()}

    def needs(self) -> dict[str, range | int]:
        return {"label": range(self.n_experts)} if self.training and self.balance else {}


def localized_balance(Q: Tensor, label: Tensor, delta: float, mask: Tensor) -> Tensor:
    """var(I ⊙ Q) / mean(I ⊙ Q) for Q (samples, E) and label (samples,), over the samples of all
    processes where mask (samples,) is 1."""
    own = label.unsqueeze(-1) == torch.arange(Q.shape[-1], device=Q.device)
    m = mask.to(Q).unsqueeze(-1)
    Z = m * torch.where(own, (1 + delta) * Q, (1 - delta) * Q)
    n, total = sum_over_processes(torch.stack([m.expand_as(Z).sum(), Z.sum()]))
    mean = total / n.clamp_min(1)
    var = sum_over_processes((m * (Z - mean).square()).sum()) / n.clamp_min(1)
    return var / mean.clamp_min(1e-30)
