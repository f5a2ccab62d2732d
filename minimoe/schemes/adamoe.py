"""AdaMoE: a router over whole LoRAs chooses; a second one adds to the weights.

Expertise need not monopolize: Action-Specialized Mixture of Experts for Vision-Language-Action
Learning. Shen et al., arXiv 2510.14300.

The one equation, with one weight per block of ranks, choice and weight apart:

    z = x Aᵀ
    p = softmax(x Wᵀ)
    keep the k largest p
    w = p + x Sᵀ of the kept                of any sign; they sum to anything
    g = w_e for each rank of a kept expert e, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, k kept experts.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, W (E, D) router, S (E, D) the scale adapter;
one expert per task: R = E·r and K = k·r.

Life: one task trains one new expert and its rows of W and S, S from 0 on; all older are frozen.

Departures: the paper's experts are whole FFNs of an action model, one of them always on, trained
at once.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..lora_moe import LoRAMoE
from ..sparse import at


class AdaMoE(LoRAMoE):
    """Choice and weight apart. Parameters: R (D + O) + 2 E D; active, E D + k D + k (R / E) (D +
    O). Args and errors: LoRAMoE's."""

    claims = replace(LoRAMoE.claims, simplex=False, as_lora=None)

    def choose(self, x: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
        _, expert = l.topk(self.kept)  # (..., k): in 16 bits small p are all 0
        return expert, at(l.softmax(-1) + self.project(x, "S"), expert)

    def active(self) -> int:
        return super().active() + self.kept * self.in_features

    def fresh(self) -> dict[str, Tensor]:
        rows = super().fresh()
        return rows | {"S": torch.zeros_like(rows["router"])}
