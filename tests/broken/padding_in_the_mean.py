"""A sample's mean is one of all its tokens, padding too."""

import torch

from minimoe.schemes.sema import SEMA

LAW = "padding_is_left_out"


class Scheme(SEMA):
    def __init__(self, base, rank=16, scale=1.0, threshold=1.0, width=2):
        super().__init__(base, rank, scale, threshold, width)

    def mask(self, x):
        return torch.ones_like(super().mask(x))
