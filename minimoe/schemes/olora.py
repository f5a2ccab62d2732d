"""O-LoRA: ranks added per task, all of them always on, with keys orthogonal to the older ones.

Orthogonal Subspace Learning for Language Model Continual Learning. Wang et al., arXiv 2310.14152.

Dense LoRA's equation, g = 1 (lora.py), and in training a penalty on keys that share directions
with those of older tasks:

    penalty = orthogonality · Σ over old ranks i and live ranks j of (A_i · A_j)²          (eq. 8)

0 iff the new keys are orthogonal to all old ones: then what a task trains does not answer to the
directions that older tasks' keys read.

Axes: R ranks in all, r ranks per task, D in, O out. A (R, D) keys, B (R, O) values.

Life: one task trains r new ranks; all older ones are frozen, and still added.

Departures: the authors' code sums |A_i · A_j|, which the paper does not: this is the paper's form.
The paper's second penalty, on the size of the new keys, is left out, as its coefficient is 0 in
most of its experiments.
"""

from torch import Tensor, nn

from ..adapter import require
from ..lora import LoRA
from ..sparse import widened


class OLoRA(LoRA):
    """LoRA that grows into free directions. Parameters: R (D + O), all of them active.

    Args beyond LoRA's:
        orthogonality: coefficient of the penalty.

    Raises ValueError if orthogonality < 0.
    """

    def __init__(
        self, base: nn.Linear, rank: int = 8, scale: float = 1.0, orthogonality: float = 0.5
    ):
        require(orthogonality >= 0, "orthogonality", orthogonality, "0 or more")
        super().__init__(base, rank, scale)
        self.orthogonality = orthogonality

    def penalty(self) -> Tensor:
        return self.orthogonality * (widened(self.frozen_A) @ widened(self.A).T).square().sum()
