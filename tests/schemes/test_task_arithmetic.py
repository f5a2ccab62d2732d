"""Task arithmetic against its oracle, and what is its own."""

import torch
from layers import X, grown, lora_of
from oracle import blocks

SETTINGS = {"scale": 0.7, "coefficient": 0.4}
UNCLAIMED = {"support", "simplex", "degenerates_to_lora", "merge_is_equal"}  # laws


def expected(layer, x, rows, given):
    E = layer.n_experts
    w = [float(e == E - 1) if layer.training else layer.coefficient for e in range(E)]
    args = rows["W0"], rows["b"], rows["A"], rows["B"]
    return blocks(x, *args, [w] * len(x), layer.scale)


def STORED(D, O, R, r, E):
    return R * (D + O)


def ACTIVE(D, O, R, r, E, k):
    return r * (D + O)  # in training


class TestTaskArithmetic:
    def test_in_evaluation_it_is_one_lora_of_all_ranks(self):
        layer = grown("task_arithmetic", coefficient=1.0).eval()
        assert layer.active() == layer.speaking() == 6 * (7 + 5)
        y = lora_of(layer, layer.keys, layer.rows("B"))(X)
        assert torch.allclose(layer(X), y, rtol=0, atol=1e-12)

    def test_at_one_in_E_it_is_the_mean_of_the_loras(self):
        layer = grown("task_arithmetic", coefficient=1 / 3).eval()
        A, B = (layer.rows(name).unflatten(0, (3, 2)) for name in "AB")
        mean = sum(lora_of(layer, A[e], B[e])(X) for e in range(3)) / 3
        assert torch.allclose(layer(X), mean, rtol=0, atol=1e-12)

    def test_while_it_trains_a_lora_knows_of_no_other(self):
        layer = grown("task_arithmetic").train()
        alone = lora_of(layer, layer.A, layer.B)(X)
        assert torch.allclose(layer(X), alone, rtol=0, atol=1e-12)
