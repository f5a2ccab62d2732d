"""Input Domain Aware MoE: a router over whole LoRAs that knows what each expert's inputs are like.

Input Domain Aware MoE: Decoupling Routing Decisions from Task Optimization in Mixture of Experts.
Hua et al., arXiv 2510.16448. (Reconstructed from summaries.)

The one equation, as lora_moe.py has it, with a density in place of a router's row:

    z = x Aᵀ
    u_e = x P_eᵀ                            what the encoder of expert e makes of x
    l_e = ln Σ over m of π_em N(u_e; μ_em, diag s_em) - ‖x - u_e P_e‖² / 2
    keep the k largest l
    w = softmax over the kept of l          how likely it is that x is e's; they sum to 1
    g = w_e for each rank of a kept expert e, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

l is ln of a density of x, up to a constant, if P_e has orthonormal rows: M Gaussians within their
span, one of variance 1 beside it. It is trained by its likelihood, not by the task: no gradient
goes through l in the gate, nor to x, and in training

    loss = - mean over tokens of l_e        e the live expert; u_e of the first term a constant

so that P_e is trained by the second term alone, which makes its rows orthonormal: it is a linear
autoencoder. (By the first term it would shrink, to make any x likely.)

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, k kept experts, F
width of a code, M Gaussians of an expert. x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, P
(E·F, D) `encoder`, μ (E·M, F) `mean`, ln s (E·M, F) `spread`, π (E, M) a softmax of `mix`; one
expert per task: R = E·r and K = k·r.

Life: one task trains one new expert and its density, on its own inputs; all older ones are frozen.
So l of old experts on old inputs stays as it is, bit for bit; what changes is their share.

Departures: the paper has M = 16, and one encoder for all experts, which all train at once, on the
density of their mixture. Here a code is the expert's own, and codes of several encoders can be
compared only together with what they leave out: so the reconstruction is part of l, and not of the
loss alone.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..adapter import require
from ..balance import mean_over_tokens
from ..lora_moe import LoRAMoE
from ..sparse import widened


class InputDomainAware(LoRAMoE):
    """A router of densities. Parameters: R (D + O) + E (F D + 2 M F + M); active, E (F D + 2 M F +
    M) + k r (D + O).

    Args beyond LoRAMoE's, without balance and experts:
        components: M.
        code: F.

    Raises ValueError if components < 1 or code < 1.
    """

    DENSITY = ("encoder", "mean", "spread", "mix")
    claims = replace(
        LoRAMoE.claims,
        as_lora=dict.fromkeys(DENSITY, 0.0),
        active_at_most=True,
        exact_gradient=False,
    )

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 16,
        scale: float = 1.0,
        top_k: int = 2,
        components: int = 2,
        code: int = 4,
    ):
        require(components >= 1, "components", components, "1 or more")
        require(code >= 1, "code", code, "1 or more")
        self.components, self.code = components, code
        super().__init__(base, rank, scale, top_k)

    def logits(self, x: Tensor) -> Tensor:
        each = (self.rows(name).unflatten(0, (self.n_experts, -1)) for name in self.DENSITY)
        # one by one: so that more experts change no bit of the others'
        l = [log_density(x.detach(), *density) for density in zip(*each, strict=True)]
        return torch.stack(l, -1)  # (..., E)

    def choose(self, x: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
        expert, w = super().choose(x, l.detach())
        return expert, w.to(x.dtype)

    def auxiliary(self, x: Tensor, l: Tensor, expert: Tensor, w: Tensor) -> Tensor | None:
        return -mean_over_tokens(l[..., -1], self.mask(x))

    def active(self) -> int:
        of_density = self.code * self.in_features + self.components * (2 * self.code + 1)
        return self.n_experts * of_density + self.speaking()

    def fresh(self) -> dict[str, Tensor]:
        rows, D = super().fresh(), self.in_features
        del rows["router"]
        encoder = self.empty(self.code, D).normal_(std=1 / math.sqrt(D))
        mean = self.empty(self.components, self.code).normal_()
        density = encoder, mean, torch.zeros_like(mean), self.empty(1, self.components).zero_()
        return rows | dict(zip(self.DENSITY, density, strict=True))


def log_density(x: Tensor, encoder: Tensor, mean: Tensor, spread: Tensor, mix: Tensor) -> Tensor:
    """l (...) of x (..., D): of one expert, encoder (F, D), mean, spread (M, F) and mix (1, M)."""
    u = nn.functional.linear(x, encoder)
    left = widened(x) - widened(u @ encoder)
    off = widened(u.detach()).unsqueeze(-2) - mean  # (..., M, F)
    ln = -(off.square() / spread.exp() + spread + math.log(2 * math.pi)).sum(-1) / 2
    return (ln + mix[0].log_softmax(-1)).logsumexp(-1) - left.square().sum(-1) / 2
