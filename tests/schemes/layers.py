"""Layers of every scheme that have lived through some tasks, and what their oracles read."""

import importlib
import importlib.util
import math
from collections import OrderedDict

import torch
from torch import nn

from minimoe import LoRAMoE
from minimoe.adapt import adapt, adapters, context, grow
from minimoe.roster import SCHEMES
from minimoe.schemes.alone import Alone, TrainedAlone

# whose products and state are their own: other routers and other lives are lora_moe's and alone's
OWN = [
    name
    for name, scheme in SCHEMES.items()
    if scheme in (LoRAMoE, Alone) or not issubclass(scheme, LoRAMoE | TrainedAlone)
]
PATHS = ["plain", "dense", "gather", "compact"]
PATHS += ["triton"] if importlib.util.find_spec("triton") else []
X = torch.randn(40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def file_of(name):
    """The module test_NAME, which every scheme of the roster has."""
    try:
        return importlib.import_module(f"test_{name}")
    except ModuleNotFoundError as error:
        message = f"{name} is in the roster, and has no tests/schemes/test_{name}.py"
        raise AssertionError(message) from error


def own(case):
    """(the scheme, its test file, the settings of the case)."""
    name, _, variant = case.partition(" ")
    tests = file_of(name)
    more = tests.VARIANTS[variant] if variant else {}
    return SCHEMES[name], tests, tests.SETTINGS | more


def calm(layer):
    """Without the noise of training."""
    for name, value in {"dropout": 0.0, "noise": 0.0, "reuse": 1.0}.items():
        if hasattr(layer, name):
            setattr(layer, name, value)
    return layer


@torch.no_grad()
def filled(layer):
    """No value, frozen or live, is zero, and each is one that it can have."""
    theirs = layer.base.state_dict()
    for name, tensor in layer.state_dict().items():
        key = name.removeprefix("frozen_")
        if key == "expert_bias":
            tensor.uniform_(-0.1, 0.4)
        elif name not in theirs and tensor.is_floating_point():
            std = {
                "w1": 0.005,
                "w2": 0.005,
                "router": 0.5,
                "code": 0.1,
                "code_bias": 0.1,
                "encoder": 0.2,
            }
            tensor.normal_(std=std.get(key, 1.0))
        if key == "sigma" or key.startswith("fisher"):
            tensor.abs_().add_(0.1)
    return layer


def grown(case, D=7, O=5, rank=2, tasks=3, dtype=torch.float64, **settings):
    """A layer of several tasks: of a case, with its settings, or of a class, with none."""
    scheme, usual = (case, {}) if isinstance(case, type) else own(case)[::2]
    layer = scheme(nn.Linear(D, O, dtype=dtype), **{"rank": rank} | usual | settings)
    for _ in range(tasks - 1):
        layer.grow()
    return filled(layer)


def network(case, tasks=3):
    """Two adapted layers, 6 to 9 and 9 to 6."""
    scheme, _, settings = own(case)
    layers = [("fc1", nn.Linear(6, 9)), ("act", nn.ReLU()), ("fc2", nn.Linear(9, 6))]
    net = adapt(nn.Sequential(OrderedDict(layers)), scheme, r"fc\d", rank=2, **settings)
    for _ in range(tasks - 1):
        grow(net)
    for _, layer in adapters(net):
        filled(layer)
    return net


def context_of(layer, *samples):
    """Some context of each sample, if the layer needs any."""
    drawn = {}
    for name, need in layer.needs().items():
        index = isinstance(need, range)
        drawn[name] = torch.randint(len(need), samples) if index else torch.randn(*samples, need)
    return drawn


def arrays(layer):
    """Frozen and live rows by name, and what belongs to no task, as float64 arrays."""
    rows = {name: layer.rows(name) for name in layer.fresh()}
    rows |= {name: getattr(layer, name) for name in layer.task_agnostic()}
    rows |= {"W0": layer.base.weight, "b": layer.base.bias}
    return {name: tensor.detach().double().numpy().copy() for name, tensor in rows.items()}


def frozen_and_live(rows):
    """W0, b, A, B."""
    return rows["W0"], rows["b"], rows["A"], rows["B"]


def live(layer, rows):
    """The part of the arrays that is trained, by name: views."""
    trained = {name: p for name, p in layer.named_parameters() if not name.startswith("base")}
    return {name: rows[name][len(rows[name]) - len(p) :] for name, p in trained.items()}


def situation(case, size):
    """A layer, x (samples, 2, D), the context of the samples, and the same for the oracle."""
    samples, D, O, r, tasks = size
    layer = grown(case, D, O, r, tasks)
    x = torch.randn(samples, 2, D, dtype=torch.float64, requires_grad=True)
    given = context_of(layer, samples)
    each = {key: value.repeat_interleave(2, 0).tolist() for key, value in given.items()}
    points = x.detach().reshape(-1, D).numpy().copy()
    return layer, x, given, points, each | {"sample": [t // 2 for t in range(2 * samples)]}


def compiled_equals_eager(layer):
    """Output, loss and every gradient, from one graph."""
    x, given = torch.randn(3, 4, 7, requires_grad=True), context_of(layer, 3)
    dy = torch.randn(3, 4, 5)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    both = []
    for module in (layer, compiled):
        with context(layer, **given) as batch:
            y, aux = module(x), batch.aux_loss
        grads = torch.autograd.grad((y * dy).sum() + aux, leaves)
        both.append((y, torch.as_tensor(aux), *grads))
    for eager, graph in zip(*both, strict=True):
        assert torch.allclose(eager, graph, atol=1e-6)


def lora_of(layer, A, B):
    """LoRA's answer on the layer's base, at its scale."""
    return lambda x: layer.base(x) + layer.scale * x @ A.T @ B


def tokens_each(given, samples, tokens):
    """The context of samples (*samples), once for each of their tokens (*tokens), in one row."""
    return {
        key: value.reshape(math.prod(samples), *value.shape[len(samples) :]).repeat_interleave(
            math.prod(tokens), 0
        )
        for key, value in given.items()
    }
