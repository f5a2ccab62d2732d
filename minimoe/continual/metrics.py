"""What an accuracy matrix says of a learner.

a is (J + 1, J) for a stream of J tasks: entry [i, j] is the accuracy in [0, 1] on task j after
i tasks were learned, so row 0 is the model before any task and row J the model at the end. The
literature counts rows from the first task, R_i,j with i >= 1: these are the same numbers.

Every function takes a matrix as nested lists, NumPy or torch, and returns a float: nan where
the measure says nothing (a single task has no backward transfer) or reads a nan entry. All
raise ValueError if a is not (J + 1, J) with J >= 1.
"""

from collections.abc import Callable
from typing import Any

import numpy as np


def acc(a: Any) -> float:
    """Average accuracy: mean over all tasks j of a[J, j] (Lopez-Paz & Ranzato, 1706.08840)."""
    return mean_or_nan(_matrix(a)[-1])


def bwt(a: Any) -> float:
    """Backward transfer: mean over j < J - 1 of a[J, j] - a[j + 1, j] (1706.08840). Below 0 is
    forgetting."""
    a = _matrix(a)
    return mean_or_nan([a[-1, j] - a[j + 1, j] for j in range(a.shape[1] - 1)])


def fwt(a: Any) -> float:
    """Forward transfer: mean over j >= 1 of a[j, j] - a[0, j], what the tasks before j gave it
    (1706.08840, with the model before any task as the baseline)."""
    a = _matrix(a)
    return mean_or_nan([a[j, j] - a[0, j] for j in range(1, a.shape[1])])


def plasticity(a: Any) -> float:
    """Mean over all tasks j of a[j + 1, j]: accuracy on a task just after it was learned. Where it
    is low, there is little to forget."""
    a = _matrix(a)
    return mean_or_nan([a[j + 1, j] for j in range(a.shape[1])])


# Forgetting has three definitions in use. Where no task is ever better than just after it was
# learned, all three are the same number.


def forgetting(a: Any) -> float:
    """Mean over j < J - 1 of max over 1 <= i < J of a[i, j], minus a[J, j] (Chaudhry et al.,
    1801.10112, eq. 3: the one that this package prints). From -1 to 1: the last row is not in the
    max, so a task that ends at its best counts below 0; rows before a task is learned are in it."""
    a = _matrix(a)
    return mean_or_nan([a[1:-1, j].max() - a[-1, j] for j in range(a.shape[1] - 1)])


def mammoth_forgetting(a: Any) -> float:
    """Mean over j < J - 1 of max over 1 <= i <= J of b[i, j], minus a[J, j], with b[i, j] = a[i, j]
    if i > j, else 0: as the library mammoth has it, where a task not yet learned counts 0 and the
    last row is in the max. From 0 to 1."""
    a = _matrix(a)
    return mean_or_nan((np.tril(a[1:]).max(0) - a[-1])[:-1])


def avalanche_forgetting(a: Any) -> float:
    """Mean over j < J - 1 of a[j + 1, j] - a[J, j], minus `bwt`: as the library Avalanche has it,
    from what a task was just after it was learned. From -1 to 1."""
    return -bwt(a)


def transfer(a: Any) -> float:
    """Mean over j >= 1 of the mean over 1 <= i <= j of a[i, j]: accuracy on tasks not yet learned
    (ZSCL, Zheng et al., 2303.06628)."""
    a = _matrix(a)
    return mean_or_nan([a[1 : j + 1, j].mean() for j in range(1, a.shape[1])])


def average(a: Any) -> float:
    """Mean of a over all tasks and all rows but the first (2303.06628)."""
    return mean_or_nan(_matrix(a)[1:])


def last(a: Any) -> float:
    """Mean of the last row, the same number as `acc` (2303.06628)."""
    return acc(a)


METRICS: dict[str, Callable[[Any], float]] = {
    f.__name__: f
    for f in (
        *(acc, bwt, forgetting, fwt, transfer, average, last),
        *(plasticity, mammoth_forgetting, avalanche_forgetting),
    )
}


def summary(a: Any) -> dict[str, float]:
    """Every measure by its name."""
    return {name: measure(a) for name, measure in METRICS.items()}


def _matrix(a: Any) -> np.ndarray:
    a = np.asarray(a, dtype=np.float64)
    if a.ndim != 2 or a.shape[1] < 1 or a.shape[0] != a.shape[1] + 1:
        raise ValueError(f"a has shape {a.shape}, allowed: (J + 1, J) with J of 1 or more")
    return a


def mean_or_nan(values: Any) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
