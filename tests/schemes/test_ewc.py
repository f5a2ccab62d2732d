"""EWC against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import pytest
import torch
from layers import X, arrays, filled, frozen_and_live, grown
from oracle import gradient, softmax
from test_lora import lora
from torch import nn
from torch.distributions import Categorical

from minimoe import LoRA
from minimoe.adapt import adapt, context
from minimoe.schemes.ewc import EWC, fisher_information

SETTINGS = {"scale": 0.7, "importance": 3.0}
UNCLAIMED = {"support", "simplex"}  # laws


def elastic(theta, tasks):
    """Kirkpatrick et al., 1612.00796, eq. 3: F (theta - theta*)², summed over weights and over all
    tasks (F, theta*)."""
    total = 0.0
    for F, star in tasks:
        for place in np.ndindex(theta.shape):
            total += F[place] * (theta[place] - star[place]) ** 2
    return total


def fisher_loop(logits, array, power=2):
    """The mean over inputs of the expectation over y ~ softmax of (d ln p(y) / d array)^power;
    logits() (N, C) reads array."""
    out, rows = np.zeros_like(array), logits()
    for n, row in enumerate(rows):
        for y, p in enumerate(softmax(row)):
            slope = gradient(lambda n=n, y=y: math.log(softmax(logits()[n])[y]), array, np.ones(()))
            out += p * slope**power / len(rows)
    return out


def expected(layer, x, rows, given):
    return lora(x, *frozen_and_live(rows), layer.scale)


AUX = {"A", "B"}


def expected_aux(layer, x, rows, given):
    each, r = [], layer.rank
    for key in "AB":
        task = rows[f"fisher_{key}"][-r:], rows[f"anchor_{key}"][-r:]
        each.append(elastic(rows[key][-r:], [task]))
    return layer.importance / 2 * sum(each)


def STORED(D, O, R, r, E):
    return 3 * R * (D + O)


def ACTIVE(D, O, R, r, E, k):
    return R * (D + O)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"importance": -1.0}, "importance is -1.0, allowed: 0 or more"),
        ({"importance": math.nan}, "importance is nan, allowed: 0 or more"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        EWC(nn.Linear(7, 5), **{"rank": 2} | settings)


class TestEWC:
    def test_penalty_by_hand(self):
        # 2/2 · (2·(3 - 1)² + 5·0² + 1/2·(2 - 0)²) = 10
        layer = EWC(nn.Linear(2, 1), rank=1, importance=2.0)
        layer.A.data, layer.B.data = torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0]])
        layer.anchor_A.copy_(torch.tensor([[1.0, 1.0]]))
        layer.fisher_A.copy_(torch.tensor([[2.0, 5.0]]))
        layer.fisher_B.fill_(0.5)
        assert layer.penalty() == 10

    def test_before_any_task_has_ended_nothing_holds(self):
        layer = EWC(nn.Linear(7, 5), rank=2)
        nn.init.normal_(layer.B)
        with context(layer) as batch:
            layer(X.float())
        batch.aux_loss.backward()
        assert batch.aux_loss == 0 and not layer.A.grad.any()

    def test_three_tasks_penalties_are_kept_up_to_a_constant(self):
        layer = grown("ewc", tasks=1)
        for key in ("fisher_A", "fisher_B", "anchor_A", "anchor_B"):
            getattr(layer, key).zero_()
        tasks = {"A": [], "B": []}
        for _ in range(3):
            F = {}
            for key in "AB":
                theta = getattr(layer, key).data.normal_()
                F[key] = torch.rand_like(theta) * (torch.rand_like(theta) > 0.3)  # some are 0
                tasks[key].append((F[key].numpy().copy(), theta.numpy().copy()))
            layer.consolidate(F)

        def penalties():
            for key in "AB":
                getattr(layer, key).data.normal_()
            each = [elastic(arrays(layer)[key], tasks[key]) for key in "AB"]
            return layer.penalty().item(), layer.importance / 2 * sum(each)

        (kept, literal), *others = (penalties() for _ in range(4))
        assert literal - kept > 1
        for other, theirs in others:
            assert math.isclose(other - kept, theirs - literal, rel_tol=1e-9)


class Answers(nn.Module):
    """One linear layer, and class embeddings if its answers are logits."""

    def __init__(self, classes):
        super().__init__()
        self.fc1 = nn.Linear(3, 2, dtype=torch.float64)
        if classes:
            self.classes = nn.Parameter(torch.randn(classes, 2, dtype=torch.float64))

    def forward(self, x):
        return self.fc1(x) @ self.classes.T if hasattr(self, "classes") else self.fc1(x)


@pytest.mark.parametrize("classes", [2, 3, 0])
def test_fisher_information_is_the_expectation_over_the_models_own_answers(classes):
    """Within 5 standard errors, which are at most √(E slope⁴ / draws)."""
    net = adapt(Answers(classes), LoRA, "fc1", rank=1, scale=0.7)
    filled(net.fc1)
    x, draws = torch.randn(4, 3, dtype=torch.float64), 2000
    found = fisher_information(net, x.repeat(draws // 4, 1), real=not classes)
    n = arrays(net.fc1)

    def answers():
        vectors = lora(x.numpy(), n["W0"], n["b"], n["A"], n["B"], 0.7)
        return vectors @ net.classes.detach().numpy().T if classes else vectors

    assert list(found) == ["fc1"] and list(found["fc1"]) == ["A", "B"]
    for key in "AB":
        if classes:
            F, fourth = (fisher_loop(answers, n[key], power) for power in (2, 4))
        else:  # y - answer is normal: the slope is too, with Σ (d answer_o)² as its variance
            F, fourth = np.zeros_like(n[key]), np.zeros_like(n[key])
            for t in range(4):
                slopes = [
                    gradient(lambda t=t, o=o: answers()[t][o], n[key], np.ones(()))
                    for o in range(2)
                ]
                variance = sum(slope**2 for slope in slopes)
                F, fourth = F + variance / 4, fourth + 3 * variance**2 / 4
        error = np.sqrt(fourth / draws)
        got = found["fc1"][key].numpy()
        assert (abs(got - F) < 5 * error + 1e-9).all()
        assert (5 * error < F / 2).all()  # the mean slope is 0, and so would its square be


def test_each_inputs_slope_is_squared_before_the_mean(monkeypatch):
    """Told by answers that are always 0, whose slopes do not cancel out."""
    monkeypatch.setattr(Categorical, "sample", lambda p: torch.zeros(p.batch_shape).long())
    net = adapt(Answers(2), LoRA, "fc1", rank=1, scale=0.7)
    n, x = arrays(filled(net.fc1)), torch.randn(4, 3, dtype=torch.float64)
    found, C = fisher_information(net, x)["fc1"], net.classes.detach().numpy()

    def log_p(t):
        (answer,) = lora(x[t : t + 1].numpy(), n["W0"], n["b"], n["A"], n["B"], 0.7) @ C.T
        return math.log(softmax(answer)[0])

    for key in "AB":
        slopes = [gradient(lambda t=t: log_p(t), n[key], np.ones(())) for t in range(4)]
        wanted = sum(slope**2 for slope in slopes) / 4
        np.testing.assert_allclose(found[key].numpy(), wanted, rtol=1e-6, atol=1e-9)
        assert not np.allclose(sum(slopes) ** 2 / 4, wanted, rtol=1e-3)
