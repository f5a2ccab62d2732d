"""LD-MoLE: a router over whole LoRAs whose softmax has zeros, as many as the token sets.

LD-MoLE: Learnable Dynamic Routing for Mixture of LoRA Experts. Zhuang et al., arXiv 2509.25684.

The one equation, with one weight per block of ranks, and a softmax that reaches 0 (sparsegen, Laha
et al., arXiv 1810.11975):

    z = x Aᵀ
    l = x Wᵀ                                router logits, one per expert
    λ = .99 + logsigmoid(relu(x W1ᵀ + b1) w2ᵀ + b2)      below 1
    w = [l - t]₊ / (1 - λ)                  t: the number with which w sums to 1
    g = w_e for each rank of expert e
    y = x W0ᵀ + scale · (g ⊙ z) B

λ near 1 leaves one expert, λ = 0 is sparsemax, and λ → -∞ weighs all the same. With l_(1) the
largest logit, at most k experts are used iff λ >= λ_k; so in training there can be

    λ_k = 1 - Σ over i <= k of (l_(i) - l_(k+1))          no gradient goes through it
    loss = sparsity · mean over tokens of [λ_k - λ]₊

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept, h width
of λ's network. x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, W (E, D) router, W1 (h, D),
b1 (h,), w2 (1, h), b2 (1,); one expert per task: R = E·r.

Life: one task trains one new expert and its router row; all older ones are frozen. λ's network
belongs to no task, and trains on.

Departures: the paper trains one task mixture and never grows, and λ's network serves all layers of
one width; here it is a layer's own. Its balance loss is left out, whose coefficient is 0 in the
authors' configuration, as is sparsity's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import require
from ..balance import mean_over_tokens
from ..sparse import widened
from .adamole import Thresholded


class LDMoLE(Thresholded):
    """A softmax with zeros. Parameters: R (D + O) + E D + h (D + 2) + 1, all active.

    Args beyond Adapter's:
        width: h.
        sparsity: coefficient of the loss, in training.
        at_most: k of the loss.

    Raises ValueError if width < 1, sparsity < 0 or at_most < 1.
    """

    W1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 8,
        scale: float = 1.0,
        width: int = 64,
        sparsity: float = 0.0,
        at_most: int = 2,
    ):
        require(width >= 1, "width", width, "1 or more")
        require(sparsity >= 0, "sparsity", sparsity, "0 or more")
        require(at_most >= 1, "at_most", at_most, "1 or more")
        self.width, self.sparsity, self.at_most = width, sparsity, at_most
        super().__init__(base, rank, scale)

    def weights(self, x: Tensor, l: Tensor) -> Tensor:
        return sparsegen(l, self.one_less(x))

    def one_less(self, x: Tensor) -> Tensor:
        """1 - λ (..., 1), at least .01."""
        hidden = F.linear(x, self.W1, self.b1).relu()
        return 0.01 + F.softplus(-widened(F.linear(hidden, self.w2, self.b2)))

    def auxiliary(self, x: Tensor, l: Tensor, expert: Tensor, w: Tensor) -> Tensor | None:
        if not self.sparsity:
            return None
        k = min(self.at_most, l.shape[-1] - 1)
        top = widened(l.detach()).topk(k + 1).values
        most = (top - top[..., -1:]).sum(-1)  # 1 - λ_k
        each = (self.one_less(x).squeeze(-1) - most).relu() * (self.at_most < l.shape[-1])
        return self.sparsity * mean_over_tokens(each, self.mask(x))

    def active(self) -> int:
        return super().active() + self.width * (self.in_features + 2) + 1

    def task_agnostic(self) -> dict[str, Tensor]:
        nets = {"1": nn.Linear(self.in_features, self.width), "2": nn.Linear(self.width, 1)}
        with torch.no_grad():
            both = {"W1": nets["1"].weight, "b1": nets["1"].bias}
            both |= {"w2": nets["2"].weight, "b2": nets["2"].bias}
            return {name: self.empty(*t.shape).copy_(t) for name, t in both.items()}


def sparsegen(l: Tensor, c: Tensor) -> Tensor:
    """w (..., E) = [l - t]₊ / c, with Σ w = 1, of logits l (..., E) and c = 1 - λ > 0 (..., 1)."""
    top = l.sort(-1, descending=True).values
    total, k = top.cumsum(-1), torch.arange(1, l.shape[-1] + 1, device=l.device)
    speak = (c + k * top > total).sum(-1, keepdim=True).clamp_min(1)  # how many: the largest such k
    t = (total.gather(-1, speak - 1) - c) / speak
    return (l - t).relu() / c
