"""LoRAMoEPlugin against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import pytest
import torch
from layers import X, frozen_and_live, grown, lora_of
from oracle import base, softmax
from torch import nn

from minimoe.adapt import context
from minimoe.schemes.lora_moe_plugin import LoRAMoEPlugin, localized_balance

SETTINGS = {"scale": 0.7, "balance": 0.4, "delta": 0.3}
UNCLAIMED = {"support", "merge_is_equal"}  # laws


def lora_moe_plugin(x, W0, b, A, B, W, scale):
    """Dou et al., 2312.09979: a softmax over all experts."""
    y, E = base(x, W0, b), len(W)
    r = len(A) // E
    for t in range(len(x)):
        w = softmax([x[t] @ W[e] for e in range(E)])
        for e in range(E):
            for i in range(e * r, (e + 1) * r):
                y[t] += scale * w[e] * (x[t] @ A[i]) * B[i]
    return y


def balance_loop(x, W, sample, label, delta):
    """Dou et al.: var(Z) / mean(Z), Z being each expert's weight in each sample, times 1 + delta
    where the sample is of the expert's type, and 1 - delta elsewhere."""
    Z = []
    for m in sorted(set(sample)):
        tokens = [t for t in range(len(x)) if sample[t] == m]
        w = [softmax([x[t] @ W[e] for e in range(len(W))]) for t in tokens]
        for e in range(len(W)):
            weight = 1 + delta if label[tokens[0]] == e else 1 - delta
            Z.append(weight * sum(row[e] for row in w))
    mean = sum(Z) / len(Z)
    return sum((z - mean) ** 2 for z in Z) / len(Z) / mean


def expected(layer, x, rows, given):
    return lora_moe_plugin(x, *frozen_and_live(rows), rows["router"], layer.scale)


AUX = {"router"}


def expected_aux(layer, x, rows, given):
    own = given["sample"], given["label"], layer.delta
    return layer.balance * balance_loop(x, rows["router"], *own)


def STORED(D, O, R, r, E):
    return R * (D + O) + E * D


def ACTIVE(D, O, R, r, E, k):
    return R * (D + O) + E * D


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balance": -0.1}, "balance is -0.1, allowed: 0 or more"),
        ({"balance": math.nan}, "balance is nan, allowed: 0 or more"),
        ({"delta": 1.5}, "delta is 1.5, allowed: 0 to 1"),
        ({"delta": -0.1}, "delta is -0.1, allowed: 0 to 1"),
        ({"delta": math.nan}, "delta is nan, allowed: 0 to 1"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        LoRAMoEPlugin(nn.Linear(7, 5), **{"rank": 2} | settings)


def test_the_papers_settings_are_the_defaults():
    paper = {"rank": 4, "scale": 32 / 4, "balance": 0.1, "delta": 0.1}
    settings = LoRAMoEPlugin(nn.Linear(64, 64)).settings()
    assert {key: settings[key] for key in paper} == paper


class TestLoRAMoEPlugin:
    def test_by_hand(self):
        # w = softmax(ln 3, 0) = (3/4, 1/4), z = (1, 2): update = 3/4·1·(4, 0) + 1/4·2·(0, 2)
        layer = LoRAMoEPlugin(nn.Linear(2, 2, bias=False), rank=1, scale=1.0).eval()
        nn.init.zeros_(layer.base.weight)
        layer.grow()
        layer.frozen_router = torch.tensor([[math.log(3), 0.0]])
        layer.router.data = torch.tensor([[0.0, 0.0]])
        layer.frozen_A, layer.A.data = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        layer.frozen_B, layer.B.data = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        assert torch.allclose(layer(torch.tensor([1.0, 0.0])), torch.tensor([3.0, 1.0]))

    def test_one_expert_is_lora(self):
        layer = grown("lora_moe_plugin", tasks=1).eval()
        assert torch.allclose(layer(X), lora_of(layer, layer.A, layer.B)(X), atol=1e-12)

    def test_balance_by_hand(self):
        # types (0, 1), delta 1/2: I = ((3/2, 1/2), (1/2, 3/2)). Q = ((3, 1), (1, 3)):
        # Z = ((9/2, 1/2), (1/2, 9/2)), of mean 5/2 and variance 4: 8/5
        Q, types = torch.tensor([[3.0, 1.0], [1.0, 3.0]]), torch.tensor([0, 1])
        assert torch.isclose(localized_balance(Q, types, 0.5, torch.ones(2)), torch.tensor(1.6))
        # the same at delta 0: mean 2, variance 1
        assert torch.isclose(localized_balance(Q, types, 0.0, torch.ones(2)), torch.tensor(0.5))
        assert localized_balance(Q[:0], types[:0], 0.5, torch.ones(0)) == 0

    def test_balance_is_0_only_where_weight_is_inverse_to_importance(self):
        # 1 / I = ((2/3, 2), (2, 2/3), (2, 2)) for delta 1/2 and types (0, 1, 2 of 2 experts)
        types = torch.tensor([0, 1, 2])
        Q = 5 * torch.tensor([[2 / 3, 2.0], [2.0, 2 / 3], [2.0, 2.0]])
        assert localized_balance(Q, types, 0.5, torch.ones(3)) < 1e-12
        for place in np.ndindex(3, 2):
            other = Q.clone()
            other[place] *= 1.1
            assert localized_balance(other, types, 0.5, torch.ones(3)) > 1e-3

    def test_a_uniform_gate_is_balanced_at_delta_0_and_leaves_its_type_above(self):
        for delta, balanced in ((0.0, True), (0.3, False)):
            layer = grown("lora_moe_plugin", delta=delta)
            layer.frozen_router.zero_()
            layer.router.data.zero_()
            with context(layer, label=torch.full((40,), 2)) as batch:
                layer(X.abs())
            assert (batch.aux_loss.abs() < 1e-7) == balanced
        batch.aux_loss.backward()  # of the sample's own type: a step down takes weight from it
        assert (layer.router.grad > 0).all()
