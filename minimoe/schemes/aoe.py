"""AoE: whole LoRAs that score themselves, by how strongly they answer.

Autonomy-of-Experts Models. Lv et al., arXiv 2501.13074.

The one equation, with the length of what an expert sees as its logit:

    z = x Aᵀ
    l_e = ‖z_e‖₂                            z_e: z of the expert's own ranks
    keep the k largest l
    w = softmax over all experts of l       not renormalised over the kept
    g = w_e for each rank of a kept expert e, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

There is no router. With experts of one rank l = |z|, which is MoRA's score without its sign and its
norm: x and -x have the same gate here, and not there.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept, k kept
experts. x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values. R = E·r and K = k·r.

Life: one task trains one new expert; all older ones are frozen.

Departures: the paper's experts are gated MLPs, trained at once from the start, whose first matrix
has two factors: the one that is applied to x is A here. The kept z are computed twice.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..adapter import Adapter
from ..lora_moe import LoRAMoE
from ..sparse import widened


class AoE(LoRAMoE):
    """Whole LoRAs without a router. Parameters: R (D + O); active, R D + k (R / E) O. Args and
    errors: LoRAMoE's."""

    claims = replace(LoRAMoE.claims, simplex=False, as_lora=None)

    def logits(self, x: Tensor) -> Tensor:
        z = widened(self.project(x, "A")).unflatten(-1, (-1, self.block))  # (..., E, r)
        return torch.linalg.vector_norm(z, dim=-1)

    def choose(self, x: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
        w, expert = l.softmax(-1).topk(self.kept)  # (..., k)
        return expert, w.to(x.dtype)

    def active(self) -> int:
        return self.ranks * self.in_features + self.kept * self.block * self.out_features

    def fresh(self) -> dict[str, Tensor]:
        return Adapter.fresh(self)
