"""Adapters on disk: what they have learned, apart from the model that they are in."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .adapter import Adapter
from .tools.files import read_tensors, write_tensors

# what torch's wrappers call the model that they wrap
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def plain_names(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module, each once, as the model names it without wrappers of
    compilation, data parallelism or checkpointing."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    names = {"": ""}
    for name, module in model.named_modules():
        if name:
            owner, _, last = name.rpartition(".")
            around = model.get_submodule(owner)
            hidden = last in _WRAPPERS or (last == "module" and isinstance(around, parallel))
            names[name] = names[owner] if hidden else f"{names[owner]}.{last}".lstrip(".")
        yield names[name], module


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """(name, adapter) of every adapter in model, each once."""
    return ((name, m) for name, m in plain_names(model) if isinstance(m, Adapter))


def beside(model: nn.Module) -> dict[str, Tensor]:
    """What learns beside the adapters, by name: the parameters of the model's own that train, or
    that `adapt` was told to train, and the buffers of the modules that have such."""
    inside = {id(m) for _, adapter in adapters(model) for m in adapter.modules()}
    inside -= {id(m) for _, adapter in adapters(model) for m in adapter.base.modules()}
    tensors: dict[str, Tensor] = {}
    for name, module in plain_names(model):
        if id(module) in inside:
            continue
        told = module.__dict__.get("trained_beside")
        own: dict[str, Tensor] = {
            key: p
            for key, p in module.named_parameters(recurse=False)
            if p.requires_grad or (told and key in told)
        }
        skip = module._non_persistent_buffers_set
        if own or told is not None:
            own |= {k: b for k, b in module.named_buffers(recurse=False) if k not in skip}
        tensors |= {_join(name, key): tensor for key, tensor in own.items()}
    return tensors


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what has been learned: the adapters' own tensors and those that train beside them,
    by name, without any frozen weight of the model itself."""
    return {name: tensor.detach().clone() for name, tensor in learned(model).items()}


def load_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `state` gave, also into adapters that have grown less or more often.

    Raises ValueError, before anything is changed, if names or shapes do not fit.
    """
    layers, heads = dict(adapters(model)), beside(model)
    names = {_join(name, key) for name, layer in layers.items() for key in _own(layer)}
    names |= set(heads)
    empty = {
        _join(name, key)
        for name, layer in layers.items()
        for key in layer._buffers
        if key.startswith("frozen_")
    }
    for key in sorted(names ^ tensors.keys()):
        if key not in empty:
            wrong = "missing" if key in names else "not an adapter of this model"
            raise ValueError(f"{key} is {wrong}")
    for name, layer in layers.items():
        tasks = set()
        for key, ours in _own(layer).items():
            if key.startswith("frozen_"):
                continue
            live, frozen = tensors[_join(name, key)], tensors.get(_join(name, f"frozen_{key}"))
            grown = () if frozen is None else tuple(frozen.shape)
            if live.shape != ours.shape or grown[1:] != tuple(live.shape[1:])[: len(grown)]:
                raise ValueError(
                    f"{_join(name, key)} is {tuple(live.shape)} and frozen {grown}, "
                    f"allowed: {tuple(ours.shape)}, and any number of such"
                )
            if f"frozen_{key}" in layer._buffers:
                tasks.add(0.0 if frozen is None else len(frozen) / len(live))
        if len(tasks) > 1:
            raise ValueError(f"{name} holds tensors of different numbers of tasks")
    for key, tensor in heads.items():
        if tensors[key].shape != tensor.shape:
            shape = tuple(tensors[key].shape)
            raise ValueError(f"{key} is {shape}, allowed: {tuple(tensor.shape)}")
    for name, layer in layers.items():
        start = f"{name}." if name else ""
        keys = {*_own(layer), *layer._buffers}
        own = {key: tensors[start + key] for key in keys if start + key in tensors}
        layer.load_state_dict(own, strict=False)  # base is not ours to load
    with torch.no_grad():
        for key, tensor in heads.items():
            tensor.copy_(tensors[key])


def save(model: nn.Module, path: str | Path) -> None:
    """Write the adapters, and what trains beside them, to a safetensors file, with the schemes and
    settings. (Not what moves in the model's own frozen modules while they are in train(), such as
    the statistics of a BatchNorm: keep those in eval().)

    Raises ValueError if there are none, or a setting is nothing that a file can hold.
    """
    described = _described(model)
    if not described["adapters"]:
        raise ValueError("the model has no adapters")
    write_tensors(path, "adapters", state(model), described)


def load(model: nn.Module, path: str | Path) -> None:
    """Read adapters that `save` wrote into a model adapted in the same way, grown or not.

    Raises FileNotFoundError; ValueError, before anything is changed, on a file that is damaged
    or not of this package, or whose layers, schemes, settings or shapes are not the model's.
    """
    tensors, facts = read_tensors(path, "adapters", mend="save writes it anew")
    described, there = _described(model), facts.get("adapters")
    here = described["adapters"]
    if not isinstance(there, dict):
        raise ValueError(f"{path}: holds no adapters")
    for name in sorted(here.keys() | there.keys()):
        one, other = (facts.get(name, "not adapted") for facts in (there, here))
        if one != other and json.dumps(one) != json.dumps(other):  # where nan is nan
            raise ValueError(f"{path}: {name} is {one} there, {other} here")
    ours, theirs = described["beside"], facts.get("beside", [])
    if not isinstance(theirs, list) or not all(isinstance(name, str) for name in theirs):
        raise ValueError(f"{path}: what trains beside the adapters is {theirs}, allowed: names")
    for name in sorted({*ours} ^ {*theirs}):
        where = "here, and not there" if name in ours else "there, and not here"
        raise ValueError(f"{path}: {name} trains beside the adapters {where}")
    try:
        load_state(model, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _own(layer: Adapter) -> dict[str, Tensor]:
    """A layer's tensors without its base's, none of them empty."""
    theirs = layer.base.state_dict().keys()
    return {key: tensor for key, tensor in layer.state_dict().items() if key not in theirs}


def learned(model: nn.Module) -> dict[str, Tensor]:
    """What `state` copies."""
    own = {
        _join(name, key): tensor
        for name, layer in adapters(model)
        for key, tensor in _own(layer).items()
    }
    return own | beside(model)


def _described(model: nn.Module) -> dict[str, Any]:
    """The facts of a file."""
    described = {}
    for name, layer in adapters(model):
        settings = {}
        for key, value in layer.settings().items():
            try:
                settings[key] = json.loads(json.dumps(value, default=_number))
            except TypeError:
                kind = type(value).__name__
                raise ValueError(f"{name}: {key} is a {kind}, which a file cannot hold") from None
        if not layer.batch_first:
            settings["batch_first"] = False
        described[name] = [type(layer).__name__, settings]
    return {"adapters": described, "beside": sorted(beside(model))}


def _number(value: Any) -> Any:
    """A NumPy number, or a tensor of one element, as the number it is."""
    if isinstance(value, np.generic | np.ndarray | Tensor) and math.prod(value.shape) == 1:
        return value.item()
    raise TypeError


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
