"""LoRAs trained alone against their oracle, numbers worked by hand, and what is their own."""

import pytest
import torch
from layers import X, frozen_and_live, grown, lora_of, network
from oracle import base
from torch import nn

from minimoe import LoRA
from minimoe.adapt import adapters, context
from minimoe.continual.learn import train
from minimoe.continual.probe import dense_gate
from minimoe.continual.stream import Stream, Task
from minimoe.schemes.alone import Alone, AloneLearner

SETTINGS = {"scale": 0.7}
UNCLAIMED = {"support", "degenerates_to_lora", "merge_is_equal"}  # laws


def alone(x, W0, b, A, B, m, scale, training):
    """One LoRA alone: the last in training, else that of the nearest mean."""
    y, E = base(x, W0, b), len(m)
    r = len(A) // E
    for t in range(len(x)):
        far = [sum((x[t, d] - m[e, d]) ** 2 for d in range(x.shape[1])) for e in range(E)]
        e = E - 1 if training else min(range(E), key=lambda e: far[e])
        for i in range(e * r, (e + 1) * r):
            y[t] += scale * (x[t] @ A[i]) * B[i]
    return y


def expected(layer, x, rows, given):
    return alone(x, *frozen_and_live(rows), rows["mean"], layer.scale, layer.training)


def STORED(D, O, R, r, E):
    return R * (D + O) + E * D


def ACTIVE(D, O, R, r, E, k):
    return r * (D + O)  # in training


class TestAlone:
    def test_by_hand(self):
        # means (0, 0) and (2, 0): of (1.1, 0) the second is nearer, of (.9, 0) the first. z is
        # 1.1 · 10 and .9 · 1; the answers go to another place each
        layer = Alone(nn.Linear(2, 2, bias=False), rank=1).eval()
        nn.init.zeros_(layer.base.weight)
        layer.grow()
        layer.mean = torch.tensor([[2.0, 0.0]])
        layer.frozen_A, layer.A.data = torch.tensor([[1.0, 0.0]]), torch.tensor([[10.0, 0.0]])
        layer.frozen_B, layer.B.data = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        x = torch.tensor([[1.1, 0.0], [0.9, 0.0]])
        assert torch.allclose(layer(x), torch.tensor([[0.0, 11.0], [0.9, 0.0]]))
        assert torch.allclose(layer.train()(x), torch.tensor([[0.0, 11.0], [0.0, 9.0]]))

    def test_a_long_mean_is_not_nearer_for_being_long(self):
        layer = Alone(nn.Linear(2, 2), rank=1).eval()
        layer.grow()
        layer.frozen_mean, layer.mean = torch.tensor([[1.0, 0.0]]), torch.tensor([[9.0, 0.0]])
        g = dense_gate(layer, torch.tensor([[2.0, 0.0], [6.0, 0.0]]))
        assert g.tolist() == [[1, 0], [0, 1]]  # a product with m would choose the second twice

    def test_in_training_old_ranks_are_silent_and_the_layer_is_one_lora(self):
        layer = grown("alone").train()
        y = layer(X)
        assert torch.allclose(y, lora_of(layer, layer.A, layer.B)(X), rtol=0, atol=1e-12)

    def test_active_counts_the_means_where_they_are_read(self):
        layer = grown("alone")
        assert layer.active() == 2 * (7 + 5)
        assert layer.eval().active() == 2 * (7 + 5) + 3 * 7

    def test_the_first_expert_trains_as_lora_does(self):
        torch.manual_seed(0)
        one = Alone(nn.Linear(7, 5), rank=2)
        other = LoRA(one.base, rank=2)
        other.load_state_dict({k: t for k, t in one.state_dict().items() if "mean" not in k})
        x, y = X.float(), torch.randn(40, 5)
        for layer in (one, other):
            train(layer, [layer.A, layer.B], Task("a", (x, y), (x, y)), 3, seed=0)
        assert torch.equal(one.A, other.A) and torch.equal(one.B, other.B)


def two_tasks(first_epochs=2, **settings):
    """A learner after two tasks in a net of two layers, and the stream."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)).requires_grad_(False)
    tasks = []
    for t in range(2):
        x, y = torch.randn(600, 6) + 4 * t - 2, torch.randn(600, 6)
        tasks.append(Task(f"t{t}", (x, y), (x, y)))
    stream = Stream("s", tasks)
    learner = AloneLearner(net, rank=2, **settings)
    for t in range(2):
        epochs = 2 if t else first_epochs
        learner.learn(stream, t, lambda m, w, task, n=epochs: train(m, w, task, n, 0))
    return learner, stream


class TestAloneLearner:
    def test_the_means_are_of_what_each_layer_is_given_while_the_task_speaks(self):
        learner, stream = two_tasks()
        first, second = (layer for _, layer in adapters(learner.model))
        for t, task in enumerate(stream.tasks):
            x = task.x_train
            assert torch.allclose(first.rows("mean")[t], x.mean(0), atol=1e-5)
            A, B = (first.rows(name)[2 * t : 2 * t + 2] for name in "AB")
            h = torch.relu(lora_of(first, A, B)(x))
            assert B.any() and torch.allclose(second.rows("mean")[t], h.mean(0), atol=1e-5)

    def test_means_far_apart_name_the_task(self):
        learner, stream = two_tasks()
        (_, layer), *_ = adapters(learner.model)
        assert not any(m.training for m in learner.model.modules())
        for t, task in enumerate(stream.tasks):
            g = dense_gate(layer, task.x_test)
            assert (g[:, 2 * t : 2 * t + 2] == 1).float().mean() > 0.99

    def test_padding_counts_for_no_mean(self):
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(3, 4)

            def forward(self, h, mask):
                m = mask.unsqueeze(-1)
                return (self.fc(h) * m).sum(1) / m.sum(1)

        h, y = torch.randn(30, 5, 3), torch.randn(30, 4)
        mask = (torch.rand(30, 5) > 0.5).long()
        mask[:, 0] = 1
        h[mask == 0] = torch.inf
        task = Task("a", ({"h": h, "mask": mask}, y), ({"h": h, "mask": mask}, y))
        learner = AloneLearner(Named().requires_grad_(False), rank=2)
        learner.learn(Stream("s", [task]), 0, lambda *args: None)
        assert torch.allclose(learner.model.fc.mean[0], h[mask == 1].mean(0), atol=1e-5)

    def test_an_expert_is_what_it_is_whatever_came_before_it(self):
        (one, _), (other, _) = two_tasks(), two_tasks(first_epochs=5)
        for (_, a), (_, b) in zip(adapters(one.model), adapters(other.model), strict=True):
            assert not torch.equal(a.rows("B")[:2], b.rows("B")[:2])
            for name in "AB":  # the second task's, bit for bit
                assert torch.equal(a.rows(name)[2:], b.rows(name)[2:])

    def test_a_mean_stays_as_it_was_when_the_next_task_comes(self):
        learner, stream = two_tasks()
        before = [layer.mean.clone() for _, layer in adapters(learner.model)]
        learner.learn(stream, 1, lambda *args: None)
        for (_, layer), m in zip(adapters(learner.model), before, strict=True):
            assert torch.equal(layer.frozen_mean[1:], m) and len(layer.rows("mean")) == 3


@pytest.mark.parametrize("tasks", [1, 3])
def test_it_needs_no_context(tasks):
    net = network("alone", tasks).eval()
    with context(net):
        assert torch.equal(net(torch.ones(2, 6)), net(torch.ones(2, 6)))
