"""The norm is guarded if the whole input is 0, and not for one token of zeros among others."""

from minimoe import Gate, MoRA

LAW = "zero_is_finite"


class Scheme(MoRA):
    def gate(self, x):
        z = self.project(x, "A")
        if not z.any():
            return super().gate(x)
        s, idx = (z / z.norm(dim=-1, keepdim=True)).topk(self.kept)
        return Gate(idx, (s / self.tau).softmax(-1), z.gather(-1, idx))
