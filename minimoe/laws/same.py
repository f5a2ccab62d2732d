"""One implementation held to another: what differs first, and as if which step were another.

    from minimoe.laws import same
    for row in same(MyMoRA, MoRA, tau=0.1):
        print(row)

Mine is an Adapter; or a function y = f(x, layer) of the numbers that a layer of theirs holds, as a
kernel is; or any nn.Module, by a `Mapped`: how one is built, and which of its tensors are which.
Both get the same settings, tasks and values, and are compared in this order:

    rows        mine has theirs' tensors, of the same sizes, after as many tasks
    chosen      which ranks speak for a token, in training
    weights     g of each, in training
    pruned      who speaks in evaluation, and how loud
    y           the output, of tokens in any shape, and of none
    gradients   by x and by all that learns
    counts      of adapters: the loss left beside y, active() and speaking()
    steps       what learns, and what must not, after three steps of training
    growth      what the end of a task freezes, and where; what it adds
    bits16      y in 16 bits is as near to float64 as theirs
    usual       of adapters: what is claimed, what settings are by default, what is refused

Weights are read off outputs, so that what has no gate is compared too: where the R values are
independent, y - x W0ᵀ = scale · (g ⊙ z) B has one solution g ⊙ z.

Axes: T tokens, D in, O out, R ranks in all, r ranks per task, E experts, k kept experts.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapter import Adapter
from .case import DRAWN_PATHS, Broken, Case, LeftOut, naming, near, same_bits, tensors
from .check import Row, claimed, drawn
from .guess import SPEAKS, guess
from .pair import Mapped, Mine, Pair, gradient, mapped

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

# Settings that are drawn where they are not given, by the name that all schemes have for them.
DRAWN: Mapping[str, Sequence[float]] = {
    "scale": (1.0, 0.5, 3.0),
    "tau": (0.5, 2.0, 0.7),
    "delta": (0.2, -1.0, 0.4),
    "balance": (0.0, 0.5, 2.0),
}


# The steps of the comparison


def rows(pair: Pair) -> None:
    """Mine has theirs' tensors: of the same sizes after as many tasks."""


def chosen(pair: Pair) -> None:
    """The same ranks speak for each token, in training."""
    theirs, mine, _ = pair.gates()
    floor = SPEAKS * (1 + float(theirs.abs().max()))
    doubt = (theirs.abs() > 0.01 * floor) & (theirs.abs() < 100 * floor)
    for t in range(len(theirs)):
        ours = (theirs[t].abs() > floor).nonzero().flatten().tolist()
        others = (mine[t].abs() > floor).nonzero().flatten().tolist()
        if ours != others:
            if doubt[t].any():
                raise LeftOut
            raise Broken(f"for token {t} ranks {others or 'none'} speak, theirs: {ours or 'none'}")


def weights(pair: Pair) -> None:
    """Each that speaks has the same weight, in training."""
    theirs, mine, z = pair.gates()
    off = (mine - theirs).abs() - 1e-7 * (theirs.abs().amax(-1, keepdim=True) + 1e-3)
    if off.max() > 0:
        t, i = divmod(int(off.argmax()), off.shape[1])
        both = " where theirs is ".join(f"{float(c[t, i] / z[t, i]):.5g}" for c in (mine, theirs))
        raise Broken(f"for token {t} rank {i} has weight {both}")


def pruned(pair: Pair) -> None:
    """The same ranks speak in evaluation, and weigh the same."""
    chosen(pair)
    weights(pair)


def y(pair: Pair) -> None:
    """The same output, of tokens in any shape, of x = 0 and of no tokens."""
    T = pair.case.T
    for shape in ((T,), (2, T), (), (0,)):
        x = pair.x(*shape) if shape else pair.x(1)[0]
        if shape == (0,):
            x = x.reshape(0, pair.case.D)
        for part in (x, 0 * x):
            with naming(f"x {tuple(x.shape)}{' of zeros' * (part is not x)}"):
                near(pair.run(pair.mine, part), pair.run(pair.theirs, part), "y", "theirs")


def gradients(pair: Pair) -> None:
    """The same gradients, by x and all that learns; none by what is frozen."""
    ours, mine = gradient(pair)
    for name, want in ours.items():
        near(mine[name], want, f"d{name}", "theirs", 1e-8)


def counts(pair: Pair) -> None:
    """Adapters leave the same loss, and count the same parameters."""
    if not isinstance(pair.mine, Adapter):
        raise LeftOut
    for name in ("active", "speaking"):
        ours, mine = (getattr(layer, name)() for layer in (pair.theirs, pair.mine))
        if ours != mine:
            raise Broken(f"{name}() is {mine}, theirs {ours}")
    losses = []
    for layer in (pair.theirs, pair.mine):
        torch.manual_seed(pair.case.seed + 3)
        with pair.context(layer, pair.x()) as batch:
            layer(pair.x())
            losses.append(torch.as_tensor(batch.aux_loss, dtype=torch.float64).detach())
    near(losses[1], losses[0], "aux_loss", "theirs")


