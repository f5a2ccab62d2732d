"""active() counts top_k ranks, also where there are fewer."""

from minimoe import MoRA

LAW = "active_is_read"


class Scheme(MoRA):
    def active(self):
        return self.ranks * self.base.in_features + self.top_k * self.base.out_features
