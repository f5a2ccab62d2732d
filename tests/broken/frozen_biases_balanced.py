"""Balancing moves the biases of frozen ranks too: older tasks' ranks weigh otherwise."""

from minimoe.schemes.smora import SMoRA

LAW = "only_live_learns"


class Scheme(SMoRA):
    def after_step(self):
        if self.counts is not None:
            self.frozen_expert_bias += self.rate
        super().after_step()
