"""A lambda as an attribute: the layer cannot be sent to another process."""

from minimoe import MoRA

LAW = "round_trips"


class Scheme(MoRA):
    def __init__(self, base, rank=16, scale=1.0, top_k=16, tau=0.01, delta=0.2):
        super().__init__(base, rank, scale, top_k, tau, delta)
        self.sharpen = lambda s: s / tau
