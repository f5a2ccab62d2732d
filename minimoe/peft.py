"""LoRA folders of Hugging Face's peft, read and written without peft.

A folder is `adapter_config.json`, and `adapter_model.safetensors` with these tensors, all names
after the prefix "base_model.model.":

    LAYER.lora_A.weight (r, D), LAYER.lora_B.weight (O, r)      y = x W0ᵀ + s · (x Aᵀ) Bᵀ
    MODULE.weight, ...                                          what trains beside: modules_to_save

with s = alpha / r, under rsLoRA alpha / √r; r and alpha may differ by layer. Here B is (r, O).
Where peft skips something in silence, this raises. Checked against peft 0.21.

Axes: D in, O out, R ranks in all, r ranks of a folder's layer, k kept experts.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import PositiveInt
from safetensors import SafetensorError
from torch import Tensor, nn

from .adapt import adapt, survey
from .adapter import Adapter, require
from .lora import LoRA
from .lora_moe import LoRAMoE
from .mora import MoRA
from .saving import adapters, beside, plain_names
from .schemes.meteora import MeteoRA
from .tools.files import sync_folder, write_atomic
from .tools.results import EXACT, parse
from .wrapped import sizes

__all__ = ["load_peft", "save_peft"]

SCHEMES = (LoRA, LoRAMoE, MoRA, MeteoRA)
CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
ANEW = "have peft save it anew"
RETRAIN = "train it without, or have peft merge it into the model (merge_and_unload)"
ELSEWHERE = "load it into the model that it was trained in"


def load_peft(
    model: nn.Module,
    folders: str | Path | Iterable[str | Path],
    scheme: type[Adapter] = LoRA,
    **settings: Any,
) -> nn.Module:
    """Adapt model, a plain one, with what one or several peft folders hold. As by `adapt`, it is
    changed in place and returned; so is what trains beside.

    One folder and LoRA: each layer has the folder's rank and its scale, alpha / r. Outputs are
    peft's bit for bit where the scale is a power of 2, else to rounding: peft scales what B says,
    this package what A sees. The folder's dropout is left out.

    Several folders are tasks that were learned in this order: the last one's rows are live, all
    others frozen; `grow` begins the next. Their layers must be the same, and what trains beside
    equal; ranks may differ under LoRA and MoRA. Scales that differ go into B, and the layer's is 1.
    What the gate does then:

        LoRA                it has none: y is the sum of all folders' updates.
        LoRAMoE, MeteoRA    a folder is an expert. The router is untrained, N(0, .02): the top k are
                            picked by chance, with weights near 1 / k.
        MoRA                a rank is an expert. It has no router: the keys A score themselves, as
                            they are. The weights sum to 1 over ranks, where peft's are all 1, so
                            the update is smaller than peft's, up to top_k times.

    Router rows of earlier tasks are frozen, too. With `experts=n`, LoRAMoE takes n folders as one
    task, all of it live. To train routers alone, as MeteoRA's paper does, call
    `layer.frozen_router.requires_grad_()`, and give the optimiser these and each `layer.router`.

    Args:
        folders: one or several. Of peft's adapters with names, each has a folder inside.
        settings: the scheme's, without rank and scale; and `adapt`'s dtype, batch_first, verbose.

    Raises, before the model is changed, FileNotFoundError; ValueError if a folder is damaged, holds
    what is not read here (DoRA, biases, embeddings, ...), or does not fit the model or the other
    folders; and whatever `adapt` raises.
    """
    paths = [folders] if isinstance(folders, str | Path) else list(folders)
    n = settings.get("experts", 1)
    kind = getattr(scheme, "__name__", scheme)
    require(scheme in SCHEMES, "scheme", kind, ", ".join(one.__name__ for one in SCHEMES))
    require(bool(paths), "folders", paths, "one or more")
    divides = isinstance(n, int) and n > 0 and len(paths) % n == 0
    require(divides, "experts", n, f"divisors of the number of folders, {len(paths)}")
    for name in sorted({"rank", "scale", "train"} & settings.keys()):
        require(False, name, settings[name], "what the folders say")
    read = [_read(Path(path), model) for path in paths]
    for folder in read[1:]:
        _require_alike(read[0], folder, scheme)
    parts = {id(model.get_submodule(x)): [f.layers[x] for f in read] for x in read[0].layers}

    def made(base: nn.Linear, **settings: Any) -> Adapter:
        return _filled(scheme, base, parts[id(base)], n, settings)

    made.__name__ = scheme.__name__
    targets, train = _either(read[0].layers), _either(read[0].trained) or None
    adapt(model, made, targets, train=train, **settings)  # type: ignore[arg-type]
    here = model.state_dict()
    with torch.no_grad():
        for name, tensor in read[0].beside.items():
            here[name].copy_(tensor)
    return model


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
    places = _places(model)
    for name, layer in layers.items():
        layer.stop_if_merged()
        if reason := _unlike_peft(name, layer, places, ungated):
            raise ValueError(f"{name or 'the layer'} {reason}")
    ranks = {name: layer.ranks for name, layer in layers.items()}
    alphas = {name: _alpha(layer.scale, layer.ranks) for name, layer in layers.items()}
    config = Config(
        r=next(iter(ranks.values())),
        lora_alpha=next(iter(alphas.values())),
        target_modules=_either(layers),
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
    outside = [name for name in modules if not name.startswith(_inside(layers))]
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


@dataclass(frozen=True)
class Config:
    """The fields that outputs depend on, with the values that are read here, and what they say of a
    module's name."""

    r: PositiveInt
    lora_alpha: float
    target_modules: str | list[str]
    peft_type: Literal["LORA"] = "LORA"
    exclude_modules: str | list[str] | None = None
    rank_pattern: dict[str, PositiveInt] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False  # says again that a layer is a Conv1D
    bias: Literal["none"] = "none"
    # where a model starts; the ways that are left out also change W0 when they are loaded
    init_lora_weights: Literal[True, False, "gaussian", "eva", "orthogonal"] = True
    __pydantic_config__ = EXACT

    def patterns(self) -> list[str]:
        """All that peft reads as regular expressions."""
        either = [n for n in (self.target_modules, self.exclude_modules) if isinstance(n, str)]
        return [*either, *(self.modules_to_save or ()), *self.rank_pattern, *self.alpha_pattern]

    def targets(self, name: str) -> bool:
        """Whether a layer of that name is to be adapted."""
        for one in self.modules_to_save or []:
            if re.match(rf"(^|.*\.){one}($|\..*)", name):
                return False
        excluded = self.exclude_modules and _is_one_of(self.exclude_modules, name)
        return not excluded and _is_one_of(self.target_modules, name)

    def rank(self, name: str) -> int:
        return _by_pattern(self.rank_pattern, name, self.r)

    def scale(self, name: str) -> float:
        r = self.rank(name)
        alpha = _by_pattern(self.alpha_pattern, name, self.lora_alpha)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def saved(self, names: Iterable[str]) -> list[str]:
        """The modules that train beside: names that end so, even in the middle of a word."""
        return [name for name in names if name.endswith(tuple(self.modules_to_save or ()))]


