"""MoR1E against its oracle, numbers worked by hand, and what is its own."""

import math

import pytest
import torch
from layers import X, context_of, frozen_and_live, grown
from oracle import base, softmax
from torch import nn

from minimoe.adapt import context
from minimoe.continual import streams
from minimoe.continual.learn import make_backbone
from minimoe.continual.probe import dense_gate
from minimoe.schemes.mor1e import MoR1E, MoR1ELearner

SETTINGS = {"scale": 0.7, "embedding": 3}
TASK_AGNOSTIC = {"w1", "w2"}
UNCLAIMED = {"support", "simplex", "degenerates_to_lora", "merge_is_equal"}  # laws


def mor1e(x, W0, b, A, B, W, centres, w1, w2, scale, embedding):
    """Liu et al., 2404.08985: R · omega · softmax + 4 (1 - omega) · intuition, under one factor."""
    y, R = base(x, W0, b), len(A)
    omega, outer = (1 / (1 + math.exp(-100 * w[0])) for w in (w1, w2))
    for t in range(len(x)):
        length = math.sqrt(sum(value**2 for value in embedding[t]))
        p = softmax([x[t] @ W[i] for i in range(R)])
        for i in range(R):
            c = sum(embedding[t][f] * centres[i][f] for f in range(len(centres[i]))) / length
            g = R * omega * p[i] + 4 * (1 - omega) * c
            y[t] += scale * outer * g * (x[t] @ A[i]) * B[i]
    return y


def expected(layer, x, rows, given):
    own = (rows[name] for name in ("router", "centres", "w1", "w2"))
    return mor1e(x, *frozen_and_live(rows), *own, layer.scale, given["embedding"])


def STORED(D, O, R, r, E):
    return R * (2 * D + O + 3) + 2


def ACTIVE(D, O, R, r, E, k):
    return R * (2 * D + O + 3) + 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embedding": 0}, "embedding is 0, allowed: 1 or more"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        MoR1E(nn.Linear(7, 5), **{"rank": 2} | settings)


class TestMoR1E:
    def test_at_birth_by_hand(self):
        # e = (3, 4) is (.6, .8) at length 1; c = (.6, 1); g = 1/2 · (1/2 + 2 c) = (.85, 1.25)
        layer = MoR1E(nn.Linear(4, 4), rank=2, embedding=2)
        layer.centres = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        with context(layer, embedding=torch.tensor([[3.0, 4.0], [30.0, 40.0]])):
            g = dense_gate(layer, torch.randn(2, 4))
        assert torch.allclose(g, torch.tensor([0.85, 1.25]))

    def test_the_routers_part_sums_to_R_omega(self):
        # omega = sigmoid(ln 3) = 3/4, outer factor sigmoid(-ln 3) = 1/4, R = 6: 1/4 · 6 · 3/4
        layer = grown("mor1e")
        layer.w1.data.fill_(math.log(3) / 100)
        layer.w2.data.fill_(-math.log(3) / 100)
        layer.centres.zero_()
        layer.frozen_centres.zero_()
        with context(layer, **context_of(layer, 40)):
            g = dense_gate(layer, X)
        assert torch.allclose(g.sum(1), torch.tensor(1.125, dtype=torch.float64))
        assert g.std() > 0.01


def test_its_embedding_is_as_wide_as_the_features_of_its_model():
    for stream in ("clusters", "subspaces", "permuted-digits"):
        model = make_backbone(streams.make(stream, 1))
        layer = MoR1ELearner(model, rank=2).model.fc1
        assert layer.embedding == {"clusters": 128}.get(stream, 64)
