"""Conditional MixLoRA against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import pytest
import torch
from layers import X, arrays, grown, lora_of
from oracle import base, sample_means, softmax
from torch import nn

from minimoe.adapt import context
from minimoe.schemes.conditional_mixlora import ConditionalMixLoRA

SETTINGS = {"scale": 0.7, "top_k": 3}
UNCLAIMED = {"equation", "simplex", "degenerates_to_lora", "merge_is_equal"}  # laws


def kept(scores, k):
    """The places of the k largest, in order, and their shares."""
    places = sorted(range(len(scores)), key=lambda e: -scores[e])[:k]
    return list(zip(places, softmax([scores[e] for e in places]), strict=True))


def expected(layer, x, rows, given):
    """The keys that the mean token chooses, then the values that it and they choose."""
    A, B, U, W, V = (rows[name] for name in ("A", "B", "key_router", "router", "V"))
    y, R, means = base(x, rows["W0"], rows["b"]), len(A), sample_means(x, given["sample"])
    for t in range(len(x)):
        m = means[given["sample"][t]]
        keys = kept([m @ U[e] for e in range(R)], layer.top_k)
        q = np.zeros(R)
        for n, (i, _) in enumerate(keys):
            q += softmax([V[e, n] @ A[i] for e in range(R)])
        of_sample, of_keys = softmax([m @ W[e] for e in range(R)]), softmax(list(q))
        values = kept([of_sample[e] + of_keys[e] for e in range(R)], layer.top_k)
        for (i, g), (j, h) in zip(keys, values, strict=True):
            y[t] += layer.scale * (g * h if layer.weighted else 1) * (x[t] @ A[i]) * B[j]
    return y


def STORED(D, O, R, r, E):
    return R * (D + O) + (2 + 3) * R * D


def ACTIVE(D, O, R, r, E, k):
    return (2 + k) * R * D + k * (D + O)


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"^top_k is 0, allowed: 1 or more$"):
        ConditionalMixLoRA(nn.Linear(7, 5), rank=2, top_k=0)


def of_numbers(A, B, U, W, V, **settings):
    """A layer of one number in and one out, without a base; V (R, k)."""
    base = nn.Linear(1, 1, bias=False).double()
    layer = ConditionalMixLoRA(base, rank=1, scale=1.0, top_k=len(V[0]), **settings)
    for _ in A[1:]:
        layer.grow()
    rows = {"A": A, "B": B, "key_router": U, "router": W, "V": V}
    with torch.no_grad():
        layer.base.weight.zero_()
        for name, numbers in rows.items():
            every = torch.tensor(numbers, dtype=torch.float64).unsqueeze(-1)
            getattr(layer, f"frozen_{name}").copy_(every[:-1])
            getattr(layer, name).copy_(every[-1:])
    return layer


ONE = torch.ones(1, 1, dtype=torch.float64)


class TestConditionalMixLoRA:
    def test_by_hand(self):
        # Keys: logits (ln 3, 0, -9), so the first at 3/4 and the second at 1/4. Values: the sample
        # has no opinion, 1/3 each. The keys: of the first, softmax(2 (0, 0, 0)) is 1/3 each; of the
        # second softmax(5 (0, ln 2 / 5, ln 5 / 5)) = (1, 2, 5) / 8; q = (11, 14, 23) / 24, of which
        # the softmax, over 1: (e^(11/24), e^(14/24), e^(23/24)) / their sum. So the last value is
        # the first chosen, and the second one the second.
        V = [[0.0, 0.0], [0.0, math.log(2) / 5], [0.0, math.log(5) / 5]]
        U = [math.log(3), 0.0, -9.0]
        rows = ([2.0, 5.0, 9.0], [1.0, 10.0, 100.0], U, [0.0] * 3, V)
        e = [math.exp(n / 24) for n in (11, 14, 23)]
        lead = (e[2] - e[1]) / sum(e)  # of the last score before the second
        h = 1 / (1 + math.exp(-lead))
        want = 3 / 4 * h * 2 * 100 + 1 / 4 * (1 - h) * 5 * 10
        assert of_numbers(*rows)(ONE).item() == pytest.approx(want)
        assert of_numbers(*rows, weighted=False)(ONE).item() == pytest.approx(2 * 100 + 5 * 10)

    def test_other_keys_choose_other_values(self):
        # one slot: key 0 speaks for value 1, and key 1 for value 0
        V = [[1.0], [0.0]]
        rows = ([-3.0, 3.0], [1.0, 10.0], [1.0, 0.0], [0.0, 0.0], V)
        assert of_numbers(*rows)(ONE).item() == pytest.approx(-3 * 10)
        rows[2].reverse()
        assert of_numbers(*rows)(ONE).item() == pytest.approx(3 * 1)

    def test_where_all_are_kept_at_weight_1_it_is_a_lora_of_other_pairs(self):
        layer = grown("conditional_mixlora", top_k=6, weighted=False)
        for one in X[:10]:
            x = one.expand(1, 3, 7)
            gate = layer.gate(x)
            i = layer.project(one, "key_router").argsort(descending=True)
            A, B = layer.keys[i], layer.rows("B")[gate.idx[0, 0]]
            assert sorted(gate.idx[0, 0].tolist()) == list(range(6))
            assert torch.allclose(layer(x), lora_of(layer, A, B)(x), rtol=0, atol=1e-12)

    def test_a_samples_update_is_of_rank_k_at_most(self):
        layer = grown("conditional_mixlora", D=9, O=8, rank=5, top_k=2)
        x = torch.randn(2, 30, 9, dtype=torch.float64)
        update = layer(x) - layer.base(x)
        assert [torch.linalg.matrix_rank(u).item() for u in update] == [2, 2]
        assert torch.linalg.matrix_rank(update.flatten(0, 1)) > 2  # other samples, other ranks

    @pytest.mark.parametrize("training", [True, False])
    def test_without_weights_it_equals_the_oracle_and_the_choice_has_no_gradient(self, training):
        layer = grown("conditional_mixlora", weighted=False).train(training)
        x = X[:12].view(4, 3, 7)
        y = layer(x)
        given = {"sample": [t // 3 for t in range(12)]}
        want = expected(layer, X[:12].numpy(), arrays(layer), given)
        np.testing.assert_allclose(y.detach().view(12, 5), want, rtol=0, atol=1e-12)
        y.sum().backward()
        learns = {n for n, p in layer.named_parameters() if p.grad is not None}
        assert learns == {"A", "B"}

    def test_padding_chooses_nothing(self):
        layer, x = grown("conditional_mixlora"), X[:12].view(4, 3, 7)
        mask = torch.tensor([[1, 1, 0]] * 4)
        padded = torch.where(mask.unsqueeze(-1) > 0, x, 50.0)
        with context(layer, mask=mask):
            y = layer(padded)
        assert torch.allclose(y[:, :2], layer(x[:, :2]), rtol=0, atol=1e-12)
