"""Training passes are counted in an attribute, and evaluation is the sharper the more there were:
a saved layer has forgotten how many."""

from minimoe import MoRA

LAW = "round_trips"


class Scheme(MoRA):
    passes = 0

    def gate(self, x):
        tau, self.tau = self.tau, self.tau if self.training else self.tau / (1 + self.passes)
        try:
            return super().gate(x)
        finally:
            self.tau = tau

    def forward(self, x):
        if self.training:
            self.passes += 1
        return super().forward(x)
