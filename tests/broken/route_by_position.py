"""Experts take turns by the token's place in the batch: the batch's order decides."""

import math

import torch

from minimoe import Adapter, Claims
from minimoe.sparse import rank_scores

LAW = "granularity"


class Scheme(Adapter):
    claims = Claims(
        zero_at_birth=True, granularity="token", expert="block", simplex=True, as_lora=None
    )

    def gate(self, x):
        lead = x.shape[:-1]
        place = torch.arange(math.prod(lead), device=x.device).view(lead)
        first = place % (self.ranks // self.rank) * self.rank
        idx = first.unsqueeze(-1) + torch.arange(self.rank, device=x.device)
        return idx, 1.0, rank_scores(x, idx, self.frozen_A, self.A, self.path)

    def active(self):
        return self.rank * (self.base.in_features + self.base.out_features)
