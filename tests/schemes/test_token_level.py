"""Token-level adaptation against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import torch
from layers import X, grown
from oracle import blocks, softmax
from torch import nn

from minimoe.continual.probe import dense_gate
from minimoe.schemes.token_level import TokenLevel

SETTINGS = {"scale": 0.7}
UNCLAIMED = {"support", "degenerates_to_lora", "merge_is_equal"}  # laws


def expected(layer, x, rows, given):
    """Belofsky, 2311.10847: a softmax over cosines, of which the largest is taken four times."""
    E, w = layer.n_experts, []
    for u in x:
        s = [m @ u / math.sqrt(m @ m) / math.sqrt(u @ u) for m in rows["mean"]]
        best = max(range(E), key=lambda e: s[e])
        shares = softmax([4 * s[e] if e == best else s[e] for e in range(E)])
        w.append([float(e == E - 1) for e in range(E)] if layer.training else shares)
    return blocks(x, rows["W0"], rows["b"], rows["A"], rows["B"], w, layer.scale)


def STORED(D, O, R, r, E):
    return R * (D + O) + E * D


def ACTIVE(D, O, R, r, E, k):
    return r * (D + O)  # in training


class TestTokenLevel:
    def test_by_hand(self):
        # cosines (.9, .1): a softmax of (3.6, .1), (.9707, .0293)
        layer = TokenLevel(nn.Linear(2, 2).double(), rank=1).eval()
        layer.grow()
        angles = torch.tensor([math.acos(0.9), math.acos(0.1)], dtype=torch.float64)
        means = 3 * torch.stack([angles.cos(), angles.sin()], 1)
        layer.frozen_mean, layer.mean = means[:1], means[1:]
        g = dense_gate(layer, torch.tensor([5.0, 0.0], dtype=torch.float64))
        np.testing.assert_allclose(g, [0.97069, 0.02931], atol=1e-5)

    def test_how_long_a_mean_or_an_input_is_changes_nothing(self):
        layer = grown("token_level").eval()
        g = dense_gate(layer, X)
        layer.mean *= 7
        assert torch.allclose(dense_gate(layer, 0.1 * X), g, rtol=0, atol=1e-12)

    def test_one_expert_speaks_at_weight_1(self):
        layer = grown("token_level", tasks=1).eval()
        assert torch.equal(dense_gate(layer, X), torch.ones(40, 2, dtype=torch.float64))

    def test_all_speak_in_evaluation(self):
        layer = grown("token_level")
        assert layer.active() == layer.speaking() == 2 * (7 + 5)
        assert layer.eval().speaking() == 6 * (7 + 5)
        assert layer.active() == 6 * (7 + 5) + 3 * 7
