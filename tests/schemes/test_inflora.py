"""InfLoRA against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import pytest
import torch
from layers import X, frozen_and_live, grown
from test_lora import lora
from torch import nn

from minimoe.adapt import adapters
from minimoe.continual.learn import train
from minimoe.continual.stream import Stream, Task
from minimoe.schemes.inflora import InfLoRA, InfLoRALearner

SETTINGS = {"scale": 0.7}
UNCLAIMED = {"support", "simplex"}  # laws


def directions(C, M):
    """Left singular vectors of what C (D, D) has outside M, a list of vectors; and its values."""
    outside = C.copy()
    for m in M:
        outside -= np.outer(m, m @ C)
    U, s, _ = np.linalg.svd(outside)
    return U.T, s


def remembered(C, M, share):
    """Liang and Li, 2404.00228: M and the fewest first directions with that share of ‖C‖²."""
    new, s = directions(C, M)
    total = sum(value**2 for row in C for value in row)
    within = total - sum(value**2 for value in s)
    kept = list(M)
    for u, value in zip(new, s, strict=True):
        if within >= share * total:
            break
        kept.append(u)
        within += value**2
    return kept


def expected(layer, x, rows, given):
    return lora(x, *frozen_and_live(rows), layer.scale)


def STORED(D, O, R, r, E):
    return R * (D + O) + D * D


def ACTIVE(D, O, R, r, E, k):
    return R * (D + O)


def test_the_papers_settings_are_the_defaults():
    assert InfLoRA(nn.Linear(64, 64)).settings() == {"rank": 10, "scale": 1.0}


def inputs(n, *places, D=7):
    """x (n, D), whose span is that of `places` orthonormal directions, and C = xᵀ x."""
    frame = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)).double())
    x = torch.randn(n, len(places), dtype=torch.float64) @ frame.Q[:, list(places)].T
    return x, x.T @ x


def fresh(rank=2, D=7):
    return InfLoRA(nn.Linear(D, 5, dtype=torch.float64), rank=rank, scale=0.7)


class TestInfLoRA:
    @pytest.mark.parametrize(("share", "kept"), [(0.7, 1), (0.77, 2), (0.95, 2), (0.96, 3)])
    def test_by_hand(self, share, kept):
        # C = diag(2, 4, 1): squares 4, 16, 1. Of 21, 16 is .762 and 20 is .952: the second
        # direction first, then the first
        layer = fresh(rank=1, D=3)
        layer.remember(torch.diag(torch.tensor([2.0, 4.0, 1.0])).double(), share)
        left = [0.0 if place < kept else 1.0 for place in (1, 0, 2)]
        assert torch.allclose(layer.P, torch.diag(torch.tensor(left)).double())
        # of the next task's diag(3, 9, 2) what is left: its key is the largest of that, over √3
        layer.place(torch.diag(torch.tensor([3.0, 9.0, 2.0])).double())
        largest = {1: [1.0, 0.0, 0.0], 2: [0.0, 0.0, 1.0], 3: [0.0] * 3}[kept]
        assert torch.allclose(layer.A.abs() * math.sqrt(3), torch.tensor([largest]).double())

    def test_what_is_known_counts_towards_the_share(self):
        # the first task leaves e1 in M. Of diag(3, 2, 1), squares 9, 4, 1, it is 9 / 14 = .64:
        # for .9 (12.6) e2 is enough, and for .6 nothing is taken in
        for share, known in ((0.9, [1.0, 1.0, 0.0]), (0.6, [1.0, 0.0, 0.0])):
            layer = fresh(rank=1, D=3)
            layer.remember(torch.diag(torch.tensor([1.0, 0.0, 0.0])).double(), 0.95)
            layer.remember(torch.diag(torch.tensor([3.0, 2.0, 1.0])).double(), share)
            assert torch.allclose(layer.P, torch.diag(1 - torch.tensor(known)).double())

    def test_four_tasks_equal_the_oracles(self):
        layer, M, sizes = fresh(D=12), [], []
        for t in range(4):
            x = torch.randn(30, 12, dtype=torch.float64) * torch.rand(12, dtype=torch.float64)
            C = x.T @ x
            layer.place(C)
            U, _ = directions(C.numpy(), M)
            signs = np.sign((layer.A.numpy() * U[:2]).sum(1, keepdims=True))
            np.testing.assert_allclose(layer.A * math.sqrt(3), signs * U[:2], atol=1e-9)
            layer.remember(C, 0.6 + 0.05 * t)
            M = remembered(C.numpy(), M, 0.6 + 0.05 * t)
            outer = sum(np.outer(m, m) for m in M)
            np.testing.assert_allclose(layer.P, np.eye(12) - outer, atol=1e-9)
            sizes.append(len(M))
            layer.grow()
        assert 1 < sizes[0] < sizes[1] < sizes[3] < 12

    def test_new_keys_are_orthogonal_to_what_is_known_and_to_each_other(self):
        layer = fresh()
        old, C = inputs(50, 0, 1, 2)
        layer.remember(C, 1 - 1e-9)
        assert torch.allclose(layer.P.trace(), torch.tensor(4.0).double())
        layer.grow()
        layer.place(inputs(50, 1, 2, 3, 4, 5)[1])
        assert (layer.A @ old.T).abs().max() < 1e-9  # A M = 0
        assert torch.allclose(layer.A @ layer.A.T, torch.eye(2).double() / 3, atol=1e-12)

    def test_old_inputs_are_answered_as_before_whatever_is_learned(self):
        layer, (old, C) = fresh(), inputs(50, 0, 1, 2)
        layer.place(C)
        layer.B.data.normal_()
        before = layer(old).detach()
        layer.remember(C, 1 - 1e-9)
        layer.grow()
        new, C = inputs(50, 1, 2, 3, 4, 5)
        layer.place(C)
        layer.B.data.normal_(std=100.0)
        assert (layer(old) - before).abs().max() < 1e-9
        assert (layer(new) - layer.base(new)).abs().max() > 1
        beside = torch.randn(7, dtype=torch.float64)
        assert (
            layer(old + beside) - layer(old) - (layer(beside) - layer.base.bias)
        ).abs().max() < 1e-9

    def test_where_no_direction_is_left_keys_are_0_and_nothing_is_nan(self):
        layer = fresh(rank=3)
        layer.remember(inputs(50, *range(5))[1], 1 - 1e-9)
        layer.grow()
        layer.place(inputs(50, 0, 1, 2, 5)[1])  # one new direction, for three keys
        lengths = layer.A.norm(dim=1) * math.sqrt(3)
        assert math.isclose(lengths[0], 1, rel_tol=1e-9)
        assert (layer.A @ inputs(9, 0, 1, 2, 3, 4)[0].T).abs().max() < 1e-9
        layer.place(torch.zeros(7, 7).double())
        assert not layer.A.isnan().any()

    def test_training_moves_values_and_no_key(self):
        layer = grown("inflora", dtype=torch.float32)
        A, P, B = (getattr(layer, name).detach().clone() for name in "APB")
        y = torch.randn(40, 5)
        train(
            layer,
            [p for p in layer.parameters() if p.requires_grad],
            Task("a", (X.float(), y), (X.float(), y)),
            2,
            0,
        )
        assert torch.equal(layer.A, A) and torch.equal(layer.P, P)
        assert not torch.equal(layer.B, B)


def two_tasks():
    """A learner after two tasks in a net of two layers, whose inputs lie in six dimensions each,
    and the inputs of the two layers before and after each task's training."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 6)).double().requires_grad_(False)
    tasks, frame = [], torch.linalg.qr(torch.randn(16, 16).double()).Q
    for t in range(2):
        x = torch.randn(600, 6).double() @ frame[6 * t : 6 * t + 6]
        y = torch.randn(600, 6).double()
        tasks.append(Task(f"t{t}", (x, y), (x, y)))
    stream, seen = Stream("s", tasks), []
    learner = InfLoRALearner(net, rank=2)

    def fit(model, weights, task):
        for when in range(2):
            (_, first), (_, second) = adapters(model)
            h = torch.relu(first(task.x_train)).detach()
            seen.append([(task.x_train, first.A.clone()), (h, second.A.clone())])
            if not when:
                train(model, weights, task, 5, 0)

    for t in range(2):
        learner.learn(stream, t, fit)
    return learner, stream, seen


