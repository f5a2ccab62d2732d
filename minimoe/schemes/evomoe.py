"""EvoMoE's gate: a router over whole LoRAs that is dense at first, and falls to few.

EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate. Nie et al.,
arXiv 2112.14397.

The one equation, with one weight per block of ranks, and a temperature that falls:

    z = x Aᵀ
    l = x Wᵀ + n                            n: Gumbel noise, in training only
    p = softmax(l / tau)                    tau from `start` to `end` in `steps` steps of a task
    w = p where p > threshold, else 0       not renormalised
    g = w_e for each rank of expert e
    y = x W0ᵀ + scale · (g ⊙ z) B

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, W (E, D) router; one expert per task:
R = E·r.

Life: one task trains one new expert and its router row, from dense to sparse; all older ones are
frozen. With each task tau starts anew. Evaluation is at the tau of the last step.

Departures: the paper trains one task mixture and never grows, starts its experts as copies of one
that was trained (the rule `upcycle`), and answers with the likeliest expert alone; here tau has
fallen, which is nearly that. Its balance loss is left out.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..adapter import require
from .adamole import Thresholded


class EvoMoE(Thresholded):
    """From dense to sparse. Parameters: R (D + O) + E D, all active.

    Args beyond Adapter's:
        start, end: of tau.
        steps: from start to end, in a straight line.
        threshold: on p; .02 is the authors' code's.
        noise: how large n is; 0: none.

    Raises ValueError if start or end is not above 0, steps < 1, noise < 0, or threshold is not in
    [0, 1).
    """

    claims = replace(Thresholded.claims, simplex=False, as_lora=None)
    buffer_rows = ("steps_done",)
    steps_done: Tensor

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 16,
        scale: float = 1.0,
        start: float = 2.0,
        end: float = 0.3,
        steps: int = 1000,
        threshold: float = 0.02,
        noise: float = 1.0,
    ):
        require(start > 0, "start", start, "above 0")
        require(end > 0, "end", end, "above 0")
        require(steps >= 1, "steps", steps, "1 or more")
        require(0 <= threshold < 1, "threshold", threshold, "0 to below 1")
        require(noise >= 0, "noise", noise, "0 or more")
        self.start, self.end, self.steps = start, end, steps
        self.threshold, self.noise = threshold, noise
        super().__init__(base, rank, scale)

    def weights(self, x: Tensor, l: Tensor) -> Tensor:
        if self.training and self.noise:
            l = l - self.noise * torch.empty_like(l).exponential_().log()
        done = (self.steps_done / self.steps).clamp_max(1).to(l)
        p = (l / (self.start + done * (self.end - self.start))).softmax(-1)
        return p * (p > self.threshold)

    def fresh(self) -> dict[str, Tensor]:
        none = torch.zeros(1, dtype=torch.int64, device=self.base.weight.device)
        return super().fresh() | {"steps_done": none}

    def after_step(self) -> None:
        self.steps_done += 1