def steps(pair: Pair) -> None:
    """What learns is the same after 3 steps; what is frozen is as before."""
    before = {name: t.detach().clone() for name, t in pair.read().items()}
    for layer in (pair.theirs, pair.mine):
        layer.train()
        trained = [p for p in layer.parameters() if p.requires_grad]
        optimiser = torch.optim.SGD(trained, lr=0.1)
        for step in range(3):
            optimiser.zero_grad()
            x = pair.x(pair.case.T + step)
            torch.manual_seed(pair.case.seed + step)
            with pair.context(layer, x) as batch:
                loss = layer(x).square().mean() + (batch.aux_loss if batch else 0.0)
            loss.backward()
            optimiser.step()
            if isinstance(layer, Adapter):
                layer.after_step()
    own, now = tensors(pair.theirs), pair.read()
    for name in pair.names:
        if name.startswith("frozen_"):
            same_bits(now[name], before[name], f"{name} after 3 steps", "before")
        else:
            near(now[name], own[name], f"{name} after 3 steps", "theirs", 1e-8)
    for name, tensor in pair.mine.named_parameters():
        if tensor.requires_grad and tensor.grad is None:
            raise Broken(f"{name} has no gradient")


def growth(pair: Pair) -> None:
    """A task's end freezes live rows behind frozen ones; its new rows answer alike."""
    if pair.mapped.grow is None:
        raise LeftOut
    before = {name: t.detach().clone() for name, t in pair.read().items()}
    pair.theirs.grow()
    pair.grow()
    own, now = tensors(pair.theirs), pair.read()
    for name in pair.names:
        if name not in now or now[name].shape != own[name].shape:
            size = tuple(now[name].shape) if name in now else "missing"
            raise Broken(f"{name} after grow is {size}, theirs {tuple(own[name].shape)}")
        if name.startswith("frozen_"):
            same_bits(now[name], own[name], f"{name} after grow", "theirs")
        elif f"frozen_{name}" in own:
            if not own[name].any():  # as values are, which start at 0
                same_bits(now[name], own[name], f"fresh {name}", "theirs")
        elif name in before:
            same_bits(now[name], before[name], f"{name}, which is no task's, after grow", "before")
    pair.copy()
    x = pair.x()
    near(pair.run(pair.mine, x), pair.run(pair.theirs, x), "y after grow", "theirs")


@torch.no_grad()
def bits16(pair: Pair) -> None:
    """In 16 bits mine is finite, and as near to float64 as theirs."""
    x = 30 * pair.x(64)
    want = pair.run(pair.theirs, x)
    for dtype in (torch.bfloat16, torch.float16):
        error = []
        for layer in (pair.theirs, pair.mine):
            with naming(f"{dtype}".removeprefix("torch.")):
                narrow = copy.deepcopy(layer).to(dtype)
                got = pair.run(narrow, x.to(dtype))
                if got.dtype != dtype or not got.isfinite().all():
                    raise Broken(f"y is {got.dtype}" + ", not finite" * (got.dtype == dtype))
                error.append(float((got.double() - want).norm(dim=-1).median()))
        ours, mine = error
        rounding = torch.finfo(dtype).eps * float(want.norm(dim=-1).median())
        if mine > 4 * ours + 4 * rounding:
            raise Broken(
                f"{dtype}: the median token's error is {mine:.3g}, theirs {ours:.3g}".removeprefix(
                    "torch."
                )
            )


def usual(pair: Pair) -> None:
    """Adapters claim the same, have the same defaults, and refuse the same."""
    if not isinstance(pair.mine, Adapter):
        raise LeftOut
    theirs, mine = type(pair.theirs), pair.mapped.build
    made = [scheme(nn.Linear(32, 32)) for scheme in (theirs, mine)]
    ours, own = (layer.settings() for layer in made)
    for name in ours:
        if name in own and ours[name] != own[name]:
            raise Broken(f"{name} is {own[name]} by itself, theirs {ours[name]}")
    if made[0].claims != made[1].claims:
        raise Broken(f"claims are {made[1].claims}, theirs {made[0].claims}")
    for name in (name for name in ours if name in own):
        for value in (-1, -0.5, 0, 0.5, 1, 2, 3, math.nan, math.inf):
            said = [refuses(scheme, name, value) for scheme in (theirs, mine)]
            if said[0] != said[1]:
                verb = "refused" if said[1] else "allowed"
                raise Broken(f"{name} {value} is {verb}, and not by theirs")


