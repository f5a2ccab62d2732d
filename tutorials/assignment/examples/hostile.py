"""A file that tries to take points instead of earning them. It does no harm where it is run by
accident: what it writes is one small file in the folder where it stands, and it starts one process,
which ends at once.

What it tries: to print a grade, to write one, to answer in the grader's place, to make laws hold by
changing the functions that look, to start processes, and to be given more memory than there is.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from minimoe import Adapter, Claims, Gate
from minimoe.laws.check import Row

DONE: list[bool] = []  # once in a process is enough
FORGED = json.dumps({"points": 80, "of": 80})


def stated(x, rows, settings, training):
    return np.ones((len(x), len(rows["A"])))


class Scheme(Adapter):
    claims = Claims(zero_at_birth=True, granularity="token", top_k=True, simplex=True)

    def __init__(self, base, rank=16, scale=1.0, top_k=16):
        self.top_k = top_k
        super().__init__(base, rank, scale)

    def gate(self, x):
        if not DONE:
            DONE.append(True)
            attack()
        return Gate(None, 1.0, self.project(x, "A"))

    def active(self):
        return 0


def attack():
    print(FORGED)
    for name in ("grade.json", "handed"):
        Path(name).write_text(FORGED)
    for module in [*sys.modules.values()]:
        if hasattr(module, "drawn"):
            module.drawn = lambda name, *_: Row(name, "held", "1000 cases")
    try:
        if os.fork() == 0:
            os._exit(0)
        torch.zeros(2**45)
    except (OSError, RuntimeError):
        pass  # it was refused
