"""LD-MoLE against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import pytest
import torch
from layers import X, grown
from oracle import blocks
from torch import nn

from minimoe.adapt import context
from minimoe.schemes.ld_mole import LDMoLE, sparsegen

SETTINGS = {"scale": 0.7, "width": 4, "sparsity": 0.5, "at_most": 1}
UNCLAIMED = {"support", "merge_is_equal"}  # laws
TASK_AGNOSTIC = {"W1", "b1", "w2", "b2"}


def one_less_loop(x, rows):
    """1 - lambda of one token: .01 - logsigmoid of a network with one hidden layer."""
    W1, b1, w2 = rows["W1"], rows["b1"], rows["w2"][0]
    u = rows["b2"][0] + sum(w2[h] * max(W1[h] @ x + b1[h], 0.0) for h in range(len(W1)))
    return 0.01 + math.log(1 + math.exp(-u))


def sparsegen_loop(l, c):
    """[l - t]₊ / c, t being the one of E candidates with which the weights sum to 1."""
    order = sorted(l, reverse=True)
    for k in range(len(l), 0, -1):
        t = (sum(order[:k]) - c) / k
        if order[k - 1] > t:
            return [max(value - t, 0.0) / c for value in l]


def expected(layer, x, rows, given):
    W = rows["router"]
    w = [sparsegen_loop([W[e] @ u for e in range(len(W))], one_less_loop(u, rows)) for u in x]
    return blocks(x, rows["W0"], rows["b"], rows["A"], rows["B"], w, layer.scale)


AUX = {"x", *TASK_AGNOSTIC}


def expected_aux(layer, x, rows, given):
    W, total, k = rows["router"], 0.0, layer.at_most
    # no gradient goes through lambda_k: it is that of the x and the router that were there first
    logits = given.setdefault("first", [sorted(W[e] @ u for e in range(len(W))) for u in x])
    for t in range(len(x)):
        l = logits[t][::-1]
        if len(l) > k:
            lambda_k = 1 - sum(l[i] - l[k] for i in range(k))
            total += max(lambda_k - (1 - one_less_loop(x[t], rows)), 0.0)
    return layer.sparsity * total / len(x)


def STORED(D, O, R, r, E):
    return R * (D + O) + E * D + 4 * (D + 2) + 1


def ACTIVE(D, O, R, r, E, k):
    return STORED(D, O, R, r, E)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width is 0, allowed: 1 or more"),
        ({"sparsity": -1.0}, "sparsity is -1.0, allowed: 0 or more"),
        ({"at_most": 0}, "at_most is 0, allowed: 1 or more"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        LDMoLE(nn.Linear(7, 5), **{"rank": 2} | settings)


class TestLDMoLE:
    @pytest.mark.parametrize(
        ("lam", "w"), [(0.0, (0.55, 0.45, 0.0)), (0.9, (1.0, 0.0, 0.0)), (-1e9, (1 / 3,) * 3)]
    )
    def test_by_hand(self, lam, w):
        # λ 0: t = (.6 + .5 - 1) / 2 = .05, so .55 and .45. λ .9: t = .6 - .1 = .5, so .1 / .1
        l = torch.tensor([0.6, 0.5, -0.3], dtype=torch.float64)
        got = sparsegen(l, torch.tensor([1 - lam], dtype=torch.float64))
        assert torch.allclose(got, torch.tensor(w).double(), atol=1e-9)

    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_between_its_bounds_lambda_keeps_exactly_k(self, k):
        l = torch.tensor([1.3, 0.9, 0.4, -0.7], dtype=torch.float64)
        low = 1 - (l[:k] - l[k]).sum()
        high = 1 - (l[:k] - l[k - 1]).sum()
        for lam, speak in ((low, k), ((low + high) / 2, k), (high + 1e-9 if k > 1 else low, k)):
            w = sparsegen(l, (1 - lam).reshape(1))
            wanted = speak if lam < high or k == 1 else k - 1
            assert (w > 0).sum() == wanted
            assert math.isclose(w.sum(), 1, rel_tol=1e-12)

    def test_the_loss_asks_for_lambda_where_more_than_k_speak_and_nowhere_else(self):
        layer = grown("ld_mole", tasks=5)
        for k in (1, 2, 3, 4, 5):
            layer.at_most = k
            with torch.no_grad(), context(layer) as batch:
                more = (layer.gate(X).weight[:, ::2] > 0).sum(-1) > k
                layer(X)
                assert (batch.aux_loss > 0) == more.any()
        assert not more.any()

    def test_a_network_that_says_1_leaves_one_expert_and_the_gradient_is_exact_between(self):
        layer = grown("ld_mole", tasks=5)
        layer.w2.data.zero_()
        layer.b2.data.fill_(40.0)  # λ is .99
        layer.frozen_router.mul_(10), layer.router.data.mul_(10)
        w = layer.gate(X).weight[:, ::2]
        assert ((w > 0).sum(-1) == 1).float().mean() > 0.9
        np.testing.assert_allclose(w.sum(-1).detach(), 1, rtol=1e-12)
