"""Put any scheme into any torch model, let it grow, and take it out again.

adapt, survey, unwrap    wrap layers; what a pattern would wrap; the plain model again
parameters, count        what learns, and how much of it there is
context, after_step      a batch (context.py); between the optimiser's steps
grow                     a task ends
save, load               adapters in a file (saving.py); state, load_state: in memory
adapters, WithContext    all of them, by name; a model that makes its own context

torch.export and torch.onnx.export take an adapted model in evaluation, with dynamic sizes too. The
program computes plainly (sparse.py), and runs without this package. A path other than auto and
plain goes with it as an operator of the package, which ONNX lacks. Context (`needs`) must come from
the program's inputs: export a WithContext, or a module that opens a `context` in its forward pass.
With torch 2.6, first set the `path` of all adapters to "plain".
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .adapter import Adapter
from .context import Batch, WithContext, context
from .hooks import around, move_hooks, unwatch, watch
from .saving import adapters, beside, learned, load, load_state, save, state
from .tools.outgrown import refuse_wrapped, take_back
from .wrapped import sizes

__all__ = [
    "Batch",
    "WithContext",
    "adapt",
    "adapters",
    "after_step",
    "context",
    "count",
    "grow",
    "load",
    "load_state",
    "parameters",
    "save",
    "state",
    "survey",
    "unwrap",
]


def adapt(
    model: nn.Module,
    scheme: type[Adapter],
    targets: str,
    *,
    train: str | None = None,
    dtype: torch.dtype | None = None,
    batch_first: bool | None = None,
    verbose: bool = False,
    **settings: Any,
) -> nn.Module:
    """Wrap every linear layer of model whose whole name matches the pattern `targets`.

    The model is changed in place and returned; all its own parameters are frozen. A layer that
    stands in two places gets one adapter. It may be called again, for other layers, with another
    scheme or other settings. A wrapped layer has the mode, the device and the hooks of the one
    that it replaces, and answers for its weight, bias, in_features and out_features.

    Args:
        targets: a regular expression for module names as `named_modules` gives them
            (r".*fc[12]", r".*(q|v)_proj"). `survey` says what it matches.
        train: likewise, modules or parameters that learn beside the adapters, such as a head, in
            their own dtype (a tied one in all its places). `parameters`, `save` and `load`
            include them.
        dtype: of the adapters; by default float32, and float64 beside float64.
        batch_first: whether layers see (samples, tokens, D); False: (tokens, samples, D). By
            default as a torch module around the layer says, else True.
        verbose: print what was wrapped, and what matched and was not.
        settings: the scheme's.

    Raises ValueError, before anything is changed, if a pattern matches nothing that it could, a
    layer that is adapted already or whose weight is read past any wrapper, or a layer that a
    setting does not fit (naming it); and whatever else the scheme raises. In a forward pass of the
    model, RuntimeError if a layer's weight is used, and the layer is not called.
    """
    chosen, left_out = survey(model, targets)
    for name, reason in left_out.items():
        if reason in _NEVER:
            raise ValueError(f"targets {targets!r} matches {name}, which is {reason}")
    if not chosen:
        raise ValueError(f"targets {targets!r} {_nothing(model, left_out)}")
    ids = {id(layer) for layer in chosen.values()}
    chosen |= {n: m for n, m in model.named_modules(remove_duplicate=False) if id(m) in ids}
    heads = _trained(model, train, chosen)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}, allowed: a floating-point dtype")
    first: dict[int, str] = {}
    for name, layer in chosen.items():  # in the model's order, in which seeded keys are drawn
        first.setdefault(id(layer), name)
    trainable = [p for p in model.parameters() if p.requires_grad]
    made: dict[int, Adapter] = {}
    warned: set[str] = set()
    for key, name in first.items():
        layer = chosen[name]
        try:
            made[key] = _made(scheme(layer, **settings), name, dtype)
            made[key].tied, made[key].warned = _tied(model, layer), warned
        except ValueError as error:
            raise ValueError(f"{name} ({type(layer).__name__}): {error}") from None
        except Exception as error:
            error.add_note(f"in {name} ({type(layer).__name__})")
            raise
        finally:  # nothing is changed yet
            for parameter in trainable:
                parameter.requires_grad = True
    for layer in chosen.values():
        layer.__dict__.pop("trained_beside", None)
    kept = {id(p) for p in (*_of_adapters(model), *_marked(model), *heads)}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad = False
    _mark(model, train, heads)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in chosen.items():
        adapter, (owner, _, attribute) = made[id(layer)], name.rpartition(".")
        adapter.batch_first = _batch_first(modules, name) if batch_first is None else batch_first
        setattr(modules[owner], attribute, adapter)
    for key, name in first.items():
        move_hooks(chosen[name], made[key])
    watch(model, {name: made[id(layer)] for name, layer in chosen.items()})
    if verbose:
        for name, layer in chosen.items():
            print(f"{name}: {type(layer).__name__} -> {scheme.__name__}")
        for name, reason in left_out.items():
            print(f"{name}: left out, {reason}")
    return model


def survey(model: nn.Module, targets: str) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """What a pattern of `adapt` matches: (the layers that can be wrapped, by name; of everything
    else that has weights, by name, why it cannot). A layer that is adapted already, or whose weight
    is read past any wrapper, is there too; `adapt` refuses the pattern for it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, Adapter))
    chosen: dict[str, Any] = {}
    left_out = {}
    for name, module in modules.items():
        if not name or not re.fullmatch(targets, name) or isinstance(module, Adapter):
            continue
        if name.startswith(inside):
            left_out[name] = _ADAPTED
            continue
        if "adapted" in vars(module):
            left_out[name] = _ELSEWHERE
            continue
        kind = f"{type(module).__module__}.{type(module).__name__}"
        if not _is_linear(module):
            own = next(module.parameters(recurse=False), None)
            if own is not None or kind.startswith("torch.ao.nn.quantized"):
                left_out[name] = f"a {kind}, allowed: nn.Linear, transformers' Conv1D"
            continue
        weight = next(module.parameters(), None)
        if isinstance(modules[name.rpartition(".")[0]], nn.MultiheadAttention):
            left_out[name] = _PAST
        elif isinstance(weight, nn.parameter.UninitializedParameter):
            left_out[name] = f"a {kind} without weights yet: call the model once first"
        elif weight is not None and weight.is_meta:
            left_out[name] = f"a {kind} on the meta device: load its weights first"
        elif hasattr(weight, "device_mesh"):
            left_out[name] = f"a {kind} sharded by FSDP: adapt the plain model, then shard it"
        else:
            chosen[name] = module
    for name, _ in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        ours = name.startswith(inside) or _is_linear(owner)
        if re.fullmatch(targets, name) and not ours:
            left_out[name] = f"a parameter of a {type(owner).__name__}, and no layer"
    return chosen, left_out


