"""MOORE: whole LoRAs whose answers are made orthogonal to one another, then mixed as the task says.

Multi-Task Reinforcement Learning with Mixture of Orthogonal Experts. Hendawy et al., arXiv
2311.11385.

    v_e = (x A_eᵀ) B_e                      what expert e would say
    u_e = v_e less its part along u_1 ... u_(e-1), over its norm        (Gram-Schmidt)
    y = x W0ᵀ + scale · Σ over e of w_e(t) u_e

w(t), the weights of the task t that the sample is said to be of, are numbers of any sign: there is
no softmax. Since all u are orthogonal and of length 1, the update is of the same length for every
input of a task, scale · ‖w(t)‖: what an expert says is its direction alone. Who comes first keeps
his direction, so that u_e is the same whatever comes later. An expert that says nothing beyond the
others adds nothing: u_e = 0. There can be O that are not.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, w (E, tasks); one expert per task: R = E·r.

Life: one task trains one new expert, and the weights of the task: its own, and those that older
experts, which are frozen, have for it. An old task has no weight for newer experts: its answers
stay as they are. Which task it is must be said at test too; for one that is not learned yet, the
layer is W0 alone.

Departures: the paper trains all tasks at once; its experts are MLPs that stand before a head of
the task's own. The weights start at 0 and the values do not: a fresh layer is the base layer, and
the norm of what is 0 has no gradient.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Adapter, Gate, require
from ..claims import Claims
from ..sparse import widened


class MOORE(Adapter):
    """Orthogonal experts. Parameters: R (D + O) + E · tasks; active, R (D + O) + E.

    Args beyond Adapter's:
        tasks: the most that it can learn.

    Needs the context label (...), the task of each sample, from 0 to E, one not learned yet.
    Raises ValueError if tasks < 1; RuntimeError if there is one more.
    """

    claims = Claims(
        zero_at_birth=True,
        granularity="token",
        expert="block",
        active_at_most=True,
        equation=False,
    )

    def __init__(self, base: nn.Linear, rank: int = 16, scale: float = 1.0, tasks: int = 32):
        require(tasks >= 1, "tasks", tasks, "1 or more")
        self.tasks = tasks
        super().__init__(base, rank, scale)

    def gate(self, x: Tensor) -> Gate:
        return Gate(None, self.of_ranks(self.weights(x)), self.project(x, "A"))

    def weights(self, x: Tensor) -> Tensor:
        """w (..., E)."""
        w = self.rows("w")[:, : self.n_experts].tril()  # (E, E): a task, and experts up to its own
        w = F.embedding(self.given("label", x), F.pad(w, (0, 0, 0, 1)))  # 0 if not learned yet
        return w.expand(*x.shape[:-1], self.n_experts)

    def update(self, x: Tensor) -> Tensor:
        z = self.project(x, "A").unflatten(-1, (-1, self.block))  # (..., E, r)
        B = self.rows("B").unflatten(0, (-1, self.block))  # (E, r, O)
        u = orthonormal(widened(torch.einsum("...er,ero->...eo", z, B)).unbind(-2))
        w = self.weights(x).unsqueeze(-1).unbind(-2)
        each = (w_e * u_e for w_e, u_e in zip(w, u, strict=True))
        said = sum(each, x.new_zeros(()))  # one by one: so that more of weight 0 change no bit
        return (self.scale * said).to(x.dtype)

    def grow(self) -> None:
        if self.n_experts == self.tasks:
            raise RuntimeError(f"{self.where} has learned {self.tasks} tasks, as many as it can")
        super().grow()

    def active(self) -> int:
        return self.speaking() + self.n_experts

    def fresh(self) -> dict[str, Tensor]:
        B = nn.init.kaiming_uniform_(self.empty(self.rank, self.out_features), a=math.sqrt(5))
        return super().fresh() | {"B": B, "w": self.empty(1, self.tasks).zero_()}

    def needs(self) -> dict[str, range | int]:
        return {"label": range(self.n_experts + 1)}


def orthonormal(vectors: Iterable[Tensor]) -> list[Tensor]:
    """Gram-Schmidt's vectors (..., O), of length 1, each orthogonal to those before; 0 in place of
    one that, but for rounding, lies in their span."""
    found: list[Tensor] = []
    for v in vectors:
        least = torch.finfo(v.dtype).eps ** 0.5 * torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        for u in found:
            v = v - (v * u).sum(-1, keepdim=True) * u
        norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        new = norm > least
        found.append((v / norm.where(new, 1.0)).where(new, 0.0))
    return found
