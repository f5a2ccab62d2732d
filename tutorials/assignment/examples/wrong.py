"""A sharp softmax over the ranks with the largest |z|, which claims what it does not keep.

Its mistakes: in training scores are centred over the batch, so that a token's output depends on the
other tokens; weights sum to k and not to 1; and what is stated has no centring.
"""

import numpy as np

from minimoe import Adapter, Claims, Gate


def stated(x, rows, settings, training):
    z = x @ rows["A"].T
    g = np.zeros_like(z)
    for t in range(len(z)):
        kept = np.argsort(-np.abs(z[t]))[: settings["top_k"]]
        w = np.exp(np.abs(z[t, kept]) - np.abs(z[t, kept]).max())
        g[t, kept] = len(kept) * w / w.sum()
    return g


class Scheme(Adapter):
    claims = Claims(zero_at_birth=True, granularity="token", top_k=True, simplex=True)

    def __init__(self, base, rank=16, scale=1.0, top_k=16):
        self.top_k = top_k
        super().__init__(base, rank, scale)

    def gate(self, x):
        z = self.project(x, "A")
        score = z.abs()
        if self.training:
            score = score - score.reshape(-1, self.ranks).mean(0)
        top, idx = score.topk(self.kept)
        return Gate(idx, self.kept * top.softmax(-1), z.gather(-1, idx))

    def active(self):
        return self.ranks * self.in_features + self.kept * self.out_features