def unwrap(model: nn.Module, merge: bool = True) -> nn.Module:
    """The plain model again, in place: its layers where they were, frozen, with their hooks. What
    trained beside them goes on training.

    With `merge` the update of each scheme that can be merged (claims.mergeable) is added to its
    layer's weight; all others end with their adapters, as do all without it. Save them first.

    Raises RuntimeError, naming the layer, before anything is changed, if one that should be merged
    cannot be: its weight is tied, parametrised, pruned or quantised.
    """
    layers = list(adapters(model))
    ours: list[Any] = [a for _, a in layers if merge and a.claims.mergeable and a.unmerged is None]
    for adapter in ours:
        adapter.tied = _tied(model, adapter.base)
        adapter.require_plain_weight()
    for adapter in ours:
        adapter.merge()
    if not merge:
        for _, adapter in layers:
            if adapter.unmerged is not None:
                adapter.unmerge()
    for module in list(model.modules()):
        unwatch(module)
        for attribute, child in list(module._modules.items()):
            if isinstance(child, Adapter):
                setattr(module, attribute, child.base)
        module.__dict__.pop("trained_beside", None)
    for _, adapter in layers:
        move_hooks(adapter, adapter.base)
        adapter.base.__dict__.pop("adapted", None)  # there if it was `adapt` that wrapped it
    return model.base if isinstance(model, Adapter) else model


def grow(model: nn.Module) -> None:
    """A task ends: every adapter freezes its live rows and adds fresh ones. The fresh rows are new
    parameters: make a new optimiser, and a new data-parallel wrapper.

    Raises RuntimeError, naming the layer, and with every layer as it was, under a wrapper of DDP or
    FSDP, and where a layer cannot grow. An optimiser that was made before, and a DDP wrapper, raise
    where they are used next.
    """
    refuse_wrapped(model)
    layers = list(adapters(model))
    before = [(dict(a._parameters), dict(a._buffers), a.step.counts) for _, a in layers]
    for name, adapter in layers:
        try:
            adapter.grow()
        except Exception as error:
            for (_, layer), (parameters, buffers, counts) in zip(layers, before, strict=True):
                layer._parameters, layer._buffers = parameters, buffers
                layer.step.counts = counts
                for parameter in parameters.values():
                    if parameter is not None:
                        take_back(parameter)
            raise RuntimeError(f"{name} cannot grow: {error}; no layer has grown") from error


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """What learns, for an optimiser: the adapters' live rows, and what trains beside them."""
    return [p for p in model.parameters() if p.requires_grad]


