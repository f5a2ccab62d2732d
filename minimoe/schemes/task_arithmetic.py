"""Task arithmetic: LoRAs trained alone, then all on at once, each at the same weight.

Editing Models with Task Arithmetic. Ilharco et al., arXiv 2212.04089 . (A
uniform soup, Wortsman et al., arXiv 2203.05482, is λ = 1 / E.)

The one equation, with one weight for all ranks of evaluation:

    z = x Aᵀ
    g = 1 for each rank of the last expert, 0 elsewhere       in training
    g = λ                                                     in evaluation; at 1 / E, a soup
    y = x W0ᵀ + scale · (g ⊙ z) B

It reads no input to choose: what each mixture of LoRAs that were trained alone must beat.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values; one expert per task: R = E·r.

Life: one task trains one new expert; all older ones are frozen.

Departures: the papers add up the changes of whole models, these those of the adapted layers.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from .alone import TrainedAlone


class TaskArithmetic(TrainedAlone):
    """The sum of LoRAs trained alone. Parameters: R (D + O), all active in evaluation; in training
    r (D + O).

    Args beyond Adapter's:
        coefficient: λ.
    """

    claims = replace(TrainedAlone.claims, simplex=False)

    def __init__(
        self, base: nn.Linear, rank: int = 16, scale: float = 1.0, coefficient: float = 1.0
    ):
        self.coefficient = coefficient
        super().__init__(base, rank, scale)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        every = torch.arange(self.n_experts, device=x.device).expand(*x.shape[:-1], -1)
        return every, x.new_full(every.shape, self.coefficient)

    def active(self) -> int:
        return self.speaking()
