"""The layer's side of a context: what a gate can ask for, and where what a pass leaves is kept.

context.py is the side of whoever calls the model; it says what all this is for.
"""

import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction


@dataclass
class Record:
    """What one layer is given in a batch, and the loss that its passes have left."""

    values: Mapping[str, Tensor]
    again: bool  # the batch is itself inside a second run
    outer: "Record | None" = None
    open: bool = True
    loss: Tensor | None = None
    blind: bool = False  # part of the loss was made without gradients

    def add(self, loss: Tensor, blind: bool) -> None:
        self.loss = loss if self.loss is None else self.loss + loss
        self.blind |= blind


@dataclass
class Step:
    """What belongs to a layer's step, and to no copy of the layer.

    record: of the batch that is open. counts: see Contextual. last: the context of the last pass,
    for its second run; used: what of it the gate has asked for.
    """

    record: Record | None = None
    counts: Tensor | None = None
    last: Mapping[str, Tensor] = field(default_factory=dict)
    used: dict[str, Tensor] = field(default_factory=dict)


def runs_again() -> bool:
    """Whether a checkpointed block runs a second time: a forward pass inside a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _reentrant(which: str) -> Iterator[Any]:
    """The checkpoints, innermost first, in whose first run ("forward") or second ("backward") this
    is called, if they are reentrant: torch's own objects, each of one call."""
    code = getattr(CheckpointFunction, which).__code__
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is code:
            yield frame.f_locals["ctx"]
        frame = frame.f_back  # type: ignore[assignment]


