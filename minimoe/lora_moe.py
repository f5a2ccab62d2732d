"""LoRA-MoE: whole LoRAs as experts, and a router that learns which of them speak.

The linear form of MoE-Adapters4CL (Yu et al., arXiv 2403.11549), which MoRA is compared with.

The one equation, with one weight per block of ranks:

    z = x Aᵀ
    l = x Wᵀ                                router logits, one per expert
    w = softmax over the top k of l         one weight per kept expert; they sum to 1
    g = w_e for each rank of a kept expert e, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, W (E, D) router. With one expert per task,
as usual, R = E·r and K = k·r.

Life: one task trains one new expert and one new router row; all older ones are frozen. On
permuted-digits that did better than training the old rows on, and small random rows no worse
than zero ones; top-2, top-3 and all experts came out alike. At top-1 the one weight is always
1, so the router gets no gradient; and so it is while there is one expert: the first task's router
row stays as it was drawn, and later rows outbid it on that task's own inputs.

Balance (off by default), as Switch Transformers (Fedus et al., arXiv 2101.03961, eq. 4-6):

    aux = balance · E · Σ_e f_e P_e         balance where the router is uniform
    f_e = share of the kept (token, slot) pairs that fall to e
    P_e = mean over tokens of softmax(l)_e

What it keeps and what it leaves out, of
- MoE-Adapters4CL: top-k then softmax, zero-change birth, freezing by task. Not: non-linear
  adapters beside the FFN, a router set per task (it needs to be told the task, or to guess it),
  routing by a sample's first token, noise on the logits.
- MixLoRA (arXiv 2404.15159): top-k over learned logits, router N(0, .02), its load-balance
  loss. Not: gating whole FFNs, experts all trained at once.
- LoRAMoE (arXiv 2312.09979): a block gate on each linear layer. Not: the dense softmax over all
  experts, the balance between two given kinds of expert.
"""

import torch
from torch import Tensor, nn

from .lora import Adapter, Claims
from .parallel import everywhere


class LoRAMoE(Adapter):
    """A router over whole LoRAs. Parameters: R (D + O) + E D; active, E D + k (R / E) (D + O).

    Args beyond Adapter's:
        top_k: k, experts kept per token, at most all.
        balance: coefficient of the load-balance loss, left in `aux` in training.
        experts: how many a task adds, its r ranks shared out evenly; at r, experts are single
            ranks, as MoRA's, with a router.

    Raises ValueError if top_k < 1, balance < 0, or experts does not divide rank.
    """

    claims = Claims(
        zero_at_birth=True,
        granularity="token",
        expert="block",
        top_k=True,
        simplex=True,
        as_lora={"router": 0.0},
    )
    router: Tensor
    frozen_router: Tensor

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 16,
        scale: float = 1.0,
        top_k: int = 2,
        balance: float = 0.0,
        experts: int = 1,
    ):
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}, allowed: 1 or more")
        if not balance >= 0:
            raise ValueError(f"balance is {balance}, allowed: 0 or more")
        if experts < 1 or rank % experts:
            raise ValueError(f"experts is {experts}, allowed: a divisor of rank, which is {rank}")
        self.top_k, self.balance, self.experts = top_k, balance, experts
        super().__init__(base, rank, scale)

    @property
    def block(self) -> int:
        return self.rank // self.experts

    def gate(self, x: Tensor) -> tuple[Tensor | None, Tensor | float, Tensor]:
        logits = self.project(x, "router")  # (..., E)
        top, expert = logits.topk(min(self.top_k, logits.shape[-1]))  # (..., k)
        w = top.softmax(-1)
        if self.training and self.balance:
            self.aux = self.balance * switch_balance(logits, expert)
        return self.of_blocks(x, expert, w)

    def active(self) -> int:
        D, O, E = self.base.in_features, self.base.out_features, self.ranks // self.block
        return E * D + min(self.top_k, E) * self.block * (D + O)

    def fresh(self) -> dict[str, Tensor]:
        rows = self.base.weight.new_empty(self.experts, self.base.in_features)
        return super().fresh() | {"router": rows.normal_(std=0.02)}


def switch_balance(logits: Tensor, expert: Tensor) -> Tensor:
    """E · Σ_e f_e P_e: 1 where routing is uniform, up to E where one expert takes all.

    logits (..., E), expert (..., k) the kept ones; Switch Transformers eq. 4-6, with f_e counted
    over all k slots, and all tokens of all processes. An empty batch gives 0.
    """
    E, k = logits.shape[-1], expert.shape[-1]
    kept = expert.flatten()
    f = logits.new_zeros(E).scatter_add(0, kept, logits.new_ones(()).expand(len(kept)))
    P = logits.softmax(-1).reshape(-1, E).sum(0)
    sums = everywhere(torch.cat([f, P, P.new_full((1,), len(kept) / k)]))
    f, P, tokens = sums.split([E, E, 1])
    tokens = tokens.clamp_min(1)
    return E * (f / (k * tokens) * (P / tokens)).sum()
