"""MoFME against its oracle, numbers worked by hand, and what is its own."""

import pytest
import torch
from layers import X, grown, lora_of
from oracle import base, softmax
from torch import nn

from minimoe import LoRAMoE
from minimoe.schemes.mofme import MoFME
from minimoe.schemes.mosld import MoSLD

SETTINGS = {"scale": 0.7, "top_k": 2}
TASK_AGNOSTIC = {"A", "B"}
UNCLAIMED = {"equation", "merge_is_equal"}  # laws


def expected(layer, x, rows, given):
    """Of what the shared keys see, a mean of the kept experts' modulations, then the values."""
    A, B, W, r = rows["A"], rows["B"], rows["router"], len(rows["A"])
    y = base(x, rows["W0"], rows["b"])
    for t in range(len(x)):
        h = [A[i] @ x[t] for i in range(r)]
        l = [W[e] @ x[t] for e in range(len(W))]
        kept = sorted(range(len(W)), key=lambda e: -l[e])[: layer.top_k]
        for w, e in zip(softmax([l[e] for e in kept]), kept, strict=True):
            for i in range(r):
                own = e * r + i
                gamma = sum(rows["gamma"][own, j] * h[j] for j in range(r))
                beta = sum(rows["beta"][own, j] * h[j] for j in range(r))
                u = (gamma + rows["gamma_bias"][own]) * h[i] + beta + rows["beta_bias"][own]
                y[t] += layer.scale * w * u * B[i]
    return y


def STORED(D, O, R, r, E):
    return r * (D + O) + E * D + E * (2 * r**2 + 2 * r)


def ACTIVE(D, O, R, r, E, k):
    return r * (D + O) + E * D + k * (2 * r**2 + 2 * r)


def SPEAKING(D, O, r, K):
    return r * (D + O)  # the same for all experts


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"^top_k is 0, allowed: 1 or more$"):
        MoFME(nn.Linear(7, 5), rank=2, top_k=0)


def still(layer, gamma=1.0):
    """The layer, with constant modulations: γ as given, β = 0."""
    for name in ("gamma", "gamma_bias", "beta", "beta_bias"):
        for key in (name, f"frozen_{name}"):
            getattr(layer, key).data.zero_()
    layer.frozen_gamma_bias += gamma[:-2] if isinstance(gamma, torch.Tensor) else gamma
    layer.gamma_bias.data += gamma[-2:] if isinstance(gamma, torch.Tensor) else gamma
    return layer


class TestMoFME:
    def test_by_hand(self):
        # h = 2; γ = 3 · 2 + 1 = 7 and β = 5 · 2 + 4 = 14: u = 7 · 2 + 14 = 28, y = .5 · 28 · 10
        layer = MoFME(nn.Linear(1, 1, bias=False).double(), rank=1, scale=0.5)
        for name, value in {
            "A": 2.0,
            "B": 10.0,
            "gamma": 3.0,
            "beta": 5.0,
            "beta_bias": 4.0,
        }.items():
            getattr(layer, name).data.fill_(value)
        layer.base.weight.data.zero_()
        assert layer.gamma_bias.item() == 1.0  # at birth
        assert layer(torch.ones(1, dtype=torch.float64)).item() == pytest.approx(140.0)

    def test_two_experts_have_a_mean_of_modulations(self):
        # logits alike: the mean of u = 1 · 2 and 3 · 2 is 4
        layer = MoFME(nn.Linear(1, 1, bias=False).double(), rank=1)
        layer.grow()
        for tensor, value in {
            layer.A: 2.0, layer.B: 1.0, layer.router: 0.0, layer.gamma_bias: 3.0,
        }.items():  # fmt: skip
            tensor.data.fill_(value)
        layer.frozen_router.zero_(), layer.base.weight.data.zero_()
        assert layer(torch.ones(1, dtype=torch.float64)).item() == pytest.approx(4.0)

    @pytest.mark.parametrize("top_k", [1, 2, 3])
    def test_as_they_start_modulations_leave_lora_whatever_the_router_says(self, top_k):
        layer = still(grown("mofme", top_k=top_k))
        assert torch.allclose(layer(X), lora_of(layer, layer.A, layer.B)(X), rtol=0, atol=1e-12)
        fresh = MoFME(nn.Linear(7, 5), rank=2)
        assert (fresh.gamma_bias == 1).all()
        assert not any(rows.any() for rows in (fresh.gamma, fresh.beta, fresh.beta_bias))

    def test_constant_modulations_are_mosld_with_tied_values(self):
        gamma = torch.randn(6, dtype=torch.float64)
        layer = still(grown("mofme"), gamma)
        other = MoSLD(layer.base, rank=2, scale=0.7, top_k=2, dropout=0.0)
        other.grow(), other.grow()
        other.A.data, other.router.data = layer.A.data, layer.router.data
        other.frozen_router = layer.frozen_router
        values = gamma.unsqueeze(-1) * layer.B.detach().repeat(3, 1)
        other.frozen_B, other.B.data = values[:4], values[4:]
        assert torch.allclose(layer(X), other(X), rtol=0, atol=1e-12)

    def test_an_expert_is_quadratic_in_its_input(self):
        layer = grown("mofme", tasks=1)
        y = [layer(a * X) - layer.base(a * X) for a in (0.0, 1.0, 2.0, 3.0)]
        third = y[3] - 3 * y[2] + 3 * y[1] - y[0]
        assert torch.allclose(third, torch.zeros_like(third), atol=1e-10)
        assert (y[2] - 2 * y[1] + y[0]).abs().max() > 0.1

    def test_a_task_costs_what_it_says(self):
        layer = MoFME(nn.Linear(64, 64), rank=4)
        before = sum(tensor.numel() for tensor in layer.state_dict().values())
        layer.grow()
        after = sum(tensor.numel() for tensor in layer.state_dict().values())
        assert after - before == 2 * 4**2 + 2 * 4 + 64 < 4 * (64 + 64)

    def test_the_router_is_lora_moes(self):
        layer = grown("mofme")
        other = LoRAMoE(layer.base, rank=2, top_k=2)
        other.grow(), other.grow()
        other.router.data, other.frozen_router = layer.router.data, layer.frozen_router
        got, want = layer.gate(X), other.double().gate(X)
        assert torch.equal(got.idx, want.idx) and torch.equal(got.weight, want.weight)
