"""MoSLD against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import pytest
import torch
from layers import X, arrays, frozen_and_live, grown, lora_of
from oracle import base, gradient, softmax
from torch import nn

from minimoe.schemes.mosld import MoSLD

SETTINGS = {"scale": 0.7, "top_k": 2, "dropout": 0.4}
TASK_AGNOSTIC = {"A"}
UNCLAIMED = {"merge_is_equal"}  # laws


def mosld(x, W0, b, A, B, W, scale, top_k):
    """Zhao et al., 2412.08946: A (r, D) for every expert, as dropout left it; the top_k of a
    softmax over all, renormalised."""
    y, r = base(x, W0, b), len(A)
    for t in range(len(x)):
        p = softmax([x[t] @ W[e] for e in range(len(W))])
        kept = sorted(range(len(W)), key=lambda e: -p[e])[:top_k]
        total = sum(p[e] for e in kept)
        for e in kept:
            for i in range(r):
                y[t] += scale * p[e] / total * (x[t] @ A[i]) * B[e * r + i]
    return y


def expected(layer, x, rows, given):
    return mosld(x, *frozen_and_live(rows), rows["router"], layer.scale, layer.top_k)


def STORED(D, O, R, r, E):
    return r * D + R * O + E * D


def ACTIVE(D, O, R, r, E, k):
    return r * D + E * D + k * r * O


def SPEAKING(D, O, r, K):
    return r * D + K * O  # the keys once for all


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k is 0, allowed: 1 or more"),
        ({"dropout": 1.0}, "dropout is 1.0, allowed: 0 to below 1"),
        ({"dropout": -0.1}, "dropout is -0.1, allowed: 0 to below 1"),
        ({"dropout": math.nan}, "dropout is nan, allowed: 0 to below 1"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        MoSLD(nn.Linear(7, 5), **{"rank": 2} | settings)


def test_the_papers_settings_are_the_defaults():
    paper = {"rank": 8, "scale": 16 / 8, "top_k": 2, "dropout": 0.1}
    settings = MoSLD(nn.Linear(64, 64)).settings()
    assert {key: settings[key] for key in paper} == paper


class TestMoSLD:
    def test_experts_of_equal_values_are_lora(self):
        layer = grown("mosld").eval()
        layer.frozen_B = layer.B.detach().repeat(2, 1)
        assert torch.allclose(layer(X), lora_of(layer, layer.A, layer.B)(X), atol=1e-12)

    def test_dropped_keys_are_0_or_larger_and_right_on_average(self):
        # an entry's deviation is √(p / (1 - p)) of it: after 4000 draws, .0129 at p = .4
        layer, p = grown("mosld", tasks=1), 0.4
        eye = torch.eye(7, dtype=torch.float64)
        with torch.no_grad():
            draws = torch.stack([layer.gate(eye)[2].T / layer.A for _ in range(4000)])
        kept = 1 / (1 - p)
        assert torch.isclose(draws, torch.tensor(kept).double()).logical_or(draws == 0).all()
        assert (draws.mean(0) - 1).abs().max() < 5 * 0.0129

    def test_one_mask_is_for_all_experts_and_tokens_and_for_the_gradient(self):
        layer = grown("mosld", tasks=2)
        n, dy = arrays(layer), torch.randn(40, 5, dtype=torch.float64)
        torch.manual_seed(3)
        mask = (layer.gate(torch.eye(7, dtype=torch.float64))[2][:, :2].T / layer.A).detach()
        assert 0 < (mask == 0).sum() < mask.numel()

        def f():
            dropped = n | {"A": n["A"] * mask.numpy()}
            return expected(layer, X[:6].numpy(), dropped, {})

        torch.manual_seed(3)
        y = layer(X[:6])
        np.testing.assert_allclose(y.detach().numpy(), f(), rtol=0, atol=1e-12)
        y.backward(dy[:6])
        wanted = gradient(f, n["A"], dy[:6].numpy())
        np.testing.assert_allclose(layer.A.grad.numpy(), wanted, atol=1e-7)

    def test_evaluation_drops_nothing(self):
        layer, x = grown("mosld", dropout=0.9).eval(), X[:6]
        wanted = expected(layer, x.numpy(), arrays(layer), {})
        for _ in range(2):
            np.testing.assert_allclose(layer(x).detach().numpy(), wanted, rtol=0, atol=1e-12)
        assert not torch.allclose(layer.train()(x), layer.eval()(x))
