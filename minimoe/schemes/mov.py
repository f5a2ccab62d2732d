"""MoV: vectors that a frozen layer's output is multiplied by, under a dense router.

Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient MoE for Instruction Tuning.
Zadouri et al., arXiv 2309.05444. (Its other method, MoLoRA, is LoRAMoE with all experts kept.)

    u = x W0ᵀ + b                           what the frozen layer says
    g = softmax(u Wᵀ)                       one weight per vector; they sum to 1
    y = u ⊙ Σ over e of g_e l_e             l_e = 1 + scale · B_e, an (IA)³ vector
      = u + u ⊙ scale · (g ⊙ 1) B           since the weights sum to 1

The second form is that of steer_moe.py, its update multiplied by u. It is what is computed: so a
fresh layer, B = 0, is the base layer bit for bit, where Σ g_e 1 is 1 but for rounding.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), B (R, O) vectors, W (R, O) router. Each vector is an expert: E = R = K.

Life: one task trains r new vectors and their router rows; all older ones are frozen, and their
weights fall.

Departures: the paper trains one task mixture and never grows. It scales keys, values and the MLP's
activations, the latter behind their non-linearity; here every adapted layer's output, with its
bias, which T5's layers have none of.
"""

from torch import Tensor, nn

from ..adapter import Adapter
from .steer_moe import SteerMoE


class MoV(SteerMoE):
    """Mixed scales of what the layer says. Parameters: 2 R O, all of them active. (And the base
    layer is computed three times.) Args and errors: Adapter's."""

    def __init__(self, base: nn.Linear, rank: int = 30, scale: float = 1.0):
        super().__init__(base, rank, scale)

    def update(self, x: Tensor) -> Tensor:
        return self.of_base(x) * super().update(x)

    def logits(self, u: Tensor) -> Tensor:
        return self.project(u, "router")

    def active(self) -> int:
        return self.ranks * 2 * self.out_features

    def fresh(self) -> dict[str, Tensor]:
        router = self.empty(self.rank, self.out_features).normal_(std=0.02)
        return {"B": Adapter.fresh(self)["B"], "router": router}
