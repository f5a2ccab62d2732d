"""MMoE against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import pytest
import torch
from layers import X, arrays, grown
from oracle import blocks, softmax
from torch import nn

from minimoe import LoRAMoE
from minimoe.adapt import context
from minimoe.continual.baselines import ToldLoRA
from minimoe.continual.probe import dense_gate
from minimoe.rules import extract, keep, merge
from minimoe.schemes.mmoe import MMoE

SETTINGS = {"scale": 0.7, "tasks": 32}
UNCLAIMED = {"support", "degenerates_to_lora", "merge_is_equal"}  # laws


def expected(layer, x, rows, given):
    """By the task's own router, shares among its own experts and those that older ones left it."""
    n, W, w = layer.experts, rows["routers"], []
    for t, task in enumerate(given["label"]):
        share = [0.0] * (len(W) * n)
        if task < len(W):
            seen = [
                s * n + i
                for s in range(task + 1)
                for i in range(n)
                if s == task or i >= math.floor(layer.exclusive * n)
            ]
            shares = softmax([W[task, e] @ x[t] for e in seen])
            for e, value in zip(seen, shares, strict=True):
                share[e] = value
        w.append(share)
    return blocks(x, rows["W0"], rows["b"], rows["A"], rows["B"], w, layer.scale)


def STORED(D, O, R, r, E):
    return R * (D + O) + E * 32 * D