# fields of any value: the outputs of a trained adapter do not depend on them
INERT = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode"),
    *("loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "task_type"),
}


@dataclass
class Folder:
    """What a folder holds, checked against a model."""

    path: Path
    layers: dict[str, tuple[Tensor, Tensor, float]]  # A (r, D), B (r, O) and the scale, by layer
    trained: list[str]  # modules that train beside
    beside: dict[str, Tensor]  # their tensors


def _config(path: Path) -> Config:
    file = path / CONFIG
    if not file.is_file():
        inside = ", ".join(sorted(each.parent.name for each in path.glob(f"*/{CONFIG}")))
        there = f"; there are {inside}" if inside else ""
        raise FileNotFoundError(f"{file}: no such file{there}")
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: truncated, or no JSON ({error}); {ANEW}") from None
    if not isinstance(found, dict) or "peft_type" not in found:
        raise ValueError(f"{file}: peft_type is missing; {ANEW}")
    known = {one.name for one in fields(Config)}
    for name, value in found.items():
        empty = value is None or value is False or value in ("", [], {})
        if name not in known | INERT and not empty:
            raise ValueError(f"{file}: {name} is {json.dumps(value)}, allowed: no value; {RETRAIN}")
    try:
        config = parse(Config, {k: v for k, v in found.items() if k in known and v is not None})
        for pattern in config.patterns():
            re.compile(pattern)
    except (ValueError, re.error) as error:
        retrain = str(error).startswith(("peft_type", "bias", "init_lora_weights"))
        mend = RETRAIN if retrain else "write in what it was trained with"
        raise ValueError(f"{file}: {error}; {mend}") from None
    return config


