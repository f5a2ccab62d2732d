"""Tasks in clusters of inputs, on which a gate decides and a mean is enough to gate by.

    x = m_c + n                    n ~ N(0, I) (D,), m_c = 5 e_c
    y = (x - m_c)ᵀ U V_c + noise   V_c (Q, O) normal, centred over c, scaled to an RMS of 1/√Q

e_1 ... e_C and the columns of U (D, Q) are the first C + Q columns of one random orthonormal basis.
The model is one linear layer with W0 = 0. As U is orthogonal to the means, a task's map is linear:
U V_c, but for the noise.

- The maps sum to 0: of one linear map for all tasks the best is 0, and explains nothing.
- The means name the task: they lie 5 √2 apart, where the noise of x has deviation 1.

Axes: D in, O out, C clusters (a task each), Q directions that count.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .linear import one_map, own_maps, to_mean, zero
from .stream import Stream, Task

C, D, O, Q = 5, 128, 64, 4
DISTANCE = 5.0  # of a mean from 0
NOISE = 0.1


def clusters(tasks: int, seed: int) -> Stream:
    """linear maps that cancel each other, on inputs around a mean of the task's: one map explains
    nothing, the mean names the task (scored by the share of the answer explained)"""
    draw = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=draw, dtype=torch.float64)
    basis = torch.linalg.qr(normal(D, D)).Q
    means, U = DISTANCE * basis[:, :C].T, basis[:, C : C + Q]
    V = normal(C, Q, O)
    V -= V.mean(0)
    V /= math.sqrt(Q) * V.square().mean().sqrt()

    def task(name: str, mean: Tensor, V: Tensor) -> Task:
        data = []
        for n in (1024, 512):
            x = mean + normal(n, D)
            y = (x - mean) @ U @ V + NOISE * normal(n, O)
            data.append((x.float(), y.float()))
        return Task(name, *data)

    made = [task(f"cluster {c + 1}", means[c], V[c]) for c in range(min(tasks, C))]
    return Stream("clusters", made, model=zero, reachable=reachable)


def reachable(
    model: Any, stream: Stream, settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """What closed forms score, and no scheme's limit: the model and the settings are not read."""
    return {
        "one linear map": one_map(stream),
        "own map, by nearest mean": own_maps(stream, to_mean),
        "own map, told which": own_maps(stream),
    }
