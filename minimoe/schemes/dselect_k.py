"""DSelect-k: whole LoRAs, chosen by spelling their numbers in bits, with a gradient throughout.

DSelect-k: Differentiable Selection in the Mixture of Experts with Applications to Multi-Task
Learning. Hazimeh et al., arXiv 2106.03760.

The one equation, with one weight per block of ranks, from k selectors of m bits each:

    z = x Aᵀ
    c = x Cᵀ + c0                           m numbers for each selector
    S(c) = -2 c³ / γ³ + 3 c / (2 γ) + 1/2   from 0 at c <= -γ / 2 to 1 at c >= γ / 2: a bit
    s_je = Π over bits b of (S(c_jb) if bit b of e is 1, else 1 - S(c_jb))
    w = Σ over selectors j of a_j s_j       a = softmax(x Vᵀ + v0)
    g = w_e for each rank of expert e
    y = x W0ᵀ + scale · (g ⊙ z) B

Where all bits are 0 or 1, k experts are used, at most. Of the numbers of m = ⌈log2 E⌉ bits some may
be nobody's; their weight is lost. So in training

    loss = mean over tokens of Σ_j (1 / Σ_e s_je - 1)       0 if E = 2^m

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, k selectors, K
kept. x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, C (bits·k, D) `code`, c0 its bias,
V (k, D) `share`, v0 its bias; one expert per task: R = E·r.

Life: one task trains one new expert; all older ones are frozen. There is no router row per expert:
the selectors belong to no task, and train on. The highest bit comes into use when E passes 2^m, and
then each old expert shares its number's weight with a new one.

Departures: the paper trains one task mixture and never grows. Its loss is a sum over tokens,
without the -1, and its 1 / 0 is 1e6 here. Its entropy term, off by default, is left out.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Adapter, require
from ..balance import mean_over_tokens
from ..sparse import widened
from .adamole import Thresholded


class DSelectK(Thresholded):
    """Experts chosen by bits. Parameters: R (D + O) + k (bits + 1) (D + 1); active, R (D + O) +
    k (m + 1) (D + 1).

    Args beyond Adapter's:
        selectors: k.
        bits: of a number; for 2^bits experts, in time.
        gamma: γ, the width of the step.

    Raises ValueError if selectors < 1, bits < 0 or gamma is not above 0; RuntimeError if a task
    more would need another bit.
    """

    claims = replace(Thresholded.claims, simplex=False, as_lora=None)
    code: Tensor
    code_bias: Tensor
    share: Tensor
    share_bias: Tensor

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 16,
        scale: float = 1.0,
        selectors: int = 2,
        bits: int = 6,
        gamma: float = 1.0,
    ):
        require(selectors >= 1, "selectors", selectors, "1 or more")
        require(bits >= 0, "bits", bits, "0 or more")
        require(gamma > 0, "gamma", gamma, "above 0")
        self.selectors, self.bits, self.gamma = selectors, bits, gamma
        super().__init__(base, rank, scale)

    @property
    def m(self) -> int:
        """Bits in use."""
        return (self.n_experts - 1).bit_length()

    def logits(self, x: Tensor) -> Tensor:
        """s (..., k, E)."""
        c = widened(F.linear(x, self.code, self.code_bias)).unflatten(
            -1, (self.bits, self.selectors)
        )
        places = torch.arange(self.m, device=x.device)
        ones = torch.arange(self.n_experts, device=x.device).unsqueeze(-1) >> places & 1  # (E, m)
        c = c[..., : self.m, :].mT.unsqueeze(-2) * (2 * ones - 1)  # 1 - S(c) is S(-c)
        return smooth_step(c, self.gamma).prod(-1)

    def weights(self, x: Tensor, l: Tensor) -> Tensor:
        a = widened(F.linear(x, self.share, self.share_bias)).softmax(-1)
        return (a.unsqueeze(-1) * l).sum(-2)

    def auxiliary(self, x: Tensor, l: Tensor, expert: Tensor, w: Tensor) -> Tensor | None:
        return mean_over_tokens((1 / l.sum(-1).clamp_min(1e-6) - 1).sum(-1), self.mask(x))

    def grow(self) -> None:
        if self.n_experts == 2**self.bits:
            raise RuntimeError(
                f"{self.where} has {self.n_experts} experts, as many as {self.bits} bits allow"
            )
        super().grow()

    def active(self) -> int:
        D, O = self.in_features, self.out_features
        return self.ranks * (D + O) + self.selectors * (self.m + 1) * (D + 1)

    def fresh(self) -> dict[str, Tensor]:
        return Adapter.fresh(self)

    def task_agnostic(self) -> dict[str, Tensor]:
        D, n, near = self.in_features, self.bits * self.selectors, self.gamma / 100
        return {
            "code": self.empty(n, D).uniform_(-near, near),
            "code_bias": self.empty(n).uniform_(-near, near),
            "share": self.empty(self.selectors, D).uniform_(-0.05, 0.05),
            "share_bias": self.empty(self.selectors).uniform_(-0.05, 0.05),
        }


def smooth_step(t: Tensor, gamma: float) -> Tensor:
    """S(t): 0 below -gamma / 2, 1 above gamma / 2, a cubic between, and smooth."""
    t = (t / gamma).clamp(-0.5, 0.5)
    return t * (1.5 - 2 * t * t) + 0.5
