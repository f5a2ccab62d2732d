"""A layer of theirs and one of mine, of the same life and values, to be compared.

Axes: T tokens, D in, O out, R ranks in all.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from .case import Broken, Case, LeftOut, naming, require_seed, tensors

WITHIN = 1e-9  # by default
Parts = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Mapped:
    """An nn.Module that is no Adapter, and where its numbers are.

    build(base, **settings): one around a linear layer, of those of theirs' settings that it takes.
        Those that it does not take stay at theirs' defaults.
    rows(module): by the name of a tensor of theirs ("A", "B", "router", "frozen_A", ...) the
        module's own, in theirs' shape: the tensor, a view of it, or several whose rows follow one
        another. Frozen ones may be left out while there are none.
    grow(module): a task ends; it changes the module in place. None: only layers of one task are
        looked at.
    Raises TypeError if one of them cannot be called.
    """

    build: Callable[..., Any]
    rows: Callable[[Any], Mapping[str, Parts]]
    grow: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not callable(value) and (name != "grow" or value is not None):
                raise TypeError(f"{name} is {value!r}, allowed: a function")


Mine = type[Adapter] | Callable[[Tensor, Any], Tensor] | Mapped


def mapped(mine: Mine, theirs: type[Adapter]) -> Mapped:
    """Mine as a Mapped. Raises TypeError if it is none of the three."""
    if isinstance(mine, Mapped):
        return mine
    if not isinstance(mine, (type, nn.Module)) and callable(mine):
        function = mine
        forward = {"forward": lambda layer, input: function(input, layer), "function": True}
        mine = type(getattr(function, "__name__", "Mine"), (theirs,), forward)
    if not (isinstance(mine, type) and issubclass(mine, Adapter)):
        raise TypeError(
            f"mine is {mine!r}, allowed: a subclass of minimoe.Adapter, a function of x and a "
            "layer, a minimoe.laws.Mapped"
        )

    def rows(layer: Adapter) -> dict[str, Parts]:
        own = tensors(layer)
        return {name: own[name] for name in own if not name.startswith("base.")}

    return Mapped(mine, rows, mine.grow)


def untaken(mine: Mapped, settings: Iterable[str]) -> list[str]:
    """Of these settings those that its build does not take."""
    taken = inspect.signature(mine.build).parameters
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return []
    return [name for name in settings if name not in taken]


class Pair:
    """A layer of theirs and one of mine, in one case: of the same life and values.

    within: what of the largest number they may differ by; what is far below it says nothing.
    """

    def __init__(self, case: Case, mine: Mapped, device: str = "cpu", within: float = WITHIN):
        self.case, self.mapped, self.device, self.within = case, mine, device, within
        self.theirs = case.layer().to(device)
        base = copy.deepcopy(self.theirs.base).requires_grad_()  # to freeze it is mine's part
        self.base_parameters = dict(base.named_parameters())
        settings = self.theirs.settings()
        unknown = untaken(mine, settings)
        known = {name: settings[name] for name in settings if name not in unknown}
        with naming("build"):
            made = mine.build(base, **known)
            require_seed(case.seed)
        if not isinstance(made, nn.Module):
            raise Broken(f"build gives {made!r}, allowed: an nn.Module")
        self.mine: Any = made.to(device, torch.float64)
        if isinstance(self.mine, Adapter):
            self.mine.path = case.path
        self.born = {name: t.detach().clone() for name, t in self.read().items()}
        for _ in range(case.tasks - 1):
            self.grow()
        self.mine.train(case.training)
        self.copy()

    def grow(self) -> None:
        assert self.mapped.grow is not None
        with naming("grow"):
            other = self.mapped.grow(self.mine)
            require_seed(self.case.seed)
        if isinstance(other, nn.Module) and other is not self.mine:
            raise Broken("grow gives another module, allowed: to change the one that it is given")

    @property
    def names(self) -> list[str]:
        """Of theirs' tensors, without the base's, and without frozen ones of no rows."""
        own = tensors(self.theirs)
        return [n for n in own if not n.startswith("base.") and own[n].numel()]

    def parts(self) -> dict[str, list[Tensor]]:
        """Mine, by theirs' names."""
        with naming("rows"):
            found = self.mapped.rows(self.mine)
        if not isinstance(found, Mapping):
            raise Broken(f"rows gives {found!r}, allowed: a dictionary of tensors")
        own = tensors(self.theirs)
        if isinstance(self.mine, Adapter):  # what else it has is its own
            found = {name: found[name] for name in found if name in own}
        with naming("rows"):
            return {n: [p] if isinstance(p, Tensor) else [*p] for n, p in found.items()}

    def read(self) -> dict[str, Tensor]:
        """The values of mine, by theirs' names, each in one."""
        found = self.parts()
        return {n: torch.cat(p) if len(p) != 1 else p[0] for n, p in found.items() if p}

    def copy(self) -> None:
        """Theirs' values into mine. Raises Broken where they do not fit."""
        found, own = self.parts(), tensors(self.theirs)
        unknown = [name for name in found if name not in own]
        if missing := [name for name in self.names if not found.get(name)]:
            also = f", and there is no {', '.join(unknown)}" if unknown else ""
            raise Broken(f"of {self.case.tasks} tasks: rows gives no {', '.join(missing)}{also}")
        if unknown:
            fit = ", ".join(name for name in own if not name.startswith("base."))
            raise Broken(f"rows gives {', '.join(unknown)}, allowed: {fit}")
        for name, tensor in self.read().items():
            if tensor.shape != own[name].shape:
                both = f"{tuple(tensor.shape)}, theirs {tuple(own[name].shape)}"
                raise Broken(f"of {self.case.tasks} tasks: {name} is {both}")
            if tensor.dtype != own[name].dtype:
                raise Broken(f"{name} of a layer in {own[name].dtype} is {tensor.dtype}")
        with torch.no_grad():
            for name, parts in found.items():
                sizes = [len(part) for part in parts]
                values = own[name].split(sizes) if len(parts) > 1 else [own[name]] * len(parts)
                for part, value in zip(parts, values, strict=True):
                    part.copy_(value)
        for name, tensor in self.read().items():
            if not torch.equal(tensor, own[name]):
                raise Broken(f"{name} as rows gives it is a copy: give the tensor, or views of it")

    def run(self, layer: Any, x: Tensor) -> Tensor:
        """y of x, by one of both, as `Case.run`."""
        torch.manual_seed(self.case.seed + 3)
        with self.context(layer, x):
            y: Tensor = layer(x)
        require_seed(self.case.seed + 3)
        auto = torch.is_autocast_enabled(x.device.type)
        if isinstance(y, Tensor) and y.dtype != x.dtype and not auto:
            raise Broken(f"y of x in {x.dtype} is in {y.dtype}")
        shape = (*x.shape[:-1], self.case.O)
        if not isinstance(y, Tensor) or y.shape != shape:
            what = tuple(y.shape) if isinstance(y, Tensor) else y
            raise Broken(f"y of x {tuple(x.shape)} is {what}, theirs {shape}")
        return y

    def context(self, layer: Any, x: Tensor, mask: Tensor | None = None) -> Any:
        if isinstance(layer, Adapter):
            return self.case.context(layer, x, mask)
        return contextlib.nullcontext()

    def x(self, *shape: int) -> Tensor:
        return self.case.x(shape or None).to(self.theirs.B.device)

    def tokens(self) -> Tensor:
        """x (T, D), of length 1 or so, so that no weight is too small to be seen."""
        return self.x() / self.case.D**0.5

    def said(self, y: Tensor, x: Tensor) -> Tensor:
        """g ⊙ z (T, R), as y (T, O) of x (T, D) tells. Raises LeftOut where it does not."""
        layer = self.theirs
        if len(layer.rows("B")) > self.case.O or not layer.scale or not len(x):
            raise LeftOut
        B = layer.rows("B").T
        rest = ((y - layer.base(x)) / layer.scale).T
        found = torch.linalg.lstsq(B, rest).solution
        if not (B @ found - rest).norm() <= 10 * self.within * (1 + rest.norm()):
            raise LeftOut  # no mix of the values: y will tell
        return found.T

    def speak(self, gz: Tensor, loud: bool = False) -> Tensor:
        """Who says something, of g ⊙ z (T, R); loud: what is far from rounding."""
        return gz.abs() > (100 if loud else 0.01) * self.within * (1 + gz.abs().max())

    @torch.no_grad()
    def gates(self) -> tuple[Tensor, Tensor, Tensor]:
        """g ⊙ z (T, R) of theirs and of mine, and z."""
        if not self.case.claims.equation:
            raise LeftOut
        x = self.tokens()
        both = [self.run(layer, x) for layer in (self.theirs, self.mine)]
        if not all(y.isfinite().all() for y in both):
            raise Broken(f"y is {both[1].flatten()[0]:.6g}, theirs {both[0].flatten()[0]:.6g}")
        ours, mine = (self.said(y, x) for y in both)
        return ours, mine, x @ self.theirs.keys.T


