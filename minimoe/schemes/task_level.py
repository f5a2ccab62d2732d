"""Task-level routing: whole LoRAs, mixed as the task says, the same for all of its tokens.

Beyond Distillation: Task-level Mixture-of-Experts for Efficient Inference. Kudugunta et al., arXiv
2110.03742; with the router of Eliciting and Understanding Cross-Task Skills with Task-Level
Mixture-of-Experts, Ye et al., arXiv 2205.12701.

The one equation, with one weight per block of ranks, which does not look at x:

    z = x Aᵀ
    l = W2 gelu(W1 c_t)                     t, the task of the sample, is given; c_t its embedding
    w = softmax(l)                          over the experts of task t and of older ones
    g = w_e for each rank of expert e, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

So for one task the whole layer is one matrix, W0 + scale · Σ over e of w_e (A_eᵀ B_e)ᵀ, and serves
as cheaply as W0 does: `rules.merged` makes it, and where one w_e is 1, `rules.extract`.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, h width of the
router. x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, c (E, h), W1 (h, h), W2 (E, h)
`router`; one expert per task: R = E·r.

Life: one task trains one new expert, its row of W2, and its c; all older ones are frozen. W1
belongs to no task, and trains on: it is all that moves an old task's answers, as an old task has no
weight for newer experts. Which task it is must be said at test too; for one that is not learned
yet, the layer is W0 alone.

Departures: the papers train all tasks at once; their experts are FFNs, or layers of a transformer.
The second's router has biases; it also draws w by Gumbel-softmax, one expert at a time, and takes c
from a task's examples or text.
"""

import math
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import require
from ..lora_moe import LoRAMoE
from ..sparse import widened


class TaskRouted(LoRAMoE):
    """A dense router that is given the task, and weighs the experts that the task sees: its own,
    and those of older tasks. A subclass gives the `logits`.

    Needs the context label (...), the task of each sample, from 0 on; in evaluation also one more,
    a task not learned yet, of which all weights are 0.
    """

    claims = replace(LoRAMoE.claims, top_k=False, as_lora=None, active_at_most=True)

    def __init__(self, base: nn.Linear, rank: int = 16, scale: float = 1.0, experts: int = 1):
        super().__init__(base, rank, scale, top_k=sys.maxsize, experts=experts)

    @property
    def learned(self) -> int:
        """How many tasks there are, the live one among them."""
        return self.n_experts // self.experts

    def task(self, x: Tensor) -> Tensor:
        """That of each sample of x (..., D), the last one for what is not learned yet: (...)."""
        return self.given("label", x).clamp(max=self.learned - 1)

    def choose(self, x: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
        expert = torch.arange(self.n_experts, device=x.device)
        unseen = ~self.sees(self.task(x).unsqueeze(-1), expert)
        known = self.given("label", x).unsqueeze(-1) < self.learned
        w = widened(l).masked_fill(unseen, -torch.inf).softmax(-1) * known
        w = w.to(x.dtype).expand(*x.shape[:-1], len(expert))
        return expert.expand_as(w), w

    def sees(self, task: Tensor, expert: Tensor) -> Tensor:
        return expert // self.experts <= task

    def needs(self) -> dict[str, range | int]:
        return {"label": range(self.learned + (not self.training))}


class TaskLevel(TaskRouted):
    """Weights that are the task's. Parameters: R (D + O) + 2 E h + h²; active, R (D + O) + E h +
    h² + h.

    Args beyond Adapter's:
        width: h.

    Raises ValueError if width < 1.
    """

    W1: Tensor

    def __init__(self, base: nn.Linear, rank: int = 16, scale: float = 1.0, width: int = 16):
        require(width >= 1, "width", width, "1 or more")
        self.width = width
        super().__init__(base, rank, scale)

    def logits(self, x: Tensor) -> Tensor:
        c = F.embedding(self.task(x), self.rows("c"))  # (..., h)
        return self.project(F.gelu(F.linear(c, self.W1)), "router")

    def active(self) -> int:
        router = (self.n_experts + self.width + 1) * self.width
        return self.ranks * (self.in_features + self.out_features) + router

    def fresh(self) -> dict[str, Tensor]:
        c, router = self.empty(1, self.width).normal_(), self.empty(1, self.width)
        return super().fresh() | {"c": c, "router": router.normal_(std=0.02)}

    def task_agnostic(self) -> dict[str, Tensor]:
        W1 = self.empty(self.width, self.width)
        return {"W1": nn.init.kaiming_uniform_(W1, a=math.sqrt(5))}
