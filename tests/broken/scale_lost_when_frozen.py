"""The scale is on the live ranks only: a rank speaks otherwise once it is frozen."""

from minimoe import MoRA
from minimoe.sparse import rank_sparse

LAW = "equation"


class Scheme(MoRA):
    def forward(self, x):
        idx, g, z, *_ = self.gate(x)
        scale = (idx < len(self.frozen_A)).to(z) * (1 - self.scale) + self.scale
        return self.base(x) + rank_sparse(scale * g * z, idx, self.frozen_B, self.B, self.path)