class TestInfLoRALearner:
    def test_keys_are_placed_by_the_inputs_before_and_remembered_by_those_after(self):
        learner, _, seen = two_tasks()
        for place, (_, layer) in enumerate(adapters(learner.model)):
            M = []
            for t, share in enumerate((0.95, 0.975)):
                (x, A), (after, same) = seen[2 * t][place], seen[2 * t + 1][place]
                U, _ = directions((x.T @ x).numpy(), M)
                assert torch.allclose(
                    (A @ torch.tensor(U[:2]).T).abs(), torch.eye(2).double() / 3**0.5
                )
                assert torch.equal(A, same)
                M = remembered((after.T @ after).numpy(), M, share)
            outer = sum(np.outer(m, m) for m in M)
            np.testing.assert_allclose(layer.P, np.eye(layer.in_features) - outer, atol=1e-9)

    def test_the_first_layer_forgets_nothing_of_inputs_that_it_knows(self):
        learner, stream, _ = two_tasks()
        (_, layer), *_ = adapters(learner.model)
        x = stream.tasks[0].x_test @ (torch.eye(16).double() - layer.P)
        A, B = layer.frozen_A, layer.frozen_B
        assert B.any() and layer.B.any()
        assert (layer(x) - layer.base(x) - x @ A.T @ B).abs().max() < 1e-9

    def test_its_share_depends_on_how_many_tasks_will_come(self):
        assert InfLoRALearner.whole_stream

    def test_what_it_remembers_is_part_of_its_state(self):
        learner, *_ = two_tasks()
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 6)).double()
        other = InfLoRALearner(net.requires_grad_(False), rank=2)
        other.load_state(learner.state())
        for (_, one), (_, two) in zip(adapters(learner.model), adapters(other.model), strict=True):
            assert torch.equal(one.P, two.P) and not torch.equal(
                one.P, torch.eye(len(one.P)).double()
            )

    def test_padding_is_not_remembered(self):
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
        learner = InfLoRALearner(Named().requires_grad_(False), rank=2)
        ((_, C),) = learner.given(task)
        x = h[mask == 1]
        assert torch.allclose(C, (x.T @ x).double(), rtol=1e-5)
