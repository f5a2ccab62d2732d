"""What an accuracy matrix says of a learner.

R is (T + 1, T) for a stream of T tasks: entry [i, j] is the accuracy in [0, 1] on task j after
i tasks were learned, so row 0 is the model before any task and row T the model at the end. The
literature counts rows from the first task, R_i,j with i >= 1: these are the same numbers.

Every function takes a matrix as nested lists, NumPy or torch, and returns a float: nan where
the measure says nothing (a single task has no backward transfer) or reads a nan entry. All
raise ValueError if R is not (T + 1, T) with T >= 1.
"""

from collections.abc import Callable
from typing import Any

import numpy as np


def acc(R: Any) -> float:
    """Average accuracy: mean over all tasks j of R[T, j] (Lopez-Paz & Ranzato, 1706.08840)."""
    return _mean(_matrix(R)[-1])


def bwt(R: Any) -> float:
    """Backward transfer: mean over j < T - 1 of R[T, j] - R[j + 1, j] (1706.08840). Below 0 is
    forgetting."""
    R = _matrix(R)
    return _mean([R[-1, j] - R[j + 1, j] for j in range(R.shape[1] - 1)])


def fwt(R: Any) -> float:
    """Forward transfer: mean over j >= 1 of R[j, j] - R[0, j], what the tasks before j gave it
    (1706.08840, with the model before any task as the baseline)."""
    R = _matrix(R)
    return _mean([R[j, j] - R[0, j] for j in range(1, R.shape[1])])


def forgetting(R: Any) -> float:
    """Mean over j < T - 1 of max over 1 <= i < T of R[i, j], minus R[T, j] (Chaudhry et al.,
    1801.10112). The last row is not in the max, so this can be negative."""
    R = _matrix(R)
    return _mean([R[1:-1, j].max() - R[-1, j] for j in range(R.shape[1] - 1)])


def transfer(R: Any) -> float:
    """Mean over j >= 1 of the mean over 1 <= i <= j of R[i, j]: accuracy on tasks not yet learned
    (ZSCL, Zheng et al., 2303.06628)."""
    R = _matrix(R)
    return _mean([R[1 : j + 1, j].mean() for j in range(1, R.shape[1])])


def average(R: Any) -> float:
    """Mean of R over all tasks and all rows but the first (2303.06628)."""
    return _mean(_matrix(R)[1:])


def last(R: Any) -> float:
    """Mean of the last row, the same number as `acc` (2303.06628)."""
    return acc(R)


METRICS: dict[str, Callable[[Any], float]] = {
    f.__name__: f for f in (acc, bwt, forgetting, fwt, transfer, average, last)
}


def summary(R: Any) -> dict[str, float]:
    """Every measure by its name."""
    return {name: measure(R) for name, measure in METRICS.items()}


def _matrix(R: Any) -> np.ndarray:
    R = np.asarray(R, dtype=np.float64)
    if R.ndim != 2 or R.shape[1] < 1 or R.shape[0] != R.shape[1] + 1:
        raise ValueError(f"R has shape {R.shape}, allowed: (T + 1, T) with T of 1 or more")
    return R


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
