"""A setting is a set, which JSON has not: the layer cannot be saved."""

from minimoe import LoRA

LAW = "round_trips"


class Scheme(LoRA):
    def __init__(self, base, rank=16, scale=1.0, tags=frozenset({"new"})):
        super().__init__(base, rank, scale)
        self.tags = tags
