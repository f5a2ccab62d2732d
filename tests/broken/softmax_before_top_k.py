"""The softmax runs over all ranks and the top k are kept of that: they sum to less than 1."""

from minimoe import MoRA

LAW = "simplex"


class Scheme(MoRA):
    def gate(self, x):
        z = self.project(x, "A")
        s = z / z.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        w, idx = (s / self.tau).softmax(-1).topk(min(self.top_k, self.ranks))
        if not self.training:
            w = w * (s.gather(-1, idx) >= self.delta)
        return idx, w, z.gather(-1, idx)
