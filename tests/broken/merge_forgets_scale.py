"""merge() adds B A without the scale."""

import torch

from minimoe import LoRA

LAW = "merge_is_equal"


class Scheme(LoRA):
    def merge(self):
        self.unmerged = self.base.weight.detach().clone()
        A, B = torch.cat([self.frozen_A, self.A]), torch.cat([self.frozen_B, self.B])
        with torch.no_grad():
            self.base.weight += B.T @ A
