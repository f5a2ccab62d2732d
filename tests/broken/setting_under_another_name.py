"""tau is kept as `temperature`: settings() does not find it, and nothing can be saved."""

import torch.nn.functional as F

from minimoe import Adapter, Claims

LAW = "round_trips"


class Scheme(Adapter):
    claims = Claims(zero_at_birth=True, granularity="token", simplex=True)

    def __init__(self, base, rank=16, scale=1.0, tau=0.1):
        super().__init__(base, rank, scale)
        self.temperature = tau

    def gate(self, x):
        z = self.project(x, "A")
        return None, (F.normalize(z, dim=-1) / self.temperature).softmax(-1), z

    def active(self):
        return self.ranks * (self.in_features + self.out_features)
