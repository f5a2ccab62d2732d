"""MixLoRA: whole feed-forward networks as experts, each the frozen one under LoRAs of its own.

MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts. Li et al.,
arXiv 2404.15159. As the authors' code has it (TUDB-Labs/MixLoRA), but for the loss.

An FFN of two linear layers, and experts that have r ranks beside each of both:

    FFN(x) = act(x W1ᵀ) W2ᵀ
    l = x Wᵀ                                router logits, one per expert
    keep the k largest l
    w = softmax over the kept of l          one weight per kept expert; they sum to 1
    y = Σ over kept e of w_e FFN_e(x)       its W1 and W2 both with LoRA e (lora.py), at weight 1

That is no router over LoRAs in each linear layer (lora_moe.py): there the activation is taken of a
mean over experts, here the mean is of what each makes of its own activations. In training

    loss = balance · E · Σ over e of (share of tokens whose largest l is l_e) · (mean softmax(l)_e)

Axes: B batch, T tokens, D in and out, H hidden, r ranks per task, E experts, k kept experts.
x (..., D), samples first, W1 (H, D), W2 (D, H), W (E, D) router; one expert per task.

Life: one task trains one new expert and its router row; all older ones are frozen. What adapt.py
does with a model of adapters (grow, parameters, count, save, load) it does with this one; the rest
of a model is to be frozen by whom it belongs to.

Departures: the paper trains once and never grows. Here the product of W1 is computed anew for each
kept expert. In the loss, the authors' code counts all kept experts.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapter import require
from ..balance import switch_balance
from ..context import context
from ..continual.baselines import ToldLoRA


class ExpertLinear(ToldLoRA):
    """A linear layer of the experts; which is a token's is given: the context `label`."""

    def __init__(self, base: nn.Linear, rank: int = 16, scale: float = 2.0, top_k: int = 2):
        self.top_k = top_k  # how often it is called for a token
        super().__init__(base, rank, scale)

    def active(self) -> int:
        return self.kept * super().active()


class FirstLinear(ExpertLinear):
    """The first, which has the router's rows."""

    def active(self) -> int:
        return self.speaking() + self.n_experts * self.in_features

    def speaking(self) -> int:
        return super().active()

    def fresh(self) -> dict[str, Tensor]:
        return super().fresh() | {"router": self.fresh_router()}


class MixLoRA(nn.Module):
    """FFNs as experts. Parameters: E D + 2 E r (D + H); active, E D + 2 k r (D + H).

    Args (the default scale is the authors' alpha / r = 32 / 16):
        ffn: a linear layer, an activation, a linear layer. It is wrapped, its weights are frozen.
        top_k: k, experts kept per token, at most all.
        balance: coefficient of the loss, in training.

    Raises ValueError if top_k < 1 or balance < 0, TypeError if ffn has other parts.
    """

    def __init__(
        self,
        ffn: nn.Sequential,
        rank: int = 16,
        scale: float = 2.0,
        top_k: int = 2,
        balance: float = 0.01,
    ):
        require(top_k >= 1, "top_k", top_k, "1 or more")
        require(balance >= 0, "balance", balance, "0 or more")
        if not isinstance(ffn, nn.Sequential) or len(ffn) != 3:
            raise TypeError(f"ffn is {ffn}, allowed: nn.Sequential of Linear, activation, Linear")
        super().__init__()
        first, self.act, second = cast(Any, ffn)
        self.fc1 = FirstLinear(first, rank, scale, top_k)
        self.fc2 = ExpertLinear(second, rank, scale, top_k)
        self.balance, self.training = balance, ffn.training

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.fc1, FirstLinear):  # unwrapped
            return cast(Tensor, self.fc2(self.act(self.fc1(x))))
        self.fc1.step.used = {}  # a new pass: the labels of the last are over
        l = self.fc1.project(x, "router")
        top, expert = l.topk(self.fc1.kept)  # (..., k)
        if self.training and self.balance:
            self.fc1.leave(self.balance * switch_balance(l, expert[..., :1], self.fc1.mask(x)))
        each = []
        for e in expert.unbind(-1):
            with context(self, label=e):
                each.append(self.fc2(self.act(self.fc1(x))))
        return (top.softmax(-1).unsqueeze(-2) * torch.stack(each, -1)).sum(-1).to(each[0].dtype)
