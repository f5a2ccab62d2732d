"""Scores are multiplied by the temperature: the higher, the sharper."""

from minimoe import MoRA

LAW = "degenerates_to_lora"


class Scheme(MoRA):
    def __init__(self, base, rank=16, scale=1.0, top_k=16, tau=0.01, delta=0.2):
        super().__init__(base, rank, scale, top_k, tau, delta)
        self.tau = tau

    def gate(self, x):
        tau, self.tau = self.tau, 1 / self.tau
        try:
            return super().gate(x)
        finally:
            self.tau = tau
