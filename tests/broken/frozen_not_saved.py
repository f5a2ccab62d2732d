"""Frozen rows are no part of the state_dict: a saved model has forgotten all old tasks."""

from minimoe import MoRA

LAW = "round_trips"


class Scheme(MoRA):
    def __init__(self, base, rank=16, scale=1.0, top_k=16, tau=0.01, delta=0.2):
        super().__init__(base, rank, scale, top_k, tau, delta)
        for name in ("frozen_A", "frozen_B"):
            self.register_buffer(name, getattr(self, name), persistent=False)
