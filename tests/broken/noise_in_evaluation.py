"""The router's exploration noise is drawn in evaluation too."""

import torch

from minimoe import MoRA

LAW = "eval_is_still"


class Scheme(MoRA):
    def gate(self, x):
        idx, w, z, *_ = super().gate(x)
        if not self.training:
            w = w * torch.rand(w.shape, device=w.device).to(w)
        return idx, w, z
