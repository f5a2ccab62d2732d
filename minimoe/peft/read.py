"""Folders of peft, read into adapters."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..adapt import adapt, survey
from ..adapter import Adapter, require
from ..lora import LoRA
from ..lora_moe import LoRAMoE
from ..mora import MoRA
from ..schemes.meteora import MeteoRA
from ..wrapped import sizes
from .config import ANEW, PREFIX, RETRAIN, TENSORS, either, inside, places_of, read_config

SCHEMES = (LoRA, LoRAMoE, MoRA, MeteoRA)
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
    targets, train = either(read[0].layers), either(read[0].trained) or None
    adapt(model, made, targets, train=train, **settings)  # type: ignore[arg-type]
    here = model.state_dict()
    with torch.no_grad():
        for name, tensor in read[0].beside.items():
            here[name].copy_(tensor)
    return model


@dataclass
class Folder:
    """What a folder holds, checked against a model."""

    path: Path
    layers: dict[str, tuple[Tensor, Tensor, float]]  # A (r, D), B (r, O) and the scale, by layer
    trained: list[str]  # modules that train beside
    beside: dict[str, Tensor]  # their tensors


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
    config, found = read_config(path), _tensors(path)
    modules, here = dict(model.named_modules()), model.state_dict()
    trained = config.saved(modules)
    own = [key for key in here if key.startswith(inside(trained))]
    groups: dict[str, set[str]] = {}
    for key in found.keys() - own:
        groups.setdefault(key.rpartition(".lora_")[0], set()).add(key)
    able, unable = survey(model, either(groups))
    places = places_of(model)

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
        unequal = a != b and scheme.claims.expert == "block" and not scheme.claims.mergeable
        if not (a and b) or unequal:
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
