"""ReXMoE's schedule: a router over whole LoRAs that may choose among few at first, then among all.

ReXMoE: Reusing Experts with Minimal Overhead in Mixture-of-Experts. arXiv 2510.17483, eq. 6.

The one equation, as lora_moe.py has it, with most experts hidden from the router at first:

    l = x Wᵀ                                and -inf for E - N old experts, drawn for each training
                                            pass
    N = E / n                               until step `begin` of a task
    N = (1 + (n - 1) (step - begin) / (end - begin)) E / n, rounded down, until step `end`
    N = E                                   from then on, and in evaluation
    w = softmax over the top k of l
    g = w_e for each rank of a kept expert e, 0 elsewhere

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, k kept experts.
x (..., D), W (E, D) router; one expert per task: R = E·r.

Life: one task trains one new expert and its router row; all older ones are frozen. The schedule
begins anew with each task. The new expert is always shown, so that it learns: alone at first, then
beside more and more old ones.

Departures: in the paper N grows because n neighbouring layers share their experts; a layer has none
but its own here, and the schedule alone is shown. The paper sets scores to 0, not to -inf: that is
the same where they are weights that are renormalised, as here.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..adapter import require
from ..lora_moe import LoRAMoE


class ReXMoE(LoRAMoE):
    """More and more experts to choose from. Parameters: LoRAMoE's.

    Args beyond LoRAMoE's:
        reuse: n, by how much the choice widens.
        begin, end: steps of a task.

    Raises ValueError if reuse < 1, or not 0 <= begin < end.
    """

    claims = replace(LoRAMoE.claims, as_lora={"router": 0.0, "reuse": 1.0})
    buffer_rows = ("steps_done",)
    router: Tensor
    steps_done: Tensor

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 16,
        scale: float = 1.0,
        top_k: int = 2,
        reuse: float = 4.0,
        begin: int = 0,
        end: int = 1000,
    ):
        require(reuse >= 1, "reuse", reuse, "1 or more")
        require(0 <= begin < end, "begin", begin, f"0 to below end {end}")
        self.reuse, self.begin, self.end = reuse, begin, end
        super().__init__(base, rank, scale, top_k)

    def logits(self, x: Tensor) -> Tensor:
        l = super().logits(x)
        if not self.training:
            return l
        chance = torch.rand(l.shape[-1], device=l.device)
        chance[-len(self.router) :] = -1  # the live ones come first
        place = chance.argsort().argsort()
        return l.masked_fill(place >= self.shown(self.steps_done), -torch.inf)

    def shown(self, step: Tensor) -> Tensor:
        """N at a step of a task, with the live experts at least."""
        done = ((step - self.begin) / (self.end - self.begin)).clamp(0, 1)
        N = ((1 + (self.reuse - 1) * done) * self.n_experts / self.reuse).floor()
        return N.clamp_min(len(self.router))

    def fresh(self) -> dict[str, Tensor]:
        none = torch.zeros(1, dtype=torch.int64, device=self.base.weight.device)
        return super().fresh() | {"steps_done": none}

    def after_step(self) -> None:
        self.steps_done += 1
