"""MixDA against its oracle, numbers worked by hand, and what is its own."""

import math

import pytest
import torch
from layers import X, grown, lora_of
from oracle import blocks, softmax
from test_mixture_of_loras import Net
from torch import nn

from minimoe.adapt import adapters, context
from minimoe.continual.learn import train
from minimoe.continual.probe import dense_gate
from minimoe.continual.stream import Stream, Task
from minimoe.schemes.mixda import MixDA, MixDALearner, last_token

SETTINGS = {"scale": 0.7, "width": 3}
UNCLAIMED = {"support", "degenerates_to_lora", "merge_is_equal"}  # laws


def paths(rows, u):
    """Diao et al., 2306.05406: a softmax over what the networks make of u, and 0, the base's."""
    P, c, q, d = (rows[name] for name in "Pcqd")
    E, h, l = len(d), len(c) // len(d), [0.0]
    for e in range(E):
        hidden = [max(0.0, P[e * h + i] @ u + c[e * h + i]) for i in range(h)]
        l.append(d[e] + sum(q[e, i] * hidden[i] for i in range(h)))
    return softmax(l)


def expected(layer, x, rows, given):
    last = {m: t for t, m in enumerate(given["sample"])}
    w = [paths(rows, x[last[m]])[1:] for m in given["sample"]]
    if layer.training:
        w = [[0.0] * (layer.n_experts - 1) + [1.0]] * len(x)
    return blocks(x, rows["W0"], rows["b"], rows["A"], rows["B"], w, layer.scale)


def STORED(D, O, R, r, E):
    return R * (D + O) + E * (3 * (D + 2) + 1)


def ACTIVE(D, O, R, r, E, k):
    return r * (D + O)  # in training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width is 0, allowed: 1 or more"),
        ({"anchor": -1.0}, "anchor is -1.0, allowed: 0 or more"),
        ({"anchor": math.nan}, "anchor is nan, allowed: 0 or more"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        MixDA(nn.Linear(7, 5), **{"rank": 2} | settings)


class TestMixDA:
    def test_a_path_that_says_nothing_leaves_half_of_the_base_layer(self):
        # E = 1, l = 0: π = (.5, .5). A of the unit vectors and B = -W0ᵀ: f = 0
        layer = MixDA(nn.Linear(4, 4, bias=False).double(), rank=4).eval()
        layer.A.data.copy_(torch.eye(4)), layer.B.data.copy_(-layer.base.weight.T), layer.q.zero_()
        x = X[:, :4]
        assert torch.allclose(layer(x), layer.base(x) / 2, rtol=0, atol=1e-12)
        assert torch.allclose(layer.train()(x), 0 * x, rtol=0, atol=1e-12)

    def test_where_all_paths_are_the_base_layer_it_is_that_for_any_gate(self):
        layer = grown("mixda").eval()
        layer.B.data.zero_(), layer.frozen_B.zero_()
        assert torch.equal(layer(X), layer.base(X))

    def test_shares_by_hand(self):
        # l = (0, ln 2, ln 5): π = (1/8, 2/8, 5/8)
        layer = MixDA(nn.Linear(4, 4), rank=1).eval()
        layer.grow()
        layer.q.zero_(), layer.frozen_q.zero_()
        layer.frozen_d.fill_(math.log(2)), layer.d.fill_(math.log(5))
        assert torch.allclose(dense_gate(layer, X[:1, :4].float()), torch.tensor([2 / 8, 5 / 8]))

    def test_the_gate_reads_the_last_token_that_counts(self):
        x = X.view(10, 2, 2, 7)
        mask = torch.ones(10, 2, 2)
        mask[0, 1, 1], mask[1, 1], mask[2] = 0, 0, 0
        mask[3, 0] = 0  # padding in front
        wanted = x[:, 1, 1].clone()
        wanted[0], wanted[1], wanted[2] = x[0, 1, 0], x[1, 0, 1], 0
        assert torch.equal(last_token(x, mask), wanted.view(10, 1, 1, 7))
        assert torch.equal(last_token(X, torch.ones(40)), X)
        layer = grown("mixda").eval()
        g = dense_gate(layer, x)
        assert torch.equal(g, g[:, :1, :1].expand_as(g))
        assert torch.allclose(g[:, 0, 0], dense_gate(layer, x[:, 1, 1]), rtol=0, atol=1e-12)

    def test_in_training_it_is_one_lora(self):
        layer = grown("mixda").train()
        assert torch.allclose(layer(X), lora_of(layer, layer.A, layer.B)(X), rtol=0, atol=1e-12)

    def test_the_anchor_is_how_far_the_path_is_from_the_base_layer_where_it_counts(self):
        layer, x = grown("mixda", anchor=3.0).train(), X.view(10, 4, 7)
        mask = torch.arange(4).expand(10, 4) < 3
        with context(layer, mask=mask) as batch:
            y = layer(x)
            assert batch.aux_loss == 0.0
            layer.anchoring = True
            layer(x)
        wanted = 3 * (y - layer.base(x))[:, :3].square().mean()
        assert torch.allclose(batch.aux_loss, wanted, rtol=1e-12)
        layer.eval()
        with context(layer) as batch:
            layer(x)
        assert batch.aux_loss == 0.0


def life(anchor=1.0, base=True):
    """A learner after two tasks in a net of two layers, the stream, and what was fitted."""
    torch.manual_seed(0)
    net, tasks = Net().requires_grad_(False), []
    for t in range(3):
        x = torch.randn(200, 6) + 4 * t - 4
        with torch.no_grad():
            y = net(x) if t == 1 else torch.randn(200, 6)
        tasks.append(Task(f"t{t}", (x, y), (x, y)))
    stream = Stream("s", [tasks[0], tasks[2]], tasks[1] if base else None)
    learner, fitted = MixDALearner(net, rank=2, keep=15, width=3, anchor=anchor), []

    def fit(model, weights, task):
        fitted.append((type(model).__name__, len(task.x_train)))
        train(model, weights, task, 30, 0, lr=1e-2)

    for t in range(2):
        learner.learn(stream, t, fit)
    return learner, stream, fitted


class TestMixDALearner:
    def test_experts_train_beside_the_base_domain_and_the_gate_on_stored_examples(self):
        _, _, fitted = life()
        beside = ("BesideBase", 200)
        assert fitted == [beside, ("WithContext", 15), beside, ("WithContext", 30)]

    def test_an_anchor_keeps_paths_near_the_base_layer_on_its_domain(self):
        (held, stream, _), (free, _, _) = life(anchor=10.0), life(anchor=0.0)
        first = [next(adapters(one.model))[1] for one in (held, free)]
        x = stream.base.x_test
        far = [(x @ n.A.T @ n.B).square().mean().item() for n in first]
        assert far[0] < far[1] / 4
        assert not any(layer.anchoring for _, layer in adapters(held.model))

    def test_without_a_base_domain_it_trains_alone(self):
        learner, _, fitted = life(base=False)
        assert [name for name, _ in fitted] == ["WithContext"] * 4
        assert learner.model.fc1.rows("q").any()
