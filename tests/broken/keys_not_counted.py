"""active() counts the kept ranks only, though every key is read to score."""

from minimoe import MoRA

LAW = "active_is_read"


class Scheme(MoRA):
    def active(self):
        return self.top_k * (self.base.in_features + self.base.out_features)
