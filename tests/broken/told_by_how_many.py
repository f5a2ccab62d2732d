"""Logits are divided by the root of how many tokens there are: a large batch is weighed evenly."""

import torch.nn.functional as F

from minimoe import MoRA

LAW = "granularity"


class Scheme(MoRA):
    def gate(self, x):
        z = self.project(x, "A")
        s, idx = F.normalize(z, dim=-1).topk(min(self.top_k, self.ranks))
        tokens = max(1, x[..., 0].numel())
        w = (s / self.tau / tokens**0.5).softmax(-1)
        if not self.training:
            w = w * (s >= self.delta)
        return idx, w, z.gather(-1, idx)
