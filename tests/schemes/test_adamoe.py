"""AdaMoE against its oracle, numbers worked by hand, and what is its own."""

import math

import torch
from layers import X, grown
from oracle import blocks, softmax
from torch import nn

from minimoe.schemes.adamoe import AdaMoE

SETTINGS = {"scale": 0.7, "top_k": 2}
UNCLAIMED = {"simplex", "degenerates_to_lora", "merge_is_equal"}  # laws


def expected(layer, x, rows, given):
    """Shen et al., 2510.14300: the largest shares, each with a number of its own added."""
    W, S, w = rows["router"], rows["S"], []
    for u in x:
        p = softmax([W[e] @ u for e in range(len(W))])
        kept = sorted(range(len(W)), key=lambda e: -p[e])[: layer.top_k]
        w.append([p[e] + S[e] @ u if e in kept else 0.0 for e in range(len(W))])
    return blocks(x, rows["W0"], rows["b"], rows["A"], rows["B"], w, layer.scale)


def STORED(D, O, R, r, E):
    return R * (D + O) + 2 * E * D


def ACTIVE(D, O, R, r, E, k):
    return E * D + k * D + k * r * (D + O)


class TestAdaMoE:
    def test_by_hand(self):
        # p (.5, .3, .2) of which two are kept, s (-.1, .2, 9): (.4, .5), which sum to .9
        layer = AdaMoE(nn.Linear(1, 1).double(), rank=1)
        layer.grow(), layer.grow()
        layer.frozen_router[:, 0] = torch.tensor([0.5, 0.3]).log()
        layer.router.data[0, 0] = math.log(0.2)
        layer.frozen_S[:, 0], layer.S.data[0, 0] = torch.tensor([-0.1, 0.2]), 9.0
        gate = layer.gate(torch.ones(1, dtype=torch.float64))
        assert gate.idx.tolist() == [0, 1]
        assert torch.allclose(gate.weight, torch.tensor([0.4, 0.5]).double())

    def test_the_second_router_changes_no_choice(self):
        layer = grown("adamoe", tasks=5)
        before = layer.gate(X).idx
        layer.S.data.mul_(100), layer.frozen_S.mul_(-100)
        assert torch.equal(layer.gate(X).idx, before)

    def test_at_birth_it_is_a_top_k_that_is_not_renormalised(self):
        layer = AdaMoE(nn.Linear(7, 5).double(), rank=2, top_k=2)
        for _ in range(3):
            layer.grow()
        w = layer.gate(X).weight[:, ::2]
        p = (X @ layer.rows("router").T).softmax(-1).topk(2).values
        assert torch.allclose(w, p, rtol=0, atol=1e-15)
