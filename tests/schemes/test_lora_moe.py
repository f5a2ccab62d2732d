"""LoRAMoE against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import pytest
import torch
from layers import arrays, frozen_and_live, grown
from oracle import base
from torch import nn

from minimoe import LoRA, LoRAMoE
from minimoe.adapt import context, state
from minimoe.lora_moe import switch_balance

SETTINGS = {"scale": 0.7, "top_k": 2}
UNCLAIMED = {"merge_is_equal"}  # laws


def lora_moe(x, W0, b, A, B, W, scale, top_k):
    """Softmax over the top_k of the router's logits; expert e is rows e·r to (e+1)·r."""
    y, E = base(x, W0, b), len(W)
    r = len(A) // E
    for t in range(len(x)):
        logits = [x[t] @ W[e] for e in range(E)]
        kept = sorted(range(E), key=lambda e: -logits[e])[:top_k]
        total = sum(math.exp(logits[e]) for e in kept)
        for e in kept:
            for i in range(e * r, (e + 1) * r):
                y[t] += scale * math.exp(logits[e]) / total * (x[t] @ A[i]) * B[i]
    return y


def expected(layer, x, rows, given):
    return lora_moe(x, *frozen_and_live(rows), rows["router"], layer.scale, layer.top_k)


def STORED(D, O, R, r, E):
    return R * (D + O) + E * D


def ACTIVE(D, O, R, r, E, k):
    return E * D + k * (R // E) * (D + O)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k is 0, allowed: 1 or more"),
        ({"balance": -1.0}, "balance is -1.0, allowed: 0 or more"),
        ({"rank": 3, "experts": 2}, "experts is 2, allowed: divisors of rank 3"),
        ({"balance": math.nan}, "balance is nan, allowed: 0 or more"),
        ({"experts": 0}, "experts is 0, allowed: divisors of rank 2"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        LoRAMoE(nn.Linear(7, 5), **{"rank": 2} | settings)


class TestLoRAMoE:
    @pytest.mark.parametrize("experts", [1, 2, 4])
    def test_a_task_may_add_several_experts(self, experts):
        layer = grown(LoRAMoE, rank=4, tasks=3, top_k=2, experts=experts)
        rows = arrays(layer)
        assert len(rows["router"]) == 3 * experts and layer.block == 4 // experts
        x = torch.randn(5, 7, dtype=torch.float64)
        wanted = expected(layer, x.numpy(), rows, {})
        np.testing.assert_allclose(layer(x).detach().numpy(), wanted, rtol=0, atol=1e-12)
        idx, g, *_ = layer.gate(x)
        assert idx.shape == g.shape == (5, 2 * (4 // experts))
        stored = sum(t.numel() for t in state(layer).values())
        assert stored == 12 * (7 + 5) + 3 * experts * 7
        assert layer.active() == 3 * experts * 7 + 2 * (4 // experts) * (7 + 5)

    def test_by_hand(self):
        # logits (ln 3, 0, -1) of which two are kept: w = (3/4, 1/4). z = (1, 2, 9).
        # update = 3/4 · 1 · (4, 0) + 1/4 · 2 · (0, 2) = (3, 1)
        layer = LoRAMoE(nn.Linear(2, 2, bias=False), rank=1, top_k=2)
        nn.init.zeros_(layer.base.weight)
        layer.frozen_router = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
        layer.router.data = torch.tensor([[-1.0, 0.0]])
        layer.frozen_A = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
        layer.A.data = torch.tensor([[9.0, 0.0]])
        layer.frozen_B = torch.tensor([[4.0, 0.0], [0.0, 2.0]])
        layer.B.data = torch.tensor([[5.0, 5.0]])
        assert torch.allclose(layer(torch.tensor([1.0, 0.0])), torch.tensor([3.0, 1.0]))

    def test_one_expert_is_lora(self):
        layer = grown(LoRAMoE, tasks=1, top_k=2)
        lora = LoRA(layer.base, rank=2)
        lora.A, lora.B = layer.A, layer.B
        x = torch.randn(6, 7, dtype=torch.float64)
        assert torch.allclose(layer(x), lora(x), atol=1e-14)

    def test_balance_loss(self):
        # two experts, top-1. Uniform: f = P = (1/2, 1/2), so 2 · (1/4 + 1/4) = 1.
        even = torch.zeros(4, 2)
        assert switch_balance(even, torch.tensor([[0], [1], [0], [1]]), torch.ones(4)) == 1
        # logits (ln 3, 0) for all: P = (3/4, 1/4), f = (1, 0), so 2 · 3/4 = 1.5.
        skewed = torch.tensor([[math.log(3), 0.0]]).repeat(4, 1)
        assert torch.isclose(
            switch_balance(skewed, torch.zeros(4, 1).long(), torch.ones(4)), torch.tensor(1.5)
        )
        assert switch_balance(even[:0], torch.zeros(0, 1).long(), torch.ones(0)) == 0

    def test_balance_is_a_loss_in_training_only_where_asked_for(self):
        x = torch.randn(6, 7, dtype=torch.float64)
        for balance, training in ((0.0, True), (0.5, False), (0.5, True)):
            layer = grown(LoRAMoE, top_k=1, balance=balance).train(training)
            with context(layer) as batch:
                layer(x)
            assert (batch.aux_loss != 0.0) == (balance > 0 and training)
        assert batch.aux_loss.requires_grad
