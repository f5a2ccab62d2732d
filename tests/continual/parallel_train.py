"""Run under torchrun: every learner, by one process with whole batches and then by all processes
together, in float64. Prints a line of JSON: the largest difference between the two in what each
has learned, in units of the largest entry (of 1, if that is less)."""

import dataclasses
import json
from functools import partial

import torch

from minimoe import LoRAMoE
from minimoe.continual import streams
from minimoe.continual.learn import AdapterLearner, pretrain, run_stream, train
from minimoe.roster import ROSTER
from minimoe.tools import parallel

SAMPLES = 129  # two batches, and one of a single sample: one of two processes then has none


def shortened(task):
    data = [getattr(task, n)[:SAMPLES] for n in ("x_train", "y_train", "x_test", "y_test")]
    return streams.Task(task.name, *(t.double() if t.is_floating_point() else t for t in data))


def learned(backbone, stream):
    """{learner: what it has learned} at the end of the stream."""
    found = {}
    balanced = partial(AdapterLearner, scheme=LoRAMoE, rank=4, balance=0.1)
    every = {name: entry.make for name, entry in ROSTER.items()}
    every["lora_moe balanced"] = lambda model, stream: balanced(model)
    for name, make in every.items():

        def keep(model, stream, name=name, make=make):
            found[name] = make(model, stream)
            return found[name]

        run_stream(keep, backbone, stream, 0, epochs=2)
    return {name: learner.state() for name, learner in found.items()}


def apart(one, other):
    assert one.keys() == other.keys()
    most = 0.0
    for key, a in one.items():
        b = other[key]
        assert torch.equal(a.isfinite(), b.isfinite()), key
        off = (a - b)[a.isfinite()].abs()
        if off.numel():
            most = max(most, (off.max() / a[a.isfinite()].abs().max().clamp_min(1)).item())
    return most


def gradient_of_three_samples():
    """Of the mean of w² · (1, 4, 36) at w = 1, by training for one step."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.ones_(model.weight)
    x = torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)
    train(model, [model.weight], streams.Task("", x, 0 * x, x, 0 * x), 1, seed=0)
    return model.weight.grad.item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    whole = streams.make("permuted-digits", 2, seed=0)
    backbone = pretrain(whole, 0).double()
    stream = dataclasses.replace(
        whole, base=shortened(whole.base), tasks=tuple(map(shortened, whole.tasks))
    )
    alone = learned(backbone, stream)
    parallel.start()
    together = learned(backbone, stream)
    said = {
        "processes": parallel.processes(),
        "apart": {name: apart(alone[name], together[name]) for name in alone},
        "gradient": gradient_of_three_samples(),
    }
    if parallel.process() == 0:
        print(json.dumps(said))
    parallel.stop()
