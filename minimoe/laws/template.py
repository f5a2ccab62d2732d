"""NewScheme: say in one line what its ranks do.

Paper: authors, title, arXiv id, equation numbers. If it is your own idea, say so.

The one equation, of which this file fills in g:

    z = x Aᵀ
    g = 1                                   <- your gate's equation
    y = x W0ᵀ + scale · (g ⊙ z) B

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values.

Departures from the paper: none yet.

Check it: minimoe check new_scheme.py:NewScheme
"""

import torch
from torch import Tensor

from minimoe import Adapter, Claims, Gate


class NewScheme(Adapter):
    """NewScheme. Parameters: R (D + O), all of them active."""

    # help(Claims) says what more there is to claim; as_lora={} is true only while g = 1.
    # A loss of its own: Gate(..., loss=...) in training, over the tokens where self.mask(x) is 1.
    # To keep k ranks: claim top_k, set self.top_k in __init__ (before super's), take idx of
    # z.topk(self.kept), and give z.gather(-1, idx). tutorials/05 does it, step by step.
    claims = Claims(zero_at_birth=True, granularity="token", as_lora={})

    def gate(self, x: Tensor) -> Gate:
        z = self.project(x, "A")  # (..., R)
        g = torch.ones_like(z)  # <- your gate: one weight per rank, (..., R)
        return Gate(None, g, z)  # to keep K of R ranks: Gate(idx, g, z at idx), each (..., K)

    def active(self) -> int:
        return self.ranks * (self.in_features + self.out_features)
