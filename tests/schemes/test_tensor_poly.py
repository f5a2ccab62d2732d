"""TensorPoly against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import pytest
import torch
from layers import X, calm, grown, lora_of
from oracle import base
from torch import nn

from minimoe.adapt import context
from minimoe.schemes.poly import Poly
from minimoe.schemes.tensor_poly import TensorPoly, halves

SETTINGS = {"scale": 0.7, "skills": 3, "terms": 2}
TASK_AGNOSTIC = {"left", "right", "B"}
UNCLAIMED = {"support", "simplex", "degenerates_to_lora", "merge_is_equal"}  # laws
FAR = 800.0  # a logit that leaves nothing to the others


def expected(layer, x, rows, given):
    """Each skill's left factors with each skill's right ones, and to each skill's values."""
    a, c, B, Z = (rows[name] for name in ("left", "right", "B", "Z"))
    (S, r, Q, D1), D2 = a.shape, c.shape[-1]
    y = base(x, rows["W0"], rows["b"])
    for t, task in enumerate(given["label"]):
        if task == len(Z):
            continue
        each = 1 / (1 + np.exp(-Z[task]))
        alpha = [each[n * S : (n + 1) * S] / each[n * S : (n + 1) * S].sum() for n in range(3)]
        for i in range(r):
            z = 0.0
            for e in range(S):
                for f in range(S):
                    for q in range(Q):
                        for d in range(D1 * D2):
                            key = a[e, i, q, d // D2] * c[f, i, q, d % D2]
                            z += alpha[0][e] * alpha[1][f] * key * x[t, d]
            for s in range(S):
                y[t] += layer.scale * z * alpha[2][s] * B[s * r + i]
    return y


def of_skills(D, O, r):
    return 3 * r * (2 * {6: 2 + 3, 9: 3 + 3}[D] + O)


def STORED(D, O, R, r, E):
    return of_skills(D, O, r) + 9 * E


def ACTIVE(D, O, R, r, E, k):
    return of_skills(D, O, r) + 9


def SPEAKING(D, O, r, K):
    return of_skills(D, O, K)  # all skills' are in a task's


def test_its_settings_beyond_polys_are_one_term():
    assert TensorPoly(nn.Linear(64, 64)).settings() == Poly(nn.Linear(64, 64)).settings() | {
        "terms": 1
    }


def test_no_terms_are_named():
    with pytest.raises(ValueError, match=r"^terms is 0, allowed: 1 or more$"):
        TensorPoly(nn.Linear(7, 5), rank=2, terms=0)


@pytest.mark.parametrize(
    ("D", "two"), [(64, (8, 8)), (128, (8, 16)), (6, (2, 3)), (7, (1, 7)), (1, (1, 1))]
)
def test_two_whole_factors_nearest_to_the_root(D, two):
    assert halves(D) == two


# beside the primes of every scheme's sizes: D of two factors
@pytest.mark.parametrize("size", [(3, 6, 5, 2, 3), (2, 12, 3, 3, 2), (2, 9, 4, 1, 1)])
def test_output_and_every_gradient_equal_the_oracles_where_factors_are_two(size):
    import test_every_scheme as every  # which reads this file when it is imported

    every.test_output_and_every_gradient_equal_the_oracles("tensor_poly", size)


def labelled(layer, x, task=0):
    with context(layer, label=torch.full((len(x),), task)):
        return layer(x)


def one(skills, terms, a, c):
    """A layer of one rank and one task, D = 6 = 2 · 3, whose value is 1 on a zero base."""
    layer = TensorPoly(nn.Linear(6, 1, bias=False).double(), 1, 1.0, skills, terms=terms).eval()
    layer.base.weight.zero_()
    layer.left.copy_(torch.tensor(a).view(skills, 1, terms, 2))
    layer.right.copy_(torch.tensor(c).view(skills, 1, terms, 3))
    layer.B.fill_(1)
    layer.Z.zero_()
    return layer


class TestTensorPoly:
    @pytest.fixture(autouse=True)
    def no_gradient(self):
        with torch.no_grad():
            yield

    def test_a_key_by_hand(self):
        layer = one(1, 1, [1.0, 2.0], [3.0, 4.0, 5.0])
        assert layer.keys.tolist() == [[3, 4, 5, 6, 8, 10]]
        assert labelled(layer, torch.eye(6).double()).flatten().tolist() == [3, 4, 5, 6, 8, 10]

    def test_terms_by_hand(self):
        # (1, 2) ⊗ (3, 4, 5) + (0, 1) ⊗ (1, 0, -1)
        layer = one(1, 2, [1.0, 2.0, 0.0, 1.0], [3.0, 4.0, 5.0, 1.0, 0.0, -1.0])
        assert layer.keys.tolist() == [[3, 4, 5, 7, 8, 9]]

    def test_factors_are_mixed_apart_by_hand(self):
        # shares (3/4, 1/4) of a: 3/4 (4, 0) + 1/4 (0, 4) = (3, 1); (1/4, 3/4) of c: (1, 3, 0);
        # of values (1/2, 1/2): 1; the key is (3, 9, 0, 1, 3, 0)
        layer = one(2, 1, [4.0, 0.0, 0.0, 4.0], [4.0, 0.0, 0.0, 0.0, 4.0, 0.0])
        layer.Z.copy_(torch.tensor([[1, -1, -1, 1, 0, 0]]).double() * math.log(3))
        want = torch.tensor([[3.0, 9, 0, 1, 3, 0]]).double()
        assert torch.allclose(layer.keys, want, rtol=0, atol=1e-12)
        assert torch.allclose(labelled(layer, torch.eye(6).double()).T, want, rtol=0, atol=1e-12)

    def test_two_is_the_weighted_sum_of_all_pairs(self):
        layer = grown("tensor_poly", D=6).eval()
        alphas, r = layer.alphas(layer.rows("Z")), 2
        for task in range(3):
            for i in range(r):
                want = sum(
                    alphas["left"][task, e]
                    * alphas["right"][task, f]
                    * torch.kron(layer.left[e, i, q], layer.right[f, i, q])
                    for e in range(3)
                    for f in range(3)
                    for q in range(2)
                )
                assert torch.allclose(layer.keys[task * r + i], want, rtol=0, atol=1e-12)

    def test_one_and_two_agree_at_one_shared_skill_and_not_in_general(self):
        two = grown("tensor_poly", D=6, tasks=1).eval()
        first = grown("poly", D=6, tasks=1).eval()  # version I: one α for whole keys
        first.base.load_state_dict(two.base.state_dict())
        keys = torch.einsum("srqu,srqv->sruv", two.left, two.right)
        first.A.copy_(keys.reshape(6, 6)), first.B.copy_(two.B)
        for alone in ([FAR, 0, 0], [0, FAR, 0], [0, 0, FAR]):
            logits = torch.tensor([alone]).double() - FAR / 2
            first.Z.copy_(logits), two.Z.copy_(logits.repeat(1, 3))
            got, want = labelled(two, X[:, :6]), labelled(first, X[:, :6])
            assert torch.allclose(got, want, rtol=0, atol=1e-12)
        logits = torch.tensor([[1.0, 0.0, -1.0]]).double()
        first.Z.copy_(logits), two.Z.copy_(logits.repeat(1, 3))
        assert (labelled(two, X[:, :6]) - labelled(first, X[:, :6])).abs().max() > 0.1

    def test_one_skill_is_lora_of_its_keys(self):
        layer = grown("tensor_poly", D=6, skills=1)
        keys = torch.einsum("rqu,rqv->ruv", layer.left[0], layer.right[0]).flatten(1)
        for task in range(3):
            want = lora_of(layer, keys, layer.B)(X[:, :6])
            assert torch.allclose(labelled(layer, X[:, :6], task), want, rtol=0, atol=1e-12)

    def test_of_a_prime_it_is_poly_whose_keys_are_the_right_factors(self):
        layer, poly = grown("tensor_poly", terms=1, tasks=1), grown("poly", tasks=1)
        poly.base.load_state_dict(layer.base.state_dict())
        layer.left.fill_(1), poly.A.copy_(layer.right.flatten(0, 2)), poly.B.copy_(layer.B)
        layer.Z.copy_(torch.cat([torch.randn(1, 3).double(), poly.Z, poly.Z], -1))
        got, want = labelled(calm(layer), X), labelled(calm(poly), X)
        assert torch.allclose(got, want, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("terms", [1, 2])
    def test_a_key_as_a_matrix_has_as_many_ranks_as_terms(self, terms):
        layer = grown("tensor_poly", D=12, terms=terms)
        matrices = layer.keys.unflatten(-1, (3, 4))
        assert (torch.linalg.matrix_rank(matrices) == terms).all()

    @pytest.mark.parametrize("terms", [1, 3])
    def test_a_fresh_skills_keys_have_loras_variance(self, terms):
        layer = TensorPoly(nn.Linear(64, 64), rank=64, skills=8, terms=terms)
        keys = torch.einsum("srqu,srqv->sruv", layer.left, layer.right)
        assert keys.var().item() == pytest.approx(1 / (3 * 64), rel=0.05)

    def test_each_of_the_three_draws_its_own_noise(self):
        layer = grown("tensor_poly", D=6)
        layer.Z.zero_(), layer.frozen_Z.zero_()
        seen = {}
        layer.alphas = lambda Z: seen.setdefault("α", TensorPoly.alphas(layer, Z))
        labelled(layer, X[:, :6])
        left, right, values = seen["α"].values()
        assert (left != right).all() and (right != values).all() and len(left.unique()) > 40