# Gradients, by theirs' names


def gradient(pair: Pair, *shape: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By x (*shape, D), "x", and by the names of all tensors, of theirs and of mine; 0 where there
    is none."""
    ours = gradient_of(pair, pair.theirs, *shape)
    x, out = pair.x(*shape).requires_grad_(), pair.mine
    out.zero_grad()
    pull(pair, pair.run(out, x))
    with swapped(pair.mine) as held:
        parts = {name: p for name, p in pair.parts().items() if name in pair.names}
        mine = {name: torch.cat([p if storage(p) in held else 0 * p for p in several])
                if len(several) != 1 or storage(several[0]) not in held else several[0].clone()
                for name, several in parts.items()}  # fmt: skip
    return ours, {"x": given(x), **{name: t.detach() for name, t in mine.items()}}


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def gradient_of(pair: Pair, call: Callable[[Tensor], Tensor], *shape: int) -> dict[str, Tensor]:
    """The same of theirs, whose y is computed by `call`."""
    x = pair.x(*shape).requires_grad_()
    pair.theirs.zero_grad()
    torch.manual_seed(pair.case.seed + 3)
    with pair.context(pair.theirs, x):
        pull(pair, call(x))
    own = tensors(pair.theirs)
    return {"x": given(x)} | {name: given(own[name]) for name in pair.names}


def pull(pair: Pair, y: Tensor) -> None:
    if y.requires_grad:
        y.backward(pair.case.dy(y.shape[:-1]).to(y))


def given(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


@contextlib.contextmanager
def swapped(module: nn.Module) -> Iterator[set[int]]:
    """Inside, each parameter and buffer holds its gradient instead, so that a map of tensors gives
    gradients. Yields where they are: a tensor that is elsewhere, as in a list, has none."""
    kept = [(t, t.data) for t in (*module.parameters(), *module.buffers())]
    for tensor, _ in kept:
        tensor.data = given(tensor)
    try:
        yield {storage(tensor) for tensor, _ in kept}
    finally:
        for tensor, data in kept:
            tensor.data = data
