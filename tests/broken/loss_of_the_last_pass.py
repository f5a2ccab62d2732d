"""The layer keeps the balance of its last pass as if it were one of the weights: of two passes in a
batch, one counts."""

from minimoe import LoRAMoE
from minimoe.adapter import Gate

LAW = "passes_add_up"


class Scheme(LoRAMoE):
    def __init__(self, base, rank=16, scale=1.0, top_k=2, balance=0.1, experts=1):
        super().__init__(base, rank, scale, top_k, balance, experts)

    def gate(self, x):
        idx, w, z, loss, _ = super().gate(x)
        self.step.balance = loss
        return Gate(idx, w, z)

    def penalty(self):
        return getattr(self.step, "balance", None)

    def after_step(self):
        self.step.balance = None
