"""WEMoE against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import pytest
import torch
from layers import X, grown, lora_of
from oracle import blocks
from test_mixture_of_loras import two_tasks
from torch import nn

from minimoe.adapt import adapters, context
from minimoe.schemes.task_arithmetic import TaskArithmetic
from minimoe.schemes.wemoe import Entropy, WEMoE, WEMoELearner

SETTINGS = {"scale": 0.7, "width": 3}
UNCLAIMED = {"support", "simplex", "degenerates_to_lora", "merge_is_equal"}  # laws


def weights(x, rows, sample):
    """Tang et al., 2402.00433: of each token what the network of each expert says, of each sample
    the mean."""
    P, c, q, d = (rows[name] for name in "Pcqd")
    E, h, said = len(d), len(c) // len(d), []
    for u in x:
        l = [d[e] for e in range(E)]
        for e in range(E):
            for i in range(h):
                l[e] += q[e, i] * max(0.0, P[e * h + i] @ u + c[e * h + i])
        said.append(np.array(l))
    own = {m: [l for l, n in zip(said, sample, strict=True) if n == m] for m in sample}
    return [sum(own[m]) / len(own[m]) for m in sample]


def expected(layer, x, rows, given):
    w = weights(x, rows, given["sample"])
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
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        WEMoE(nn.Linear(7, 5), **{"rank": 2} | settings)


class TestWEMoE:
    def test_by_hand(self):
        # tokens 2 and -2: relu(2 · 1) · 3 + 1 = 7 and relu(-2) · 3 + 1 = 1, of mean 4 (of the mean
        # token, 0, it would be 1). The other's: 5. z = ±2, (2, 10): y = 2 · 4 · 2 + 5 · 10 · 2
        layer = WEMoE(nn.Linear(1, 1, bias=False).double(), rank=1, width=1).eval()
        layer.grow()
        layer.base.weight.data.zero_()
        for name, old, new in (
            ("A", 1, 10),
            ("B", 2, 2),
            ("P", 1, 0),
            ("c", 0, 0),
            ("q", 3, 9),
            ("d", 1, 5),
        ):
            getattr(layer, f"frozen_{name}").fill_(old)
            getattr(layer, name).data.fill_(new)
        x = torch.tensor([[[2.0], [-2.0]]], dtype=torch.float64)
        y = torch.tensor([[[216.0], [-216.0]]], dtype=torch.float64)
        assert torch.allclose(layer(x), y, rtol=0, atol=1e-12)

    def test_at_first_it_is_near_task_arithmetic_and_is_it_without_the_networks(self):
        layer = WEMoE(nn.Linear(7, 5).double(), rank=2)
        other = TaskArithmetic(layer.base, rank=2, coefficient=0.3)
        for n in (layer, other):
            n.grow()
            n.frozen_B.fill_(0.5), n.B.data.fill_(0.4)
            n.frozen_A.fill_(0.3), n.A.data.fill_(0.2)
            n.eval()
        assert 0 < (layer(X) - other(X)).norm() < 0.1 * (other(X) - layer.base(X)).norm()
        layer.q.zero_(), layer.frozen_q.zero_()
        assert torch.allclose(layer(X), other(X), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("e", [0, 1, 2])
    def test_a_weight_of_1_for_one_alone_is_that_lora(self, e):
        layer = grown("wemoe").eval()
        layer.q.zero_(), layer.frozen_q.zero_(), layer.d.fill_(e == 2)
        layer.frozen_d.copy_(torch.eye(3)[e, :2])
        A, B = (layer.rows(name)[2 * e : 2 * e + 2] for name in "AB")
        assert torch.allclose(layer(X), lora_of(layer, A, B)(X), rtol=0, atol=1e-12)

    def test_a_samples_padding_has_no_say(self):
        layer, x = grown("wemoe").eval(), X.view(10, 4, 7)
        mask = torch.arange(4).expand(10, 4) < 3
        with context(layer, mask=mask):
            y = layer(x)[:, :3]
        assert torch.allclose(y, layer(x[:, :3]), rtol=0, atol=1e-12)

    def test_active_counts_what_is_read(self):
        layer = grown("wemoe")
        assert layer.active() == layer.speaking() == 2 * (7 + 5)
        assert layer.eval().active() == 6 * (7 + 5) + 3 * (3 * (7 + 2) + 1)
        assert layer.speaking() == 6 * (7 + 5)

    def test_all_networks_have_the_gradient_of_their_entropy(self):
        layer = grown("wemoe")
        layer.routing = True
        rows = [getattr(layer, k).requires_grad_() for n in "Pcqd" for k in (f"frozen_{n}", n)]

        model = Entropy(layer)
        with context(model) as batch:
            answers = model(X)
        p = layer(X).detach().softmax(-1)
        assert torch.allclose(batch.aux_loss, -(p * p.log()).sum(-1).mean(), atol=1e-12)
        assert torch.equal(answers, layer(X)) and not answers.requires_grad
        for grad, tensor in zip(torch.autograd.grad(batch.aux_loss, rows), rows, strict=True):
            way = torch.randn_like(tensor)
            both = []
            for step in (1e-6, -2e-6):
                with torch.no_grad():
                    tensor.add_(step * way)
                with context(model) as again:
                    model(X)
                both.append(again.aux_loss.item())
            with torch.no_grad():
                tensor.add_(1e-6 * way)
            slope = (both[0] - both[1]) / 2e-6
            assert math.isclose(slope, (grad * way).sum().item(), rel_tol=1e-4, abs_tol=1e-8)
            assert grad.any()


def test_an_even_answer_has_entropy_ln_C_and_a_sure_one_none():
    for size, wanted in ((0.0, math.log(5)), (1e3, 0.0)):
        model = Entropy(nn.Identity())
        with context(model) as batch:
            model(size * torch.eye(5))
        assert math.isclose(batch.aux_loss.item(), wanted, rel_tol=1e-6)


class TestWEMoELearner:
    def test_networks_learn_from_stored_examples_of_all_tasks_and_move_no_expert(self):
        learner, fitted, _ = two_tasks(WEMoELearner, classes=True, keep=15, width=3)
        assert [len(task.x_train) for _, task, *_ in fitted] == [200, 15, 200, 30]
        every = {f"{frozen}{name}" for name in "Pcqd" for frozen in ("", "frozen_")}
        for n, (_, _, before, after) in enumerate(fitted):
            changed = {key for key in after if not torch.equal(before[key], after[key])}
            kinds = {key.rpartition(".")[2] for key in changed}
            assert kinds == [{"A", "B"}, set("Pcqd"), {"A", "B"}, every][n]
        for _, layer in adapters(learner.model):
            assert not layer.routing and not layer.rows("P").requires_grad

    def test_labels_of_the_stored_move_nothing(self):
        class Wrong(WEMoELearner):
            def remembered(self, x, y, t):
                return x, 5 - y

        states = []
        for kind in (WEMoELearner, Wrong):
            learner, *_ = two_tasks(kind, classes=True, keep=15, width=3)
            states.append(learner.model.state_dict())
        assert all(torch.equal(t, states[1][key]) for key, t in states[0].items())

    def test_it_grows_surer(self):
        learner, fitted, _ = two_tasks(WEMoELearner, classes=True, keep=15, width=3)
        x, found = fitted[3][1].x_train, []
        for state in fitted[3][2:]:
            learner.model.load_state_dict(state)
            l = learner.predict(x, 0).log_softmax(-1)
            found.append(-(l.exp() * l).sum(-1).mean().item())
        assert found[1] < found[0] - 0.02

    def test_stored_examples_are_counted(self):
        learner, *_ = two_tasks(WEMoELearner, classes=True, keep=15, width=3)
        layers = sum(4 * 15 + 2 * (3 * (D + 2) + 1) for D in (6, 9))
        assert learner.count()["stored"] == layers + 30 * (6 + 1)
