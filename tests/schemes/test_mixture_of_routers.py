"""Mixture of Routers against its oracle, numbers worked by hand, and what is its own."""

import pytest
import torch
from layers import X, grown
from oracle import blocks, softmax
from torch import nn

from minimoe import LoRAMoE
from minimoe.schemes.mixture_of_routers import MixtureOfRouters

SETTINGS = {"scale": 0.7, "top_k": 2, "routers": 3}
UNCLAIMED = {"merge_is_equal"}  # laws
TASK_AGNOSTIC = {"Q"}


def expected(layer, x, rows, given):
    """A mean of several routers' shares, by the main router's; the largest of it, as shares."""
    M, Q, w = layer.routers, rows["Q"], []
    W = rows["router"].reshape(-1, M, len(x[0]))  # (E, M, D)
    for u in x:
        q = softmax([Q[j] @ u for j in range(M)])
        P = [softmax([W[e, j] @ u for e in range(len(W))]) for j in range(M)]
        s = [sum(q[j] * P[j][e] for j in range(M)) for e in range(len(W))]
        kept = sorted(range(len(W)), key=lambda e: -s[e])[: layer.top_k]
        w.append([s[e] / sum(s[i] for i in kept) if e in kept else 0.0 for e in range(len(W))])
    return blocks(x, rows["W0"], rows["b"], rows["A"], rows["B"], w, layer.scale)


def STORED(D, O, R, r, E):
    return R * (D + O) + (E + 1) * 3 * D


def ACTIVE(D, O, R, r, E, k):
    return (E + 1) * 3 * D + k * r * (D + O)


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"^routers is 0, allowed: 1 or more$"):
        MixtureOfRouters(nn.Linear(7, 5), rank=2, routers=0)


class TestMixtureOfRouters:
    def test_by_hand(self):
        # q (1/2, 1/2), P (.8, .2, 0) and (.2, .2, .6): s (.5, .2, .3), of which two: (.625, .375)
        layer = MixtureOfRouters(nn.Linear(1, 1).double(), rank=1, routers=2)
        layer.grow(), layer.grow()
        P = torch.tensor([[0.8, 0.2, 1e-300], [0.2, 0.2, 0.6]], dtype=torch.float64)
        layer.frozen_router[:, 0] = P[:, :2].log().T.flatten()
        layer.router.data[:, 0] = P[:, 2].log()
        layer.Q.data.zero_()
        gate = layer.gate(torch.ones(1, dtype=torch.float64))
        assert gate.idx.tolist() == [0, 2]
        assert torch.allclose(gate.weight, torch.tensor([0.625, 0.375]).double())

    def test_one_router_is_lora_moe(self):
        layer = grown("mixture_of_routers", routers=1)
        other = LoRAMoE(layer.base, rank=2, scale=0.7, top_k=2)
        other.grow(), other.grow()
        other.load_state_dict({k: t for k, t in layer.state_dict().items() if k != "Q"})
        assert torch.allclose(layer(X), other(X), rtol=0, atol=1e-13)

    def test_where_all_routers_agree_the_main_one_has_no_gradient(self):
        layer = grown("mixture_of_routers")
        for rows in (layer.router.data, layer.frozen_router):
            rows.copy_(rows[::3].repeat_interleave(3, 0))
        layer(X).square().sum().backward()
        assert layer.Q.grad.abs().max() < 1e-12 < layer.router.grad.abs().max()
