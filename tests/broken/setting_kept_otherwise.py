"""tau is kept as its inverse, under its own name: a layer made by settings() is another one."""

import torch.nn.functional as F

from minimoe import Adapter, Claims

LAW = "round_trips"


class Scheme(Adapter):
    claims = Claims(zero_at_birth=True, granularity="token", simplex=True)

    def __init__(self, base, rank=16, scale=1.0, tau=0.1):
        super().__init__(base, rank, scale)
        self.tau = 1 / tau

    def gate(self, x):
        z = self.project(x, "A")
        return None, (F.normalize(z, dim=-1) * self.tau).softmax(-1), z

    def active(self):
        return self.ranks * (self.in_features + self.out_features)
