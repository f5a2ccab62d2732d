"""Samples of tokens come back as one row of tokens."""

from minimoe import MoRA

LAW = "any_shape"


class Scheme(MoRA):
    def forward(self, x):
        return super().forward(x.reshape(-1, x.shape[-1]) if x.dim() > 2 else x)
