"""Many adapters in one batch: each sequence is answered by its own, in one forward pass.

    y[b] = x[b] W0ᵀ + update_i(x[b]),  i = adapter[b]         -1: no update, the base alone

As in S-LoRA (Sheng et al., arXiv 2311.03285), Punica (Chen et al., arXiv 2310.18547) and, for whole
experts, ExpertWeave (Shi et al., arXiv 2508.17624). A row is a sequence. Inside a layer the rows
are sorted by adapter: the product with W0, the same for all, runs once on all of them, and each
adapter's update once, on its own slice. Then they go back in the order given. The numbers are those
of one adapter after the other, but for the rounding of a larger product.

Axes: B batch, T tokens, D in, O out. adapter (B,); x (B, T, D), or (T, B, D) where `batch_first`
is False, or (B, D).

Departures: they have one GPU kernel for all adapters, and page adapters in and out of its memory.
Here they stand beside each other, of any scheme, each with its own `update`, in a loop. For use
only: nothing trains.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapt import adapt, unwrap
from .adapter import Adapter, require
from .context import context
from .lora import LoRA
from .lora_moe import LoRAMoE
from .mora import MoRA
from .saving import adapters, load
from .tools.files import read_tensors


class Many(Adapter):
    """A frozen linear layer, and adapters of it by name; None: that one does not adapt this layer.

    `context(model, adapter=ids)` says which of them answers each sequence: ids (B,), 0 to N - 1 in
    the order of `many`, or -1 for none. One that no sequence asks for costs nothing. Other context
    (mask, label, ...) is cut to each adapter's sequences.

    forward raises RuntimeError in train() or without ids, ValueError if they are not (B,) or out of
    range. `grow`, `save` and `load` raise RuntimeError: a file holds one adapter.
    """

    def __init__(self, base: nn.Linear):
        super().__init__(base, rank=1)
        self.many: dict[str, Adapter | None] = {}  # no children: what `adapters` gives is Many

    def forward(self, input: Tensor) -> Tensor:
        self.use.called = True
        if self.training:
            raise RuntimeError(f"{self.where} is for use only: call model.eval()")
        x = self.samples_first(input)
        ids = self.ids(x)
        beside = {name: value for name, value in self.context.items() if name != "adapter"}
        order = None if bool((ids[1:] >= ids[:-1]).all()) else ids.argsort(stable=True)
        if order is not None:
            x, beside = x[order], {name: value[order] for name, value in beside.items()}
        y = self.call_base(x)
        end, *sizes = torch.bincount(ids + 1, minlength=1 + len(self.many)).tolist()
        for adapter, size in zip(self.many.values(), sizes, strict=True):
            own, end = slice(end, end + size), end + size
            if adapter is None or not size:
                continue
            given = {name: value[own] for name, value in beside.items()}
            with context(adapter, **given) if given else contextlib.nullcontext():
                y[own].add_(adapter.update(adapter.cast(x[own])).to(y.dtype))
        return self.samples_first(y if order is None else y[order.argsort()], back=True)

    def ids(self, x: Tensor) -> Tensor:
        """The adapter of each of x (B, ..., D): (B,) int64, on the CPU."""
        B, names = x.shape[:-1][:1], list(self.many)
        if "adapter" not in self.context:
            call = "with context(model, adapter=ids): model(x)"
            raise RuntimeError(f"{self.where} needs the adapter: {call}")
        for name, value in self.context.items():
            if value.shape[:1] != B:
                shape = f"{tuple(value.shape)}, allowed: {tuple(B)}, then more axes or none"
                raise ValueError(f"{self.where}: {name} is {shape}")
        ids = self.context["adapter"].cpu()
        if ids.shape != B or ids.dtype not in (torch.int32, torch.int64):
            what = f"{tuple(ids.shape)} of {ids.dtype}, allowed: {tuple(B)} of int32 or int64"
            raise ValueError(f"{self.where}: adapter is {what}")
        for i in set(ids.tolist()) - set(range(-1, len(names))):
            allowed = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
            raise ValueError(f"{self.where}: adapter is {i}, allowed: {allowed}, -1 (none)")
        return ids.long()

    def fresh(self) -> dict[str, Tensor]:
        return {}

    def active(self) -> int:
        return 0  # none of them is the model's

    def speaking(self) -> int:
        return 0

    def grow(self) -> None:
        raise RuntimeError(f"{self.where} is for use only")

    def settings(self) -> dict[str, Any]:
        raise RuntimeError(f"{self.where} holds what other files hold: unwrap the model first")

    def extra_repr(self) -> str:
        return ", ".join(self.many)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Many":
        for adapter in filter(None, self.many.values()):
            adapter._apply(fn, recurse)
        return super()._apply(fn, recurse)


def load_many(
    model: nn.Module,
    files: Mapping[str, str | Path],
    schemes: tuple[type[Adapter], ...] = (LoRA, LoRAMoE, MoRA),
) -> dict[str, int]:
    """Put the adapters of these files of `save`, by name, beside the layers of a plain model.

        ids = load_many(model, {"anna": "anna.safetensors", "ben": "ben.safetensors"})
        with context(model.eval(), adapter=torch.tensor([ids["ben"], ids["anna"], -1])):
            y = model(x)  # of three sequences, the last by the base alone

    Files may differ in scheme, settings, growth, and in the layers that they adapt. The model is
    changed in place, as by `adapt`; `unwrap(model)` gives the plain one. transformers' `generate`
    runs inside such a context too; with n beams or n answers each, repeat each id n times.

    Returns each name's id. Raises ValueError if there are no files, if the model is adapted
    already, or if a file's scheme is none of `schemes`; and what `adapt` and `load` raise. The
    model is then as it was.
    """
    require(len(files) > 0, "files", dict(files), "one or more")
    if name := next((name for name, _ in adapters(model)), None):
        raise ValueError(f"{name} is adapted already: unwrap the model first")
    trainable = [p for p in model.parameters() if p.requires_grad]
    kinds = {scheme.__name__: scheme for scheme in schemes}
    try:
        each = {key: _read(model, path, kinds) for key, path in files.items()}
        layers = {
            name: [f[name] for f in each.values() if name in f] for f in each.values() for name in f
        }
        for name, own in layers.items():
            first = {adapter.batch_first for adapter in own}
            require(len(first) == 1, f"{name}: batch_first", first, "the same in all files")
        adapt(model, Many, _pattern(layers))
    except BaseException:
        for parameter in trainable:
            parameter.requires_grad = True
        raise
    for name, layer in adapters(model):
        layer.many = {key: found.get(name) for key, found in each.items()}
        layer.batch_first = layers[name][0].batch_first
    return {key: i for i, key in enumerate(files)}


def _read(model: nn.Module, path: str | Path, kinds: dict[str, Any]) -> dict[str, Adapter]:
    """A file's adapters by their layers' names, for use only; the model is plain again after."""
    _, facts = read_tensors(path, "adapters", mend="save writes it anew")
    there = facts.get("adapters")
    there = there if isinstance(there, dict) else {}
    try:
        for (kind, settings), names in groupby(there, lambda name: there[name]):
            require(kind in kinds, f"{path}: the scheme", kind, ", ".join(kinds))
            adapt(model, kinds[kind], _pattern(names), **settings)
        load(model, path)
        found = dict(adapters(model))
    finally:
        unwrap(model, merge=False)
    for adapter in found.values():
        adapter.requires_grad_(False).training = False
    return found


def _pattern(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names))
