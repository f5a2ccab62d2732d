"""A linear layer that has been replaced: what its model may still ask of it.

It answers for the layer that it wraps: its sizes, weight and bias, its mode, device and names in a
state_dict. So a file that any library writes of an adapted model holds the model's own tensors
under their own names, and the adapters' beside them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .contextual import Contextual
from .frozen import with_room


def sizes(base: nn.Module) -> tuple[int, int]:
    """(D, O) of a linear layer: an nn.Linear, or transformers' Conv1D, whose weight is (D, O).
    Raises TypeError if base is neither, or complex."""
    if isinstance(base, nn.Linear) and base.weight.is_complex():
        raise TypeError(f"base is of {base.weight.dtype}, allowed: real numbers")
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    kind = type(base)
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        D, O = base.get_parameter("weight").shape
        return D, O
    which = f"{kind.__name__} ({kind.__module__})"
    raise TypeError(f"base is {which}, allowed: nn.Linear, transformers' Conv1D")


@dataclass
class Use:
    """What becomes of a wrapped layer in a pass of its owner (adapt.py looks at the end)."""

    called: bool = False  # the layer was called
    read: bool = False  # its base, or its base's weight, was asked for past it
    inside: bool = False  # it runs now


class Wrapped(Contextual):
    """A frozen linear layer, wrapped, and what it answers for. Raises TypeError if base is none."""

    base: nn.Linear
    tied = ""  # another parameter of the model that is W0 too
    unmerged: Tensor | None

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = sizes(base)
        self.base = base.requires_grad_(False)
        self.register_buffer("unmerged", None, persistent=False)  # W0 while merged
        self.training, self.use = base.training, Use()
        self.register_load_state_dict_post_hook(_own_names)

    def require_no_clash(self, rows: set[str]) -> None:
        """Raise ValueError if base has something of its own under a name of this layer's, or of
        the rows that it will have."""
        theirs = {*vars(self.base), *self.base._parameters, *self.base._buffers} - _OF_ANY
        ours = rows | vars(self).keys() | set(dir(type(self)))
        both = [name for name in sorted(theirs & ours) if not name.startswith("_")]
        if both:
            raise ValueError(
                f"the layer has a {' and a '.join(both)} of its own, as its adapter has"
            )

    def __getattr__(self, name: str) -> Any:
        """What a layer of another class has beyond nn.Linear is asked of it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None or name.startswith("_") or not hasattr(base, name):
                raise
            return getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias") and value is not getattr(self.base, name):
            raise RuntimeError(
                f"{self.where} is adapted, and its {name} cannot be set or tied: unwrap the model "
                "first"
            )
        if name not in ("weight", "bias"):
            super().__setattr__(name, value)

    def call_base(self, x: Tensor) -> Tensor:
        """x W0ᵀ, by the wrapped layer."""
        self.use.inside = True
        y: Tensor = self.base(x)
        self.use.inside = False
        return y

    @property
    def weight(self) -> Tensor:
        """W0, for an owner that asks for its dtype or the like, and then calls the layer."""
        self.use.read = True
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def dtype(self) -> torch.dtype:
        """The adapter's own; at first float32, or float64 where base is."""
        for parameter in self._parameters.values():
            return parameter.dtype  # type: ignore[union-attr]
        return torch.float64 if self.base.weight.dtype == torch.float64 else torch.float32

    def empty(self, *shape: int) -> Tensor:
        """A tensor of the adapter's dtype, on its device, to be filled."""
        return torch.empty(*shape, dtype=self.dtype, device=self.base.weight.device)

    def cast(self, x: Tensor) -> Tensor:
        """x in the dtype to compute in: the adapter's, or under autocast what comes."""
        dtype = self.dtype
        same = x.dtype == dtype or torch.is_autocast_enabled(x.device.type)
        return x if same else x.to(dtype)

    def samples_first(self, x: Tensor, back: bool = False) -> Tensor:
        """x (samples, tokens..., D) of x as it comes, or back."""
        if self.batch_first or x.ndim < 3:
            return x
        return x.movedim(0, -2) if back else x.movedim(-2, 0)

    # Merging: where a scheme's update is one matrix, W0 can hold it

    def require_plain_weight(self) -> None:
        """Raise RuntimeError, with the reason, if W0 is not a weight that this layer alone has."""
        base, reason = self.base, ""
        other = isinstance(base, nn.Linear) and type(base).forward is not nn.Linear.forward
        if self.unmerged is not None:
            reason = "it is merged already"
        elif self.tied:
            reason = f"its weight is also {self.tied}"
        elif "weight" not in base._parameters:
            reason = "its weight is computed (parametrised, normalised or pruned)"
        elif not base.weight.is_floating_point():
            reason = f"its weight is quantised, {base.weight.dtype}"
        elif other or "forward" in vars(base):
            reason = f"{type(base).__name__} does more than nn.Linear"
        if reason:
            raise RuntimeError(f"{self.where} cannot be merged: {reason}")

    def replace_weight(self, update: Tensor) -> None:
        """Put W0 + update (O, D) in W0's place; outputs are equal to rounding in W0's dtype."""
        self.require_plain_weight()
        W0 = self.base.weight.detach()
        update = update if isinstance(self.base, nn.Linear) else update.T
        self.base.weight = nn.Parameter((W0 + update).to(W0.dtype), requires_grad=False)
        self.unmerged = W0

    def unmerge(self) -> None:
        """Put W0 back, bit for bit. Raises RuntimeError if the layer is not merged."""
        if self.unmerged is None:
            raise RuntimeError(f"{self.where} is not merged")
        self.base.weight = nn.Parameter(self.unmerged, requires_grad=False)
        self.unmerged = None

    def stop_if_merged(self) -> None:
        """Raise RuntimeError if W0 holds the update now."""
        if self.unmerged is not None:
            raise RuntimeError(f"{self.where} is merged: call unmerge() first")

    # State: the base's tensors keep their own names, and no tensor of size 0 is written

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        tensors = super().state_dict(*args, prefix=prefix, **kwargs)
        for key in [key for key in tensors if key.startswith(f"{prefix}base.")]:
            tensors[prefix + key.removeprefix(f"{prefix}base.")] = tensors.pop(key)
        return tensors

    def _save_to_state_dict(self, tensors: Any, prefix: str, keep_vars: bool) -> None:
        self.stop_if_merged()
        super()._save_to_state_dict(tensors, prefix, keep_vars)
        for name in self._frozen():
            if not len(getattr(self, name)):
                tensors.pop(prefix + name, None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """A grown layer's state loads into a fresh one: frozen rows take the size that comes."""
        self.stop_if_merged()
        self.end_step()
        self._prefix = prefix
        own = {**self._parameters, **self._buffers, **self._modules}
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = key.removeprefix(prefix)
            if name.split(".")[0] not in own:
                state_dict[f"{prefix}base.{name}"] = state_dict.pop(key)
        for name in self._frozen():
            here, live = getattr(self, name), prefix + name.removeprefix("frozen_")
            rows = state_dict.setdefault(prefix + name, here[:0]) if live in state_dict else None
            if rows is not None and rows.shape[1:] == here.shape[1:]:
                own_live = getattr(self, name.removeprefix("frozen_"))
                setattr(self, name, with_room(here.new_empty(rows.shape), len(own_live)))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _frozen(self) -> list[str]:
        return [name for name in self._buffers if name.startswith("frozen_")]


_OF_ANY = {"weight", "bias", "in_features", "out_features", "nf", "nx", "training", "forward"}


def _own_names(layer: Any, keys: Any) -> None:
    """What is missing of the base, or too much, under the names that the state has."""
    inner = f"{layer._prefix}base."
    for names in keys:
        names[:] = [
            layer._prefix + n.removeprefix(inner) if n.startswith(inner) else n for n in names
        ]
