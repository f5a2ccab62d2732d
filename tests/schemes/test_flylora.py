"""FlyLoRA against its oracle, numbers worked by hand, and what is its own."""

import copy
import math

import pytest
import torch
from layers import X, frozen_and_live, grown
from oracle import base
from torch import nn

from minimoe import LoRA
from minimoe.adapt import context
from minimoe.continual.probe import dense_gate
from minimoe.schemes.flylora import FlyLoRA

SETTINGS = {"scale": 0.7, "top_k": 3}
VARIANTS = {"signed": {"signed": True}}
UNCLAIMED = {"simplex", "merge_is_equal"}  # laws


def flylora(x, W0, b, A, B, bias, scale, top_k, signed):
    """Zou et al., 2510.08396: the k largest |z + bias|, or z + bias, at weight 1."""
    y, R = base(x, W0, b), len(A)
    for t in range(len(x)):
        z = [x[t] @ A[i] for i in range(R)]
        score = [z[i] + bias[i] if signed else abs(z[i] + bias[i]) for i in range(R)]
        for i in sorted(range(R), key=lambda i: -score[i])[:top_k]:
            y[t] += scale * z[i] * B[i]
    return y


def expected(layer, x, rows, given):
    return flylora(
        x, *frozen_and_live(rows), rows["expert_bias"], layer.scale, layer.top_k, layer.signed
    )


def STORED(D, O, R, r, E):
    return R * (D + O + 1)


def ACTIVE(D, O, R, r, E, k):
    return R * (D + 1) + k * O if k < R else R * (D + O)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k is 0, allowed: 1 or more"),
        ({"rate": -0.1}, "rate is -0.1, allowed: 0 or more"),
        ({"rate": math.nan}, "rate is nan, allowed: 0 or more"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        FlyLoRA(nn.Linear(7, 5), **{"rank": 2} | settings)


def test_the_papers_settings_are_the_defaults():
    paper = {"rank": 32, "scale": 64 / 32, "top_k": 8, "rate": 0.01, "signed": False}
    settings = FlyLoRA(nn.Linear(64, 64)).settings()
    assert {key: settings[key] for key in paper} == paper


class TestFlyLoRA:
    @pytest.mark.parametrize(
        ("D", "r", "k", "p"), [(64, 8, 2, 16), (10, 4, 3, 7), (7, 5, 1, 1), (6, 3, 9, 6)]
    )
    def test_each_key_has_p_entries(self, D, r, k, p):
        layer = FlyLoRA(nn.Linear(D, 9), rank=r, top_k=k)
        layer.grow()
        assert ((layer.keys != 0).sum(1) == p).all() and len(layer.keys) == 2 * r
        assert not torch.equal(layer.frozen_A != 0, layer.A != 0) or p == D

    def test_keys_shrink_an_input_by_p_over_D_r_on_average(self):
        # D 24, r 16, p 24·4/16 = 6: r rows of p/D · 1/r² each. Of 2000 draws, 32000 rows, the
        # relative deviation is at most that of one entry: √((3 D/p - 1) / 32000) = .0185
        layer = FlyLoRA(nn.Linear(24, 24), rank=16, top_k=4)
        A = torch.stack([layer.fresh()["A"] for _ in range(2000)])
        for x in (torch.eye(24)[0], torch.eye(24)[23], torch.randn(24)):
            lengths = (A @ x).square().sum(-1) / x.square().sum()
            assert abs(lengths.mean() / (6 / (24 * 16)) - 1) < 5 * 0.0185

    def test_all_ranks_are_lora_with_frozen_keys(self):
        layer = grown("flylora", top_k=6)
        lora = LoRA(layer.base, rank=2, scale=layer.scale)
        lora.frozen_A, lora.frozen_B = layer.frozen_A, layer.frozen_B
        lora.A, lora.B = nn.Parameter(layer.A.clone()), nn.Parameter(layer.B.detach().clone())
        dy = torch.randn(40, 5, dtype=torch.float64)
        for module in (layer.eval(), lora):
            module(X).backward(dy)
        assert torch.allclose(layer(X), lora(X), atol=1e-12)
        assert torch.allclose(layer.B.grad, lora.B.grad, atol=1e-12)

    def test_training_moves_values_and_no_key(self):
        layer = grown("flylora", dtype=torch.float32)
        learning = {n: p for n, p in layer.named_parameters() if p.requires_grad}
        before = {key: layer.rows(key).detach().clone() for key in "AB"}
        optimiser = torch.optim.AdamW(learning.values(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            with context(layer):
                layer(X.float()).square().mean().backward()
            optimiser.step()
            layer.after_step()
        assert list(learning) == ["B"]
        assert torch.equal(layer.rows("A"), before["A"])
        assert not torch.equal(layer.rows("B"), before["B"])

    def test_two_tasks_on_the_same_keys_merge_exactly(self):
        first, second = grown("flylora", tasks=1, rank=5), grown("flylora", tasks=1, rank=5)
        second.load_state_dict(first.state_dict() | {"B": torch.randn(5, 5).double()})
        both = copy.deepcopy(first)
        both.B.data += second.B
        updates = [layer.eval()(X) - layer.base(X) for layer in (first, second, both)]
        assert torch.allclose(updates[0] + updates[1], updates[2], atol=1e-12)

    def test_by_size_or_by_sign(self):
        # z = (3, -4, 1); by size rank 1 speaks, by sign rank 0. A bias of 2 on rank 1: |-4 + 2| is
        # less than 3, so that by size rank 0 speaks; by sign 5 more are needed for rank 1
        for signed, bias, speaks in (
            (False, 0.0, 1),
            (False, 2.0, 0),
            (True, 0.0, 0),
            (True, 6.9, 0),
            (True, 7.1, 1),
        ):
            layer = FlyLoRA(nn.Linear(3, 3), rank=3, top_k=1, signed=signed)
            layer.A.copy_(torch.eye(3))
            layer.expert_bias[1] = bias
            g = dense_gate(layer, torch.tensor([3.0, -4.0, 1.0]))
            assert g.tolist() == torch.eye(3)[speaks].tolist()
