"""z is divided by its norm, which is 0 for a zero token."""

from minimoe import MoRA

LAW = "zero_is_finite"


class Scheme(MoRA):
    def gate(self, x):
        z = self.project(x, "A")
        top, idx = (z / z.norm(dim=-1, keepdim=True)).topk(min(self.top_k, self.ranks))
        w = (top / self.tau).softmax(-1)
        if not self.training:
            w = w * (top >= self.delta)
        return idx, w, z.gather(-1, idx)
