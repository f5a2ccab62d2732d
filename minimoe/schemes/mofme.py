"""MoFME: one shared LoRA, whose experts are modulations of what its keys see, under a router.

Efficient Deweather Mixture-of-Experts with Uncertainty-aware Feature-wise Linear Modulation. Zhang
et al., arXiv 2312.16610.

A block of ranks shares its keys and values with all others; what is an expert's own is small:

    h = x Aᵀ                                what the shared keys see
    u_e = γ_e ⊙ h + β_e                     γ_e = h Γ_eᵀ + c_e and β_e = h Δ_eᵀ + d_e
    l = x Wᵀ                                router logits, one per expert
    w = softmax over the k largest l        one weight per kept expert; they sum to 1
    y = x W0ᵀ + scale · (Σ over kept e of w_e u_e) B

So an expert is quadratic in x. Were γ_e constant and β_e 0, it would be a LoRA with the shared keys
and the values γ_e ⊙ B: mosld.py with tied values.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, k kept experts.
x (..., D), W0 (O, D), A (r, D) and B (r, O) shared, Γ (R, r) `gamma`, c (R,) `gamma_bias`, Δ (R, r)
`beta`, d (R,) `beta_bias`, W (E, D) router; one expert per task: R = E·r.

Life: one task trains one new expert, 2 r² + 2 r numbers, and its router row; all older ones are
frozen. It starts at γ = 1, β = 0. The shared keys and values train on, so an old expert's answers
move.

Departures: the paper trains all experts at once, and A, B are an MLP with a non-linearity. Its
uncertainty, the variance over passes of the router, is left out: the authors' router has no
dropout, so that all its passes are the same.
"""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Adapter
from ..lora_moe import LoRAMoE
from ..sparse import at


class MoFME(LoRAMoE):
    """Experts that modulate. Parameters: r (D + O) + E D + 2 R (r + 1); active, r (D + O) + E D +
    2 k r (r + 1). Args and errors: LoRAMoE's, without balance and experts."""

    claims = replace(
        LoRAMoE.claims,
        as_lora={"router": 0.0, "gamma": 0.0, "gamma_bias": 1.0, "beta": 0.0, "beta_bias": 0.0},
        equation=False,
    )
    frozen_gamma: Tensor
    gamma: Tensor

    def __init__(self, base: nn.Linear, rank: int = 16, scale: float = 1.0, top_k: int = 2):
        super().__init__(base, rank, scale, top_k)

    @property
    def ranks(self) -> int:
        return len(self.frozen_gamma) + len(self.gamma)

    def rows(self, name: str) -> Tensor:
        """All rows of that name; of A and B the shared ones, once for each expert."""
        tied = name in ("A", "B")
        return getattr(self, name).repeat(self.n_experts, 1) if tied else super().rows(name)

    def seen(self, x: Tensor, idx: Tensor) -> Tensor:
        """u (..., K) at idx."""
        h = F.linear(x, self.A)  # (..., r)
        gamma, beta = (self.project(h, f) + self.rows(f"{f}_bias") for f in ("gamma", "beta"))
        return at(gamma * h.repeat(*[1] * (x.ndim - 1), self.n_experts) + beta, idx)

    def update(self, x: Tensor) -> Tensor:
        _, w, u, *beside = self.gate(x)
        self.leave(*beside)
        mean = (w * u).unflatten(-1, (-1, self.block)).sum(-2)  # (..., r), of the kept experts
        return self.scale * F.linear(mean, self.B.T)

    def active(self) -> int:
        return self.speaking() + self.n_experts * self.in_features + self.kept * self.of_expert

    def speaking(self) -> int:
        return self.block * (self.in_features + self.out_features)

    @property
    def of_expert(self) -> int:
        """Parameters of one expert's own."""
        return 2 * self.block * (self.block + 1)

    def fresh(self) -> dict[str, Tensor]:
        r = self.rank
        rows = {"gamma": self.empty(r, r), "gamma_bias": self.empty(r)}
        rows |= {"beta": self.empty(r, r), "beta_bias": self.empty(r)}
        for name, tensor in rows.items():
            tensor.fill_(name == "gamma_bias")
        return {"router": self.fresh_router(), **rows}

    def task_agnostic(self) -> dict[str, Tensor]:
        return Adapter.fresh(self)