def refuses(scheme: Callable[..., Any], name: str, value: float) -> bool:
    try:
        scheme(nn.Linear(32, 32), **{name: value})
    except Exception:
        return True
    return False


Step = Callable[[Pair], None]
STEPS: tuple[Step, ...] = (
    rows, chosen, weights, pruned, y, gradients, counts, steps, growth, bits16, usual,
)  # fmt: skip
MODES: Mapping[Step, bool] = {chosen: True, weights: True, pruned: False}  # of others both


def same(mine: Mine, theirs: type[Adapter], /, device: str = "cpu", **settings: Any) -> list[Row]:
    """Hold mine to a scheme: a Row for each of STEPS. After the first that differs no other is
    looked at.

    settings: of both; what is not given of rank, top_k and DRAWN is drawn. Raises TypeError if mine
    is none of the three, ValueError if theirs needs more than x and mine is no Adapter.
    """
    claims = claimed(theirs, settings)
    held = mapped(mine, theirs)
    if isinstance(mine, Mapped) and theirs(nn.Linear(8, 8), **{"rank": 2} | settings).needs():
        raise ValueError(f"{theirs.__name__} needs a context, allowed for mine: an Adapter")
    if isinstance(mine, Mapped) and "balance" in inspect.signature(theirs).parameters:
        settings = {"balance": 0.0} | settings  # nobody would see its loss
    most = 1 if held.grow is None else 4
    found: list[Row] = []
    for step in STEPS:
        if any(row.verdict == "broken" for row in found):
            found.append(Row(step.__name__, "not claimed", "not looked at"))
            continue
        cases = twins(theirs, settings, claims, most, MODES.get(step))
        examples = 6 if step is bits16 else 1 if step is usual else 40

        def test(case: Case, step: Step = step) -> None:
            step(Pair(case, held, device))

        row = drawn(step.__name__, test, cases, examples)
        if row.verdict == "broken" and row.case is None:
            row = Row(step.__name__, "not claimed", row.evidence)  # nowhere to be seen
        elif row.verdict == "broken" and row.case is not None:
            pairs = (Pair(case, held, device) for case in clear(row.case, most, MODES.get(step)))
            with torch.random.fork_rng(devices=[]):
                why = guess(step.__name__, step, pairs)
            row = replace(row, evidence=f"{why}: {row.evidence}" if why else row.evidence)
        found.append(row)
    return found


def clear(case: Case, most: int, mode: bool | None) -> Iterator[Case]:
    """Cases like it that are large enough to see into; what was drawn is drawn otherwise."""
    for i in range(12):
        tasks = min(most, 3)
        settings = {**case.settings, "rank": 2}
        settings |= {name: DRAWN[name][i % 3] for name in DRAWN if name in settings}
        if "top_k" in settings:
            settings["top_k"] = tasks if case.claims.expert == "rank" else max(1, tasks - 1)
        made = replace(case, T=8, D=7, O=2 * tasks + 4, tasks=tasks, seed=i, bias=True, path="auto")
        yield replace(made, settings=settings, training=i % 2 == 0 if mode is None else mode)


def twins(
    scheme: type[Adapter], settings: dict[str, Any], claims: Any, most: int, mode: bool | None
) -> "SearchStrategy[Case]":
    """How cases are drawn: up to `most` tasks, and as many outputs as tell all ranks apart; now and
    then a large one. mode: whether in training; None: in both."""
    from hypothesis import strategies

    known = inspect.signature(scheme).parameters

    @strategies.composite
    def case(draw: "DrawFn") -> Case:
        def number(low: int, high: int) -> int:
            return draw(strategies.integers(low, high))

        large = number(0, 9) > 7
        tasks = number(1, most) if not large or most == 1 else number(5, 8)
        rank = settings.get("rank") or (number(4, 6) if large else number(1, 3))
        sizes = {"rank": rank}
        if claims.top_k:
            sizes["top_k"] = number(1, tasks * (1 if claims.expert == "block" else rank) + 1)
        for name in DRAWN:
            if name in known and name not in settings:
                sizes[name] = draw(strategies.sampled_from(DRAWN[name]))
        D = number(rank, rank + 5) if not large else number(40, 64)
        return Case(
            scheme,
            sizes | settings,
            claims,
            T=number(200, 300) if large else number(1, 5),
            D=D,
            O=tasks * rank + number(2, 5),
            tasks=tasks,
            bias=draw(strategies.booleans()),
            training=draw(strategies.booleans()) if mode is None else mode,
            seed=number(0, 999),
            path=draw(strategies.sampled_from(DRAWN_PATHS)),
        )

    return case()
