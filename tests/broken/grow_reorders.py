"""The newest ranks come first among the frozen ones: rank i is another rank after each task."""

import torch
from torch import nn

from minimoe import MoRA

LAW = "grow_keeps"


class Scheme(MoRA):
    def grow(self):
        for name, rows in self.fresh().items():
            frozen = torch.cat([getattr(self, name).detach(), getattr(self, f"frozen_{name}")])
            setattr(self, f"frozen_{name}", frozen)
            setattr(self, name, nn.Parameter(rows))
