"""PHATGOOSE against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import pytest
import torch
from layers import X, grown, lora_of
from oracle import blocks, softmax
from torch import nn

from minimoe.adapt import adapters
from minimoe.continual.learn import train
from minimoe.continual.stream import Stream, Task
from minimoe.schemes.alone import Alone, AloneLearner
from minimoe.schemes.phatgoose import PHATGOOSE, PHATGOOSELearner

SETTINGS = {"scale": 0.7, "top_k": 2}
UNCLAIMED = {"degenerates_to_lora", "merge_is_equal"}  # laws


def standard(u):
    mean = sum(u) / len(u)
    return [(a - mean) / math.sqrt(sum((a - mean) ** 2 for a in u) / len(u) + 1e-5) for a in u]


def expected(layer, x, rows, given):
    """Muqeeth et al., 2402.05859: a softmax over the largest products of what is standardised."""
    E, D, w = layer.n_experts, x.shape[1], []
    gates = [standard(v) for v in rows["v"]]
    for u in x:
        l = [sum(a * b for a, b in zip(standard(u), v, strict=True)) / math.sqrt(D) for v in gates]
        kept = sorted(range(E), key=lambda e: -l[e])[: layer.top_k]
        shares = dict(zip(kept, softmax([l[e] for e in kept]), strict=True))
        own = [float(e == E - 1) for e in range(E)]
        w.append(own if layer.training else [shares.get(e, 0.0) for e in range(E)])
    return blocks(x, rows["W0"], rows["b"], rows["A"], rows["B"], w, layer.scale)


def STORED(D, O, R, r, E):
    return R * (D + O) + E * D


def ACTIVE(D, O, R, r, E, k):
    return r * (D + O)  # in training


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"^top_k is 0, allowed: 1 or more$"):
        PHATGOOSE(nn.Linear(7, 5), rank=2, top_k=0)


class TestPHATGOOSE:
    def test_by_hand(self):
        # x (3, 1) is (1, -1) less its mean, over its deviation; v (1, 0) is (1, -1) too, and
        # (0, 9) is (-1, 1): l = (2, -2) / sqrt 2, and w = (1, e^(-4 / sqrt 2)) as shares
        layer = PHATGOOSE(nn.Linear(2, 2).double(), rank=1, top_k=2).eval()
        layer.grow()
        layer.frozen_v = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        layer.v = torch.tensor([[0.0, 9.0]], dtype=torch.float64)
        w = layer.gate(torch.tensor([3.0, 1.0], dtype=torch.float64)).weight
        small = math.exp(-4 / math.sqrt(2))
        np.testing.assert_allclose(w.detach(), [1 / (1 + small), small / (1 + small)], rtol=1e-4)

    def test_while_a_gate_trains_its_expert_has_its_weight_and_a_half_at_first(self):
        layer = grown("phatgoose").train()
        layer.gating = True
        alone = lora_of(layer, layer.A, layer.B)(X) - layer.base(X)
        w = torch.sigmoid(X @ layer.v[0]).unsqueeze(-1)
        assert torch.allclose(layer(X), layer.base(X) + w * alone, rtol=0, atol=1e-12)
        layer.v.zero_()
        assert torch.allclose(layer(X), layer.base(X) + alone / 2, rtol=0, atol=1e-12)

    def test_gates_that_were_not_trained_are_level(self):
        layer = grown("phatgoose", top_k=3).eval()
        layer.v.zero_(), layer.frozen_v.zero_()
        assert torch.allclose(layer.gate(X).weight, torch.full((40, 6), 1 / 3).double())


def two_tasks(learner_class, **settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)).requires_grad_(False)
    tasks = []
    for t in range(2):
        x, y = torch.randn(200, 6) + 4 * t - 2, torch.randn(200, 6)
        tasks.append(Task(f"t{t}", (x, y), (x, y)))
    learner, stream, trained = learner_class(net, rank=2, **settings), Stream("s", tasks), []

    def fit(model, weights, task):
        trained.append([tuple(w.shape) for w in weights])
        train(model, weights, task, 2, 0)

    for t in range(2):
        learner.learn(stream, t, fit)
    return learner, trained


class TestPHATGOOSELearner:
    def test_gates_train_after_their_experts_and_move_none(self):
        learner, trained = two_tasks(PHATGOOSELearner)
        assert [len(weights) for weights in trained] == [4, 2, 4, 2]
        assert trained[1] == [(1, 6), (1, 9)]
        other, _ = two_tasks(AloneLearner, scheme=Alone)
        for (_, ours), (_, theirs) in zip(
            adapters(learner.model), adapters(other.model), strict=True
        ):
            for name in "AB":  # bit for bit what they are where no gate trains
                assert torch.equal(ours.rows(name), theirs.rows(name))
            assert ours.rows("v").any(-1).all() and not ours.gating
            assert not ours.v.requires_grad and not ours.rows("v").requires_grad
