"""Scores are centred by their mean over the batch, and the gate is said to be token-level."""

from minimoe import MoRA

LAW = "granularity"


class Scheme(MoRA):
    def gate(self, x):
        z = self.project(x, "A")
        over = tuple(range(z.dim() - 1))
        s = z - z.mean(over, keepdim=True) if over else z
        s = s / s.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        top, idx = s.topk(min(self.top_k, self.ranks))
        w = (top / self.tau).softmax(-1)
        if not self.training:
            w = w * (top >= self.delta)
        return idx, w, z.gather(-1, idx)
