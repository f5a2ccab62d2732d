"""Steer-MoE against its oracle, numbers worked by hand, and what is its own."""

import math

import torch
from layers import X, grown
from oracle import base, softmax
from torch import nn

from minimoe.schemes.steer_moe import SteerMoE

SETTINGS = {"scale": 0.7}
UNCLAIMED = {"equation", "support", "degenerates_to_lora", "merge_is_equal"}  # laws


def expected(layer, x, rows, given):
    """A mean of the vectors, added to u; the weights are a softmax of u's logits."""
    B, W, c = rows["B"], rows["router"], rows["router_bias"]
    y = base(x, rows["W0"], rows["b"])
    for u in y:
        p = softmax([W[e] @ u + c[e] for e in range(len(W))])
        u += layer.scale * sum(p[e] * B[e] for e in range(len(B)))
    return y


def STORED(D, O, R, r, E):
    return R * O + R * O + R


def ACTIVE(D, O, R, r, E, k):
    return STORED(D, O, R, r, E)


def SPEAKING(D, O, r, K):
    return K * O


def test_the_codes_settings_are_the_defaults():
    assert SteerMoE(nn.Linear(64, 64)).settings() == {"rank": 8, "scale": 0.1}


class TestSteerMoE:
    def test_by_hand(self):
        # u = (1, 2): logits 0 and (ln 3 / 2) · 2, so p = (1/4, 3/4); the update is .1 (1, 3)
        layer = SteerMoE(nn.Linear(2, 2, bias=False).double(), rank=2)
        log3 = math.log(3)
        with torch.no_grad():
            layer.base.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
            layer.router.copy_(torch.tensor([[0.0, 0.0], [0.0, log3 / 2]]))
            layer.router_bias.zero_()
            layer.B.copy_(torch.tensor([[4.0, 0.0], [0.0, 4.0]]))
        y = layer(torch.ones(2, dtype=torch.float64))
        assert torch.allclose(y, torch.tensor([1.1, 2.3]).double())

    def test_the_bias_counts(self):
        layer = grown("steer_moe", tasks=1)
        layer.router.data.zero_()
        layer.router_bias.data = torch.tensor([1.0, 4.0]).double().log()
        w = layer.gate(X).weight
        assert torch.allclose(w, torch.tensor([0.2, 0.8]).double().expand(40, 2))

    def test_one_vector_is_a_trained_bias(self):
        layer = grown("steer_moe", rank=1, tasks=1)
        assert torch.equal(layer(X), layer.base(X) + layer.scale * layer.B)

    def test_equal_vectors_are_one_whatever_the_router_says(self):
        layer = grown("steer_moe")
        layer.frozen_B = layer.B[:1].detach().expand(4, 5).clone()
        layer.B.data[1] = layer.B.data[0]
        assert torch.allclose(layer(X), layer.base(X) + layer.scale * layer.B[0])

    def test_the_router_reads_what_the_layer_says_and_nothing_else_of_x(self):
        layer = grown("steer_moe")
        layer.base.weight.data[:, 0] = 0.0
        other = X.clone()
        other[:, 0] += 5
        assert torch.equal(layer.gate(X).weight, layer.gate(other).weight)

    def test_a_layer_of_16_bits_is_called_in_its_own(self):
        layer = SteerMoE(nn.Linear(7, 5, dtype=torch.bfloat16), rank=2)
        x = X.bfloat16()
        assert layer.of_base(x.float()).dtype == torch.float32
        assert torch.equal(layer.of_base(x.float()), layer.base(x).float())