def _tensors(path: Path) -> dict[str, Tensor]:
    """By name, without the prefix."""
    file, pickle = path / TENSORS, path / "adapter_model.bin"
    if not file.is_file() and pickle.exists():
        raise ValueError(f"{pickle}: a pickle can run code, and is never loaded; {ANEW}")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        found = safetensors.torch.load(file.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated, or no safetensors file ({error}); {ANEW}") from None
    for key, tensor in found.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"{file}: {key} lacks the prefix {PREFIX}; {ANEW}")
        if tensor.is_floating_point() and not tensor.double().isfinite().all():
            raise ValueError(f"{file}: {key} holds nan or infinity; {ANEW}")
    return {key.removeprefix(PREFIX): tensor for key, tensor in found.items()}


def _read(path: Path, model: nn.Module) -> Folder:
    """A folder, of which no tensor is left over and none is missing. Raises FileNotFoundError;
    ValueError, in a line with the file, the name and the mend."""
    config, found = _config(path), _tensors(path)
    modules, here = dict(model.named_modules()), model.state_dict()
    trained = config.saved(modules)
    own = [key for key in here if key.startswith(_inside(trained))]
    groups: dict[str, set[str]] = {}
    for key in found.keys() - own:
        groups.setdefault(key.rpartition(".lora_")[0], set()).add(key)
    able, unable = survey(model, _either(groups))
    places = _places(model)

    def must(holds: bool, what: str, mend: str) -> None:
        if not holds:
            raise ValueError(f"{path / TENSORS}: {what}; {mend}")

    layers = {}
    must(bool(found), "holds no tensors", ANEW)
    for name, keys in sorted(groups.items()):
        both = [f"{name}.lora_A.weight", f"{name}.lora_B.weight"]
        for key in sorted(keys - {*both}):
            must(False, f"{key} is neither lora_A, lora_B nor of modules_to_save", RETRAIN)
        for key in both:
            must(key in keys, f"{key} is missing", ANEW)
        like = [x for x in modules if f".{x}".endswith(f".{name.rpartition('.')[2]}")][:4]
        why = f"not in the model, which has {', '.join(like) or 'none of such a name'}"
        why = "adapted already" if isinstance(modules.get(name), Adapter) else why
        must(name in able, f"{name} is {unable.get(name, why)}", ELSEWHERE)
        must(places[id(able[name])] == 1, f"{name} is in two places; peft adapts one", RETRAIN)
        must(config.targets(name), f"{name} is none that target_modules names", ANEW)
        (A, B), (D, O), r = [found.pop(key) for key in both], sizes(able[name]), config.rank(name)
        there, fits = (tuple(A.shape), tuple(B.shape)), ((r, D), (O, r))
        must(there == fits, f"{name} is {there}, allowed: {fits}", ELSEWHERE)
        floats = A.is_floating_point() and B.is_floating_point()
        must(floats, f"{name} is {A.dtype}, {B.dtype}, allowed: floating-point dtypes", ANEW)
        layers[name] = (A, B.T, config.scale(name))
    for name in modules:
        missing = bool(name) and name not in layers and config.targets(name)
        must(not missing, f"{name} is named by target_modules, and has no tensors", ANEW)
    for key in own:
        must(key in found, f"{key}, of modules_to_save, is missing", ANEW)
        tensor, ours = found[key], here[key]
        must(not ours.is_meta, f"{key} is on the meta device", "load the model's weights first")
        floats = tensor.is_floating_point() and ours.is_floating_point()
        alike = tensor.shape == ours.shape and (floats or tensor.dtype == ours.dtype)
        what = f"{tensor.dtype} {tuple(tensor.shape)}, allowed: {ours.dtype} {tuple(ours.shape)}"
        must(alike, f"{key} is {what}", ELSEWHERE)
        for other, theirs in here.items():
            tied = ours.numel() > 0 and theirs.data_ptr() == ours.data_ptr() and other != key
            same = not tied or (other in found and _equal(found[other], tensor))
            must(same, f"{key} is tied to {other} in the model, and not there", "untie them first")
    trained = [name for name in trained if next(modules[name].parameters(), None) is not None]
    return Folder(path, layers, trained, found)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return False
    return one.dtype == other.dtype and torch.equal(one, other)


