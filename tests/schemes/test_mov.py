"""MoV against its oracle, numbers worked by hand, and what is its own."""

import math

import torch
from layers import X, grown
from oracle import base, softmax
from torch import nn

from minimoe.schemes.mov import MoV

SETTINGS = {"scale": 0.7}
UNCLAIMED = {"equation", "support", "degenerates_to_lora", "merge_is_equal"}  # laws


def expected(layer, x, rows, given):
    """u times a mean of the vectors l_e, under a softmax of u's logits."""
    l, W = 1 + layer.scale * rows["B"], rows["router"]
    y = base(x, rows["W0"], rows["b"])
    for u in y:
        p = softmax([W[e] @ u for e in range(len(W))])
        u *= sum(p[e] * l[e] for e in range(len(l)))
    return y


def STORED(D, O, R, r, E):
    return R * O + R * O


def ACTIVE(D, O, R, r, E, k):
    return STORED(D, O, R, r, E)


def SPEAKING(D, O, r, K):
    return K * O


def test_the_papers_settings_are_the_defaults():
    assert MoV(nn.Linear(64, 64)).settings() == {"rank": 30, "scale": 1.0}


class TestMoV:
    def test_by_hand(self):
        # u = (1, 2): logits 0 and (ln 3 / 2) · 2, so p = (1/4, 3/4), and of l = (3, 1), (1, 5)
        # the mean is (3/2, 4): y = (3/2, 8)
        layer = MoV(nn.Linear(2, 2, bias=False).double(), rank=2)
        with torch.no_grad():
            layer.base.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
            layer.router.copy_(torch.tensor([[0.0, 0.0], [0.0, math.log(3) / 2]]))
            layer.B.copy_(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        y = layer(torch.ones(2, dtype=torch.float64))
        assert torch.allclose(y, torch.tensor([1.5, 8.0]).double())

    def test_vectors_of_1_are_the_base_layer_bit_for_bit_whatever_the_router_says(self):
        layer = grown("mov")
        layer.frozen_B.zero_(), layer.B.data.zero_()
        layer.router.data.mul_(100)
        assert torch.equal(layer(X), layer.base(X))

    def test_one_vector_is_ia3(self):
        layer = grown("mov", rank=1, tasks=1)
        assert torch.allclose(layer(X), layer.base(X) * (1 + layer.scale * layer.B))

    def test_a_vector_of_0_silences_the_layer(self):
        layer = grown("mov", tasks=1)
        layer.B.data.fill_(-1 / layer.scale)
        assert torch.allclose(layer(X), torch.zeros(40, 5).double(), atol=1e-12)
