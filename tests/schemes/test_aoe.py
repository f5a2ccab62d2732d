"""AoE against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import pytest
import torch
from layers import X, arrays, grown
from oracle import blocks, softmax
from torch import nn

from minimoe.continual.probe import dense_gate
from minimoe.schemes.aoe import AoE

SETTINGS = {"scale": 0.7, "top_k": 2}
UNCLAIMED = {"simplex", "degenerates_to_lora", "merge_is_equal"}  # laws


def expected(layer, x, rows, given):
    """Lv et al., 2501.13074: a softmax of the experts' lengths, of which the largest are kept."""
    A, E, w = rows["A"], layer.n_experts, []
    r = len(A) // E
    for u in x:
        l = [math.sqrt(sum((u @ A[i]) ** 2 for i in range(e * r, (e + 1) * r))) for e in range(E)]
        p = softmax(l)
        kept = sorted(range(E), key=lambda e: -p[e])[: layer.top_k]
        w.append([p[e] if e in kept else 0.0 for e in range(E)])
    return blocks(x, rows["W0"], rows["b"], A, rows["B"], w, layer.scale)


def STORED(D, O, R, r, E):
    return R * (D + O)


def ACTIVE(D, O, R, r, E, k):
    return R * D + k * r * O


class TestAoE:
    def test_by_hand(self):
        # z = (3, 4 | 0, 2 | 1, 0): lengths 5, 2, 1. Shares e⁵, e², e¹ of their sum, 148.41 + 7.39
        # + 2.72 = 158.52: the first two are kept, and sum to .983
        layer = AoE(nn.Linear(6, 6).double(), rank=2, top_k=2)
        layer.grow(), layer.grow()
        layer.frozen_A, layer.A.data = torch.eye(6).double()[:4], torch.eye(6).double()[4:]
        g = dense_gate(layer, torch.tensor([3.0, 4.0, 0.0, 2.0, 1.0, 0.0]).double())
        wanted = torch.tensor([0.93624, 0.93624, 0.04661, 0.04661, 0.0, 0.0]).double()
        assert torch.allclose(g, wanted, atol=1e-5)

    @pytest.mark.parametrize("top_k", [1, 3, 6])
    def test_experts_of_one_rank_go_by_its_size(self, top_k):
        layer = grown("aoe", experts=2, top_k=top_k)
        l = layer.logits(X)
        assert torch.allclose(l, (X @ layer.keys.T).abs(), atol=1e-13)
        rows = arrays(layer)
        np.testing.assert_allclose(
            layer(X).detach(), expected(layer, X.numpy(), rows, {}), rtol=0, atol=1e-12
        )

    def test_an_input_turned_round_has_the_same_gate_and_under_mora_it_has_not(self):
        layer, mora = grown("aoe"), grown("mora", top_k=2)
        assert torch.equal(dense_gate(layer, X), dense_gate(layer, -X))
        update = layer(X) - layer.base(X)
        turned = layer(-X) - layer.base(-X)
        assert torch.allclose(turned, -update, atol=1e-12)
        assert not torch.allclose(dense_gate(mora, X), dense_gate(mora, -X))

    def test_a_louder_input_has_a_sharper_gate(self):
        layer = grown("aoe", top_k=3)
        one, ten = (dense_gate(layer, c * X)[:, ::2] for c in (1, 10))
        assert (ten.max(-1).values >= one.max(-1).values).all()
        assert torch.allclose(one.sum(-1), torch.ones(40).double())  # all are kept

    def test_the_basis_of_a_block_does_not_matter(self):
        layer, other = grown("aoe"), grown("aoe")
        other.load_state_dict(layer.state_dict())
        turn = torch.linalg.qr(torch.randn(2, 2).double()).Q
        other.A.data, other.B.data = turn @ layer.A.data, turn @ layer.B.data
        assert torch.allclose(layer(X), other(X), atol=1e-12)

    def test_a_key_learns_through_the_gate_too(self):
        layer = grown("aoe", tasks=2, top_k=2)
        y = layer(X)
        (whole,) = torch.autograd.grad(y.sum(), layer.A, retain_graph=True)
        g = dense_gate(layer, X).detach()
        fixed = layer.base(X) + 0.7 * (g * (X @ layer.keys.T)) @ layer.rows("B")
        (part,) = torch.autograd.grad(fixed.sum(), layer.A)
        assert not torch.allclose(whole, part, rtol=1e-3)

    def test_no_input_is_no_nan(self):
        layer = grown("aoe")
        x = torch.zeros(3, 7, dtype=torch.float64, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.isfinite().all() and layer.A.grad.isfinite().all()
