"""Cartesian against its oracle, numbers worked by hand, and what is its own."""

import math

import pytest
import torch
from layers import X, grown, lora_of
from oracle import base, softmax
from torch import nn

from minimoe.schemes.cartesian import Cartesian

SETTINGS = {"scale": 0.7, "top_k": 2}
UNCLAIMED = {"equation", "degenerates_to_lora", "merge_is_equal"}  # laws


def shares(x, W, k):
    """A softmax over the k largest logits, 0 elsewhere, for one token."""
    l = [W[e] @ x for e in range(len(W))]
    kept = sorted(range(len(W)), key=lambda e: -l[e])[:k]
    w = dict(zip(kept, softmax([l[e] for e in kept]), strict=True))
    return [w.get(e, 0.0) for e in range(len(W))]


def expected(layer, x, rows, given):
    """Every pair of a key and a value, by the product of two routers' shares."""
    y, E = base(x, rows["W0"], rows["b"]), len(rows["router"])
    r = len(rows["A"]) // E
    for t in range(len(x)):
        of_key, of_value = (shares(x[t], rows[n], layer.top_k) for n in ("key_router", "router"))
        for i in range(E):
            for j in range(E):
                for a in range(r):
                    z = x[t] @ rows["A"][i * r + a]
                    weight = of_key[i] * of_value[j]
                    y[t] += layer.scale * weight * z * rows["B"][j * r + a]
    return y


def STORED(D, O, R, r, E):
    return R * (D + O) + 2 * E * D


def ACTIVE(D, O, R, r, E, k):
    return 2 * E * D + k * r * (D + O)


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"^top_k is 0, allowed: 1 or more$"):
        Cartesian(nn.Linear(7, 5), rank=2, top_k=0)


def of_logits(keys, values, top_k=9):
    """A layer of single ranks without a base, whose routers give x = (1, ...) these logits, whose
    key i reads x_i, and whose value j is
    answered at place j."""
    E = len(keys)
    layer = Cartesian(nn.Linear(E, E, bias=False).double(), rank=1, top_k=top_k)
    for _ in range(E - 1):
        layer.grow()
    eye = torch.eye(E, dtype=torch.float64)
    with torch.no_grad():
        layer.base.weight.zero_()
        for name, rows in {
            "A": eye,
            "B": eye,
            "key_router": torch.tensor(keys).double().unsqueeze(1) * eye[:1],
            "router": torch.tensor(values).double().unsqueeze(1) * eye[:1],
        }.items():
            getattr(layer, f"frozen_{name}").copy_(rows[:-1])
            getattr(layer, name).copy_(rows[-1:])
    return layer


class TestCartesian:
    def test_by_hand(self):
        # keys weigh 1/4 and 3/4, values 1/3 and 2/3. x = (1, 5) is seen as 1 and 5: the mean is
        # 1/4 + 15/4 = 4, of which the values say (4/3, 8/3)
        layer = of_logits([0.0, math.log(3)], [0.0, math.log(2)])
        y = layer(torch.tensor([1.0, 5.0], dtype=torch.float64))
        assert torch.allclose(y, torch.tensor([4 / 3, 8 / 3]).double())

    def test_nine_weights_of_six_factors_are_of_rank_one_and_sum_to_one(self):
        layer = of_logits([0.3, -1.0, 0.8], [0.1, 2.0, -0.4])
        start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)  # what the routers read
        y = layer(start)  # of the first key alone
        others = torch.eye(3, dtype=torch.float64)[1:] + start  # another key sees as much beside it
        table = torch.cat([y.unsqueeze(0), layer(others) - y])  # (keys, values)
        assert table.min() > 0 and table.sum().item() == pytest.approx(1)
        assert torch.linalg.matrix_rank(table) == 1
        g, h = (torch.tensor(l).double().softmax(0) for l in ([0.3, -1.0, 0.8], [0.1, 2.0, -0.4]))
        assert torch.allclose(table, torch.outer(g, h))

    def test_key_and_value_of_different_tasks_may_be_one_expert(self):
        layer = of_logits([1.0, 0.0], [0.0, 1.0], top_k=1)
        y = layer(torch.tensor([2.0, 7.0], dtype=torch.float64))
        assert y.tolist() == [0.0, 2.0]  # the first task's key, the second one's value

    def test_one_block_of_each_is_lora(self):
        layer = grown("cartesian", tasks=1)
        assert torch.allclose(layer(X), lora_of(layer, layer.A, layer.B)(X), rtol=0, atol=1e-13)

    def test_where_all_values_are_alike_the_keys_router_alone_counts(self):
        layer = grown("cartesian", top_k=3)
        layer.frozen_B.copy_(layer.B.data.repeat(2, 1))
        before = layer(X)
        layer.router.data.normal_()
        assert torch.allclose(layer(X), before, rtol=0, atol=1e-13)
        layer.key_router.data.normal_()
        assert not torch.allclose(layer(X), before, atol=1e-3)
