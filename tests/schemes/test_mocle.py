"""MoCLE against its oracle, numbers worked by hand, and what is its own."""

import math

import pytest
import torch
from layers import X, frozen_and_live, grown, lora_of
from oracle import base, softmax
from torch import nn

from minimoe.adapt import context
from minimoe.continual.probe import dense_gate
from minimoe.schemes.mocle import MoCLE

SETTINGS = {"scale": 0.7, "clusters": 2, "tau": 0.6, "embedding": 3}
TASK_AGNOSTIC = {"UA", "UB"}
UNCLAIMED = {"equation", "support", "simplex", "degenerates_to_lora", "merge_is_equal"}  # laws


def mocle(x, W0, b, A, B, UA, UB, W, C, scale, tau, cluster):
    """Gou et al., 2312.12379: the likeliest expert of the cluster by its G, the universal one by
    1 - G."""
    y, r = base(x, W0, b), len(UA)
    for t in range(len(x)):
        p = softmax([C[cluster[t]] @ W[e] / tau for e in range(len(W))])
        e = max(range(len(W)), key=lambda e: p[e])
        for i in range(r):
            y[t] += scale * p[e] * (x[t] @ A[e * r + i]) * B[e * r + i]
            y[t] += scale * (1 - p[e]) * (x[t] @ UA[i]) * UB[i]
    return y


def expected(layer, x, rows, given):
    own = (rows[name] for name in ("UA", "UB", "router", "C"))
    return mocle(x, *frozen_and_live(rows), *own, layer.scale, layer.tau, given["cluster"])


def STORED(D, O, R, r, E):
    return (R + r) * (D + O) + E * 3 + 2 * E * 3


def ACTIVE(D, O, R, r, E, k):
    return 2 * r * (D + O) + E * 3 + 3


def SPEAKING(D, O, r, K):
    return (K + r) * (D + O)  # the universal expert beside them


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clusters": 0}, "clusters is 0, allowed: 1 or more"),
        ({"embedding": 0}, "embedding is 0, allowed: 1 or more"),
        ({"tau": 0.0}, "tau is 0.0, allowed: above 0"),
        ({"tau": math.nan}, "tau is nan, allowed: above 0"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        MoCLE(nn.Linear(7, 5), **{"rank": 2} | settings)


def test_the_papers_settings_are_the_defaults():
    paper = {"rank": 8, "clusters": 64, "tau": 0.05}
    settings = MoCLE(nn.Linear(64, 64)).settings()
    assert {key: settings[key] for key in paper} == paper


class TestMoCLE:
    def test_by_hand(self):
        # cluster 1 has (1, 0): W C = (ln 3 / 2, 0), at tau 1/2 G = 3/4, expert 0. z = (1, 9), and
        # of the universal 2: update = 3/4·1·(4, 0) + 1/4·2·(0, 6) = (3, 3)
        layer = MoCLE(nn.Linear(2, 2, bias=False), rank=1, clusters=2, tau=0.5, embedding=2)
        nn.init.zeros_(layer.base.weight)
        layer.grow()
        layer.frozen_C = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        layer.frozen_router = torch.tensor([[math.log(3) / 2, 0.0]])
        layer.router.data = torch.tensor([[0.0, 5.0]])
        layer.frozen_A, layer.A.data = torch.tensor([[1.0, 0.0]]), torch.tensor([[9.0, 0.0]])
        layer.frozen_B, layer.B.data = torch.tensor([[4.0, 0.0]]), torch.tensor([[7.0, 7.0]])
        layer.UA.data, layer.UB.data = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 6.0]])
        with context(layer, cluster=torch.tensor(1)):
            assert torch.allclose(layer(torch.tensor([1.0, 0.0])), torch.tensor([3.0, 3.0]))

    def test_one_clusters_samples_have_one_gate(self):
        layer = grown("mocle")
        with context(layer, cluster=torch.arange(40) % 6):
            g = dense_gate(layer, X)
        assert torch.equal(g[:6], g[6:12])
        assert not torch.equal(g[0], g[1])
        assert ((g > 0).sum(1) == 2).all()  # one expert of two ranks

    def test_weights_sum_to_1(self):
        layer = grown("mocle")
        with context(layer, cluster=torch.arange(40) % 6):
            _, G, rest = layer.choose(X)
        assert torch.allclose(G + rest, torch.ones(40, 1, dtype=torch.float64))
        assert (G >= 1 / 3).all() and (rest > 0).all()

    def test_a_low_temperature_silences_the_universal_expert(self):
        layer = grown("mocle", tau=1e-4)
        with context(layer, cluster=torch.arange(40) % 6):
            idx, g, *_ = layer.gate(X)
            y = layer(X)
        assert torch.equal(g, torch.ones_like(g))
        A, B = layer.keys[idx], layer.rows("B")[idx]  # (T, 2, D), (T, 2, O)
        update = torch.einsum("td,tkd,tko->to", X, A, B)
        assert torch.allclose(y, layer.base(X) + layer.scale * update, atol=1e-12)

    def test_one_expert_alone_is_lora(self):
        layer = grown("mocle", tasks=1)
        with context(layer, cluster=torch.arange(40) % 2):
            y = layer(X)
        assert torch.allclose(y, lora_of(layer, layer.A, layer.B)(X), rtol=0, atol=1e-12)
        y.sum().backward()
        assert not layer.UB.grad.any()
