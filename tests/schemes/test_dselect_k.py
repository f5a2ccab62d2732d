"""DSelect-k against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import pytest
import torch
from layers import X, grown
from oracle import blocks, softmax
from torch import nn

from minimoe.adapt import context
from minimoe.schemes.dselect_k import DSelectK, smooth_step

SETTINGS = {"scale": 0.7, "selectors": 2, "bits": 3, "gamma": 1.5}
UNCLAIMED = {"support", "simplex", "degenerates_to_lora", "merge_is_equal"}  # laws
TASK_AGNOSTIC = {"code", "code_bias", "share", "share_bias"}


def step(t, gamma):
    if t <= -gamma / 2:
        return 0.0
    if t >= gamma / 2:
        return 1.0
    return -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5


def selected(x, rows, E, k, gamma):
    """Each selector's share of each expert, of one token."""
    found = []
    for j in range(k):
        shares = []
        for e in range(E):
            share, b = 1.0, 0
            while 2**b < E:
                row = b * k + j
                on = step(rows["code"][row] @ x + rows["code_bias"][row], gamma)
                share *= on if (e >> b) % 2 else 1 - on
                b += 1
            shares.append(share)
        found.append(shares)
    return found


def expected(layer, x, rows, given):
    w, E, k = [], layer.n_experts, layer.selectors
    for u in x:
        s = selected(u, rows, E, k, layer.gamma)
        a = softmax([rows["share"][j] @ u + rows["share_bias"][j] for j in range(k)])
        w.append([sum(a[j] * s[j][e] for j in range(k)) for e in range(E)])
    return blocks(x, rows["W0"], rows["b"], rows["A"], rows["B"], w, layer.scale)


AUX = {"x", "code", "code_bias"}


def expected_aux(layer, x, rows, given):
    each = [selected(u, rows, layer.n_experts, layer.selectors, layer.gamma) for u in x]
    return sum(1 / sum(shares) - 1 for s in each for shares in s) / len(x)


def STORED(D, O, R, r, E):
    return R * (D + O) + 2 * (3 + 1) * (D + 1)


def ACTIVE(D, O, R, r, E, k):
    return R * (D + O) + 2 * ({1: 0, 3: 2}[E] + 1) * (D + 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selectors": 0}, "selectors is 0, allowed: 1 or more"),
        ({"bits": -1}, "bits is -1, allowed: 0 or more"),
        ({"gamma": 0.0}, "gamma is 0.0, allowed: above 0"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        DSelectK(nn.Linear(7, 5), **{"rank": 2} | settings)


def says(c, E):
    """What one selector of codes c, the highest bit first, gives each of E experts."""
    layer = DSelectK(nn.Linear(1, 1).double(), rank=1, selectors=1, bits=len(c))
    for _ in range(E - 1):
        layer.grow()
    layer.code.data.zero_()
    layer.code_bias.data = torch.tensor(c[::-1], dtype=torch.float64)
    return layer, layer.gate(torch.ones(1, dtype=torch.float64)).weight.detach()


class TestDSelectK:
    def test_the_step_by_hand(self):
        t = torch.tensor([-2.0, -0.5, -0.25, 0.0, 0.25, 0.5, 2.0], dtype=torch.float64)
        assert smooth_step(t, 1.0).tolist() == [0, 0, 0.15625, 0.5, 0.84375, 1, 1]
        t = torch.randn(50, dtype=torch.float64)
        assert torch.allclose(smooth_step(t, 1.7) + smooth_step(-t, 1.7), torch.ones(50).double())
        t = torch.tensor([0.6, -0.6, 0.4], requires_grad=True)
        smooth_step(t, 1.0).sum().backward()
        assert t.grad[:2].tolist() == [0, 0] and t.grad[2] > 0

    def test_by_hand(self):
        # bits (.84375, .15625): of 00, 01, 10, 11
        _, w = says([0.25, -0.25], 4)
        wanted = [0.15625 * 0.84375, 0.15625**2, 0.84375**2, 0.84375 * 0.15625]
        assert torch.allclose(w, torch.tensor(wanted).double()) and math.isclose(w.sum(), 1)
        layer, w = says([0.0, 0.0], 3)
        assert w.tolist() == [0.25, 0.25, 0.25]
        with context(layer) as batch:
            layer(torch.ones(4, 1).double())
        assert math.isclose(batch.aux_loss.item(), 1 / 0.75 - 1)
        assert says([1.0, -1.0], 4)[1].tolist() == [0, 0, 1, 0]

    def test_a_selector_of_nobody_is_lost_and_no_loss_is_infinite(self):
        layer, w = says([1.0, 1.0], 3)
        assert w.tolist() == [0, 0, 0]
        with context(layer) as batch:
            layer(torch.ones(4, 1).double())
        assert math.isclose(batch.aux_loss.item(), 1e6 - 1)

    def test_weights_of_2_to_the_m_experts_are_shares(self):
        layer = grown("dselect_k", tasks=4)
        np.testing.assert_allclose(layer.gate(X).weight[:, ::2].sum(-1).detach(), 1, rtol=1e-12)
        with context(layer) as batch:
            layer(X)
        assert abs(batch.aux_loss) < 1e-12

    def test_beyond_its_bits_it_does_not_grow(self):
        layer = grown("dselect_k", tasks=8)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        with pytest.raises(RuntimeError, match=r"DSelectK has 8 experts, as many as 3 bits allow"):
            layer.grow()
        assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
