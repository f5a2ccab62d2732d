"""Adapters as a folder that peft loads."""

import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from ..adapter import Adapter, require
from ..lora import LoRA
from ..saving import adapters, beside, plain_names
from ..tools.files import sync_folder, write_atomic
from .config import CONFIG, PREFIX, TENSORS, Config, either, inside, places_of


def save_peft(model: nn.Module, folder: str | Path, ungated: bool = False) -> None:
    """Write the adapters of model as a folder that peft's PeftModel.from_pretrained loads. A LoRA
    that has grown is one LoRA of all its ranks. What trains beside is in modules_to_save.

    peft's outputs are the model's bit for bit where a layer has not grown and its scale is a power
    of 2, else to rounding. Other files in the folder stay. A reader, or a kill at any moment, finds
    the old folder or the new one; or, for a moment where the config changes (layers, ranks,
    scales), one without its config, which all readers refuse.

    Args:
        ungated: write layers of schemes with a gate, too, as the sum of all their ranks with
            weight 1. peft has no gates: the routing is lost.

    Raises, before anything is written, ValueError, naming it, on a layer or a parameter beside that
    peft cannot hold, or if there are no adapters; RuntimeError if a layer is merged; OSError.
    """
    layers, modules = dict(adapters(model)), dict(plain_names(model))
    require(bool(layers), "adapters of the model", "none", "one or more")
    places = places_of(model)
    for name, layer in layers.items():
        layer.stop_if_merged()
        if reason := _unlike_peft(name, layer, places, ungated):
            raise ValueError(f"{name or 'the layer'} {reason}")
    ranks = {name: layer.ranks for name, layer in layers.items()}
    alphas = {name: _alpha(layer.scale, layer.ranks) for name, layer in layers.items()}
    config = Config(
        r=next(iter(ranks.values())),
        lora_alpha=next(iter(alphas.values())),
        target_modules=either(layers),
        rank_pattern=_by_layer(ranks),
        alpha_pattern=_by_layer(alphas),
        modules_to_save=sorted({name.rpartition(".")[0] for name in beside(model)}) or None,
        fan_in_fan_out=any(not isinstance(layer.base, nn.Linear) for layer in layers.values()),
    )
    tensors = {}
    for name, layer in layers.items():
        held = (config.rank(name), config.scale(name)) == (ranks[name], alphas[name] / ranks[name])
        if not (held and config.targets(name)):
            raise ValueError(f"{name} has a name by which peft takes it for another module")
        tensors[f"{name}.lora_A.weight"] = layer.keys
        tensors[f"{name}.lora_B.weight"] = layer.rows("B").T
    containers = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
    outside = [name for name in modules if not name.startswith(inside(layers))]
    for name in dict.fromkeys([*(config.modules_to_save or ()), *config.saved(outside)]):
        if name in ("", *layers) or name not in outside or isinstance(modules[name], containers):
            what = f"{name or 'the model'} ({type(modules[name]).__name__})"
            raise ValueError(f"{what} has a parameter of its own that trains, as no module in peft")
        tensors |= {f"{name}.{key}": t for key, t in modules[name].state_dict().items()}
    plain = {
        PREFIX + name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    facts = asdict(config) | {"base_model_name_or_path": base, "inference_mode": True}
    data = safetensors.torch.save(plain, {"format": "pt"})
    _write(Path(folder), f"{json.dumps(facts, indent=1, allow_nan=False)}\n".encode(), data)


def _unlike_peft(name: str, layer: Adapter, places: Counter[int], ungated: bool) -> str:
    """What keeps a layer from being one of peft's; "" if nothing does."""
    kind = type(layer)
    if not kind.claims.equation or kind.update is not Adapter.update:
        return f"is under {kind.__name__}, whose update is more than a sum of ranks"
    if kind.gate is not LoRA.gate and not ungated:
        return f"is under {kind.__name__}, whose gate peft does not have: ungated=True drops it"
    if not name:
        return "is the whole model, and has no name: put it into an nn.Sequential"
    return "is in two places, of which peft adapts one" if places[id(layer)] > 1 else ""


def _write(folder: Path, config: bytes, tensors: bytes) -> None:
    """The config makes it a folder of peft's: it goes first, and comes last."""
    files = {folder / TENSORS: tensors, folder / CONFIG: config}
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(f"{path} is read-only")
    drafts = {path: path.with_name(f"{path.name}.new") for path in files}
    try:
        if (folder / CONFIG).exists() and (folder / CONFIG).read_bytes() == config:
            return write_atomic(folder / TENSORS, tensors)
        for path, data in files.items():
            write_atomic(drafts[path], data)  # a full disk shows here
        (folder / CONFIG).unlink(missing_ok=True)
        for path, draft in drafts.items():
            os.replace(draft, path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
    sync_folder(folder)


def _by_layer(values: dict[str, Any]) -> dict[str, Any]:
    """A pattern of all layers, where they differ: longer names first, as the first match counts."""
    names = sorted(values, key=len, reverse=True) if len({*values.values()}) > 1 else []
    return {name: values[name] for name in names}


def _alpha(scale: float, r: int) -> float:
    """The alpha for which alpha / r is the scale, up to the last bit."""
    whole = round(scale * r)
    return whole if whole / r == scale else scale * r
