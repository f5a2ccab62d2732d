"""MaskMoE against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import pytest
import torch
from layers import X, arrays, context_of, grown
from oracle import blocks
from torch import nn

from minimoe import LoRAMoE
from minimoe.adapt import context
from minimoe.continual.probe import dense_gate
from minimoe.continual.stream import Stream, Task
from minimoe.schemes.mask_moe import MaskMoE, MaskMoELearner

SETTINGS = {"scale": 0.7, "top_k": 2, "classes": 5, "rare": 2}
UNCLAIMED = {"merge_is_equal"}  # laws


def expected(layer, x, rows, given):
    """A softmax over the largest logits of those experts that the token's class sees."""
    W, M, w = rows["router"], rows["M"], []
    for t in range(len(x)):
        l = {e: W[e] @ x[t] for e in range(len(W)) if M[e][given["token_class"][t]]}
        kept = sorted(l, key=lambda e: -l[e])[: layer.top_k]
        total = sum(math.exp(l[e]) for e in kept)
        w.append([math.exp(l[e]) / total if e in kept else 0.0 for e in range(len(W))])
    return blocks(x, rows["W0"], rows["b"], rows["A"], rows["B"], w, layer.scale)


def STORED(D, O, R, r, E):
    return R * (D + O) + E * D + E * 5


def ACTIVE(D, O, R, r, E, k):
    return E * D + k * r * (D + O)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": 0}, "classes is 0, allowed: 1 or more"),
        ({"rare": -1}, "rare is -1, allowed: 0 or more"),
        ({"view": 0}, "view is 0, allowed: 1 or more"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        MaskMoE(nn.Linear(7, 5), **{"rank": 2} | settings)


def several(tasks=3, **settings):
    """Of each task four experts, of which rare classes (0, 1) see one and the others two."""
    return grown("mask_moe", rank=4, experts=4, tasks=tasks, **{"top_k": 5} | settings)


class TestMaskMoE:
    @pytest.mark.parametrize("top_k", [1, 2, 5, 12])
    def test_several_experts_a_task_equal_the_oracles(self, top_k):
        layer, given = several(top_k=top_k), {"token_class": torch.arange(40) % 5}
        assert layer.M.shape == (4, 5) and layer.rows("M").sum(0).tolist() == [3, 3, 6, 6, 6]
        each = {"token_class": given["token_class"].tolist()}
        with context(layer, **given):
            y = layer(X).detach()
        wanted = expected(layer, X.numpy(), arrays(layer), each)
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)

    def test_a_class_that_sees_one_has_it_at_weight_1_and_teaches_no_router(self):
        layer = several(tasks=1)
        with context(layer, token_class=torch.zeros(40, dtype=torch.int64)):
            g = dense_gate(layer, X)
            layer(X).square().sum().backward()
        (e,) = layer.M[:, 0].nonzero().flatten().tolist()
        assert torch.equal(g, torch.eye(4, dtype=torch.float64)[[e] * 40])
        assert not layer.router.grad.any()
        others = [i for i in range(4) if i != e]
        assert layer.B.grad[e].any() and not layer.B.grad[others].any()

    def test_where_all_is_seen_it_is_lora_moe(self):
        layer = several(rare=0, view=4, top_k=3)
        other = LoRAMoE(layer.base, rank=4, scale=0.7, top_k=3, experts=4)
        other.grow(), other.grow()
        other.load_state_dict({k: t for k, t in layer.state_dict().items() if k[-1] != "M"})
        with context(layer, **context_of(layer, 40)):
            assert torch.allclose(layer(X), other(X), rtol=0, atol=1e-13)

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_one_graph_serves_all_classes(self):
        layer, x = several(dtype=torch.float32), torch.randn(6, 7)
        torch.compiler.reset()
        compiled, answers = torch.compile(layer, backend="aot_eager", fullgraph=True), []
        with torch._dynamo.config.patch(error_on_recompile=True):
            for c in range(5):
                with context(layer, token_class=torch.full((6,), c)):
                    answers.append(compiled(x))
                    assert torch.allclose(answers[-1], layer(x), atol=1e-5)
        assert all(not torch.allclose(answers[0], y) for y in answers[1:])

    def test_which_a_class_sees_stays_as_it_was_drawn(self):
        layer = several(tasks=1)
        before = layer.M.clone()
        layer.grow()
        assert torch.equal(layer.frozen_M, before)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)

    def features(self, x):
        return x

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


def test_a_class_is_a_cluster_of_the_first_task_the_smallest_first():
    far = torch.eye(4)[:3] * 10  # three clusters, of 10, 30 and 60 inputs
    x = far.repeat_interleave(torch.tensor([30, 10, 60]), 0) + 0.1 * torch.randn(100, 4)
    tasks = [Task(name, (x, torch.randn(100, 4)), (x, torch.randn(100, 4))) for name in "ab"]
    learner = MaskMoELearner(Net().requires_grad_(False), 3, rank=2)
    assert learner.context(x)["token_class"].tolist() == [0] * 100  # none is known yet
    for t in range(2):
        learner.learn(Stream("s", tasks), t, lambda *args: None)
        assert learner.context(far)["token_class"].tolist() == [1, 0, 2]
    other = MaskMoELearner(Net().requires_grad_(False), 3, rank=2)
    other.load_state(learner.state())
    assert other.context(far)["token_class"].tolist() == [1, 0, 2]
    plain = LoRAMoE(nn.Linear(4, 6), rank=2)  # and the centres are counted
    assert learner.known.shape == (3, 4) and plain.ranks == 2
