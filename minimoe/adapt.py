"""Put any scheme into any torch model, and carry its adapters about."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .adapter import Adapter
from .tools.files import read_tensors, write_tensors


def adapt(model: nn.Module, scheme: type[Adapter], targets: str, **settings: Any) -> nn.Module:
    """Wrap every nn.Linear of model whose whole name matches the pattern `targets`.

    The model is changed in place and returned; all its own parameters are frozen. A layer that
    stands in two places gets one adapter. `targets` is a regular expression for module names
    as `named_modules` gives them (r".*fc[12]", r".*(q|v)_proj"); settings are the scheme's.

    Raises ValueError if the pattern matches no nn.Linear (naming those that there are), or
    matches one inside an adapter or an nn.MultiheadAttention, and whatever the scheme raises.
    The model then keeps all its layers.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, Adapter))
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear) and name}
    chosen = {name: linear for name, linear in linears.items() if re.fullmatch(targets, name)}
    if not chosen:
        there = ", ".join(list(linears)[:8]) + (", ..." if len(linears) > 8 else "")
        raise ValueError(f"targets {targets!r} matches no nn.Linear; there are: {there or 'none'}")
    for name in chosen:
        parent = modules[name.rpartition(".")[0]]
        if name.startswith(inside):
            raise ValueError(f"targets {targets!r} matches {name}, which is adapted already")
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(f"{name}: nn.MultiheadAttention reads its weight past any wrapper")
    made = {id(linear): linear for linear in chosen.values()}
    wrapped = {key: scheme(linear, **settings) for key, linear in made.items()}
    model.requires_grad_(False)
    for name, linear in chosen.items():
        parent = modules[name.rpartition(".")[0]]
        setattr(parent, name.rpartition(".")[2], wrapped[id(linear)])
    for module in model.modules():  # torch's fused paths in eval() read weights past any wrapper
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return model


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """(name, adapter) of every adapter in model, each once."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Adapter))


def grow(model: nn.Module) -> None:
    """A task ends: every adapter freezes its live rows and adds fresh ones. The fresh rows are new
    parameters: make a new optimiser."""
    for _, adapter in adapters(model):
        adapter.grow()


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """What the adapters train, for an optimiser."""
    return [p for _, adapter in adapters(model) for p in adapter.parameters() if p.requires_grad]


def count(model: nn.Module) -> dict[str, int]:
    """Numbers of adapter parameters: "trainable" now; "stored", trainable and frozen; "active",
    those that one token's output depends on by value (Adapter.active)."""
    trainable = sum(p.numel() for p in parameters(model))
    stored = sum(tensor.numel() for tensor in state(model).values())
    return {
        "trainable": trainable,
        "stored": stored,
        "active": sum(adapter.active() for _, adapter in adapters(model)),
    }


def after_step(model: nn.Module) -> None:
    """The optimiser has made a step: every adapter does what its scheme does between steps, such as
    to move the biases that balance its ranks. Most do nothing."""
    for _, adapter in adapters(model):
        adapter.after_step()


@contextlib.contextmanager
def context(model: nn.Module, **values: Tensor) -> Iterator[None]:
    """Inside, every adapter of model has this context of the samples that come, by name.

        with context(model, cluster=ids):                  # ids (B,): one per sample
            y = model(x)                                # whose layers see (B, ..., D)

    The way to a gate that needs more than its layer's input (Adapter.needs names what). An index
    (...) or a vector (..., F) per sample; its axes before F are the first ones of what the layers
    see, whatever tokens follow. The adapters hold it, so no module in between need pass it on, and
    a compiled model takes it as an input. An outer `context` stays in force.
    """
    layers = [adapter for _, adapter in adapters(model)]
    before = [layer.context for layer in layers]
    try:
        for layer in layers:
            layer.context = {**layer.context, **values}
        yield
    finally:
        for layer, then in zip(layers, before, strict=True):
            layer.context = then


class WithContext(nn.Module):
    """A model whose adapters get, with every input, the context that a function makes of it.

    forward(...) is model(...) inside context(model, **describe(...)), for any arguments.
    """

    def __init__(self, model: nn.Module, describe: Callable[..., dict[str, Tensor]]):
        super().__init__()
        self.model, self.describe = model, describe

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with context(self.model, **self.describe(*args, **kwargs)):
            return self.model(*args, **kwargs)


def aux_loss(model: nn.Module) -> Tensor | float:
    """Sum of the auxiliary losses of the last forward pass in training, 0.0 if there are none."""
    return sum((a.aux for _, a in adapters(model) if a.aux is not None), start=0.0)


def state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' own tensors, by module name, without any weight of the model itself."""
    return {
        f"{name}.{key}": tensor
        for name, adapter in adapters(model)
        for key, tensor in adapter.state_dict().items()
        if not key.startswith("base.")
    }


def load_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `state` gave, also into adapters that have grown less or more often.

    Raises ValueError, before anything is changed, if names or shapes do not fit.
    """
    here = state(model)
    if here.keys() != tensors.keys():
        key = min(here.keys() ^ tensors.keys())
        raise ValueError(f"{key} is {'missing' if key in here else 'not an adapter of this model'}")
    for name, adapter in adapters(model):
        tasks = set()
        for key, ours in adapter.state_dict().items():
            if key.startswith(("base.", "frozen_")):
                continue
            live, frozen = tensors[f"{name}.{key}"], tensors.get(f"{name}.frozen_{key}")
            grown = () if frozen is None else tuple(frozen.shape)
            if live.shape != ours.shape or grown[1:] != tuple(live.shape[1:])[: len(grown)]:
                raise ValueError(
                    f"{name}.{key} is {tuple(live.shape)} and frozen {grown}, "
                    f"allowed: {tuple(ours.shape)}, and any number of such"
                )
            if frozen is not None:
                tasks.add(len(frozen) / len(live))
        if len(tasks) > 1:
            raise ValueError(f"{name} holds tensors of different numbers of tasks")
    for name, adapter in adapters(model):
        start = f"{name}."
        own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        adapter.load_state_dict(own, strict=False)  # base is not ours to load


def save(model: nn.Module, path: str | Path) -> None:
    """Write the adapters alone to a safetensors file, with their schemes and settings."""
    if not (described := _describe(model)):
        raise ValueError("the model has no adapters")
    write_tensors(path, state(model), {"adapters": described})


def load(model: nn.Module, path: str | Path) -> None:
    """Read adapters that `save` wrote into a model adapted in the same way, grown or not.

    Raises FileNotFoundError; ValueError, before anything is changed, on a file that is truncated
    or not of this package, or whose layers, schemes, settings or shapes are not the model's.
    """
    tensors, facts = read_tensors(path)
    here, there = _describe(model), facts.get("adapters")
    if not isinstance(there, dict):
        raise ValueError(f"{path}: holds no adapters")
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise ValueError(f"{path}: {name} is {there.get(name)} there, {here.get(name)} here")
    try:
        load_state(model, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _describe(model: nn.Module) -> dict[str, list[Any]]:
    return {name: [type(a).__name__, a.settings()] for name, a in adapters(model)}
