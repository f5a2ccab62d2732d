"""A second stage of training, after a task's experts: what padding and failures do to it."""

import pytest
import torch
from torch import nn

from minimoe.adapt import adapters
from minimoe.continual import data
from minimoe.continual.learn import train
from minimoe.continual.stream import Stream, Task
from minimoe.schemes.adamix import AdaMixLearner
from minimoe.schemes.mixda import MixDALearner
from minimoe.schemes.mixture_of_loras import MixtureOfLoRAsLearner
from minimoe.schemes.wemoe import WEMoELearner

STAGED = [MixDALearner, MixtureOfLoRAsLearner, WEMoELearner]


class Words(nn.Module):
    """Logits of each token, or of a sample: of the mean of its tokens."""

    targets = "fc1|fc2"

    def __init__(self, pools):
        super().__init__()
        self.pools = pools
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x, mask=None):
        y = self.fc2(self.fc1(x).tanh())
        if not self.pools:
            return y
        return y.where(mask.unsqueeze(-1), 0).sum(1) / mask.sum(1, keepdim=True)


def words(pools, padding=0.0, lengths=(5, 5)):
    """A stream of two tasks of 24 samples, of which the last two tokens are padding."""
    tasks = []
    for t, T in enumerate(lengths):
        draw = torch.Generator().manual_seed(t)
        x = torch.randn(24, T, 6, generator=draw)
        mask = (torch.arange(T) < T - 2).expand(24, T)
        y = torch.randint(4, (24,) if pools else (24, T), generator=draw)
        y = y if pools else y.where(mask, -100)
        given = {"x": x.where(mask.unsqueeze(-1), padding), "mask": mask}
        tasks.append(Task(f"task {t}", (given, y), (given, y)))
    return Stream("words", tasks, classes=4)


def lived(kind, stream, pools, fit=None):
    """A learner after both tasks."""
    torch.manual_seed(0)
    learner = kind(Words(pools).eval().requires_grad_(False), rank=2)
    for t in range(2):
        torch.manual_seed(t)
        learner.learn(stream, t, fit or (lambda m, weights, task: train(m, weights, task, 3, 0)))
    return learner


@pytest.mark.parametrize("pools", [False, True], ids=["tokens", "samples"])
@pytest.mark.parametrize("kind", [*STAGED, AdaMixLearner])
def test_padding_teaches_nothing(kind, pools):
    one, other = (lived(kind, words(pools, padding), pools) for padding in (0.0, 5.0))
    for (key, tensor), same in zip(one.state().items(), other.state().values(), strict=True):
        if not key.startswith("memory"):
            assert torch.equal(tensor, same), key


@pytest.mark.parametrize("kind", STAGED)
def test_a_stage_that_failed_is_over_and_remembers_nothing_of_its_task(kind):
    torch.manual_seed(0)
    learner = kind(Words(True).eval().requires_grad_(False), rank=2)
    calls = []

    def fit(model, weights, task):
        calls.append(task)
        if len(calls) == 2:
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        learner.learn(words(True), 0, fit)
    assert learner.memory == []
    for _, layer in adapters(learner.model):
        assert not layer.routing
        assert not any(getattr(layer, name).requires_grad for name in layer.buffer_rows)


@pytest.mark.parametrize("kind", STAGED)
def test_examples_of_other_lengths_still_come_in_batches(kind):
    stages = []

    def fit(model, weights, task):
        stages.append([data.count(x) for x, _ in data.batches(task.train, 32)])

    learner = lived(kind, words(True, lengths=(5, 7)), True, fit)
    assert len(learner.memory) == 40
    assert stages == [[24], [20], [24], [20, 20]]  # an expert, its router; the same again