def ACTIVE(D, O, R, r, E, k):
    return R * (D + O) + E * D


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exclusive": -0.1}, r"exclusive is -0\.1, allowed: 0 to 1"),
        ({"exclusive": 1.1}, r"exclusive is 1\.1, allowed: 0 to 1"),
        ({"exclusive": math.nan}, "exclusive is nan, allowed: 0 to 1"),
        ({"tasks": 0}, "tasks is 0, allowed: 1 or more"),
        ({"experts": 3}, "experts is 3, allowed: divisors of rank 2"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        MMoE(nn.Linear(7, 5), **{"rank": 2} | settings)


def several(tasks=3, **settings):
    """Of each task four experts, of which the first two are its own."""
    return grown("mmoe", rank=4, experts=4, tasks=tasks, **{"exclusive": 0.6} | settings)


def labelled(layer, label, x=X):
    with context(layer, label=torch.full((len(x),), label)):
        return layer(x)


def weights(layer, label, x=X):
    """(T, E)"""
    with context(layer, label=torch.full((len(x),), label)):
        return dense_gate(layer, x)[:, :: layer.block]


class TestMMoE:
    def test_by_hand(self):
        # two experts a task, the first its own. Task 1 sees the second of task 0, and both of its
        # own, of logits ln (2, 1, 1): its router's second, third and fourth
        layer = MMoE(nn.Linear(2, 2).double(), rank=2, experts=2, exclusive=0.5, tasks=3)
        layer.grow()
        layer.eval()
        nn.init.zeros_(layer.frozen_routers), nn.init.zeros_(layer.routers)
        layer.frozen_routers[0, :2, 0] = torch.tensor([3.0, 1.0]).log()
        layer.routers.data[0, :4, 0] = torch.tensor([9.0, 2.0, 1.0, 1.0]).log()
        x, want = torch.tensor([[1.0, 0.0]]).double(), [[0.75, 0.25, 0, 0], [0, 0.5, 0.25, 0.25]]
        for label, w in enumerate([*want, [0.0] * 4]):
            assert torch.allclose(weights(layer, label, x), torch.tensor([w]).double())

    @pytest.mark.parametrize("exclusive", [0.0, 0.2, 0.6, 0.75, 1.0])
    def test_several_experts_a_task_equal_the_oracles(self, exclusive):
        layer, label = several(exclusive=exclusive).eval(), torch.arange(40) % 4
        with context(layer, label=label):
            y = layer(X).detach()
        wanted = expected(layer, X.numpy(), arrays(layer), {"label": label.tolist()})
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)

    def test_who_sees_whom(self):
        layer = several()
        seen = [(weights(layer, label) > 0).all(0).int().tolist() for label in range(3)]
        assert seen == [
            [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
            [0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1],
        ]

    def test_an_exclusive_expert_learns_of_its_task_alone(self):
        layer = several()
        labelled(layer, 1).square().sum().backward()  # an older one
        for rows in (layer.A, layer.B, layer.routers):
            assert not rows.grad.any()
        before = labelled(layer, 2)
        layer.frozen_B[[0, 1, 4, 5]] += 1.0
        assert torch.equal(labelled(layer, 2), before)
        layer.frozen_B[2] += 1.0
        assert not torch.allclose(labelled(layer, 2), before)

    def test_of_a_router_what_is_for_newer_experts_does_not_learn(self):
        layer = several(exclusive=0.0)
        labelled(layer, 2).square().sum().backward()
        assert layer.routers.grad[0, :12].all() and not layer.routers.grad[0, 12:].any()

    def test_without_exclusive_ones_and_with_one_router_it_is_lora_moe(self):
        layer = grown("mmoe")
        other = LoRAMoE(layer.base, rank=2, scale=0.7, top_k=3)
        other.grow(), other.grow()
        layer.frozen_routers[:] = layer.routers.data
        rows = layer.routers.data[0, :3]
        state = {k: t for k, t in layer.state_dict().items() if "routers" not in k}
        other.load_state_dict(state | {"frozen_router": rows[:2], "router": rows[2:]})
        assert torch.allclose(labelled(layer, 2), other(X), rtol=0, atol=1e-13)

    def test_where_all_are_exclusive_a_task_has_a_lora_of_its_own(self):
        layer = grown("mmoe", exclusive=1.0).eval()
        other = ToldLoRA(layer.base, rank=2, scale=0.7).eval()
        other.grow(), other.grow()
        other.load_state_dict({k: t for k, t in layer.state_dict().items() if "routers" not in k})
        for label in range(4):
            got = labelled(layer, label)
            assert torch.allclose(got, labelled(other, label), rtol=0, atol=1e-13)

    @pytest.mark.parametrize("exclusive", [0.0, 0.5])
    def test_old_tasks_answers_stay_while_new_experts_come_and_learn(self, exclusive):
        layer = several(exclusive=exclusive)
        before = [labelled(layer, label) for label in range(3)]
        layer.grow()
        for name in ("A", "B", "routers"):
            nn.init.normal_(getattr(layer, name))
        for label, y in enumerate(before):  # in bits, but that a larger product may round otherwise
            assert torch.allclose(labelled(layer, label), y, rtol=0, atol=1e-13)

    def test_a_task_not_learned_yet_has_the_base_layer(self):
        layer = several(exclusive=1.0).eval()
        assert torch.equal(labelled(layer, 3), layer.base(X))

    def test_one_task_too_many_is_named(self):
        layer = MMoE(nn.Linear(7, 5), rank=2, tasks=2)
        layer.grow()
        with pytest.raises(RuntimeError, match="has learned 2 tasks, as many as it can"):
            layer.grow()

    def test_some_of_its_experts_cannot_be_kept_but_all_can_and_one_alone(self):
        layer = grown("mmoe", rank=4, experts=2)
        for rule in (lambda: keep(layer, [0, 3]), lambda: merge(layer, [1])):
            with pytest.raises(ValueError, match=r"^experts is \[.*\], allowed: all 6 of MMoE's$"):
                rule()
        assert keep(layer, range(6)).ranks == layer.ranks
        one, (A, B) = extract(layer, 3), (layer.keys[6:8], layer.rows("B")[6:8])
        assert torch.equal(one.A, A) and torch.equal(one.B, B)

    @pytest.mark.parametrize("exclusive", [0.0, 0.5, 1.0])
    def test_who_speaks_is_who_has_weight_for_a_task(self, exclusive):
        layer = grown("mmoe", rank=4, experts=2, exclusive=exclusive).eval()
        w = torch.stack([weights(layer, label) for label in range(3)])  # (tasks, T, E)
        speak = int((w != 0).sum(-1).max())
        assert layer.speaking() == speak * layer.block * (7 + 5)
        assert layer.active() == layer.speaking() + 6 * 7
