"""Run under torchrun: every learner, by one process with whole batches and then by all processes
together, in float64. Prints a line of JSON: the largest difference between the two in what each
has learned, in units of the largest entry (of 1, if that is less)."""

import contextlib
import dataclasses
import json
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from minimoe import LoRAMoE
from minimoe.adapt import adapt, context, grow, load_state, parameters, state
from minimoe.continual import streams
from minimoe.continual.learn import AdapterLearner, pretrain, run_stream, train
from minimoe.roster import ROSTER, names
from minimoe.schemes.smora import SMoRA
from minimoe.tools import parallel

NOISY = (
    "evomoe",
    "poly",
    "tensor_poly",
)  # of each token or sample: two processes draw otherwise than one
SAMPLES = 129  # two batches, and one of a single sample: one of two processes then has none


def shortened(task):
    parts = [[t[:SAMPLES] for t in part] for part in (task.train, task.test)]
    parts = [[t.double() if t.is_floating_point() else t for t in part] for part in parts]
    return streams.Task(task.name, *parts)


def learned(backbone, stream):
    """{learner: what it has learned} at the end of the stream."""
    found = {}
    balanced = partial(AdapterLearner, scheme=LoRAMoE, rank=4, balance=0.1)
    every = {name: ROSTER[name].make for name in names(backbone) if name not in NOISY}
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
    for key in one:
        a, b = one[key].double(), other[key].double()
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
    train(model, [model.weight], streams.Task("", (x, 0 * x), (x, 0 * x)), 1, seed=0)
    return model.weight.grad.item()


def gradients_of_micro_batches(checkpointed):
    """Of two micro-batches of 8, shared by all processes, through DistributedDataParallel if there
    are several: of LoRA-MoE with a balance loss, and SMoRA's counts."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(6, 6) for _ in range(2)]).double()
    adapt(model, LoRAMoE, "0", rank=2, balance=0.5, top_k=1)
    adapt(model, SMoRA, "1", rank=2, top_k=1)
    grow(model)
    load_state(model, {name: torch.randn_like(t) for name, t in state(model).items()})
    xs = torch.randn(2, 8, 6, dtype=torch.float64)
    wrapped, n = model, parallel.processes()
    if n > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for i, x in enumerate(xs):
        x = x[parallel.process() :: n].requires_grad_()
        last = i == len(xs) - 1 or n == 1
        with contextlib.nullcontext() if last else wrapped.no_sync():
            with context(wrapped) as batch:
                y = checkpoint(wrapped, x, use_reentrant=False) if checkpointed else wrapped(x)
                total = y.square().sum(-1).mean() + batch.aux_loss
            total.backward()
    counts = parallel.sum_over_processes(model[1].counts)
    return {"counts": counts.double(), **{str(i): p.grad for i, p in enumerate(parameters(model))}}


def unused_weights():
    """What `average` makes of a weight that one of two processes uses, and of one of neither."""
    one, none = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    if parallel.process() == 0:
        (3 * one).sum().backward()
    parallel.average([one, none])
    return [one.grad.item(), none.grad]


if __name__ == "__main__":
    torch.set_num_threads(1)
    whole = streams.make("permuted-digits", 2, seed=0)
    backbone = pretrain(whole, 0).double()
    stream = dataclasses.replace(
        whole, base=shortened(whole.base), tasks=tuple(map(shortened, whole.tasks))
    )
    alone = learned(backbone, stream)
    micro = [gradients_of_micro_batches(checkpointed) for checkpointed in (False, True)]
    parallel.start()
    together = learned(backbone, stream)
    said = {
        "processes": parallel.processes(),
        "apart": {name: apart(alone[name], together[name]) for name in alone},
        "gradient": gradient_of_three_samples(),
        "micro": [
            apart(m, gradients_of_micro_batches(c)) for m, c in zip(micro, (0, 1), strict=True)
        ],
        "unused": unused_weights(),
    }
    if parallel.process() == 0:
        print(json.dumps(said))
    parallel.stop()
