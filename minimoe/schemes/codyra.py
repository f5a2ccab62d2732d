"""CoDyRA: ranks added per task, each with one learned weight, which is driven to 0 where it can be.

Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual Learning Vision-Language Models
with Dynamic Rank-Selective LoRA. Lu et al., arXiv 2412.01004.

The one equation, with weights that do not depend on x:

    z = x Aᵀ
    g = w                                   one number per rank, N(0, 1) at birth
    y = x W0ᵀ + scale · (g ⊙ z) B

and after each step of the optimiser a proximal one, which makes Σ |w| cost something:

    w <- sign(w) [|w| - κ]₊                 κ: 0 until step `begin` of a task, from there to `end`
                                            in a straight line to `kappa`, then `kappa`

So w is 0 while the optimiser's steps on it are less than κ, and the task alone says how many ranks
it needs. It is MoRA without the self-routing: ranks are chosen for the task, not for the token.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, R' those whose w is not 0.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, w (R,).

Life: one task trains r new ranks and their weights; all older ones are frozen. A rank whose w is 0
when its task ends says nothing for ever. The authors drop it, and add the others to W0; here W0
stays the model's own, and all ranks stay beside it, in their places: the same function. So a rank
that is dropped is still stored, but no longer read. `merge` adds the update to W0.

Departures: the authors' code lets κ rise in 50 steps; and, having shrunk w, it sets to 0 what is
now below κ, so that all up to 2 κ is lost (w .08, κ .05 becomes 0; here, as in the paper, .03).
Its learning rate falls to 0 meanwhile: where it does not, w is 0 only if κ is above it.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..adapter import Gate, require
from ..lora import LoRA


class CoDyRA(LoRA):
    """Ranks of learned weights. Parameters: R (D + O + 1), and for each task a count of steps;
    active, R + R' (D + O).

    Args beyond LoRA's:
        kappa: κ at last, how much a step takes from each |w|.
        begin, end: steps of a task.

    Raises ValueError if kappa < 0, or not 0 <= begin < end.
    """

    claims = replace(LoRA.claims, expert="rank", as_lora={"w": 1.0})
    buffer_rows = ("steps_done",)
    w: Tensor
    steps_done: Tensor

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 16,
        scale: float = 1.0,
        kappa: float = 7e-4,
        begin: int = 500,
        end: int = 1000,
    ):
        require(kappa >= 0, "kappa", kappa, "0 or more")
        require(0 <= begin < end, "begin", begin, f"0 to below end {end}")
        self.kappa, self.begin, self.end = kappa, begin, end
        super().__init__(base, rank, scale)

    def gate(self, x: Tensor) -> Gate:
        return Gate(None, self.rows("w"), self.project(x, "A"))

    def active(self) -> int:
        return self.ranks + self.speaking()

    def speaking(self) -> int:
        return int((self.rows("w") != 0).sum()) * (self.in_features + self.out_features)

    def merge(self) -> None:
        with torch.no_grad():
            B = self.rows("w").unsqueeze(-1) * self.rows("B")
            self.replace_weight(self.scale * (B.T @ self.keys))

    def fresh(self) -> dict[str, Tensor]:
        none = torch.zeros(1, dtype=torch.int64, device=self.base.weight.device)
        return super().fresh() | {"w": self.empty(self.rank).normal_(), "steps_done": none}

    @torch.no_grad()
    def after_step(self) -> None:
        self.steps_done += 1
        done = ((self.steps_done - self.begin) / (self.end - self.begin)).clamp(0, 1)
        kappa = self.kappa * done.to(self.w)
        self.w.copy_(self.w.sign() * (self.w.abs() - kappa).relu())
