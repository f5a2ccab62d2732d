"""The softmax is one over 10 ranks, however many are kept."""

import torch.nn.functional as F

from minimoe import MoRA

LAW = "degenerates_to_lora"


class Scheme(MoRA):
    def gate(self, x):
        z = self.project(x, "A")
        s, idx = F.normalize(z, dim=-1).topk(min(self.top_k, self.ranks, 10))
        w = (s / self.tau).softmax(-1)
        if not self.training:
            w = w * (s >= self.delta)
        return idx, w, z.gather(-1, idx)