def count(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters, of the adapters and of what trains beside them: "trainable" now;
    "stored", trainable and frozen; "read", those that one token's output depends on by value, also
    to choose among ranks (Adapter.active); "speaking", those of keys and values whose rank has a
    weight for one token, at most (Adapter.speaking)."""
    heads, layers = sum(t.numel() for t in beside(model).values()), list(adapters(model))
    return {
        "trainable": sum(p.numel() for p in parameters(model)),
        "stored": sum(tensor.numel() for tensor in learned(model).values()),
        "read": heads + sum(layer.active() for _, layer in layers),
        "speaking": heads + sum(layer.speaking() for _, layer in layers),
    }


def after_step(model: nn.Module) -> None:
    """The optimiser has made a step: every adapter does what its scheme does between steps, such as
    to move the biases that balance its ranks, by all that it has counted since the last."""
    for adapter in model.modules():
        if isinstance(adapter, Adapter):
            adapter.after_step()
            adapter.end_step()


_ADAPTED = "adapted already"
_ELSEWHERE = "adapted under another name"
_PAST = "read past any wrapper by nn.MultiheadAttention"
_NEVER = (_ADAPTED, _ELSEWHERE, _PAST)


def _is_linear(module: nn.Module) -> bool:
    try:
        sizes(module)
    except TypeError:
        return False
    return True


def _nothing(model: nn.Module, left_out: dict[str, str]) -> str:
    """Why a pattern found nothing to wrap."""
    if left_out:
        each = "; ".join(f"{name} is {reason}" for name, reason in list(left_out.items())[:4])
        return f"matches no nn.Linear: {each}"
    linears = [name for name, module in model.named_modules() if name and _is_linear(module)]
    there = ", ".join(linears[:8]) + (", ..." if len(linears) > 8 else "")
    return f"matches no nn.Linear; there are: {there or 'none'}"


def _made(adapter: Adapter, name: str, dtype: torch.dtype | None) -> Adapter:
    adapter.name = name
    for child in adapter.children():
        if child is not adapter.base:
            child.train(adapter.training)
    if dtype is not None:
        for tensor in (*adapter._parameters.values(), *adapter._buffers.values()):
            if tensor is not None and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
    return adapter


def _trained(model: nn.Module, train: str | None, chosen: dict[str, Any]) -> list[nn.Parameter]:
    """The parameters that a pattern names, by their own names or those of modules around them."""
    if train is None:
        return []
    wrapped = tuple(f"{name}." for name in (*chosen, *dict(adapters(model))))
    found = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if _matches(train, name):
            if name.startswith(wrapped):
                raise ValueError(f"train {train!r} matches {name}, of a layer that is adapted")
            if not parameter.is_floating_point():
                raise ValueError(f"train {train!r} matches {name}, which is {parameter.dtype}")
            found.append(parameter)
    if not found:
        names = [name for name, _ in model.named_children()]
        raise ValueError(f"train {train!r} matches no parameter; there are: {', '.join(names)}")
    return found


def _of_adapters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The adapters' own parameters, which are all of theirs but their bases'."""
    for _, adapter in adapters(model):
        theirs = {id(p) for p in adapter.base.parameters()}
        yield from (p for p in adapter.parameters() if id(p) not in theirs)


def _mark(model: nn.Module, train: str | None, heads: list[nn.Parameter]) -> None:
    """Note in each module which of its parameters learn beside the adapters (maybe none, in one
    whose buffers move), and let them."""
    ids = {id(p) for p in heads}
    for parameter in heads:
        parameter.requires_grad = True
    for name, module in model.named_modules():
        names = {n for n, p in module.named_parameters(recurse=False) if id(p) in ids}
        if names or (train is not None and _matches(train, name)):
            module.trained_beside = names | module.__dict__.get("trained_beside", set())


def _matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches this name, or that of a module around it."""
    parts = name.split(".")
    return any(re.fullmatch(pattern, ".".join(parts[:n])) for n in range(1, len(parts) + 1))


def _marked(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        for name in module.__dict__.get("trained_beside", ()):
            if (parameter := module._parameters.get(name)) is not None:
                yield parameter


def _tied(model: nn.Module, layer: nn.Module) -> str:
    """The name of another module's parameter that is this layer's weight, if there is one."""
    weight = layer._parameters.get("weight")
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter is weight and module is not layer:
                return f"{name}.{key}"
    return ""


def _batch_first(modules: dict[str, nn.Module], name: str) -> bool:
    for module in around(modules, name):
        attention = [m for m in module.children() if isinstance(m, nn.MultiheadAttention)]
        for one in (module, *attention):
            if isinstance(getattr(one, "batch_first", None), bool):
                return one.batch_first  # type: ignore[return-value]
    return True
