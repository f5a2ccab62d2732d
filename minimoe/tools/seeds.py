"""Draws that a seed decides: torch's, NumPy's and Python's own, of which somebody's data may use
any."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws inside are decided by the seed; those that come after it do not notice."""
    numpys, pythons = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng():
            seed_all(seed)
            yield
    finally:
        np.random.set_state(numpys)
        random.setstate(pythons)
