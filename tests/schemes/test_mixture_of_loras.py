"""Mixture-of-LoRAs against its oracle, numbers worked by hand, and what is its own."""

import copy
import math

import numpy as np
import pytest
import torch
from layers import X, arrays, grown, lora_of
from oracle import blocks, sample_means, softmax
from torch import nn

from minimoe.adapt import adapters, context
from minimoe.continual.learn import train
from minimoe.continual.probe import dense_gate
from minimoe.continual.stream import Stream, Task
from minimoe.schemes.mixture_of_loras import LABEL, MixtureOfLoRAsLearner

SETTINGS = {"scale": 0.7}
UNCLAIMED = {"support", "degenerates_to_lora", "merge_is_equal"}  # laws


def logits(rows, m):
    return [sum(a * b for a, b in zip(w, m, strict=True)) for w in rows["router"]]


def expected(layer, x, rows, given):
    """Feng et al., 2403.03432: the last in training, else the likeliest for the mean token."""
    means, E, w = sample_means(x, given["sample"]), layer.n_experts, []
    for m in given["sample"]:
        l = logits(rows, means[m])
        e = E - 1 if layer.training else max(range(E), key=lambda e: l[e])
        w.append([float(i == e) for i in range(E)])
    return blocks(x, rows["W0"], rows["b"], rows["A"], rows["B"], w, layer.scale)


def STORED(D, O, R, r, E):
    return R * (D + O) + E * D


def ACTIVE(D, O, R, r, E, k):
    return r * (D + O)  # in training


def routing(layer):
    layer.routing = True
    return layer.train()


class TestMixtureOfLoRAs:
    @pytest.mark.parametrize("label", [0, 1, 2])
    def test_a_label_has_its_lora_alone(self, label):
        layer = routing(grown("mixture_of_loras"))
        with context(layer, label=torch.full((40,), label)):
            y = layer(X)
        A, B = (layer.rows(name)[2 * label : 2 * label + 2] for name in "AB")
        assert torch.allclose(y, lora_of(layer, A, B)(X), rtol=0, atol=1e-12)

    def test_a_level_routers_loss_is_ln_E(self):
        layer = routing(grown("mixture_of_loras"))
        layer.router.zero_(), layer.frozen_router.zero_()
        with context(layer, label=torch.arange(40) % 3) as batch:
            layer(X)
        assert math.isclose(batch.aux_loss.item(), math.log(3), rel_tol=1e-12)

    def test_the_loss_is_the_oracles_each_sample_once_and_padding_left_out(self):
        layer, x = routing(grown("mixture_of_loras")), X.view(10, 4, 7)
        mask = torch.arange(4) < torch.tensor([4, 1, 3, 2, 4, 4, 1, 2, 3, 0]).unsqueeze(1)
        label, rows, total = torch.arange(10) % 3, arrays(layer), 0.0
        for i in range(9):  # the last is padding alone
            tokens = x[i][mask[i]].numpy()
            p = softmax(logits(rows, sum(tokens) / len(tokens)))
            total -= math.log(p[int(label[i])])
        with context(layer, label=label, mask=mask) as batch:
            layer(x)
        np.testing.assert_allclose(batch.aux_loss.item(), total / 9, rtol=1e-12)

    def test_all_rows_of_the_router_have_the_losses_gradient_and_none_of_the_answers(self):
        layer = routing(grown("mixture_of_loras"))
        both = [rows.requires_grad_() for rows in (layer.frozen_router, layer.router)]
        with context(layer, label=torch.arange(40) % 3) as batch:
            y = layer(X)
        assert torch.autograd.grad(y.sum(), both, allow_unused=True, retain_graph=True) == (
            None,
            None,
        )
        got = torch.cat(torch.autograd.grad(batch.aux_loss, both))
        p = (
            torch.softmax(X @ layer.rows("router").T, -1)
            - torch.eye(3).double()[torch.arange(40) % 3]
        )
        assert torch.allclose(got, p.T @ X / 40, rtol=0, atol=1e-12)

    def test_a_sample_has_one_expert(self):
        layer = grown("mixture_of_loras").eval()
        g = dense_gate(layer, X.view(10, 4, 7))
        assert torch.equal(g, g[:, :1].expand_as(g)) and torch.equal(g.sum(-1), 2 * g.max(-1)[0])
        assert len(g[:, 0].unique(dim=0)) == 3

    def test_active_counts_the_router_where_it_is_read(self):
        layer = grown("mixture_of_loras")
        assert layer.active() == 2 * (7 + 5)
        assert layer.eval().active() == 2 * (7 + 5) + 3 * 7


