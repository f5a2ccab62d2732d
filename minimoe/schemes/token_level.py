"""Token-level adaptation: LoRAs trained alone, mixed by how like a task's mean a token is.

Token-Level Adaptation of LoRA Adapters for Downstream Task Generalization. Belofsky, arXiv
2311.10847.

The one equation, with one weight per block of ranks in evaluation:

    z = x Aᵀ
    e = the last, at weight 1, in training
    s_e = cos(x, m_e)                       m_e the mean of the layer's inputs from task e
    w = softmax(s), the largest s four times as large
    g = w_e for each rank of expert e
    y = x W0ᵀ + scale · (g ⊙ z) B

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, m (E, D) means; one expert per task: R = E·r.

Life: alone.py's, whose means these are too.

Departures: the paper compares the embedding of what was said so far with means of a task's
prompts, one choice for all layers, and mixes A and B apart; here each layer goes by its own
inputs, and mixes what the experts say.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sparse import widened
from .alone import Alone, TrainedAlone


class TokenLevel(Alone):
    """Whole LoRAs, mixed by cosines. Parameters: R (D + O) + E D, all active in evaluation; in
    training r (D + O)."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        m = F.normalize(widened(self.rows("mean")), dim=-1)
        s = F.linear(F.normalize(widened(x), dim=-1), m)  # (..., E)
        w = torch.where(s == s.amax(-1, keepdim=True), 4 * s, s).softmax(-1)
        return torch.arange(w.shape[-1], device=w.device).expand_as(w), w.to(x.dtype)

    def speaking(self) -> int:
        return TrainedAlone.speaking(self)
