"""OLoRA against its oracle, numbers worked by hand, and what is its own."""

import math

import pytest
import torch
from layers import frozen_and_live, grown
from test_lora import lora
from torch import nn

from minimoe.schemes.olora import OLoRA

SETTINGS = {"scale": 0.7, "orthogonality": 0.3}
UNCLAIMED = {"support", "simplex"}  # laws


def overlap(old, new):
    """Wang et al., 2310.14152, eq. 8: sum of (a · b)² over old and new keys."""
    return sum(sum(p * q for p, q in zip(a, b, strict=True)) ** 2 for a in old for b in new)


def expected(layer, x, rows, given):
    return lora(x, *frozen_and_live(rows), layer.scale)


AUX = {"A"}


def expected_aux(layer, x, rows, given):
    F = len(layer.frozen_A)
    return layer.orthogonality * overlap(rows["A"][:F], rows["A"][F:])


def STORED(D, O, R, r, E):
    return R * (D + O)


def ACTIVE(D, O, R, r, E, k):
    return R * (D + O)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"orthogonality": -0.5}, "orthogonality is -0.5, allowed: 0 or more"),
        ({"orthogonality": math.nan}, "orthogonality is nan, allowed: 0 or more"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        OLoRA(nn.Linear(7, 5), **{"rank": 2} | settings)


class TestOLoRA:
    def test_penalty_by_hand(self):
        # ((1, 0, 0) · (3, -1, 5))² + ((0, 2, 0) · (3, -1, 5))² = 9 + 4, times 1/2
        layer = OLoRA(nn.Linear(3, 3), rank=1, orthogonality=0.5)
        layer.grow()
        layer.grow()
        layer.frozen_A = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        for new, aux in (([3.0, -1.0, 5.0], 6.5), ([0.0, 0.0, 4.0], 0.0), ([0.0, 1.0, 4.0], 2.0)):
            layer.A.data = torch.tensor([new])
            assert layer.penalty() == aux

    def test_penalty_is_0_only_where_row_spaces_are_orthogonal(self):
        layer, frame = grown("olora"), torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0]
        layer.frozen_A = torch.randn(4, 4, dtype=torch.float64) @ frame[:4]
        layer.A.data = torch.randn(2, 3, dtype=torch.float64) @ frame[4:]
        assert layer.penalty() < 1e-24
        layer.A.data += 1e-3 * frame[0]
        assert layer.penalty() > 1e-7

    def test_the_first_task_is_free(self):
        layer = grown("olora", tasks=1)
        assert layer.penalty() == 0
