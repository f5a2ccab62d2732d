"""MeteoRA against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import pytest
import torch
from layers import PATHS, X, arrays, frozen_and_live, grown, lora_of
from oracle import base, softmax
from torch import nn

from minimoe.adapt import context
from minimoe.schemes.meteora import MeteoRA, label_loss

SETTINGS = {"scale": 0.7, "top_k": 2, "tau": 0.6, "supervision": 0.5}
UNCLAIMED = {"merge_is_equal"}  # laws


def meteora(x, W0, b, A, B, W, scale, top_k, tau):
    """Xu et al., 2405.13053: a softmax at temperature tau over the top_k logits."""
    y, E = base(x, W0, b), len(W)
    r = len(A) // E
    for t in range(len(x)):
        logits = [x[t] @ W[e] for e in range(E)]
        kept = sorted(range(E), key=lambda e: -logits[e])[:top_k]
        for e, w in zip(kept, softmax([logits[e] / tau for e in kept]), strict=True):
            for i in range(e * r, (e + 1) * r):
                y[t] += scale * w * (x[t] @ A[i]) * B[i]
    return y


def label_loss_loop(x, W, label):
    """Xu et al.: the mean of -ln softmax(logits) at the label."""
    total = 0.0
    for t in range(len(x)):
        total -= math.log(softmax([x[t] @ W[e] for e in range(len(W))])[label[t]])
    return total / len(x)


def expected(layer, x, rows, given):
    return meteora(x, *frozen_and_live(rows), rows["router"], layer.scale, layer.top_k, layer.tau)


AUX = {"router"}


def expected_aux(layer, x, rows, given):
    return layer.supervision * label_loss_loop(x, rows["router"], given["label"])


def STORED(D, O, R, r, E):
    return R * (D + O) + E * D


def ACTIVE(D, O, R, r, E, k):
    return E * D + k * r * (D + O)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k is 0, allowed: 1 or more"),
        ({"tau": -1.0}, "tau is -1.0, allowed: above 0"),
        ({"tau": math.nan}, "tau is nan, allowed: above 0"),
        ({"supervision": -1.0}, "supervision is -1.0, allowed: 0 or more"),
        ({"supervision": math.nan}, "supervision is nan, allowed: 0 or more"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        MeteoRA(nn.Linear(7, 5), **{"rank": 2} | settings)


def test_the_papers_settings_are_the_defaults():
    paper = {"rank": 8, "top_k": 2, "supervision": 50.0}
    settings = MeteoRA(nn.Linear(64, 64)).settings()
    assert {key: settings[key] for key in paper} == paper


class TestMeteoRA:
    def test_loop_gathered_and_dense_paths_agree(self):
        layer = grown("meteora", D=12, O=10, rank=4, tasks=5, top_k=3).eval()
        x = torch.randn(30, 12, dtype=torch.float64)
        n = arrays(layer)
        wanted = expected(layer, x.numpy(), n, {})
        for layer.path in PATHS:
            np.testing.assert_allclose(layer(x).detach().numpy(), wanted, rtol=0, atol=1e-12)

    def test_one_kept_is_that_lora_at_any_temperature(self):
        layer = grown("meteora", top_k=1, tau=7.0).eval()
        A, B = layer.keys.unflatten(0, (3, 2)), layer.rows("B").unflatten(0, (3, 2))
        y, best = layer(X), (X @ layer.rows("router").T).argmax(1)
        assert set(best.tolist()) == {0, 1, 2}
        for x, answer, e in zip(X, y, best, strict=True):
            assert torch.allclose(lora_of(layer, A[e], B[e])(x), answer, atol=1e-12)

    def test_label_loss_by_hand(self):
        # logits (ln 3, 0): -ln 3/4 at label 0, -ln 1/4 at label 1
        logits = torch.tensor([[math.log(3), 0.0]] * 2)
        wanted = (math.log(4 / 3) + math.log(4)) / 2
        loss = label_loss(logits, torch.tensor([0, 1]), torch.ones(2))
        assert math.isclose(loss.item(), wanted, rel_tol=1e-6)
        assert label_loss(logits[:0], torch.zeros(0).long(), torch.ones(0)) == 0

    def test_a_uniform_router_has_loss_ln_E(self):
        layer = grown("meteora", supervision=50.0)
        layer.frozen_router.zero_()
        layer.router.data.zero_()
        with context(layer, label=torch.arange(40) % 3) as batch:
            layer(X)
        assert math.isclose(batch.aux_loss.item(), 50 * math.log(3), rel_tol=1e-12)
