"""What linear maps reach: by hand, and beside loops."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import tensor

from minimoe.continual.linear import in_subspace, least_squares, one_map, own_maps, to_mean
from minimoe.continual.stream import Stream, Task


def test_by_hand():
    # task 1: y = x on 2; task 2: y = -x on -1. One map: w = Σ x y / Σ x² = (4 - 1) / (4 + 1) = .6
    first = Task("1", (tensor([[2.0]]), tensor([[2.0]])), (tensor([[2.0], [0.4]]),) * 2)
    second = Task("2", (tensor([[-1.0]]), tensor([[1.0]])), (tensor([[-1.0]]), tensor([[1.0]])))
    stream = Stream("by hand", [first, second])
    # .6 x for x explains 1 - .4² = .84; .6 x for -x explains 1 - 1.6² = -1.56
    assert one_map(stream) == pytest.approx((0.84 - 1.56) / 2)
    assert own_maps(stream) == pytest.approx(1)
    # .4 is nearer to -1 than to 2 and answered by -.4: 1 - .8² / (2² + .4²)
    assert own_maps(stream, to_mean) == pytest.approx((1 - 0.64 / 4.16 + 1) / 2)


def test_energy_by_hand():
    # the principal directions are the axes, the longest first
    seen = torch.diag(tensor([3.0, 2.0, 1.0]))
    x = tensor([[1.0, 2.0, 3.0]])
    assert [round(in_subspace(x, seen, m).item(), 4) for m in (1, 2, 3)] == [1, 5, 14]


def test_least_squares_is_0_where_no_input_lies():
    # inputs on the diagonal, but for what float32 rounds off; outputs with noise
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(50, 1, generator=draw, dtype=torch.float64)
    x = torch.cat([a / 3, a / 3 * (1 + 1e-7 * torch.randn(50, 1, generator=draw))], 1)
    W = least_squares(x, a + torch.randn(50, 1, generator=draw))
    assert torch.allclose(W[0], W[1], rtol=1e-5) and W.abs().max() < 3


@pytest.mark.parametrize("gate", ["mean", "energy", "told"])
def test_own_maps_as_a_loop(gate):
    draw = torch.Generator().manual_seed(1)
    D, O, m = 5, 3, 2
    tasks, data = [], []
    for t in range(3):
        x, y = torch.randn(24, D, generator=draw), torch.randn(24, O, generator=draw)
        x[:, t] *= 3
        x += 0.3 * t
        tasks.append(Task(f"{t}", (x[:13], y[:13]), (x[13:], y[13:])))
        data.append([part.double().numpy() for part in (x[:13], y[:13], x[13:], y[13:])])
    maps, means, axes = [], [], []
    for x, y, _, _ in data:
        maps.append(np.linalg.inv(x.T @ x) @ x.T @ y)  # the normal equations
        means.append(x.mean(0))
        axes.append(np.linalg.eigh(x.T @ x)[1][:, -m:])
    scores = []
    for j, (_, _, x, y) in enumerate(data):
        lost = 0.0
        for one, wanted in zip(x, y, strict=True):
            near = {
                "mean": [-sum((one[d] - mean[d]) ** 2 for d in range(D)) for mean in means],
                "energy": [sum((one @ U[:, i]) ** 2 for i in range(m)) for U in axes],
                "told": [float(t == j) for t in range(3)],
            }[gate]
            lost += sum((one @ maps[int(np.argmax(near))] - wanted) ** 2)
        scores.append(1 - lost / sum(sum(wanted**2) for wanted in y))
    nearness = {"mean": to_mean, "energy": partial(in_subspace, m=m), "told": None}[gate]
    assert own_maps(Stream("random", tasks), nearness) == pytest.approx(np.mean(scores), abs=1e-9)
