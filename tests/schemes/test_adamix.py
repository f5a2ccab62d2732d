"""AdaMix against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import pytest
import torch
from layers import X, arrays, compiled_equals_eager, frozen_and_live, grown, live, lora_of
from oracle import gradient
from test_lora import lora
from torch import nn

from minimoe.adapt import adapt, adapters, context, parameters
from minimoe.continual.learn import train
from minimoe.continual.stream import Stream, Task
from minimoe.schemes.adamix import AdaMix, AdaMixLearner, TwoPasses, disagreement

SETTINGS = {"scale": 0.7, "copies": 1}  # one that draws nothing: the others are looked at below
UNCLAIMED = {"support", "simplex", "merge_is_equal"}  # laws


def expected(layer, x, rows, given):
    """LoRA, whose live keys are those of one expert, or else the mean of all experts'."""
    W0, b, A, B = frozen_and_live(rows)
    keys = np.zeros((len(A), A.shape[2]))
    for i in range(len(A)):
        for e in range(layer.copies):
            drawn = "drawn" in given and i >= len(A) - layer.rank
            share = (e == given["drawn"]) if drawn else 1 / layer.copies
            keys[i] += share * A[i, e]
    return lora(x, W0, b, keys, B, layer.scale)


def STORED(D, O, R, r, E):
    return R * (D + O)


def ACTIVE(D, O, R, r, E, k):
    return R * (D + O)


def test_the_authors_settings_are_the_defaults():
    assert AdaMix(nn.Linear(64, 64)).settings() == {"rank": 4, "scale": 32 / 4, "copies": 8}


@pytest.mark.parametrize("copies", [0, -1])
def test_settings_out_of_range_are_named(copies):
    with pytest.raises(ValueError, match=rf"^copies is {copies}, allowed: 1 or more$"):
        AdaMix(nn.Linear(7, 5), rank=2, copies=copies)


def drawn(layer, tries=40):
    """{expert: the layer's answer to X where it is drawn}, by seeds."""
    found = {}
    for seed in range(tries):
        torch.manual_seed(seed)
        e = torch.randint(layer.copies, ()).item()
        torch.manual_seed(seed)
        found[e] = layer(X)
    return found


class TestAdaMix:
    @pytest.mark.parametrize("training", [True, False])
    def test_three_experts_equal_the_oracles(self, training):
        layer = grown("adamix", copies=3).train(training)
        rows, dy = arrays(layer), torch.randn(40, 5, dtype=torch.float64)
        for e, y in drawn(layer).items():
            given, x = {"drawn": e} if training else {}, X.numpy()

            def f(given=given, x=x):
                return expected(layer, x, rows, given)

            np.testing.assert_allclose(y.detach(), f(), rtol=0, atol=1e-12)
            leaves = {key: getattr(layer, key) for key in live(layer, rows)}
            grads = torch.autograd.grad(y, list(leaves.values()), dy)
            for (key, array), grad in zip(live(layer, rows).items(), grads, strict=True):
                wanted = gradient(f, array, dy.numpy())
                np.testing.assert_allclose(grad, wanted, atol=1e-7, err_msg=key)

    def test_the_mean_of_what_all_experts_answer_is_evaluations(self):
        layer = grown("adamix", copies=3)
        answers = drawn(layer)
        assert set(answers) == {0, 1, 2} and not torch.allclose(answers[0], answers[1])
        y = layer.eval()(X)
        assert torch.allclose(sum(answers.values()) / 3, y, rtol=0, atol=1e-12)
        assert torch.allclose(y, lora_of(layer, layer.keys, layer.rows("B"))(X), atol=1e-12)

    def test_one_expert_is_lora_and_draws_nothing_that_shows(self):
        layer = grown("adamix", copies=1)
        want = lora_of(layer, layer.keys, layer.rows("B"))(X)
        assert torch.allclose(layer(X), want, rtol=0, atol=1e-12) and torch.equal(
            layer(X), layer(X)
        )

    def test_experts_start_alike_and_the_one_that_is_drawn_moves(self):
        layer = AdaMix(nn.Linear(7, 5), rank=2, copies=3)
        assert torch.equal(layer.A, layer.A[:, :1].expand(2, 3, 7)) and layer.A.any()
        nn.init.normal_(layer.B)
        layer(X.float()).sum().backward()
        assert layer.A.grad.flatten(2).any(2).any(0).sum() == 1

    def test_counts_are_the_docstrings(self):
        layer = grown("adamix", copies=3)
        assert sum(layer.rows(name).numel() for name in "AB") == layer.active() == 6 * (3 * 7 + 5)

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_compiled_in_evaluation_it_is_eager(self):
        compiled_equals_eager(grown("adamix", copies=3, dtype=torch.float32).eval())


