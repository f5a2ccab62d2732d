"""Poly: a task's LoRA is a mean of a few shared ones, keys and values mixed apart.

Combining Parameter-efficient Modules for Task-level Generalisation. Ponti et al., arXiv 2202.13914,
as peft has it (after microsoft/mttl).

The one equation, in which a task's keys and values are means of S skills', and the task is given:

    α_t = sigmoid(Z_t) / Σ sigmoid(Z_t)     one weight per skill; they sum to 1
    A_t = Σ over s of α_ts A'_s             the task's keys
    B_t = Σ over s of α_ts B'_s             and its values
    z = x Aᵀ                                of all tasks' keys
    g = 1 for each rank of the task t that the sample is said to be of, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

So a skill's keys meet another's values: an update is Σ_su α_s α_u (x A'_sᵀ) B'_u, where one of
whole LoRAs has s = u alone. In training a weight is drawn anew for each sample:

    α_t ∝ sigmoid(Z_t + noise · (ln U - ln(1 - U)))     U uniform in (0, 1)

which at noise 1 is a relaxed Bernoulli of temperature 1.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept, S skills.
x (..., D), W0 (O, D), A' (S·r, D) and B' (S·r, O) skills, Z (E, S), A (R, D) and B (R, O) means of
skills; one expert per task: R = E·r and K = r.

Life: one task trains its row of Z, S numbers; older rows are frozen. The skills train on, so that
older tasks' answers move. The task must be said at test too; one not learned yet gets W0 alone.

Departures: the paper trains all tasks at once, with two rates of learning. n_splits is 1 (peft's).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Adapter, Gate, require
from ..claims import Claims
from ..sparse import widened


class Poly(Adapter):
    """Tasks that mix skills. Parameters: S r (D + O) + E S; active, S r (D + O) + S.

    Args beyond Adapter's (the default scale is peft's, 1 / r):
        skills: S.
        noise: of the weights, in training.

    Needs the context label (...), the task of each sample, from 0 to E, one not learned yet.
    Raises ValueError if skills < 1 or noise < 0.
    """

    claims = Claims(zero_at_birth=True, granularity="token", expert="block")
    frozen_Z: Tensor
    Z: Tensor

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 8,
        scale: float = 1 / 8,
        skills: int = 4,
        noise: float = 1.0,
    ):
        require(skills >= 1, "skills", skills, "1 or more")
        require(noise >= 0, "noise", noise, "0 or more")
        self.skills, self.noise = skills, noise
        super().__init__(base, rank, scale)

    @property
    def ranks(self) -> int:
        return self.rank * (len(self.frozen_Z) + len(self.Z))

    def rows(self, name: str) -> Tensor:
        """All rows of that name; of A and B the tasks' means, as they are in evaluation."""
        if name not in ("A", "B"):
            return super().rows(name)
        skills = getattr(self, name).unflatten(0, (self.skills, -1))  # (S, r, ...)
        alpha = self.alphas(self.rows("Z"))[name].to(skills.dtype)
        return torch.einsum("es,srd->erd", alpha, skills).flatten(0, 1)

    def gate(self, x: Tensor) -> Gate:
        return self.mixed(x)[0]

    def mixed(self, x: Tensor) -> tuple[Gate, Tensor]:
        """The gate, and the values' α (..., S) of each token's task."""
        label = self.given("label", x)
        task = label.clamp(max=self.n_experts - 1)
        Z = F.embedding(task, self.rows("Z"))  # (..., S)
        if self.training and self.noise:
            Z = Z + self.noise * torch.rand(Z.shape, device=Z.device).logit(1e-6).to(Z.dtype)
        alphas = {name: alpha.to(x.dtype) for name, alpha in self.alphas(Z).items()}
        z = self.of_task(x, alphas)
        idx = task.unsqueeze(-1) * self.rank + torch.arange(self.rank, device=x.device)
        known = (label < self.n_experts).unsqueeze(-1).to(z.dtype)
        return Gate(idx.expand(z.shape), known.expand(z.shape), z), alphas["B"]

    def alphas(self, Z: Tensor) -> dict[str, Tensor]:
        """Of Z (..., S), the α (..., S) of what each mixes."""
        return dict.fromkeys(("A", "B"), shares(Z))

    def of_task(self, x: Tensor, alphas: dict[str, Tensor]) -> Tensor:
        """z (..., r), what the keys of each token's task see: x A_tᵀ."""
        z = F.linear(x, self.A).unflatten(-1, (self.skills, -1))  # (..., S, r)
        return (alphas["A"].unsqueeze(-1) * z).sum(-2)

    def update(self, x: Tensor) -> Tensor:
        (_, g, z, *_), alpha = self.mixed(x)
        v = alpha.unsqueeze(-1) * (g * z).unsqueeze(-2)  # (..., S, r): B_t is a mean too
        return self.scale * F.linear(v.flatten(-2), self.B.T)

    def active(self) -> int:
        return self.speaking() + self.skills

    def speaking(self) -> int:
        return self.skills * self.rank * (self.in_features + self.out_features)

    def fresh(self) -> dict[str, Tensor]:
        return {"Z": self.empty(1, self.skills).uniform_(-1e-3, 1e-3)}

    def task_agnostic(self) -> dict[str, Tensor]:
        every = [Adapter.fresh(self) for _ in range(self.skills)]
        return {name: torch.cat([skill[name] for skill in every]) for name in ("A", "B")}

    def needs(self) -> dict[str, range | int]:
        return {"label": range(self.n_experts + 1)}


def shares(Z: Tensor) -> Tensor:
    """sigmoid(Z) (..., S) as shares of their sum."""
    return F.logsigmoid(widened(Z)).softmax(-1)
