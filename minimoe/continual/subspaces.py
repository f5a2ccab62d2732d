"""Tasks in random subspaces, on which a gate decides and means say nothing.

    x = √(D/M) U_t a        a ~ N(0, I) (M,), U_t (D, M) orthonormal, drawn at random
    y = a[:Q] V_t + noise   V_t (Q, O) normal, of variance 1/Q: each output has variance 1

The model is one linear layer with W0 = 0. Each task is a linear map x ↦ y, but for the noise.

- The mean of x is 0 in every task, and -x is as likely as x. So no nearest mean names the task.
  Nor does a router whose logits are linear in x: those of -x are those of x with the other sign.
- The subspaces have J M dimensions together, more than D. So the maps collide, and no one linear
  map serves all tasks.
- The energy of x names the task: ‖U_tᵀ x‖² is all of ‖x‖² in its own subspace, and about M/D of it
  in another's.

Axes: D in, O out, J tasks, M dimensions of a subspace, Q of them that count.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from .linear import in_subspace, one_map, own_maps, to_mean, zero
from .stream import Stream, Task

D, M, Q, O = 64, 16, 4, 32
TASKS = 8  # so that J M > D
NOISE = 0.05


def subspaces(tasks: int, seed: int) -> Stream:
    """linear maps on random subspaces of zero mean, which collide: no mean names the task, its
    subspace does (scored by the share of the answer explained)"""
    draw = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=draw, dtype=torch.float64)

    def task(name: str) -> Task:
        U, V = torch.linalg.qr(normal(D, M)).Q, normal(Q, O) / math.sqrt(Q)
        data = []
        for n in (1024, 512):
            a = normal(n, M)
            x, y = math.sqrt(D / M) * a @ U.T, a[:, :Q] @ V + NOISE * normal(n, O)
            data.append((x.float(), y.float()))
        return Task(name, *data)

    made = [task(f"subspace {t + 1}") for t in range(tasks)]
    return Stream("subspaces", made, model=zero, reachable=reachable)


def reachable(
    model: Any, stream: Stream, settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """What closed forms score, and no scheme's limit: the model and the settings are not read."""
    return {
        "one linear map": one_map(stream),
        "own map, by nearest mean": own_maps(stream, to_mean),
        "own map, by energy in its subspace": own_maps(stream, partial(in_subspace, m=M)),
        "own map, told which": own_maps(stream),
    }
