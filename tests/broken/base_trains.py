"""The base is left to learn with the adapter."""

from minimoe import MoRA

LAW = "only_live_learns"


class Scheme(MoRA):
    def __init__(self, base, rank=16, scale=1.0, top_k=16, tau=0.01, delta=0.2):
        super().__init__(base, rank, scale, top_k, tau, delta)
        self.base.requires_grad_(True)
