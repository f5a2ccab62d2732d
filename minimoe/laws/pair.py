"""A layer of theirs and one of mine, of the same life and values, to be compared.

Axes: T tokens, D in, O out, R ranks in all.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..continual.probe import dense_gate
from .case import Broken, Case, LeftOut, naming, tensors

Parts = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Mapped:
    """An nn.Module that is no Adapter, and where its numbers are.

    build(base, **settings): one around a linear layer, of those of theirs' settings that it takes.
    rows(module): by the name of a tensor of theirs ("A", "B", "router", "frozen_A", ...) the
        module's own, in theirs' shape: the tensor, a view of it, or several whose rows follow one
        another. Frozen ones may be left out while there are none.
    grow(module): a task ends. None: only layers of one task are looked at.
    """

    build: Callable[..., Any]
    rows: Callable[[Any], Mapping[str, Parts]]
    grow: Callable[[Any], Any] | None = None


Mine = type[Adapter] | Callable[[Tensor, Any], Tensor] | Mapped


def mapped(mine: Mine, theirs: type[Adapter]) -> Mapped:
    """Mine as a Mapped. Raises TypeError if it is none of the three."""
    if isinstance(mine, Mapped):
        return mine
    if not isinstance(mine, type) and callable(mine):
        function = mine
        forward = {"forward": lambda layer, input: function(input, layer)}
        mine = type(getattr(function, "__name__", "Mine"), (theirs,), forward)
    if not (isinstance(mine, type) and issubclass(mine, Adapter)):
        raise TypeError(
            f"mine is {mine!r}, allowed: a subclass of minimoe.Adapter, a function of x and a "
            "layer, a minimoe.laws.Mapped"
        )

    def rows(layer: Adapter) -> dict[str, Parts]:
        own = tensors(layer)
        return {name: own[name] for name in own if not name.startswith("base.")}

    return Mapped(mine, rows, Adapter.grow if mine.grow is Adapter.grow else mine.grow)


class Pair:
    """A layer of theirs and one of mine, in one case: of the same life and values."""

    def __init__(self, case: Case, mine: Mapped, device: str = "cpu"):
        self.case, self.mapped = case, mine
        self.theirs = case.layer().to(device)
        base = copy.deepcopy(self.theirs.base)
        taken = inspect.signature(mine.build).parameters
        every = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        settings = self.theirs.settings()
        with naming("build"):
            given = {name: settings[name] for name in settings if every or name in taken}
            self.mine: Any = mine.build(base, **given).to(device, torch.float64)
        if isinstance(self.mine, Adapter):
            self.mine.path = case.path
        for _ in range(case.tasks - 1):
            self.grow()
        self.mine.train(case.training)
        self.copy()

    def grow(self) -> None:
        assert self.mapped.grow is not None
        with naming("grow"):
            self.mapped.grow(self.mine)

    @property
    def names(self) -> list[str]:
        """Of theirs' tensors, without the base's, and without frozen ones of no rows."""
        own = tensors(self.theirs)
        return [n for n in own if not n.startswith("base.") and own[n].numel()]

    def parts(self) -> dict[str, list[Tensor]]:
        """Mine, by theirs' names."""
        with naming("rows"):
            found = self.mapped.rows(self.mine)
            return {n: [p] if isinstance(p, Tensor) else [*p] for n, p in found.items()}

    def read(self) -> dict[str, Tensor]:
        """The values of mine, by theirs' names, each in one."""
        found = self.parts()
        return {n: torch.cat(p) if len(p) != 1 else p[0] for n, p in found.items() if p}

    def copy(self) -> None:
        """Theirs' values into mine. Raises Broken where they do not fit."""
        found, own = self.parts(), tensors(self.theirs)
        if missing := [name for name in self.names if name not in found]:
            raise Broken(f"rows gives no {', '.join(missing)}")
        if unknown := [name for name in found if name not in own]:
            fit = ", ".join(name for name in own if not name.startswith("base."))
            raise Broken(f"rows gives {', '.join(unknown)}, allowed: {fit}")
        for name, tensor in self.read().items():
            if tensor.shape != own[name].shape:
                both = f"{tuple(tensor.shape)}, theirs {tuple(own[name].shape)}"
                raise Broken(f"{name} after {self.case.tasks} tasks is {both}")
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
        return y

    def context(self, layer: Any, x: Tensor) -> Any:
        if isinstance(layer, Adapter):
            return self.case.context(layer, x)
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
        if not (B @ found - rest).norm() <= 1e-8 * (1 + rest.norm()):
            raise LeftOut  # no mix of the values: y will tell
        return found.T

    @torch.no_grad()
    def gates(self) -> tuple[Tensor, Tensor, Tensor]:
        """g ⊙ z (T, R) of theirs and of mine, and z."""
        if not self.case.claims.equation:
            raise LeftOut
        x = self.tokens()
        torch.manual_seed(self.case.seed + 3)
        with self.context(self.theirs, x):
            g = dense_gate(self.theirs, x)
        z = x @ self.theirs.keys.T
        return g * z, self.said(self.run(self.mine, x), x), z


# Gradients, by theirs' names


def gradient(pair: Pair) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By "x" and the names of all tensors, of theirs and of mine; 0 where there is none."""
    ours = gradient_of(pair, pair.theirs)
    x, out = pair.x().requires_grad_(), pair.mine
    out.zero_grad()
    pull(pair, pair.run(out, x))
    with swapped(pair.mine):
        mine = {name: t.detach().clone() for name, t in pair.read().items() if name in pair.names}
    return ours, {"x": given(x), **mine}


def gradient_of(pair: Pair, call: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The same of theirs, whose y is computed by `call`."""
    x = pair.x().requires_grad_()
    pair.theirs.zero_grad()
    torch.manual_seed(pair.case.seed + 3)
    with pair.context(pair.theirs, x):
        pull(pair, call(x))
    own = tensors(pair.theirs)
    return {"x": given(x)} | {name: given(own[name]) for name in pair.names}


def pull(pair: Pair, y: Tensor) -> None:
    if y.requires_grad:
        y.backward(pair.case.dy().to(y.device))


def given(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


@contextlib.contextmanager
def swapped(module: nn.Module) -> Iterator[None]:
    """Inside, each parameter and buffer holds its gradient instead, so that a map of tensors gives
    gradients."""
    kept = [(t, t.data) for t in (*module.parameters(), *module.buffers())]
    for tensor, _ in kept:
        tensor.data = given(tensor)
    try:
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
