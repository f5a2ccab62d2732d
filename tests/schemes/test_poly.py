"""Poly against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import pytest
import torch
from layers import X, arrays, grown, lora_of
from oracle import base, gradient
from torch import nn

from minimoe.adapt import context
from minimoe.continual.probe import dense_gate
from minimoe.schemes.poly import Poly

SETTINGS = {"scale": 0.7, "skills": 3}
TASK_AGNOSTIC = {"A", "B"}
UNCLAIMED = {"support", "simplex", "degenerates_to_lora", "merge_is_equal"}  # laws


def poly(x, W0, b, A, B, Z, label, scale, noise):
    """Every skill's keys to every skill's values, by the weights that the task's row gives."""
    y, S = base(x, W0, b), Z.shape[1]
    r = len(A) // S
    for t, task in enumerate(label):
        if task == len(Z):
            continue
        each = [1 / (1 + math.exp(-(Z[task, s] + noise[t][s]))) for s in range(S)]
        alpha = [value / sum(each) for value in each]
        for s in range(S):
            for u in range(S):
                for i in range(r):
                    z = x[t] @ A[s * r + i]
                    y[t] += scale * alpha[s] * alpha[u] * z * B[u * r + i]
    return y


def expected(layer, x, rows, given):
    names = ("W0", "b", "A", "B", "Z")
    noise = given.get("noise", np.zeros((len(x), layer.skills)))
    return poly(x, *(rows[name] for name in names), given["label"], layer.scale, noise)


def STORED(D, O, R, r, E):
    return 3 * r * (D + O) + 3 * E


def ACTIVE(D, O, R, r, E, k):
    return 3 * r * (D + O) + 3


def SPEAKING(D, O, r, K):
    return 3 * K * (D + O)  # all skills' are in a task's


def test_pefts_settings_are_the_defaults():
    assert Poly(nn.Linear(64, 64)).settings() == {
        "rank": 8,
        "scale": 1 / 8,
        "skills": 4,
        "noise": 1.0,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skills": 0}, "skills is 0, allowed: 1 or more"),
        ({"noise": -0.1}, "noise is -0.1, allowed: 0 or more"),
        ({"noise": math.nan}, "noise is nan, allowed: 0 or more"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Poly(nn.Linear(7, 5), **{"rank": 2} | settings)


def labelled(layer, label, x=X):
    with context(layer, label=torch.full((len(x),), label)):
        return layer(x)


class TestPoly:
    def test_by_hand(self):
        # shares of sigmoid(ln 3) = 3/4 and sigmoid(-ln 3) = 1/4: the key is 3/4 · 2 + 1/4 · 6 = 3,
        # the value 3/4 · 4 + 1/4 · 8 = 5; y = 1/2 · 3 · 5
        layer = Poly(nn.Linear(1, 1, bias=False).double(), rank=1, scale=0.5, skills=2).eval()
        with torch.no_grad():
            layer.base.weight.zero_()
            layer.A.copy_(torch.tensor([[2.0], [6.0]])), layer.B.copy_(torch.tensor([[4.0], [8.0]]))
            layer.Z.copy_(torch.tensor([[math.log(3), -math.log(3)]]))
        x = torch.ones(1, 1, dtype=torch.float64)
        assert labelled(layer, 0, x).item() == pytest.approx(7.5)
        assert labelled(layer, 1, x).item() == 0.0  # not learned yet

    def test_a_task_is_the_lora_of_its_rows(self):
        layer = grown("poly").eval()
        for task in range(3):
            with context(layer, label=torch.full((40,), task)):
                assert dense_gate(layer, X)[0].nonzero().flatten().tolist() == [
                    2 * task,
                    2 * task + 1,
                ]
            A, B = (layer.rows(name)[2 * task : 2 * task + 2] for name in "AB")
            want = lora_of(layer, A, B)(X)
            assert torch.allclose(labelled(layer, task), want, rtol=0, atol=1e-12)
        assert torch.equal(labelled(layer, 3), layer.base(X))

    def test_one_skill_is_lora_whatever_its_weight(self):
        layer = grown("poly", skills=1)
        for task in range(3):
            want = lora_of(layer, layer.A, layer.B)(X)
            assert torch.allclose(labelled(layer, task), want, rtol=0, atol=1e-12)

    def test_a_skill_alone_is_its_own_lora(self):
        layer = grown("poly", tasks=1).eval()
        layer.Z.data = torch.tensor([[-800.0, 20.0, -800.0]]).double()
        want = lora_of(layer, layer.A[2:4], layer.B[2:4])(X)
        assert torch.allclose(labelled(layer, 0), want, rtol=0, atol=1e-10)

    def test_tasks_of_equal_rows_answer_alike_and_skills_train_for_all(self):
        layer = grown("poly").eval()
        layer.frozen_Z[0] = layer.Z.data[0]
        assert torch.equal(labelled(layer, 0), labelled(layer, 2))
        labelled(layer, 1).sum().backward()
        assert layer.A.grad.all() and layer.B.grad.all() and not layer.Z.grad.any()

    def test_a_draw_is_one_for_a_sample_and_for_the_gradient(self):
        layer = grown("poly", tasks=2)
        x, label = X[:6].view(3, 2, 7), torch.tensor([0, 1, 1])
        torch.manual_seed(3)
        U = torch.rand(3, 1, 3)
        noise = (U.log() - (1 - U).log()).double().expand(3, 2, 3).reshape(6, 3).numpy()
        n, dy = arrays(layer), torch.randn(3, 2, 5, dtype=torch.float64)
        given = {"label": [0, 0, 1, 1, 1, 1], "noise": noise}

        def f():
            return expected(layer, X[:6].numpy(), n, given)

        torch.manual_seed(3)
        with context(layer, label=label):
            y = layer(x)
        np.testing.assert_allclose(y.detach().reshape(6, 5).numpy(), f(), rtol=0, atol=1e-5)
        y.backward(dy)
        for name in ("A", "B"):
            wanted = gradient(f, n[name], dy.reshape(6, 5).numpy())
            np.testing.assert_allclose(getattr(layer, name).grad.numpy(), wanted, atol=1e-5)
        assert layer.Z.grad.any()

    def test_evaluation_draws_nothing(self):
        layer = grown("poly")
        assert torch.equal(labelled(layer.eval(), 0), labelled(layer, 0))
        assert not torch.allclose(labelled(layer.train(), 0), labelled(layer.eval(), 0))
