"""Only the first 200 tokens of a batch have a gradient, to save memory."""

import torch

from minimoe import MoRA

LAW = "exact_gradient"


class Scheme(MoRA):
    def forward(self, x):
        if x.dim() != 2 or len(x) <= 200:
            return super().forward(x)
        return torch.cat([super().forward(x[:200]), super().forward(x[200:]).detach()])
