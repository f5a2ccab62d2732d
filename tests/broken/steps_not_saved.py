"""The temperature falls with every step, and the number of steps is no part of the state: a run
that goes on from a file is hot again."""

from minimoe import MoRA

LAW = "round_trips"


class Scheme(MoRA):
    steps = 0

    def gate(self, x):
        tau, self.tau = self.tau, self.tau * (1 + 9 * 0.9**self.steps)
        try:
            return super().gate(x)
        finally:
            self.tau = tau

    def after_step(self):
        super().after_step()
        self.steps += 1