def two_tasks(make, named=None, classes=False, **settings):
    """A learner after two tasks in a net of two layers, and what was fitted."""
    torch.manual_seed(0)
    net = (OfLabel if named == "label" else Net)().requires_grad_(False)
    tasks = []
    for t in range(2):
        x, y = torch.randn(200, 6) + 4 * t - 2, torch.randn(200, 6)
        y = y.argmax(-1) if classes else y
        both = ({named: x} if named else x, y)
        tasks.append(Task(f"t{t}", both, both))
    learner, fitted = make(net, rank=2, **settings), []

    def fit(model, weights, task):
        weights = list(weights)
        before = copy.deepcopy(net.state_dict())
        train(model, weights, task, 30, 0)
        after = copy.deepcopy(net.state_dict())
        fitted.append(([tuple(w.shape) for w in weights], task, before, after))

    for t in range(2):
        learner.learn(Stream("s", tasks), t, fit)
    return learner, fitted, tasks


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class OfLabel(Net):
    def forward(self, label):
        return super().forward(label)


class TestMixtureOfLoRAsLearner:
    def test_the_router_learns_from_stored_examples_of_all_tasks_and_moves_no_expert(self):
        learner, fitted, tasks = two_tasks(MixtureOfLoRAsLearner, keep=15)
        assert [shapes for shapes, *_ in fitted[1::2]] == [
            [(1, 6), (1, 9)],
            [(1, 6), (1, 6), (1, 9), (1, 9)],
        ]
        x = fitted[3][1].x_train
        assert x[LABEL].tolist() == [0] * 15 + [1] * 15
        for t in range(2):
            for one in x[""][15 * t : 15 * t + 15]:
                assert (tasks[t].x_train == one).all(1).any()
        for n, (_, _, before, after) in enumerate(fitted):
            changed = {key for key in after if not torch.equal(before[key], after[key])}
            kinds = {key.rpartition(".")[2] for key in changed}
            assert kinds == [{"A", "B"}, set(), {"A", "B"}, {"router", "frozen_router"}][n]
        for _, layer in adapters(learner.model):
            assert not layer.routing and not layer.rows("router").requires_grad

    def test_it_finds_the_task_of_what_it_is_not_told(self):
        learner, _, tasks = two_tasks(MixtureOfLoRAsLearner, keep=15)
        for t, task in enumerate(tasks):
            g = dense_gate(learner.model.fc1, task.x_test)
            assert (g[:, 2 * t : 2 * t + 2] == 1).float().mean() > 0.99

    def test_stored_examples_are_counted_and_saved(self):
        learner, _, _ = two_tasks(MixtureOfLoRAsLearner, keep=15)
        layers = 4 * (6 + 9) * 2 + 2 * (6 + 9)
        assert learner.count()["stored"] == layers + 30 * (6 + 6 + 1)
        assert learner.count()["trainable"] == 2 * (6 + 9) * 2 + 2 * (6 + 9)
        other = MixtureOfLoRAsLearner(Net().requires_grad_(False), rank=2, keep=15)
        other.load_state(learner.state())
        assert [x[LABEL].item() for x, _ in other.memory] == [0] * 15 + [1] * 15

    @pytest.mark.parametrize("named", ["x", "label"])
    def test_inputs_may_have_names(self, named):
        one, _, tasks = two_tasks(MixtureOfLoRAsLearner, keep=15, named=named)
        other, _, _ = two_tasks(MixtureOfLoRAsLearner, keep=15)
        x = tasks[0].x_test
        assert torch.equal(one.predict(x, 0), other.predict(x[named], 0))
