"""Experience replay: who is kept, what a batch holds, and that a run goes on to the same bits."""

import copy
import dataclasses
import math
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn

from minimoe import LoRA
from minimoe.continual import data, streams
from minimoe.continual.backbones import Backbone
from minimoe.continual.checkpoints import Checkpoints
from minimoe.continual.learn import AdapterLearner, pretrain, run_stream, train
from minimoe.continual.replay import Beside, Replay, reservoir
from minimoe.continual.stream import Stream, Task
from minimoe.roster import ROSTER


def numbered(n, start=0):
    """n examples, each its own number."""
    y = torch.arange(start, start + n)
    return y.float().unsqueeze(1), y


def kept_of(memory):
    return [int(y) for _, y in memory]


def test_of_few_examples_all_are_kept_in_order():
    assert kept_of(reservoir(numbered(3), 5)) == [0, 1, 2]
    assert kept_of(reservoir(numbered(5), 5)) == [0, 1, 2, 3, 4]


def test_every_example_is_as_likely_to_be_kept():
    torch.manual_seed(0)
    counts = Counter(y for _ in range(2000) for y in kept_of(reservoir(numbered(10), 3)))
    # 2000 · 3 / 10 = 600 of each, with a deviation of √(2000 · .3 · .7) = 20
    assert sorted(counts) == list(range(10))
    assert all(abs(n - 600) < 5 * 20 for n in counts.values())


def test_nobody_is_kept_twice_and_x_stays_with_its_y():
    torch.manual_seed(1)
    memory = reservoir(numbered(700), 40)  # more than one batch
    assert len(set(kept_of(memory))) == 40
    assert all(x.shape == (1, 1) and x.item() == y.item() for x, y in memory)


@pytest.mark.parametrize("size", [4, 30])
def test_a_batch_has_as_many_of_the_memory_or_all_of_it(size):
    memory = reservoir(numbered(6, start=100), 6)
    found = []
    for x, y in Beside(numbered(14), memory).batches(size, torch.Generator().manual_seed(0), None):
        assert torch.equal(x[:, 0].long(), y)
        new, old = y[y < 100], y[y >= 100]
        assert len(new) + len(old) == len(y) and len(old) == min(len(new), 6)
        assert len(set(old.tolist())) == len(old)
        found += new.tolist()
    assert sorted(found) == list(range(14))  # the task, once through


def test_what_has_another_shape_stays_out_of_a_batch():
    memory = [(torch.ones(1, 2), torch.tensor([1])), (torch.ones(1, 3), torch.tensor([2]))]
    ((x, y),) = Beside((torch.zeros(5, 3), torch.zeros(5).long()), memory).batches(9, None, None)
    assert x.shape == (6, 3) and y.tolist() == [0] * 5 + [2]


def stream_of(tasks=3, n=24):
    made = []
    draw = torch.Generator().manual_seed(2)
    for t in range(tasks):
        x = torch.randn(n, 5, generator=draw)
        made.append(Task(f"t{t}", (x, torch.arange(n) % 4), (x, torch.arange(n) % 4)))
    return Stream("s", made, classes=4)


def test_stored_is_the_lora_and_the_memory():
    stream = stream_of()
    learner = Replay(Backbone(4, (5, 7, 7, 6)), rank=2, keep=3)
    lora = 2 * (5 + 7 + 7 + 7 + 7 + 6)
    for t in range(3):
        learner.learn(stream, t, lambda *args: None)
        assert learner.count() == {
            "trainable": lora,
            "stored": lora + (t + 1) * 3 * (5 + 1),
            "read": lora,
            "speaking": lora,
        }
    digits = streams.make("permuted-digits", 5)
    for name, stored in (("replay_20", 11_620), ("replay_80", 31_120)):
        learner = ROSTER[name].make(Backbone(), digits)
        for t in range(5):
            learner.learn(digits, t, lambda *args: None)
        assert learner.count()["stored"] == stored


def test_the_first_task_is_a_loras_and_the_others_are_trained_beside_the_memory():
    stream = stream_of()
    torch.manual_seed(0)
    backbone = Backbone(4, (5, 7, 7, 6)).requires_grad_(False)
    asked = []

    def fit(model, weights, task):
        asked.append(task)
        train(model, weights, task, 2, seed=0)

    torch.manual_seed(3)
    learner = Replay(copy.deepcopy(backbone), rank=2, keep=4)
    torch.manual_seed(3)
    plain = AdapterLearner(copy.deepcopy(backbone), LoRA, grows=False, rank=2)
    for other in (learner, plain):
        other.learn(stream, 0, fit)
    ours, theirs = learner.state(), plain.state()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    memory = list(learner.memory)
    learner.learn(stream, 1, fit)
    *_, (x, _) = data.batches(asked[-1].train, 64)
    assert len(x) == 24 + 4
    held = torch.cat([one for one, _ in memory])
    assert torch.equal(x[24:][x[24:, 0].argsort()], held[held[:, 0].argsort()])
    assert len(learner.memory) == 8 and learner.memory[:4] == memory


@pytest.mark.parametrize("kind", ["tensors", "dictionaries"])
def test_a_run_cut_off_goes_on_to_the_same_bits(kind, tmp_path):
    stream, make = stream_of(), partial(Replay, rank=2, keep=3)
    if kind == "dictionaries":

        class Named(Backbone):
            def forward(self, a, b):
                return super().forward(a + b)

        tasks = []
        for k in stream.tasks:
            x = {"a": k.x_train, "b": 0 * k.x_train}
            tasks.append(Task(k.name, (x, k.y_train), (x, k.y_train)))
        stream = dataclasses.replace(stream, tasks=tasks)
    else:
        Named = Backbone
    torch.manual_seed(0)
    backbone = Named(4, (5, 7, 7, 6)).requires_grad_(False)

    def run(stream, **more):
        found = []

        def keep(model, given):
            found.append(make(model))
            return found[0]

        matrix = run_stream(keep, backbone, stream, 1, 2, **more).matrix
        return matrix, found[0].state()

    matrix, state = run(stream)
    kept = Checkpoints(tmp_path / "c", {"scheme": "replay"})
    run(dataclasses.replace(stream, tasks=stream.tasks[:2]), checkpoints=kept)
    again, resumed = run(stream, checkpoints=kept)
    assert again == matrix and resumed.keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in resumed.items())
    assert sum(key.startswith("memory.") for key in state) == 9 * (2 + (kind == "dictionaries"))


def test_replay_keeps_what_a_lora_forgets():
    stream = streams.make("permuted-digits", 2, seed=3)
    backbone = pretrain(stream, seed=3)
    first = {
        name: run_stream(ROSTER[name].make, backbone, stream, 3, 6).matrix[-1][0]
        for name in ("lora", "replay_80")
    }
    assert first["replay_80"] > first["lora"] + 0.1


@pytest.mark.parametrize("keep", [0, -1, math.nan])
def test_keep_out_of_range_is_named(keep):
    with pytest.raises(ValueError, match=f"^keep is {keep}, allowed: 1 or more$"):
        Replay(nn.Linear(3, 3), rank=2, keep=keep)
