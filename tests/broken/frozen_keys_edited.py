"""Frozen keys are scaled to length 1 in place, to make the scores cosines."""

import torch

from minimoe import MoRA

LAW = "only_live_learns"


class Scheme(MoRA):
    def gate(self, x):
        if self.training:
            with torch.no_grad():
                self.frozen_A.div_(self.frozen_A.norm(dim=1, keepdim=True).clamp_min(1e-12))
        return super().gate(x)
