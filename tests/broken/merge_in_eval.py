"""eval() merges and train() unmerges behind the user's back."""

import torch

from minimoe import LoRA

LAW = "eval_is_still"


class Scheme(LoRA):
    def train(self, mode=True):
        if hasattr(self, "scale") and mode != self.training:
            A, B = torch.cat([self.frozen_A, self.A]), torch.cat([self.frozen_B, self.B])
            with torch.no_grad():
                self.base.weight += (-1.0 if mode else 1.0) * self.scale * (B.T @ A)
        return super().train(mode)

    def forward(self, x):
        return super().forward(x) if self.training else self.base(x)
