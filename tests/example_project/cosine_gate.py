"""A project's own scheme: experts weigh as a softmax of how well their keys fit a token."""

from torch import Tensor

from minimoe import Adapter, Claims, Gate


class CosineGate(Adapter):
    """g = softmax(z / ‖x‖). Parameters: R (D + O), all of them active."""

    claims = Claims(zero_at_birth=True, granularity="token", simplex=True)

    def gate(self, x: Tensor) -> Gate:
        z = self.project(x, "A")
        g = (z / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)).softmax(-1)
        return Gate(None, g, z)

    def active(self) -> int:
        return self.ranks * (self.in_features + self.out_features)
