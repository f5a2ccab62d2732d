"""A batch without tokens has no maximum."""

from minimoe import MoRA

LAW = "any_shape"


class Scheme(MoRA):
    def gate(self, x):
        x.max()
        return super().gate(x)
