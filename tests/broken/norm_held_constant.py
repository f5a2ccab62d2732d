"""The gradient through the norm of z is dropped, though the gate is said to be exact."""

from minimoe import MoRA

LAW = "exact_gradient"


class Scheme(MoRA):
    def gate(self, x):
        z = self.project(x, "A")
        s = z / z.detach().norm(dim=-1, keepdim=True).clamp_min(1e-12)
        top, idx = s.topk(min(self.top_k, self.ranks))
        w = (top / self.tau).softmax(-1)
        if not self.training:
            w = w * (top >= self.delta)
        return idx, w, z.gather(-1, idx)
