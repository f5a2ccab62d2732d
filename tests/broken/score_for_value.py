"""The normalised score is what a rank says, where the raw z belongs."""

from dataclasses import replace

from minimoe import MoRA

LAW = "equation"


class Scheme(MoRA):
    claims = replace(MoRA.claims, as_lora=None)

    def gate(self, x):
        idx, w, z, *_ = super().gate(x)
        norm = self.project(x, "A").norm(dim=-1, keepdim=True)
        return idx, w, z / norm.clamp_min(1e-12)
