"""MeteoRA: whole LoRAs, and a router that learns from labels which of them a sample is for.

MeteoRA: Multiple-tasks Embedded LoRA for Large Language Models. Xu et al., arXiv 2405.13053.

The one equation, with one weight per block of ranks:

    z = x Aᵀ
    l = x Wᵀ                                router logits, one per expert
    w = softmax over the top k of l / tau   one weight per kept expert; they sum to 1
    g = w_e for each rank of a kept expert e, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, W (E, D) router; one expert per task: R = E·r
and K = k·r.

Supervision, in training: the `label` of a sample is the LoRA that it is for, and

    loss = supervision · mean over layers and tokens of the cross-entropy of l with the label

Life: one task trains one new expert and its router row; all older ones are frozen.

Departures: the paper takes LoRAs that are there already, one per task, and trains the gates alone,
on data of all tasks. In a stream the new LoRA and its row train together, and on one task's data
every label is the same, which a row satisfies by being large: here the method is out of its
element.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import require
from ..balance import mean_over_tokens
from ..lora_moe import LoRAMoE
from ..sparse import widened


class MeteoRA(LoRAMoE):
    """A supervised router over whole LoRAs. Parameters: R (D + O) + E D; active, E D + k r (D + O).

    Args beyond LoRAMoE's:
        tau: temperature of the softmax.
        supervision: coefficient of the cross-entropy, in training; 0 needs no label.

    Needs, in training, the context label (...), the expert of each sample, from 0 to E - 1.
    Raises ValueError if supervision < 0, or tau is not above 0.
    """

    mean_over_layers = True

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 8,
        scale: float = 1.0,
        top_k: int = 2,
        tau: float = 1.0,
        supervision: float = 50.0,
    ):
        require(tau > 0, "tau", tau, "above 0")
        require(supervision >= 0, "supervision", supervision, "0 or more")
        self.tau, self.supervision = tau, supervision
        super().__init__(base, rank, scale, top_k)

    def choose(self, x: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
        top, expert = l.topk(self.kept)  # (..., k)
        return expert, (top / self.tau).softmax(-1)

    def auxiliary(self, x: Tensor, l: Tensor, expert: Tensor, w: Tensor) -> Tensor | None:
        if not self.supervision:
            return None
        label = self.given("label", x).expand(x.shape[:-1])
        return self.supervision * label_loss(l, label, self.mask(x))

    def needs(self) -> dict[str, range | int]:
        return {"label": range(self.n_experts)} if self.training and self.supervision else {}


def label_loss(l: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of logits l (..., E) with label (...): the mean over the tokens of all
    processes where mask (...) is 1, 0 for an empty batch."""
    each = F.cross_entropy(widened(l).reshape(-1, l.shape[-1]), label.flatten(), reduction="none")
    return mean_over_tokens(each, mask.flatten())