class Contextual(nn.Module):
    """A layer that can be given context, and can leave a loss and counts beside its output.

    A layer's x is (samples, tokens..., D), or (tokens..., samples, D) where `batch_first` is False
    (as in torch's transformers); an x of two axes is (samples, D).
    """

    name = ""  # in its model
    batch_first = True
    mean_over_layers = False  # whether its loss is the mean over a model's layers, not the sum

    def __init__(self) -> None:
        super().__init__()
        self.step = Step()
        self.warned: set[str] = set()  # the schemes that have; adapt gives a model's layers one set

    @property
    def counts(self) -> Tensor | None:
        """c (R,) int64: how often each rank was kept since the last step."""
        return self.step.counts

    @property
    def where(self) -> str:
        """What a message calls this layer."""
        kind = type(self).__name__
        return f"{self.name} ({kind})" if self.name else kind

    @property
    def context(self) -> Mapping[str, Tensor]:
        """The values that are given now, by name."""
        record = self.step.record
        if runs_again() and not (record and record.again):
            for first in _reentrant("backward"):  # it knows what its first run was given
                if id(self) in getattr(first, "contexts", {}):
                    return first.contexts[id(self)]
            return self.step.last
        return record.values if record else {}

    def needs(self) -> dict[str, range | int]:
        """The context that the gate needs of each sample, in this mode: by name, the range of
        an index, or the width of a vector. By default nothing."""
        return {}

    def given(self, name: str, x: Tensor) -> Tensor:
        """The context of that name for the samples of x (..., D), which are x's first axes: an
        index (...) or a vector (..., F), with an axis of 1 for each of x's token axes.

        Raises RuntimeError if there is none; ValueError if it is of other samples than x's, no
        integers where an index is needed, or an index out of its range (looked at on a CPU only:
        a GPU would have to be waited for).
        """
        if name not in self.context:
            call = f"with context(model, {name}=...): model(x)"
            raise RuntimeError(f"{self.where} needs the {name}: {call}")
        value, need = self.context[name], self.needs()[name]
        self.step.used[name] = value
        width = () if isinstance(need, range) else (need,)
        if value.dtype == torch.bool or value.is_floating_point() == isinstance(need, range):
            kind = "integers" if isinstance(need, range) else "floating-point numbers"
            raise ValueError(f"{self.where}: {name} is of {value.dtype}, allowed: {kind}")
        samples = value.shape[: value.ndim - len(width)]
        if (*samples, *width) != value.shape or samples != x.shape[:-1][: len(samples)]:
            allowed = f"{tuple(x.shape)}: its first axes" + "".join(f", then {n}" for n in width)
            raise ValueError(
                f"{self.where}: {name} is {tuple(value.shape)}, allowed for x {allowed}"
            )
        look = value.device.type == "cpu" and not torch.compiler.is_compiling()
        if isinstance(need, range) and look and value.numel():
            for end in (int(value.min()), int(value.max())):
                if end not in need:
                    most = len(need) - 1
                    raise ValueError(f"{self.where}: {name} is {end}, allowed: 0 to {most}")
        value = value.to(x.device) if width else value.to(x.device, torch.int64)
        return value.reshape((*samples, *[1] * (x.ndim - 1 - len(samples)), *width))

    def mask(self, x: Tensor) -> Tensor:
        """m (...) in float32 (float64 for float64), for each token of x (..., D): 0 where the
        batch's mask says that it is padding, else 1. Raises ValueError if the mask is not of x's
        first axes."""
        tokens, mask = x.shape[:-1], self.context.get("mask")
        wide = torch.promote_types(x.dtype, torch.float32)
        if mask is None:
            return x.new_ones(tokens, dtype=wide)
        self.step.used["mask"] = mask
        if mask.shape != tokens[: mask.ndim]:
            allowed = f"{tuple(x.shape)}: its first axes"
            raise ValueError(f"{self.where}: mask is {tuple(mask.shape)}, allowed for x {allowed}")
        mask = mask.reshape(*mask.shape, *[1] * (len(tokens) - mask.ndim)).expand(tokens)
        return mask.to(x.device, wide)

    def penalty(self) -> Tensor | None:
        """A loss of the weights alone. It counts once in a batch, for a layer in training."""
        return None

    @property
    def has_penalty(self) -> bool:
        return type(self).penalty is not Contextual.penalty

    def leave(self, loss: Tensor | None = None, counts: Tensor | None = None) -> None:
        """Keep for the open batch what a pass has left beside its output."""
        step, blind = self.step, not torch.is_grad_enabled()
        if blind and step.used and not torch.compiler.is_compiling():
            for first in _reentrant("forward"):
                vars(first).setdefault("contexts", {})[id(self)] = self.context
        if loss is not None:
            loss = self.hold(loss)  # in both runs: they must save the same
        if runs_again():
            return
        step.last = step.record.values if step.record else {}
        if step.record is None:
            if self.training and not blind and not torch.compiler.is_compiling():
                self._warn(loss is not None or counts is not None)
            return
        if getattr(self, "_is_replica", False) and (loss is not None or counts is not None):
            raise RuntimeError(
                f"{self.where}: what replicas of nn.DataParallel leave is lost; train with "
                "DistributedDataParallel"
            )
        if loss is not None:
            step.record.add(loss, blind)
        if counts is not None:
            step.counts = counts if step.counts is None else step.counts + counts

    def hold(self, y: Tensor) -> Tensor:
        """y, whose backward pass stops if a second run had another context than this one."""
        if not self.step.used or not y.requires_grad or torch.compiler.is_compiling():
            return y
        return _Hold.apply(y, self.where, *self.step.used.values())

    def end_step(self) -> None:
        """The counts have been used."""
        self.step.counts = None

    def _warn(self, left: bool) -> None:
        kind = type(self).__name__
        if kind not in self.warned and (left or self.has_penalty):
            self.warned.add(kind)
            warnings.warn(
                f"{kind} has an auxiliary loss or counts, which a training pass "
                "leaves only inside `with context(model) as batch:`; batch.aux_loss is the loss",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out what belongs to one step."""
        return self.__dict__ | {"step": Step()}


class _Hold(torch.autograd.Function):
    """y as it is. What is saved passes through checkpointing, and is then of the second run; what
    is held is of the first."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, where: str, *values: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(*values)
        ctx.held, ctx.where = values, where
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        for saved, held in zip(ctx.saved_tensors, ctx.held, strict=True):
            if saved.data_ptr() != held.data_ptr() and not torch.equal(saved, held):
                raise RuntimeError(
                    f"{ctx.where}: a checkpointed block runs again for one of two passes that had "
                    "different contexts, and cannot know which: call backward() for each before "
                    "the next `with context(...)`"
                )
        return dy, None, *[None for _ in ctx.held]
