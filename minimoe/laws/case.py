"""A case: a layer of drawn sizes that has lived through some tasks. And what laws are made with.

A law is a function of one `Case`. It returns if the law holds there, raises `Broken` with the
numbers if not, and `LeftOut` where nobody can tell.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapt import Batch, adapters, context
from ..adapter import Adapter
from ..claims import Claims
from ..continual.probe import dense_gate

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

# What `auto` takes at the sizes that are drawn is plain; dense is the other code, the fused one.
DRAWN_PATHS = ("auto", "dense")


class Broken(AssertionError):
    """A law does not hold; the message is the evidence."""


class LeftOut(Exception):
    """This case cannot show whether the law holds."""


@dataclass(frozen=True)
class Case:
    """One drawn situation: sizes, a number of tasks lived through, a mode, a seed, and a path."""

    scheme: type[Adapter]
    settings: dict[str, Any]
    claims: Claims
    T: int
    D: int
    O: int
    tasks: int
    bias: bool
    training: bool
    seed: int
    path: str = "auto"

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        mode = "training" if self.training else "evaluation"
        bias = "" if self.bias else ", no bias"
        sizes = f"T {self.T}, D {self.D}, O {self.O}{bias}, tasks {self.tasks}"
        path = "" if self.path == "auto" else f", path {self.path}"
        return f"{sizes}, {settings}, {mode}, seed {self.seed}{path}"

    def build(self, base: nn.Linear, **settings: Any) -> Adapter:
        """A fresh layer around base, of this case's settings and path."""
        layer = self.scheme(base, **self.settings | settings)
        layer.path = self.path
        return layer

    def layer(self, dtype: torch.dtype = torch.float64, **settings: Any) -> Adapter:
        """The layer after its tasks, each of which left what it trains at random values; what
        is not trained is as the scheme made it. The same values every time, whatever the dtype."""
        seeded(self.seed)
        layer = self.build(nn.Linear(self.D, self.O, self.bias, dtype=torch.float64), **settings)
        for task in range(self.tasks):
            if task > 0:
                layer.grow()
            for parameter in live(layer).values():
                # a lone number is a knob, such as a mixing weight: it stays near where it starts
                nn.init.normal_(parameter, std=1.0 if parameter.numel() > 1 else 0.01)
        require_seed(self.seed)
        return layer.to(dtype).train(self.training)

    def x(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """Inputs (*shape, D), by default (T, D), float64 and normal."""
        source = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(
            *((self.T,) if shape is None else shape), self.D, generator=source, dtype=torch.float64
        )

    def dy(self, shape: Iterable[int] | None = None) -> Tensor:
        """A gradient to come in at y (*shape, O), by default (T, O), float64 and normal."""
        source = torch.Generator().manual_seed(self.seed + 2)
        leading = (self.T,) if shape is None else shape
        return torch.randn(*leading, self.O, generator=source, dtype=torch.float64)

    def run(self, x: Tensor, layer: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """y of x, by a layer of this case's own if none is given."""
        layer = self.layer() if layer is None else layer
        seeded(self.seed + 3)
        with self.context(layer, x):
            y = layer(x)
        require_seed(self.seed + 3)
        return y

    def context(
        self, layer: Any, x: Tensor, mask: Tensor | None = None
    ) -> contextlib.AbstractContextManager[Batch]:
        """Inside, layer has the context that it needs (adapt.context) for each sample of x. A
        sample's context depends on that sample alone, and a small change of x does not change it.
        So a law may treat the layer as any function of x."""
        _, adapter = next(adapters(layer))
        needs = adapter.needs()
        if not needs:
            return context(layer, mask=mask)
        places = 2.0 ** (torch.arange(x.shape[-1], device=x.device) % 16)
        bits = (x > 0).double() @ places.double()
        values = {}
        for name, need in needs.items():
            if isinstance(need, range):
                values[name] = bits.long() % len(need)
            else:
                source = torch.Generator().manual_seed(self.seed + 5)
                vectors = torch.randn(7, need, generator=source, dtype=torch.float64)
                values[name] = vectors.to(x.device)[bits.long() % 7]
        return context(layer, mask=mask, **values)

    def train(self, layer: Adapter, steps: int = 3) -> None:
        """Some steps of training, each on a batch of its own, as a loop would make them."""
        layer.train()
        optimiser = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], 0.1)
        for step in range(steps):
            optimiser.zero_grad()
            x = self.x((self.T + step,))
            with self.context(layer, x) as batch:
                (self.run(x, layer).square().mean() + batch.aux_loss).backward()
            optimiser.step()
            layer.after_step()

    def gradients(
        self, x: Tensor, layer: Adapter, call: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """y (..., O), and the gradients of (y · dy) by x and by what learns; `call` for layer."""
        leaves = {"x": x.detach().requires_grad_(), **live(layer)}
        y = self.run(leaves["x"], layer if call is None else call)
        dy = self.dy(x.shape[:-1]).to(y.device)
        grads = torch.autograd.grad(y, list(leaves.values()), dy, materialize_grads=True)
        return {"y": y.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}

    @property
    def experts(self) -> int:
        """E."""
        return self.layer().n_experts


def cases(
    scheme: type[Adapter], settings: dict[str, Any], claims: Claims
) -> "SearchStrategy[Case]":
    """How cases are drawn: small sizes, 1 to 3 tasks, and what is not given of rank and top_k."""
    from hypothesis import strategies

    @strategies.composite
    def drawn(draw: "DrawFn") -> Case:
        def number(low: int, high: int) -> int:
            return draw(strategies.integers(low, high))

        tasks, rank = number(1, 3), settings.get("rank") or number(1, 3)
        sizes = {"rank": rank}
        if claims.top_k:
            sizes["top_k"] = number(1, tasks * (1 if claims.expert == "block" else rank))
        return Case(
            scheme,
            sizes | settings,
            claims,
            T=number(1, 5),
            D=number(rank, rank + 5),
            O=number(rank, rank + 5),
            tasks=tasks,
            bias=draw(strategies.booleans()),
            training=draw(strategies.booleans()),
            seed=number(0, 999),
            path=draw(strategies.sampled_from(DRAWN_PATHS)),
        )

    return drawn()


def large(scheme: type[Adapter], settings: dict[str, Any], claims: Claims) -> list[Case]:
    """Two cases beyond any that is drawn: long lives, wide layers, up to 16 experts kept, up to a
    thousand tokens. What is right in small layers alone shows itself here."""
    rank, blocks = settings.get("rank") or 3, claims.expert == "block"
    experts = settings.get("experts", 1) if blocks else rank  # that a task adds
    found = []
    for T, D, O, tasks, training in ((1000, 64, 48, 8, True), (250, 20, 24, 18, False)):
        tasks = tasks if blocks else min(tasks, 8)
        sizes = {"rank": rank}
        if claims.top_k:
            sizes["top_k"] = min(16, tasks * experts - 1)
        found.append(
            Case(
                scheme,
                sizes | settings,
                claims,
                T=T,
                D=max(D, rank),
                O=max(O, rank),
                tasks=tasks,
                bias=training,
                training=training,
                seed=int(training),  # odd and even (exact_gradient)
                path=DRAWN_PATHS[not training],
            )
        )
    return found


def smallest(breaks: Callable[[Case], bool], case: Case, free: Iterable[str]) -> Case:
    """A case that breaks, with each of its sizes in turn as small as a search by halves finds it,
    and so the settings that are free."""
    least = dict.fromkeys(("T", "tasks", "D", "O", *free), 1)
    least |= dict.fromkeys("DO", case.settings["rank"])
    for name, low in least.items():
        of_case = name not in free
        high = getattr(case, name) if of_case else case.settings[name]
        while low < high:
            middle = (low + high) // 2
            change = {name: middle} if of_case else {"settings": case.settings | {name: middle}}
            smaller = replace(case, **change)
            if breaks(smaller):
                case, high = smaller, middle
            else:
                low = middle + 1
    return case


# Of a case or a layer.


def seeded(seed: int) -> None:
    """torch.manual_seed of the devices that there are, without the stack that it writes down for
    those that there are not, which takes longer than a small layer does."""
    if torch.cuda.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def require_seed(seed: int) -> None:
    """Raise Broken if torch was seeded since `seeded`: all layers of a model would be alike."""
    if torch.initial_seed() != seed:
        raise Broken(f"sets torch's seed, to {torch.initial_seed()}")


def live(layer: Adapter) -> dict[str, nn.Parameter]:
    """What the adapter trains, by name."""
    return {
        name: parameter
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad and not name.startswith("base.")
    }


def tensors(layer: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, by name; of the base, as "base.NAME"."""
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def noiseless(case: Case, x: Tensor) -> Case:
    """The case in a mode in which its layer draws no noise: its own, or else the other one. Raises
    LeftOut if there is none."""
    for training in (case.training, not case.training):
        mode = replace(case, training=training)
        layer, before = mode.layer(), torch.get_rng_state()
        with mode.context(layer, x):
            layer(x)
        if torch.equal(torch.get_rng_state(), before):
            return mode
    raise LeftOut


def expert_weights(case: Case, layer: Adapter) -> Tensor:
    """One weight per token and expert, (T, E). Raises Broken if ranks of a block differ."""
    x = case.x()
    with case.context(layer, x):
        g = dense_gate(layer, x)
    if case.claims.expert == "rank":
        return g
    blocks = g.unflatten(-1, (-1, layer.block))  # (T, E, r)
    if not torch.equal(blocks, blocks[..., :1].expand(blocks.shape)):
        raise Broken("ranks of one block have different weights")
    return blocks[..., 0]


def nudged(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, as far off as rounding to dtype can take it."""
    if not tensor.is_floating_point():
        return tensor
    return tensor * (1 + torch.finfo(dtype).eps * (torch.rand_like(tensor) - 0.5))


# What finds a law broken.


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Whatever is raised inside becomes Broken, with `what` before its message."""
    try:
        yield
    except LeftOut:
        raise
    except Broken as error:
        raise Broken(f"{what}: {error}") from error
    except (Exception, SystemExit) as error:  # and no KeyboardInterrupt: that is the user's
        raise Broken(f"{what}: {type(error).__name__}: {error}") from error


def same_bits(got: Tensor, want: Tensor, what: str, other: str) -> None:
    """Raise Broken unless all bits are the same (nan is no number, and never the same)."""
    if not torch.equal(got, want):
        near(got, want, what, other)
        worst = (numbers(got) - numbers(want)).abs().max()
        raise Broken(f"{what} differs in bits from {other}, by up to {worst:.3g}")


def numbers(tensor: Tensor) -> Tensor:
    """The tensor, apart from any gradient; of a mask, 0 and 1."""
    return tensor.detach() if tensor.dtype != torch.bool else tensor.double()


def near(got: Tensor, want: Tensor, what: str, other: str, within: float = 1e-9) -> None:
    """Raise Broken, with the worst place, unless equal within `within` of the largest entry."""
    if got.shape != want.shape:
        raise Broken(f"{what} is {tuple(got.shape)}, {other} is {tuple(want.shape)}")
    got, want = numbers(got), numbers(want)
    off = (got - want).abs()
    if got.numel() and not off.max() <= within * max(1.0, float(want.abs().max())):
        at = int(off.nan_to_num(math.inf).argmax())
        mine, theirs = got.flatten()[at].item(), want.flatten()[at].item()
        raise Broken(f"{what} is {mine:.6g} where {other} is {theirs:.6g}")
