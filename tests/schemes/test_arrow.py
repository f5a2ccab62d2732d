"""Arrow against its oracle, numbers worked by hand, and what is its own."""

import numpy as np
import pytest
import torch
from layers import X, grown
from oracle import blocks, softmax
from torch import nn

from minimoe.continual.probe import dense_gate
from minimoe.schemes.arrow import Arrow, directions

SETTINGS = {"scale": 0.7, "top_k": 2, "tau": 0.6}
UNCLAIMED = {"degenerates_to_lora", "merge_is_equal", "exact_gradient"}  # laws


def expected(layer, x, rows, given):
    """Ostapenko et al., 2405.11157: a softmax over the largest |x · v|, v of a whole matrix."""
    if not hasattr(layer, "as_first"):  # no gradient goes through v: those of before any step
        A, B = (rows[name].reshape(layer.n_experts, layer.block, -1) for name in "AB")
        layer.as_first = [np.linalg.svd(A[e].T @ B[e])[0][:, 0] for e in range(len(A))]
    E, w = layer.n_experts, []
    for u in x:
        l = [abs(u @ v) / layer.tau for v in layer.as_first]
        kept = sorted(range(E), key=lambda e: -l[e])[: layer.top_k]
        shares = dict(zip(kept, softmax([l[e] for e in kept]), strict=True))
        own = [float(e == E - 1) for e in range(E)]
        w.append(own if layer.training else [shares.get(e, 0.0) for e in range(E)])
    return blocks(x, rows["W0"], rows["b"], rows["A"], rows["B"], w, layer.scale)


def STORED(D, O, R, r, E):
    return R * (D + O)


def ACTIVE(D, O, R, r, E, k):
    return r * (D + O)  # in training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k is 0, allowed: 1 or more"),
        ({"tau": 0.0}, "tau is 0.0, allowed: above 0"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Arrow(nn.Linear(7, 5), **{"rank": 2} | settings)


class TestArrow:
    def test_by_hand(self):
        # updates 3 (1, 0)(1, 0)ᵀ and 1 (0, 1)(0, 1)ᵀ of one expert: v = (1, 0). Another's is
        # (0, 1). x (1, -2): l = (1, 2), and the second speaks, whose z is -2: (0, -2)
        layer = Arrow(nn.Linear(2, 2, bias=False), rank=2, top_k=1).eval()
        nn.init.zeros_(layer.base.weight)
        layer.grow()
        layer.frozen_A, layer.frozen_B = torch.eye(2), torch.diag(torch.tensor([3.0, 1.0]))
        layer.A.data, layer.B.data = torch.eye(2), torch.diag(torch.tensor([0.0, 1.0]))
        y = layer(torch.tensor([[1.0, -2.0], [3.0, -2.0]]))
        assert torch.allclose(y, torch.tensor([[0.0, -2.0], [9.0, -2.0]]))

    @pytest.mark.parametrize(("r", "D", "O"), [(1, 7, 5), (3, 7, 5), (5, 5, 9), (4, 9, 4)])
    def test_directions_are_those_of_the_whole_matrix_up_to_their_sign(self, r, D, O):
        A = torch.randn(6, r, D, dtype=torch.float64)
        B = torch.randn(6, r, O, dtype=torch.float64)
        v = directions(A, B)
        whole = torch.linalg.svd(A.mT @ B).U[..., 0]
        assert torch.allclose((v * whole).sum(-1).abs(), torch.ones(6).double(), atol=1e-10)
        again = directions(A, -9 * B)
        assert torch.allclose((v * again).sum(-1).abs(), torch.ones(6).double(), atol=1e-10)

    def test_of_single_ranks_it_is_the_key_itself(self):
        A, B = torch.randn(6, 1, 7, dtype=torch.float64), torch.randn(6, 1, 5, dtype=torch.float64)
        alike = nn.functional.cosine_similarity(directions(A, B), A.squeeze(1), dim=-1)
        assert torch.allclose(alike.abs(), torch.ones(6).double(), atol=1e-12)

    def test_a_sign_changes_no_choice(self):
        layer = grown("arrow", tasks=5).eval()
        assert torch.allclose(dense_gate(layer, X), dense_gate(layer, -X), rtol=0, atol=1e-12)
