"""AdaMoLE against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import torch
from layers import grown
from oracle import blocks, softmax
from torch import nn

from minimoe.schemes.adamole import AdaMoLE

SETTINGS = {"scale": 0.7}
UNCLAIMED = {"support", "merge_is_equal"}  # laws
TASK_AGNOSTIC = {"threshold", "threshold_bias"}


def adamole(x, W, v, b):
    """Liu and Luo, 2405.00361: the part of each likelihood above a threshold, as shares."""
    weights = []
    for t in range(len(x)):
        p = softmax([x[t] @ W[e] for e in range(len(W))])
        theta = 1 / (1 + math.exp(-(x[t] @ v[0] + b[0]))) / len(W)
        above = [max(share - theta, 0.0) for share in p]
        weights.append([a / sum(above) for a in above])
    return weights


def expected(layer, x, rows, given):
    w = adamole(x, rows["router"], rows["threshold"], rows["threshold_bias"])
    return blocks(x, rows["W0"], rows["b"], rows["A"], rows["B"], w, layer.scale)


def STORED(D, O, R, r, E):
    return R * (D + O) + E * D + D + 1


def ACTIVE(D, O, R, r, E, k):
    return STORED(D, O, R, r, E)


def layer_of(p, theta):
    """A layer whose router gives x = (1,) these likelihoods, and whose threshold is theta."""
    layer = AdaMoLE(nn.Linear(1, 1).double(), rank=1)
    for _ in p[1:]:
        layer.grow()
    layer.frozen_router[:, 0] = torch.tensor(p[:-1]).log()
    layer.router.data[0, 0] = math.log(p[-1])
    layer.threshold.data.zero_()
    layer.threshold_bias.data.fill_(math.log(theta * len(p) / (1 - theta * len(p))))
    return layer


class TestAdaMoLE:
    def test_by_hand(self):
        # (.5, .3, .2) less .25: (.25, .05, 0), of which the shares are 5/6, 1/6, 0
        layer = layer_of([0.5, 0.3, 0.2], 0.25)
        w = layer.gate(torch.ones(1, dtype=torch.float64)).weight
        assert torch.allclose(w, torch.tensor([5 / 6, 1 / 6, 0.0]).double())

    def test_a_likelihood_of_one_in_E_is_always_enough(self):
        layer = layer_of([0.25] * 4, 0.2)
        layer.frozen_router.zero_()
        layer.router.data.zero_()
        layer.threshold_bias.data.fill_(60.0)  # theta is 1 / E but for rounding
        w = layer.gate(torch.ones(1, dtype=torch.float64)).weight
        assert torch.allclose(w, torch.full((4,), 0.25).double())
        layer.threshold_bias.data.fill_(1e4)  # and beyond it: 0, not nan
        assert not layer.gate(torch.ones(1, dtype=torch.float64)).weight.isnan().any()

    def test_how_many_speak_is_the_tokens_to_say(self):
        layer = grown("adamole", tasks=5)
        x = torch.randn(200, 7, dtype=torch.float64)
        speak = (layer.gate(x).weight[:, ::2] > 0).sum(-1)
        assert set(speak.tolist()) >= {1, 2, 3} and speak.min() == 1
        np.testing.assert_allclose(layer.gate(x).weight[:, ::2].sum(-1).detach(), 1)
