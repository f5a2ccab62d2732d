"""LoRA against its oracle, numbers worked by hand, and what is its own."""

import pytest
import torch
from layers import frozen_and_live, grown
from oracle import base
from torch import nn

from minimoe import LoRA

SETTINGS = {"scale": 0.7}
UNCLAIMED = {"support", "simplex"}  # laws


def lora(x, W0, b, A, B, scale):
    """Hu et al., 2106.09685, section 4.1."""
    y = base(x, W0, b)
    for t in range(len(x)):
        for i in range(len(A)):
            y[t] += scale * (x[t] @ A[i]) * B[i]
    return y


def expected(layer, x, rows, given):
    return lora(x, *frozen_and_live(rows), layer.scale)


def STORED(D, O, R, r, E):
    return R * (D + O)


def ACTIVE(D, O, R, r, E, k):
    return R * (D + O)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0, allowed: 1 to 5 for this layer"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        LoRA(nn.Linear(7, 5), **{"rank": 2} | settings)


class TestLoRA:
    def test_merged_equals_unmerged_and_unmerge_restores_every_bit(self):
        layer = grown(LoRA, scale=0.3)
        x = torch.randn(6, 7, dtype=torch.float64)
        y, W0 = layer(x), layer.base.weight.clone()
        for _ in range(5):
            layer.merge()
            assert not torch.equal(layer.base.weight, W0)
            assert torch.allclose(layer(x), y, atol=1e-12)
            layer.unmerge()
            assert torch.equal(layer.base.weight, W0)

    def test_the_update_has_at_most_R_ranks(self):
        layer = grown(LoRA, D=20, O=20, rank=2, tasks=3)
        W0 = layer.base.weight.clone()
        layer.merge()
        assert torch.linalg.matrix_rank(layer.base.weight - W0) == 6

    def test_a_merged_layer_neither_grows_nor_saves(self):
        layer = grown(LoRA)
        with pytest.raises(RuntimeError, match="not merged"):
            layer.unmerge()
        layer.merge()
        with pytest.raises(RuntimeError, match="cannot be merged: it is merged already"):
            layer.merge()
        for call in (layer.grow, layer.state_dict, lambda: layer.load_state_dict({}, strict=False)):
            with pytest.raises(RuntimeError, match=r"merged: call unmerge\(\) first"):
                call()

    def test_by_hand(self):
        # z = (2·1 + 0·1, 1·1 + 1·1) = (2, 2); update = .5 · (2·(1, 0) + 2·(3, 1)) = (4, 1)
        layer = LoRA(nn.Linear(2, 2, bias=False), rank=2, scale=0.5)
        nn.init.eye_(layer.base.weight)
        layer.A.data = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
        layer.B.data = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
        assert layer(torch.ones(2)).tolist() == [5.0, 2.0]
