"""Input Domain Aware MoE against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import pytest
import torch
from layers import X, arrays, grown
from oracle import blocks, softmax
from torch import nn

from minimoe.adapt import context
from minimoe.continual.probe import dense_gate
from minimoe.schemes.input_domain_aware import InputDomainAware, log_density

SETTINGS = {"scale": 0.7, "top_k": 2, "components": 3, "code": 4}
UNCLAIMED = {"exact_gradient", "merge_is_equal"}  # laws


def density(x, e, P, mean, spread, mix, code_of):
    """Hua et al., 2510.16448: ln of a mixture of Gaussians of the code, less half the square of
    what the code leaves out. code_of: the encoders that make the code of the first."""
    E = len(mix)
    F, M = len(P) // E, len(mix[0])
    total, pi = 0.0, softmax(list(mix[e]))
    for m in range(M):
        p = pi[m]
        for f in range(F):
            s, u = math.exp(spread[e * M + m][f]), code_of[e * F + f] @ x
            p *= math.exp(-((u - mean[e * M + m][f]) ** 2) / (2 * s)) / math.sqrt(2 * math.pi * s)
        total += p
    again = sum((P[e * F + f] @ x) * P[e * F + f] for f in range(F))
    return math.log(total) - ((x - again) @ (x - again)) / 2


def of(rows):
    return [rows[name] for name in ("encoder", "mean", "spread", "mix")]


def expected(layer, x, rows, given):
    """A softmax over the largest of l. The gate is worked out once: no gradient goes through it."""
    if "gate" not in rows:
        rows["gate"] = []
        for u in x:
            E = range(layer.n_experts)
            l = [density(u, e, *of(rows), rows["encoder"]) for e in E]
            kept = sorted(E, key=lambda e: -l[e])[: layer.top_k]
            shares = dict(zip(kept, softmax([l[e] for e in kept]), strict=True))
            rows["gate"].append([shares.get(e, 0.0) for e in E])
    return blocks(x, rows["W0"], rows["b"], rows["A"], rows["B"], rows["gate"], layer.scale)


AUX = {"encoder", "mean", "spread", "mix"}
AUX_ONLY = AUX  # the task's loss does not shape a density


def expected_aux(layer, x, rows, given):
    E, still = layer.n_experts, arrays(layer)["encoder"]  # a code's encoder is a constant there
    return -sum(density(u, E - 1, *of(rows), still) for u in x) / len(x)


def STORED(D, O, R, r, E):
    return R * (D + O) + E * (4 * D + 2 * 3 * 4 + 3)


def ACTIVE(D, O, R, r, E, k):
    return E * (4 * D + 2 * 3 * 4 + 3) + k * r * (D + O)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"components": 0}, "components is 0, allowed: 1 or more"),
        ({"code": 0}, "code is 0, allowed: 1 or more"),
        ({"top_k": 0}, "top_k is 0, allowed: 1 or more"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        InputDomainAware(nn.Linear(7, 5), **{"rank": 2} | settings)


def two(**settings):
    """Of two experts, each a unit Gaussian of the whole of x (2,), 3 apart."""
    settings = {"rank": 1, "components": 1, "code": 2} | settings
    layer = InputDomainAware(nn.Linear(2, 2).double(), **settings)
    layer.grow()
    for name in ("encoder", "frozen_encoder"):
        getattr(layer, name).data.copy_(torch.eye(2))
    layer.frozen_mean.copy_(torch.tensor([[1.0, 1.0]]))
    layer.mean.data.copy_(torch.tensor([[1.0, 4.0]]))
    return layer


class TestInputDomainAware:
    def test_by_hand(self):
        # at a mean, d = 3 from the other's: 1 / (1 + e^(-9/2)) = .98901
        layer = two()
        g = dense_gate(layer, torch.tensor([[1.0, 1.0], [1.0, 4.0], [7.0, 2.5]]).double())
        wanted = torch.tensor([[0.98901, 0.01099], [0.01099, 0.98901], [0.5, 0.5]]).double()
        assert torch.allclose(g, wanted, rtol=0, atol=1e-5)

    def test_one_density_by_hand(self):
        # x = (3, 2), u = 3: half of N(u; 1, 4) and half of N(u; 3, 1), and 2² / 2 left out
        l = log_density(
            torch.tensor([3.0, 2.0]),
            torch.tensor([[1.0, 0.0]]),
            torch.tensor([[1.0], [3.0]]),
            torch.tensor([[math.log(4)], [0.0]]),
            torch.zeros(1, 2),
        )
        first = math.exp(-0.5) / math.sqrt(8 * math.pi)
        wanted = math.log(first / 2 + 1 / math.sqrt(2 * math.pi) / 2) - 2
        assert math.isclose(l.item(), wanted, rel_tol=1e-6)

    def test_one_gaussian_each_of_one_encoder_and_spread_is_a_linear_router(self):
        # ln N(u; μ, 1) = u · μ - ‖μ‖² / 2, and what is common to all
        layer = grown("input_domain_aware", components=1, top_k=3)
        layer.frozen_encoder.copy_(layer.encoder.data.repeat(2, 1))
        layer.frozen_spread.fill_(0.3), layer.spread.data.fill_(0.3)
        mean = layer.rows("mean")
        W = mean @ layer.encoder / math.exp(0.3)
        b = -mean.square().sum(-1) / 2 / math.exp(0.3)
        wanted = (X @ W.T + b).softmax(-1)
        g = dense_gate(layer, X)[:, ::2]
        assert torch.allclose(g, wanted, rtol=0, atol=1e-12)

    def test_old_experts_densities_of_old_inputs_keep_every_bit(self):
        layer = grown("input_domain_aware", dtype=torch.float32)
        x = X.float()
        before = [layer.logits(x)]
        for _ in range(4):
            layer.grow()
            optimiser = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], 0.1)
            for step in range(3):
                optimiser.zero_grad()
                with context(layer) as batch:
                    y = layer(torch.randn(20 + step, 7) + 1)
                (y.square().mean() + batch.aux_loss).backward()
                optimiser.step()
            before.append(layer.logits(x))
        for earlier in before:
            assert torch.equal(before[-1][:, : earlier.shape[1]], earlier)

    def test_the_tasks_loss_teaches_no_density_and_the_densitys_no_expert(self):
        layer = grown("input_domain_aware")
        with context(layer) as batch:
            layer(X).square().sum().backward()
        assert layer.A.grad.any() and layer.B.grad.any()
        assert all(getattr(layer, name).grad is None for name in AUX)
        layer.zero_grad()
        batch.aux_loss.backward()
        assert layer.A.grad is None and all(getattr(layer, name).grad.any() for name in AUX)

    def test_padding_is_not_learned(self):
        layer, x = grown("input_domain_aware"), X.view(10, 4, 7)
        mask = torch.arange(4).expand(10, 4) < 3
        with context(layer, mask=mask) as some:
            layer(x)
        with context(layer) as kept:
            layer(x[:, :3])
        assert math.isclose(some.aux_loss.item(), kept.aux_loss.item(), rel_tol=1e-12)

    def test_a_density_learns_its_tasks_inputs_and_an_encoder_becomes_orthonormal(self):
        torch.manual_seed(0)
        layer = InputDomainAware(nn.Linear(8, 5), rank=2, top_k=1, components=2, code=3)
        planes = torch.linalg.qr(torch.randn(2, 8, 3))[0].mT

        def draw(task, n=200):
            return 3 * torch.randn(n, 3) @ planes[task] + 0.3 * torch.randn(n, 8)

        for task in range(2):
            if task:
                layer.grow()
            optimiser = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], 0.02)
            for _ in range(400):
                optimiser.zero_grad()
                with context(layer) as batch:
                    layer(draw(task))
                batch.aux_loss.backward()
                optimiser.step()
            P = layer.encoder.detach()
            np.testing.assert_allclose(P @ P.T, np.eye(3), atol=0.1)
        for task in range(2):  # of both, at the end
            assert (layer.logits(draw(task)).argmax(-1) == task).float().mean() > 0.98
