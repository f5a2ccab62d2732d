"""MOORE against its oracle, numbers worked by hand, and what is its own."""

import math

import pytest
import torch
from layers import X, grown
from oracle import base
from torch import nn

from minimoe.adapt import context
from minimoe.schemes.moore import MOORE, orthonormal

SETTINGS = {"scale": 0.7, "tasks": 32}
UNCLAIMED = {"equation", "support", "simplex", "degenerates_to_lora", "merge_is_equal"}  # laws


def expected(layer, x, rows, given):
    """What each expert says, less what the earlier ones have said, at length 1; then the task's
    weights, of experts no newer than itself."""
    A, B, w, r = rows["A"], rows["B"], rows["w"], layer.rank
    y, E = base(x, rows["W0"], rows["b"]), len(w)
    for t, task in enumerate(given["label"]):
        u = []
        for e in range(E):
            v = sum((A[i] @ x[t]) * B[i] for i in range(e * r, (e + 1) * r))
            whole = math.sqrt(v @ v)
            for other in u:
                v = v - (v @ other) * other
            norm = math.sqrt(v @ v)
            u.append(v / norm if norm > 1e-7 * whole else 0 * v)
        for e in range(task + 1 if task < E else 0):
            y[t] += layer.scale * w[task, e] * u[e]
    return y


def STORED(D, O, R, r, E):
    return R * (D + O) + E * 32


def ACTIVE(D, O, R, r, E, k):
    return R * (D + O) + E


@pytest.mark.parametrize("tasks", [0, -1])
def test_settings_out_of_range_are_named(tasks):
    with pytest.raises(ValueError, match=f"^tasks is {tasks}, allowed: 1 or more$"):
        MOORE(nn.Linear(7, 5), rank=2, tasks=tasks)


def labelled(layer, label, x=X):
    with context(layer, label=torch.full((len(x),), label)):
        return layer(x)


class TestMOORE:
    def test_by_hand(self):
        # x = 1: v = (3, 4, 0) and (5, 0, 0): u_1 = (.6, .8, 0); the second less 3 u_1 is
        # (3.2, -2.4, 0), of length 4: u_2 = (.8, -.6, 0). 10 u_1 - 5 u_2 = (2, 11, 0)
        layer = MOORE(nn.Linear(1, 3, bias=False).double(), rank=1)
        layer.grow()
        layer.base.weight.data.zero_(), layer.frozen_A.fill_(1.0), layer.A.data.fill_(1.0)
        layer.frozen_B[0] = torch.tensor([3.0, 4.0, 0.0])
        layer.B.data[0] = torch.tensor([5.0, 0.0, 0.0])
        layer.w.data[0, :2] = torch.tensor([10.0, -5.0])
        layer.frozen_w[0, :2] = torch.tensor([2.0, 9.0])
        x = torch.ones(1, 1, dtype=torch.float64)
        for label, y in enumerate(([1.2, 1.6, 0.0], [2.0, 11.0, 0.0], [0.0, 0.0, 0.0])):
            assert torch.allclose(labelled(layer, label, x), torch.tensor([y]).double())

    def test_what_experts_say_is_orthonormal(self):
        u = torch.stack(orthonormal(torch.randn(5, 40, 5, dtype=torch.float64)), -2)
        eye = torch.eye(5, dtype=torch.float64).expand(40, 5, 5)
        assert torch.allclose(u @ u.mT, eye, rtol=0, atol=1e-9)

    def test_an_update_has_one_length_for_every_input_of_a_task(self):
        layer = grown("moore")
        for label, w in enumerate(layer.rows("w")[:, :3].tril()):
            lengths = (labelled(layer, label) - layer.base(X)).norm(dim=-1)
            assert torch.allclose(lengths, layer.scale * w.norm().expand(40))

    def test_how_large_an_expert_is_does_not_matter(self):
        layer = grown("moore")
        before = labelled(layer, 2)
        layer.frozen_B.mul_(100), layer.B.data.mul_(0.01)
        assert torch.allclose(labelled(layer, 2), before, rtol=0, atol=1e-9)

    def test_the_order_matters(self):
        v = torch.randn(2, 5, dtype=torch.float64)
        assert not torch.allclose(orthonormal(v)[1], orthonormal(v.flip(0))[0])

    def test_what_says_nothing_new_is_silent_with_a_finite_gradient(self):
        v = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
        v.requires_grad_()
        u = torch.stack(orthonormal(v.unbind(0)))
        want = [[0.6, 0.8], [0.0, 0.0], [0.0, 0.0], [0.8, -0.6], [0.0, 0.0]]
        assert torch.allclose(u, torch.tensor(want), atol=1e-6)
        (u * torch.randn(5, 2)).sum().backward()
        assert v.grad.isfinite().all()

    def test_what_is_new_does_not_depend_on_how_large_it_is(self):
        v = torch.randn(3, 100, 2)  # the third lies in the plane of the others
        for size in (1e-8, 1.0, 1e8):
            u = orthonormal((size * v).unbind(0))
            assert torch.allclose(u[1].norm(dim=-1), torch.ones(100)) and not u[2].any()

    def test_old_tasks_answers_stay_while_new_experts_come_and_learn(self):
        layer = grown("moore")
        before = [labelled(layer, label) for label in range(3)]
        layer.grow()
        nn.init.normal_(layer.w), nn.init.normal_(layer.B)
        for label, y in enumerate(before):  # in bits, but that a larger product may round otherwise
            assert torch.allclose(labelled(layer, label), y, rtol=0, atol=1e-13)

    def test_old_tasks_have_no_gradient_in_a_new_expert(self):
        layer = grown("moore")
        labelled(layer, 1).sum().backward()
        assert not layer.B.grad.any() and not layer.A.grad.any() and not layer.w.grad.any()
        labelled(layer, 2).sum().backward()
        assert layer.B.grad.any() and layer.A.grad.any()
        assert layer.w.grad[0, :3].all() and not layer.w.grad[0, 3:].any()

    def test_a_task_not_learned_yet_has_the_base_layer(self):
        layer = grown("moore")
        assert torch.equal(labelled(layer, 3), layer.base(X))

    def test_one_task_too_many_is_named(self):
        layer = MOORE(nn.Linear(7, 5), rank=2, tasks=2)
        layer.grow()
        with pytest.raises(RuntimeError, match="has learned 2 tasks, as many as it can"):
            layer.grow()
