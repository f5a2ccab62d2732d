"""Hooks: those that a wrapped layer had, and those that see to it that its weight is not used past
its adapter."""

from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .wrapped import Use, Wrapped

_OF_WEIGHT = (WeightNorm, SpectralNorm, BasePruningMethod)
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """The hooks of source, and their handles, are then target's, after those that target has.
    Torch's own, which compute a layer's weight, stay with the layer."""
    for kind in _HOOKS:
        hooks, own = getattr(source, kind), getattr(target, kind)
        stay = {key: hook for key, hook in hooks.items() if isinstance(hook, _OF_WEIGHT)}
        for key in stay:
            del hooks[key]
        for key, hook in reversed(own.items()):
            hooks[key] = hook
            hooks.move_to_end(key, last=False)
        setattr(target, kind, hooks)  # itself, as handles refer to it
        setattr(source, kind, OrderedDict(stay))
    if source._is_full_backward_hook is not None:
        target._is_full_backward_hook = source._is_full_backward_hook
        source._is_full_backward_hook = None


def around(modules: dict[str, nn.Module], name: str) -> Iterator[nn.Module]:
    """The modules around the one of that name, the nearest first."""
    while name:
        name = name.rpartition(".")[0]
        yield modules[name]


def watch(model: nn.Module, made: dict[str, Wrapped]) -> None:
    """Let each module around an adapter see to it that its weight is not used past it. (Hooks
    also keep torch's transformers from their fused path, which would.)"""
    modules = dict(model.named_modules(remove_duplicate=False))
    for adapter in {id(a): a for a in made.values()}.values():
        adapter.base.adapted = True  # type: ignore[assignment]
        adapter.base.register_forward_pre_hook(partial(_past, adapter.use))
    inside: dict[int, list[Wrapped]] = {}
    for name, adapter in made.items():
        for module in around(modules, name):
            inside.setdefault(id(module), []).append(adapter)
    for module in {id(m): m for m in modules.values()}.values():
        if layers := inside.get(id(module)):
            module.register_forward_pre_hook(partial(_begin, layers))
            module.register_forward_hook(partial(_end, layers))
        unfused: dict[str, Any] = {}
        if isinstance(module, nn.TransformerEncoderLayer):
            unfused = {"activation_relu_or_gelu": 0}
        elif isinstance(module, nn.TransformerEncoder):
            unfused = {"use_nested_tensor": False}
        if layers and unfused and "unfused" not in module.__dict__:
            module.unfused = {name: getattr(module, name) for name in unfused}
            for attribute, value in unfused.items():
                setattr(module, attribute, value)


def unwatch(module: nn.Module) -> None:
    """Take `watch` back, of one module."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, partial) and hook.func in (_begin, _end, _past):
                del hooks[key]
    for attribute, value in module.__dict__.pop("unfused", {}).items():
        setattr(module, attribute, value)


def _begin(layers: list[Wrapped], module: nn.Module, args: Any) -> None:
    for layer in layers:
        layer.use.called = layer.use.read = False


def _past(use: Use, base: nn.Module, args: Any) -> None:
    if not use.inside:
        use.read = True


def _end(layers: list[Wrapped], module: nn.Module, args: Any, output: Any) -> None:
    for layer in layers:
        if layer.use.read and not layer.use.called:
            owner = type(module).__name__
            raise RuntimeError(
                f"{layer.where}: {owner} uses its weight and does not call it, so the adapter "
                "has no effect; this layer cannot be adapted"
            )
