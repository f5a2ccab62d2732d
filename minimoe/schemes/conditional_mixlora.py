"""Conditional MixLoRA: a LoRA for each sample, put together from a pool of keys and one of values.

Multimodal Instruction Tuning with Conditional Mixture of LoRA. Shen et al., arXiv 2402.15896. As
the authors' code has it (VT-NLP/MixLoRA).

Two routers read the mean token x̄ of a sample, padding left out; which values are chosen depends on
which keys are:

    l = x̄ Uᵀ                                of the keys
    i_1 ... i_k: the k largest l, in order
    q = Σ over slots n of softmax(V_n a_(i_n))           what the chosen keys say of the values
    s = softmax(x̄ Wᵀ) + softmax(q)          of the values
    j_1 ... j_k: the k largest s, in order
    g_n = softmax over the kept l, at i_n, times softmax over the kept s, at j_n
    y = x W0ᵀ + scale · Σ over slots n of g_n (x · a_(i_n)) b_(j_n)

So the key and the value of a rank are those that were chosen at the same place, and the update of a
sample is of rank k at most.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, k slots. x (..., D),
W0 (O, D), a (R, D) `A`, b (R, O) `B`, U (R, D) `key_router`, W (R, D) `router`, V (R, k, D):
V_n (R, D) is its slot n. An x of three axes or more is (samples, tokens..., D); of two or one, each
row is a sample.

Life: one task trains r new keys and r new values, with their rows of U, W and V; all older ones are
frozen. A new key may be chosen with an old value.

Departures: the paper trains once and never grows. Its code has g_n = 1 (`weighted` False), so that
no gradient reaches U, W and V; this is the way that it offers for weights, which it takes in
the first pass alone. Its routers start as torch's linear layers do, here at N(0, .02).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Adapter, Gate, require
from ..claims import Claims
from ..sparse import widened
from .sema import sample_mean


class ConditionalMixLoRA(Adapter):
    """Keys and values chosen for a sample, one after the other. Parameters: R (D + O) + (2 + k) R
    D; active, (2 + k) R D + k (D + O).

    Args beyond Adapter's (the default scale is the authors' alpha / r, 2 R / k of one task):
        top_k: k, at most all.
        weighted: False: g_n = 1, and the choice has no gradient.

    Raises ValueError if top_k < 1.
    """

    claims = Claims(
        zero_at_birth=True, granularity="sample", top_k=True, active_at_most=True, equation=False
    )

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 16,
        scale: float = 8.0,
        top_k: int = 4,
        weighted: bool = True,
    ):
        require(top_k >= 1, "top_k", top_k, "1 or more")
        self.top_k, self.weighted = top_k, weighted
        super().__init__(base, rank, scale)

    def gate(self, x: Tensor) -> Gate:
        """The kept values, and what the keys beside them see."""
        mean, _ = sample_mean(x, self.mask(x))  # one token for each sample
        l, i = widened(self.project(mean, "key_router")).topk(self.kept)  # (..., k)
        s = widened(self.project(mean, "router")).softmax(-1) + self.of_keys(i).softmax(-1)
        s, j = s.topk(self.kept)
        g = l.softmax(-1) * s.softmax(-1) if self.weighted else torch.ones_like(l)
        i, j, g = (t.expand(*x.shape[:-1], -1) for t in (i, j, g.to(x.dtype)))
        return Gate(j, g, self.seen(x, i))

    def of_keys(self, i: Tensor) -> Tensor:
        """q (..., R) of the keys i (..., k)."""
        a, V = F.embedding(i, self.rows("A")), self.rows("V")[:, : self.kept]
        return widened(torch.einsum("...kd,rkd->...kr", a, V)).softmax(-1).sum(-2)

    def active(self) -> int:
        return self.speaking() + (2 + self.kept) * self.ranks * self.in_features

    def fresh(self) -> dict[str, Tensor]:
        V = self.empty(self.rank, self.top_k, self.in_features).normal_(std=0.02)
        both = {name: self.fresh_router() for name in ("key_router", "router")}
        return super().fresh() | both | {"V": V}
