"""Context: what a batch gives the gates beyond x, and what its passes leave beside the output.

    with context(model, cluster=ids, mask=mask) as batch:
        loss = f(model(x)) + batch.aux_loss
    loss.backward()

A batch begins and ends with its `with`. Inside, every adapter has the batch's context (a label, a
cluster, an embedding of each sample; a mask of its tokens), and keeps what its passes leave: the
auxiliary losses, summed, and the counts of kept ranks, which add up until `after_step`. A pass
outside leaves no trace. The backward pass may be inside or after.

A checkpointed block runs again in the backward pass. The second run has the context of the first,
and leaves nothing, or there is a RuntimeError.

Limits. A block that is compiled first and then checkpointed cannot know that it runs again: its
context is missing then, and its losses and counts may be taken twice: checkpoint inside what is
compiled. A training pass outside a `with` has no loss; a layer says so once, a compiled one does
not. A model is called by one thread at a time.

In a Trainer of transformers, `compute_loss` is the place for the `with`, and the callback
`on_optimizer_step` that for `after_step`.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .contextual import Contextual, Record, runs_again


class Batch:
    """What the passes inside one `context` have left so far."""

    def __init__(self, layers: list[Contextual], records: list[Record]):
        self.layers, self.records = layers, records

    @property
    def aux_loss(self) -> Tensor | float:
        """The auxiliary losses of all layers and passes, and each layer's penalty; 0.0 if there are
        none. Reading changes nothing. Of nested contexts the outer one's holds the inner one's.

        Raises RuntimeError if part of it was made without gradients, as reentrant checkpointing
        makes it, and gradients are on.
        """
        both = list(zip(self.layers, self.records, strict=True))
        kinds = [type(layer) for layer, record in both if record.loss is not None]
        total: Tensor | float = 0.0
        for layer, record in both:
            if record.loss is None:
                continue
            if record.blind and torch.is_grad_enabled():
                raise RuntimeError(
                    f"{layer.where}: its auxiliary loss was made without gradients; checkpoint "
                    "with use_reentrant=False, or read aux_loss under torch.no_grad()"
                )
            layers = kinds.count(type(layer)) if layer.mean_over_layers else 1
            total = total + record.loss / layers
        for layer in self.layers:
            if layer.training and layer.has_penalty:
                device = next(layer.parameters()).device.type
                with torch.autocast(device, enabled=False):
                    penalty = layer.penalty()
                total = total if penalty is None else total + penalty
        return total


@contextlib.contextmanager
def context(model: nn.Module, *, mask: Tensor | None = None, **values: Tensor) -> Iterator[Batch]:
    """Inside, every adapter of model has this context of the batch, by name; what its passes leave
    is in the `Batch` that this gives.

        with context(model, cluster=ids, mask=mask) as batch:  # ids (B,), mask (B, T)
            loss = f(model(x)) + batch.aux_loss             # whose layers see (B, T, D)

    Args:
        mask: bools or integers: True or 1 where a token counts, False or 0 at padding (the
            opposite of torch's src_key_padding_mask); axes as the first of what the layers see.
            The package's schemes leave padding out of balances, counts, and a sample's mean.
        values: what a gate needs beyond its layer's input (`needs` names it): an index (...) or
            a vector (..., F) per sample; its axes before F are the first of what the layers see.

    The adapters hold it, so no module in between need pass it on, and a compiled model takes it as
    an input. Inside another context both hold, the inner one's values first, and what it leaves
    goes to the outer at its end. A batch that raises counts nothing. A layer asks for no name that
    it does not need.

    Where gradients add up over micro-batches: one `with` for each, its aux_loss divided as its loss
    is, and one `after_step` after the optimiser's step.

    Raises TypeError if a value is no tensor, ValueError if the mask is not of 0 and 1, RuntimeError
    if another that was opened inside is still open at its end.
    """
    if mask is not None:
        values = {"mask": mask, **values}
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is of type {type(value).__name__}, allowed: a tensor")
    if mask is not None:
        _require_mask(mask)
    layers = [layer for layer in model.modules() if isinstance(layer, Contextual)]
    counts = [layer.step.counts for layer in layers]
    again = runs_again()
    records = [Record({**layer.context, **values}, again, layer.step.record) for layer in layers]
    try:
        for layer, record in zip(layers, records, strict=True):
            layer.step.record = record
        yield Batch(layers, records)
        for record in records:
            if record.outer is not None and record.loss is not None:
                record.outer.add(record.loss, record.blind)
    except BaseException:
        for layer, before in zip(layers, counts, strict=True):
            layer.step.counts = None if layer.step.counts is None else before
        raise
    finally:
        last = all(n.step.record is record for n, record in zip(layers, records, strict=True))
        for layer, record in zip(layers, records, strict=True):
            record.open = False
            while layer.step.record is not None and not layer.step.record.open:
                layer.step.record = layer.step.record.outer
    if not last:
        raise RuntimeError("a context ends before one that was opened inside it")


def _require_mask(mask: Tensor) -> None:
    fits = not mask.is_floating_point()
    if fits and mask.dtype != torch.bool and mask.device.type == "cpu":
        fits = bool(((mask == 0) | (mask == 1)).all())
    if not fits:
        raise ValueError(f"mask is {mask.dtype}, allowed: bools, or integers that are 0 or 1")


class WithContext(nn.Module):
    """A model whose adapters get, with every input, the context that a function makes of it.

    forward(...) is model(...) inside context(model, **describe(...)), for any arguments. What the
    passes leave goes to the `context` that is open around it.
    """

    def __init__(self, model: nn.Module, describe: Callable[..., dict[str, Tensor]]):
        super().__init__()
        self.model, self.describe = model, describe

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (values := self.describe(*args, **kwargs)):
            return self.model(*args, **kwargs)
        with context(self.model, **values):
            return self.model(*args, **kwargs)
