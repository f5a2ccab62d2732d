"""Work is saved where no weight passes the threshold, by an `if` on a tensor."""

from minimoe import MoRA

LAW = "compiles"


class Scheme(MoRA):
    def forward(self, x):
        if not self.training and not (self.gate(x)[1] > 0).any():
            return self.base(x)
        if (x == 0).all():
            return self.base(x)
        return super().forward(x)