class TestDisagreement:
    def test_by_hand(self):
        # p (1/2, 1/2), q (3/4, 1/4): ½ Σ (p - q) (ln p - ln q) = ½ (¼ ln(3/2) + ¼ ln 2) = ⅛ ln 3
        p, q = torch.zeros(2).double(), torch.tensor([math.log(3), 0.0]).double()
        assert disagreement(p, q).item() == pytest.approx(math.log(3) / 8)
        assert disagreement(q, p).item() == pytest.approx(math.log(3) / 8)
        assert disagreement(q, q + 5.0).item() == pytest.approx(0.0, abs=1e-15)

    def test_of_real_answers_by_hand(self):
        # normals of deviation 1 whose means are 3 apart: 9 / 2 both ways
        each = disagreement(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 2.0]), real=True)
        assert each.tolist() == [4.5, 0.0]

    @pytest.mark.parametrize("real", [True, False])
    def test_each_is_drawn_to_the_other_as_it_stands(self, real):
        p, q = (torch.randn(3, dtype=torch.float64).requires_grad_() for _ in range(2))
        disagreement(p, q, real).sum().backward()
        # ½ d KL(q‖p) / dp: half of softmax(p) - softmax(q), or of p - q
        a, b = (t.detach() if real else t.detach().softmax(-1) for t in (p, q))
        assert torch.allclose(p.grad, (a - b) / 2) and torch.allclose(q.grad, (b - a) / 2)


def net_of(copies=4, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5)).double()
    adapt(net, AdaMix, ".*", rank=2, copies=copies)
    for _, layer in adapters(net):
        nn.init.normal_(layer.A), nn.init.normal_(layer.B)
    return net


class TestTwoPasses:
    @pytest.mark.parametrize("real", [True, False])
    def test_the_loss_is_the_mean_of_two_passes_of_their_own_draws(self, real):
        net = net_of()
        twice = TwoPasses(net, 3.0)
        twice.real = real
        torch.manual_seed(5)
        p, q = net(X), net(X)
        torch.manual_seed(5)
        with context(twice) as batch:
            y = twice(X)
        assert torch.equal(y, p) and not torch.allclose(p, q)
        want = 3 * disagreement(p, q, real).mean()
        assert batch.aux_loss.item() == pytest.approx(want.item(), rel=1e-12)

    def test_experts_that_are_alike_agree(self):
        twice = TwoPasses(net_of(copies=1), 1.0)
        with context(twice) as batch:
            twice(X)
        assert batch.aux_loss.abs() < 1e-15

    @pytest.mark.parametrize(("training", "weight"), [(False, 1.0), (True, 0.0)])
    def test_evaluation_and_no_weight_are_one_pass_without_a_loss(self, training, weight):
        net, calls = net_of().train(training), []
        net.register_forward_hook(lambda *args: calls.append(1))
        with context(twice := TwoPasses(net, weight)) as batch:  # itself in training
            twice(X)
        assert isinstance(batch.aux_loss, float) and len(calls) == 1

    def test_answers_at_padding_do_not_count_where_each_token_has_one(self):
        x, mask = X[:12].view(4, 3, 7), torch.tensor([[1, 1, 0]] * 4)
        losses = []
        for last in (x, torch.where(mask.unsqueeze(-1) > 0, x, 9.0), x[:, :2]):
            twice = TwoPasses(net_of(), 1.0)
            torch.manual_seed(5)
            with context(twice, mask=mask[:, : last.shape[1]]) as batch:
                twice(last)
            losses.append(batch.aux_loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-12) == losses[2] > 0

    def test_a_mask_of_tokens_is_none_of_samples(self):
        class Pooled(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net_of()

            def forward(self, x):
                return self.net(x).mean(1)

        twice, losses = TwoPasses(Pooled(), 1.0), []
        for given in ({}, {"mask": torch.ones(4, 3, dtype=torch.int64)}):
            torch.manual_seed(5)
            with context(twice, **given) as batch:
                twice(X[:12].view(4, 3, 7))
            losses.append(batch.aux_loss.item())
        assert losses[0] == losses[1] > 0


def stream(real):
    torch.manual_seed(1)
    x = torch.randn(128, 6)
    y = torch.randn(128, 3) if real else torch.randint(3, (128,))
    return Stream("s", [Task(name, (x, y), (x, y)) for name in "ab"])


def lived(consistency, real=True, epochs=20):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)).requires_grad_(False)
    learner = AdaMixLearner(net, consistency=consistency, rank=2, copies=3, scale=1.0)
    tasks = stream(real)
    for t in range(2):
        learner.learn(tasks, t, lambda m, w, task: train(m, w, task, epochs, 0, lr=0.01))
    return learner, tasks.tasks[0].x_train


@pytest.mark.parametrize("real", [True, False])
def test_consistency_makes_experts_agree(real):
    apart = {}
    for consistency in (0.0, 100.0):
        learner, x = lived(consistency, real)
        assert learner.twice.real == real
        assert all(layer.ranks == 2 for _, layer in adapters(learner.model))  # none has grown
        learner.model.train()
        with torch.no_grad():
            answers = torch.stack([learner.model(x) for _ in range(20)])
        apart[consistency] = answers.var(0).mean().item()
    assert 0 < apart[100.0] < apart[0.0] / 4


def test_a_learner_answers_in_one_pass_from_the_start():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)).requires_grad_(False)
    learner, calls = AdaMixLearner(net, rank=2), []
    net.register_forward_hook(lambda *args: calls.append(1))
    learner.row(stream(True), 0)
    assert len(calls) == 2  # one for each task's test data
    assert {id(p) for p in parameters(learner.model)} == {
        id(p) for p in learner.with_context.parameters() if p.requires_grad
    }


def test_a_negative_weight_is_named():
    with pytest.raises(ValueError, match=r"^consistency is -1.0, allowed: 0 or more$"):
        AdaMixLearner(nn.Sequential(nn.Linear(6, 9)), consistency=-1.0)
