"""A backbone that is shipped, and what a scheme learns with it.

The weights are those of a Backbone (33,728 numbers) trained on upright digits. They were written by

    python -m minimoe.lesson.learned

which calls `pretrained`, on one CPU thread.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from ..adapter import Adapter
from ..continual.backbones import Backbone
from ..continual.learn import AdapterLearner, Learner, pretrain, run_stream
from ..continual.stream import Stream
from ..continual.streams import make

WEIGHTS = Path(__file__).with_name("backbone.safetensors")
EPOCHS = 20


def pretrained() -> Backbone:
    """Train what is shipped: a Backbone on the base domain of the streams of digits, seed 0."""
    backbone: Backbone = pretrain(make("permuted-digits", 1), seed=0)
    return backbone


def shipped() -> Backbone:
    """The backbone with the weights that come with the package, frozen, in eval()."""
    with torch.random.fork_rng(devices=[]):  # what is drawn is not kept
        backbone = Backbone()
    backbone.load_state_dict(load_file(WEIGHTS))
    return backbone.eval().requires_grad_(False)


@dataclass(frozen=True)
class Learned:
    """What came of a scheme's life in a stream of J tasks.

    matrix: (J + 1, J) accuracies: a row after each task, the first before any; a column per task.
    mass: (J + 1, J, J) likewise, of inputs of each task: the share of the gate's weight that they
        give to the ranks of each task (probe.py).
    model: as it is at the end.
    """

    matrix: np.ndarray
    mass: np.ndarray
    model: Any


def learn(
    stream: Stream,
    scheme: type[Adapter],
    rank: int = 8,
    grows: bool = True,
    epochs: int = EPOCHS,
    **settings: Any,
) -> Learned:
    """Carry the shipped backbone, its three layers under a scheme, through a stream, with seed 0.
    grows: freeze the ranks after each task, and add new ones. Raises as `run_stream` does."""
    learners: list[AdapterLearner] = []

    def learner(model: Any, stream: Stream) -> Learner:
        learners.append(AdapterLearner(model, scheme, grows=grows, rank=rank, **settings))
        return learners[0]

    run = run_stream(learner, shipped(), stream, seed=0, epochs=epochs, name=scheme.__name__)
    return Learned(np.array(run.matrix), np.array(run.records["mass"]), learners[0].model)


if __name__ == "__main__":
    torch.set_num_threads(1)
    WEIGHTS.write_bytes(save(pretrained().state_dict()))
