"""A table of 16 inputs a key: in wider layers the others are not seen."""

import torch.nn.functional as F

from minimoe import MoRA

LAW = "equation"


class Scheme(MoRA):
    def gate(self, x):
        z = F.linear(self.cast(x)[..., :16], self.keys[:, :16])
        s, idx = F.normalize(z, dim=-1).topk(min(self.top_k, self.ranks))
        w = (s / self.tau).softmax(-1)
        if not self.training:
            w = w * (s >= self.delta)
        return idx, w, z.gather(-1, idx)