def _require_alike(one: Folder, other: Folder, scheme: type[Adapter]) -> None:
    """Raise ValueError, naming the layer, unless two folders can be in one mixture."""
    for name in sorted(one.layers.keys() | other.layers.keys()):
        a, b = (len(f.layers[name][0]) if name in f.layers else 0 for f in (one, other))
        if not (a and b) or (a != b and scheme.claims.expert == "block"):
            allowed = "one rank" if a and b else "the same layers"
            raise ValueError(
                f"{name} has {a} ranks in {one.path} and {b} in {other.path}, allowed: {allowed}"
            )
    for key in sorted(one.beside.keys() | other.beside.keys()):
        if not _equal(one.beside.get(key), other.beside.get(key)):
            raise ValueError(f"{key}, which trains beside, differs in {one.path} and {other.path}")


def _filled(scheme: Any, base: nn.Linear, parts: list[Any], n: int, settings: Any) -> Adapter:
    """An adapter that holds (A, B, scale) of each folder, those of the last n live."""
    alike = len({scale for *_, scale in parts}) == 1
    for A, *_ in parts:
        require(len(A) <= min(sizes(base)), "rank", len(A), f"1 to {min(sizes(base))}")
    rank, scale = sum(len(A) for A, *_ in parts[-n:]), parts[0][2] if alike else 1.0
    layer: Adapter = scheme(base, rank=rank, scale=scale, **settings)
    for _ in range(len(parts) // n - 1):
        layer.grow()  # draws the rows of a router
    A = torch.cat([A.to(layer.A) for A, *_ in parts])
    B = torch.cat([(B if alike else B.double() * s).to(layer.B) for _, B, s in parts])
    layer.frozen_A, layer.frozen_B = A[:-rank].clone(), B[:-rank].clone()
    layer.A.data.copy_(A[-rank:])
    layer.B.data.copy_(B[-rank:])
    return layer


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


# peft's patterns


def _is_one_of(names: str | list[str], name: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(f".{name}".endswith(f".{one}") for one in names)


def _by_pattern(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first key that the end of the name matches."""
    ends = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(ends, default)


def _by_layer(values: dict[str, Any]) -> dict[str, Any]:
    """A pattern of all layers, where they differ: longer names first, as the first match counts."""
    names = sorted(values, key=len, reverse=True) if len({*values.values()}) > 1 else []
    return {name: values[name] for name in names}


def _alpha(scale: float, r: int) -> float:
    """The alpha for which alpha / r is the scale, up to the last bit."""
    whole = round(scale * r)
    return whole if whole / r == scale else scale * r


def _places(model: nn.Module) -> Counter[int]:
    """In how many places each module stands, by id."""
    return Counter(id(child) for module in model.modules() for child in module._modules.values())


def _either(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names))


def _inside(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in names)
