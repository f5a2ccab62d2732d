"""LoRA-MoE: whole LoRAs as experts, and a router that learns which of them to use.

The linear form of MoE-Adapters4CL (Yu et al., arXiv 2403.11549), which MoRA is compared with.

The one equation, with one weight per block of ranks:

    z = x Aᵀ
    l = x Wᵀ                                router logits, one per expert
    keep the k largest l
    w = softmax over the kept of l          one weight per kept expert; they sum to 1
    g = w_e for each rank of a kept expert e, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, W (E, D) router. R = E·r and K = k·r.

Life: one task trains one new expert and one new router row; all older ones are frozen.

Departures: the paper's experts stand beside the FFN, are not linear, and have one router per task.
"""

from torch import Tensor, nn

from .adapter import Adapter, Gate, require
from .balance import switch_balance
from .claims import Claims


class LoRAMoE(Adapter):
    """A router over whole LoRAs. Parameters: R (D + O) + E D; active, E D + k (R / E) (D + O).

    Another rule of routing is a subclass with another `logits`, `choose` or `auxiliary` loss, as
    schemes/adamoe.py is.

    Args beyond Adapter's:
        top_k: k, experts kept per token, at most all.
        balance: coefficient in training of `switch_balance`, Switch Transformers' loss.
        experts: how many a task adds, its r ranks shared out evenly; r of them: single ranks.

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

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 16,
        scale: float = 1.0,
        top_k: int = 2,
        balance: float = 0.0,
        experts: int = 1,
    ):
        require(top_k >= 1, "top_k", top_k, "1 or more")
        require(balance >= 0, "balance", balance, "0 or more")
        require(experts > 0 and rank % experts == 0, "experts", experts, f"divisors of rank {rank}")
        self.top_k, self.balance, self.experts = top_k, balance, experts
        super().__init__(base, rank, scale)

    def gate(self, x: Tensor) -> Gate:
        l = self.logits(x)
        expert, w = self.choose(x, l)
        loss = self.auxiliary(x, l, expert, w) if self.training else None
        return self.gate_blocks(x, expert, w, loss)

    def logits(self, x: Tensor) -> Tensor:
        return self.project(x, "router")  # (..., E)

    def choose(self, x: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
        """The kept experts (..., k), and their weights w."""
        top, expert = l.topk(self.kept)  # (..., k)
        return expert, top.softmax(-1)

    def auxiliary(self, x: Tensor, l: Tensor, expert: Tensor, w: Tensor) -> Tensor | None:
        return self.balance * switch_balance(l, expert, self.mask(x)) if self.balance else None

    def active(self) -> int:
        D, O = self.in_features, self.out_features
        return self.n_experts * D + self.kept * self.block * (D + O)

    def fresh(self) -> dict[str, Tensor]:
        return super().fresh() | {"router": self.fresh_router()}
