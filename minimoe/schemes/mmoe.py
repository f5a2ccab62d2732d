"""MMoE: whole LoRAs for all tasks, and a router of each task's own; some LoRAs are for one task.

Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts. Ma et al.,
KDD 2018. With `exclusive` above 0 MMoEEx: Heterogeneous Multi-task Learning with Expert Diversity.
Aoki et al., arXiv 2106.10595.

The one equation, with one weight per block of ranks, by the router W^t of the task t:

    z = x Aᵀ
    l = x W^tᵀ                              t, the task of the sample, is given
        and -inf for an expert of a newer task, and for an exclusive one of another task
    w = softmax(l)                          one weight per expert; they sum to 1
    g = w_e for each rank of expert e, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

Of the n experts that a task adds, the first ⌊exclusive · n⌋ are exclusive. With none, and one W for
all tasks, the last task's answers are those of lora_moe.py with all kept; with n = 1 that is
exclusive, a task has a LoRA of its own and no other.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, W (tasks, experts, D) `routers`; R = E·r / n.

Life: one task trains n new experts, and its router over them and over the older ones that are
shared, which are frozen. An old task's answers stay as they are. Which task it is must be said
at test too; for one that is not learned yet, the layer is W0 alone.

Departures: the papers train all tasks at once, and so older tasks learn to use newer experts too;
experts are networks that stand before a head of the task's own. Who is exclusive, and for whom, is
drawn in MMoEEx, where the authors' code starts the others' rows at 0 and does not mask them. A
router has room for the experts to come, so that all tasks' are of one size.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Adapter, require
from .task_level import TaskRouted


class MMoE(TaskRouted):
    """A router for each task. Parameters: R (D + O) + (E / n) · tasks · n D; active, E D +
    (E - m) (r / n) (D + O), where m experts are exclusive to other tasks.

    Args beyond Adapter's:
        experts: n, that a task adds, its r ranks shared out evenly.
        exclusive: the share of them that is for the task alone.
        tasks: the most that it can learn.

    Raises ValueError if experts does not divide rank, exclusive is not in [0, 1], or tasks < 1;
    RuntimeError if there is one more.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 16,
        scale: float = 1.0,
        experts: int = 1,
        exclusive: float = 0.0,
        tasks: int = 32,
    ):
        require(0 <= exclusive <= 1, "exclusive", exclusive, "0 to 1")
        require(tasks >= 1, "tasks", tasks, "1 or more")
        self.exclusive, self.tasks = exclusive, tasks
        super().__init__(base, rank, scale, experts)

    def logits(self, x: Tensor) -> Tensor:
        W = self.rows("routers")[:, : self.n_experts]  # (tasks so far, E, D)
        l = F.linear(x, W.flatten(0, 1)).unflatten(-1, W.shape[:2])
        t = self.task(x).expand(x.shape[:-1])[..., None, None].expand(*x.shape[:-1], 1, l.shape[-1])
        return l.gather(-2, t).squeeze(-2)

    def sees(self, task: Tensor, expert: Tensor) -> Tensor:
        shared = expert % self.experts >= int(self.exclusive * self.experts)
        return super().sees(task, expert) & (shared | (expert // self.experts == task))

    def active(self) -> int:
        return self.speaking() + self.n_experts * self.in_features

    def speaking(self) -> int:
        seen = self.n_experts - int(self.exclusive * self.experts) * (self.learned - 1)
        return seen * self.block * (self.in_features + self.out_features)

    def grow(self) -> None:
        if self.learned == self.tasks:
            raise RuntimeError(f"{self.where} has learned {self.tasks} tasks, as many as it can")
        super().grow()

    def fresh(self) -> dict[str, Tensor]:
        routers = self.empty(1, self.tasks * self.experts, self.in_features).normal_(std=0.02)
        return Adapter.fresh(self) | {"routers": routers}
