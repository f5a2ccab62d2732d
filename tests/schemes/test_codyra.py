"""CoDyRA against its oracle, numbers worked by hand, and what is its own."""

import math

import pytest
import torch
from layers import X, arrays, grown
from oracle import base
from torch import nn

from minimoe import LoRA
from minimoe.schemes.codyra import CoDyRA

SETTINGS = {"scale": 0.7, "kappa": 0.05, "begin": 0, "end": 10}
UNCLAIMED = {"support", "simplex"}  # laws


def expected(layer, x, rows, given):
    """Lu et al., 2412.01004: each rank at its own weight, whatever x is."""
    y = base(x, rows["W0"], rows["b"])
    for t in range(len(x)):
        for i in range(len(rows["A"])):
            y[t] += layer.scale * rows["w"][i] * (x[t] @ rows["A"][i]) * rows["B"][i]
    return y


def STORED(D, O, R, r, E):
    return R * (D + O + 1) + E


def ACTIVE(D, O, R, r, E, k):
    return R * (D + O + 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kappa": -1.0}, "kappa is -1.0, allowed: 0 or more"),
        ({"kappa": math.nan}, "kappa is nan, allowed: 0 or more"),
        ({"begin": -1}, "begin is -1, allowed: 0 to below end 1000"),
        ({"begin": 9, "end": 9}, "begin is 9, allowed: 0 to below end 9"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        CoDyRA(nn.Linear(7, 5), **{"rank": 2} | settings)


def test_the_codes_settings_are_the_defaults():
    settings = CoDyRA(nn.Linear(64, 64)).settings()
    assert settings == {"rank": 16, "scale": 1.0, "kappa": 7e-4, "begin": 500, "end": 1000}


def of(*w, **settings):
    """A layer with these weights."""
    layer = CoDyRA(nn.Linear(9, 9).double(), rank=len(w), **{"begin": 0, "end": 1} | settings)
    layer.w.data.copy_(torch.tensor(w, dtype=torch.float64))
    return layer


class TestCoDyRA:
    def test_weights_start_as_N_0_1(self):
        # of 900, the mean's deviation is 1 / 30, that of the standard deviation 1 / √1800
        w = CoDyRA(nn.Linear(900, 900), rank=900).w
        assert abs(w.mean()) < 5 / 30 and abs(w.std() - 1) < 5 / 1800**0.5

    def test_a_proximal_step_by_hand(self):
        layer = of(0.3, -0.02, 0.05, -0.4, 0.08, kappa=0.05)
        layer.after_step()
        # .08 leaves .03: the dead zone is κ, not 2 κ
        wanted = torch.tensor([0.25, 0.0, 0.0, -0.35, 0.03], dtype=torch.float64)
        assert torch.allclose(layer.w, wanted, atol=1e-12)
        assert (layer.w[1:3] == 0).all()

    def test_kappa_rises_in_a_straight_line_and_anew_for_each_task(self):
        # .1 in the end. Steps 1 and 2 are dense; from 2 to 6 it rises by a quarter of .1
        layer = of(1.0, kappa=0.1, begin=2, end=6)
        for task in range(2):
            took = []
            for _ in range(8):
                before = layer.w.item()
                layer.after_step()
                took.append(before - layer.w.item())
            wanted = [0.0, 0.0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1]
            assert torch.allclose(torch.tensor(took), torch.tensor(wanted), atol=1e-9), task
            layer.grow()
            layer.w.data.fill_(1.0)

    def test_zero_stays_zero_while_the_gradients_step_is_below_kappa(self):
        for step, w in ((0.04, 0.0), (0.06, 0.01), (-0.06, -0.01)):
            layer = of(0.0, kappa=0.05)
            optimiser = torch.optim.SGD([layer.w], lr=1.0)
            layer.w.grad = torch.tensor([-step], dtype=torch.float64)
            optimiser.step()
            layer.after_step()
            assert math.isclose(layer.w.item(), w, abs_tol=1e-12)

    def test_frozen_weights_do_not_shrink(self):
        layer = grown("codyra")
        frozen, live = layer.frozen_w.clone(), layer.w.detach().clone()
        layer.after_step()
        assert torch.equal(layer.frozen_w, frozen) and not torch.equal(layer.w, live)

    def test_the_penalty_that_a_proximal_step_is_of(self):
        # w' = argmin of (w' - w)² / 2 + κ |w'|, by a fine grid
        grid = torch.linspace(-1, 1, 20001, dtype=torch.float64)
        for w in (0.3, -0.02, 0.7, -0.31):
            layer = of(w, kappa=0.1)
            layer.after_step()
            cost = (grid - w).square() / 2 + 0.1 * grid.abs()
            assert abs(grid[cost.argmin()] - layer.w) < 1e-4

    def test_a_rank_of_weight_0_says_nothing_for_ever_and_is_not_read(self):
        layer = grown("codyra", tasks=1)
        layer.w.data[0] = 0.0
        layer.grow()
        layer.w.data.fill_(1.0)
        before = layer(X).detach()
        layer.frozen_A[0], layer.frozen_B[0] = 9.0, 9.0
        assert torch.equal(layer(X), before)
        assert layer.speaking() == 3 * (7 + 5) and layer.active() == 4 + 3 * (7 + 5)
        assert layer.ranks == 4  # and keeps its place

    def test_merged_into_W0_it_answers_the_same_and_dropping_what_is_0_changes_nothing(self):
        layer = grown("codyra")
        layer.frozen_w[1] = 0.0
        want = layer(X).detach()
        n = {name: torch.tensor(rows) for name, rows in arrays(layer).items()}
        some = n["w"] != 0
        W = n["W0"] + 0.7 * (n["B"][some].T * n["w"][some]) @ n["A"][some]
        assert torch.allclose(X @ W.T + n["b"], want, atol=1e-12)
        layer.merge()
        assert torch.allclose(layer.base.weight, W, atol=1e-12)
        assert torch.allclose(layer(X), want, atol=1e-12)

    def test_at_weights_of_1_it_is_lora(self):
        layer = grown("codyra", kappa=0.0)
        layer.frozen_w.fill_(1), layer.w.data.fill_(1)
        lora = LoRA(layer.base, rank=2, scale=0.7)
        lora.grow(), lora.grow()
        rows = {
            k: t for k, t in layer.state_dict().items() if k[-1] in "AB" or k in ("weight", "bias")
        }
        lora.load_state_dict(rows)
        assert torch.allclose(layer(X), lora(X), atol=1e-13)

    def test_a_rank_that_the_task_does_not_need_falls_silent(self):
        # y is one direction's answer: of four ranks, which start alike, few are needed
        torch.manual_seed(0)
        x = torch.randn(256, 9).double()
        layer = of(1.0, 1.0, 1.0, 1.0, kappa=0.02, begin=100, end=200)
        y = layer.base(x).detach() + torch.outer(x[:, 0], torch.ones(9).double())
        optimiser = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], 0.05)
        for _ in range(1000):
            optimiser.zero_grad()
            (layer(x) - y).square().mean().backward()
            optimiser.step()
            layer.after_step()
        assert 1 <= (layer.w != 0).sum() < 4
