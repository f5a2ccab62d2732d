"""One implementation held to another: what differs first, and as if which step were another.

    from minimoe.laws import same
    for row in same(MyMoRA, MoRA, tau=0.1):
        print(row)

Mine is an Adapter; or a function y = f(x, layer) of the numbers that a layer of theirs holds, as a
kernel is; or any nn.Module, by a `Mapped`: how one is built, and which of its tensors are which.
Both get the same settings, tasks and values, and are compared in this order:

    rows        mine has theirs' tensors, of the same sizes after as many tasks; which are born 0
    chosen      which ranks are used for a token, in training
    weights     g of each, in training
    pruned      which are used in evaluation, at which weight
    y           the output, of tokens in any shape, and of none; of tiny, zero, huge and nan ones
    gradients   by x and by all that learns, of tokens and of samples
    counts      of adapters: gate(), what is left beside y, after_step(), active(), speaking()
    steps       what learns, and what must not, after three steps of training; what is answered then
    growth      what the end of a task freezes, and where; what is answered then
    birth       how what a task adds is drawn
    precision   y and dx in float32 and in 16 bits are as near to float64 as theirs
    usual       of adapters: what is claimed, what settings are by default, what is refused

Weights are read off outputs, so that what has no gate is compared too: where the R values are
independent, y - x W0ᵀ = scale · (g ⊙ z) B has one solution g ⊙ z.

Axes: T tokens, D in, O out, R ranks in all, r ranks per task, E experts, k kept experts.
"""

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapt import context
from ..adapter import Adapter, require
from ..continual.probe import dense_gate
from ..tools.device import device_is_here
from .case import DRAWN_PATHS, Broken, Case, LeftOut, naming, near, same_bits, tensors
from .check import Row, claimed, drawn
from .guess import guess
from .pair import WITHIN, Mapped, Mine, Pair, gradient, mapped, untaken

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

# Settings that are drawn where they are not given, of these values those that theirs allows.
DRAWN: Mapping[str, Sequence[float]] = {
    "scale": (1.0, 0.5, 3.0),
    "tau": (0.5, 2.0, 0.7),
    "delta": (0.2, -1.0, 0.4, 0.0),
    "balance": (0.0, 0.5, 2.0),
    "detach_gate": (False, True),
    "rate": (0.1, 0.5),
    "signed": (False, True),
    "experts": (1, 2),  # or as many as ranks
    "embedding": (16, 3),
    "clusters": (64, 2),
    "width": (8, 3),
    "threshold": (1.0, 0.1),
    "dropout": (0.1, 0.0, 0.5),
    "supervision": (50.0, 5.0),
    "orthogonality": (0.5, 2.0),
    "importance": (10.0, 1.0),
}

SHARP = 0.01  # a temperature, of float32: e to the 1 / 0.01 is more than it holds
# Of what is no Adapter nobody would see the loss, and few take the gradient apart.
UNSEEN = ("balance", "supervision", "orthogonality", "importance", "detach_gate")


# The steps of the comparison


def rows(pair: Pair) -> None:
    """Mine has theirs' tensors, as large after as many tasks; born 0 where they are."""
    alike(pair, pair.born, "at birth")


def alike(pair: Pair, mine: Mapping[str, Tensor], when: str) -> None:
    """What a task adds is 0 where theirs is, as values are, and elsewhere not."""
    theirs = pair.theirs.fresh()
    for name in theirs.keys() & mine.keys():
        if bool(mine[name].any()) != bool(theirs[name].any()):
            what = "0, and theirs not" if theirs[name].any() else "not 0, and theirs is"
            raise Broken(f"{name} {when} is {what}")


def chosen(pair: Pair) -> None:
    """The same ranks are used for each token, in training."""
    theirs, mine, _ = pair.gates()
    ours, others = pair.speak(theirs), pair.speak(mine)
    # what is nearly nothing may be rounding, of mine or of a weight of theirs
    clear = pair.speak(theirs, loud=True) | pair.speak(mine, loud=True)
    for t in ((ours != others) & clear).any(-1).nonzero().flatten().tolist():
        named = [c[t].nonzero().flatten().tolist() or "none" for c in (others, ours)]
        raise Broken(f"for token {t} ranks {named[0]} are used, theirs: {named[1]}")


def weights(pair: Pair) -> None:
    """Each that is used has the same weight, in training."""
    theirs, mine, z = pair.gates()
    off = (mine - theirs).abs() - pair.within * (theirs.abs().amax(-1, keepdim=True) + 1e-3)
    if off.max() > 0:
        t, i = divmod(int(off.argmax()), off.shape[1])
        both = " where theirs is ".join(f"{float(c[t, i] / z[t, i]):.9g}" for c in (mine, theirs))
        raise Broken(f"for token {t} rank {i} has weight {both}")


def pruned(pair: Pair) -> None:
    """The same ranks are used in evaluation, at the same weights."""
    chosen(pair)
    weights(pair)


def y(pair: Pair) -> None:
    """The same output: of any shape, of none, of tiny, zero, huge and nan tokens."""
    T = pair.case.T
    for shape in ((T,), (), (0,), (2, T), (3, 2, T)):
        x = pair.x(*shape) if shape else pair.x(1)[0]
        with naming(f"x {tuple(x.shape)}"):
            compare(pair, x)
    with naming("x not contiguous"):
        compare(pair, pair.x(2, T).transpose(0, 1))
    with naming("x 0"):
        compare(pair, 0 * pair.x())
    with naming("x of length 1e6"):
        compare(pair, 1e6 * pair.x())
    with naming("x of length 1e-9"):
        compare(pair, 1e-9 * pair.x())
    with naming("x with a token of nan"):
        x = pair.x(T + 1)
        x[0] = math.nan
        compare(pair, x)


def compare(pair: Pair, x: Tensor) -> None:
    """The same y of x, and x is as before; in evaluation without a graph."""
    before, version = x.clone(), x._version
    with torch.set_grad_enabled(pair.case.training):
        want, got = pair.run(pair.theirs, x), pair.run(pair.mine, x)
    if x._version != version or not torch.equal(x.nan_to_num(), before.nan_to_num()):
        raise Broken("x is changed in place")
    if not torch.equal(got.isnan(), want.isnan()):
        raise Broken(
            f"y is nan in {int(got.isnan().sum())} places, theirs {int(want.isnan().sum())}"
        )
    got, want = got.nan_to_num(), want.nan_to_num()
    small = max(1.0, float(want.detach().abs().max()) if want.numel() else 1.0)
    near(got / small, want / small, "y", "theirs", pair.within)
    if x.numel() and 0 < float(x.nan_to_num().abs().max()) < 1e-6:
        base = pair.theirs.base(x) if pair.theirs.base.bias is None else 0 * want
        near((got - base) * 1e9, (want - base) * 1e9, "y times 1e9", "theirs", pair.within)


def gradients(pair: Pair) -> None:
    """The same gradients, by x and all that learns; none by what is frozen."""
    for shape in ((pair.case.T,), (2, pair.case.T)):
        ours, mine = gradient(pair, *shape)
        for name, want in ours.items():
            with naming(f"x {(*shape, pair.case.D)}"):
                near(mine[name], want, f"d{name}", "theirs", 10 * pair.within)


def counts(pair: Pair) -> None:
    """Adapters have the same gate, loss, counts, after_step() and active()."""
    if not isinstance(pair.mine, Adapter) or hasattr(pair.mine, "function"):
        raise LeftOut
    for name in ("active", "speaking"):
        ours, mine = (getattr(layer, name)() for layer in (pair.theirs, pair.mine))
        if ours != mine:
            raise Broken(f"{name}() is {mine}, theirs {ours}")
    x = pair.x(2, pair.case.T)
    at = torch.arange(2 * pair.case.T).reshape(x.shape[:-1])
    for mask in (at >= 0, at % 3 != 2, at < 1, at < 0):  # all, some, one, none
        found = []
        for layer in (pair.theirs, pair.mine):
            torch.manual_seed(pair.case.seed + 3)
            with pair.context(layer, x) as batch, context(layer, mask=mask.to(x.device)):
                said, g = layer(x), dense_gate(layer, x)
            loss = torch.as_tensor(batch.aux_loss, dtype=torch.float64)
            found.append((loss, g, said, layer.counts))
        masked = "" if mask.all() else ", with a mask"
        ours, mine = found
        for name, got, want in zip(COUNTED, mine, ours, strict=True):
            if (got is None) != (want is None):
                raise Broken(f"{name}{masked} is {got}, theirs {want}")
            if got is not None:
                near(got, want, name + masked, "theirs", pair.within)
    for layer in (pair.theirs, pair.mine):
        layer.after_step()
        layer.after_step()
    own, now = tensors(pair.theirs), pair.read()
    for name in (name for name in pair.names if not torch.equal(now[name], own[name])):
        near(now[name], own[name], f"{name} after after_step()", "theirs", pair.within)


COUNTED = ("aux_loss", "g as gate gives it", "y", "counts")


def steps(pair: Pair) -> None:
    """What learns is the same after 3 steps; what is frozen is as before."""
    before = {name: t.detach().clone() for name, t in pair.read().items()}
    kept = {name: t.detach().clone() for name, t in pair.base_parameters.items()}
    for layer in (pair.theirs, pair.mine):
        layer.train()
        trained = [p for p in layer.parameters() if p.requires_grad]
        optimiser = torch.optim.SGD(trained, lr=0.1, weight_decay=0.1)
        for step in range(3):
            optimiser.zero_grad()
            x = pair.x(2, pair.case.T + step)
            mask = torch.arange(2 * x.shape[1], device=x.device).view(2, -1) % 4 != 3
            torch.manual_seed(pair.case.seed + step)
            with pair.context(layer, x, mask if isinstance(pair.mine, Adapter) else None) as batch:
                loss = layer(x)[mask].square().mean() + (batch.aux_loss if batch else 0.0)
            loss.backward()
            optimiser.step()
            if isinstance(layer, Adapter):
                layer.after_step()
    own, now = tensors(pair.theirs), pair.read()
    for name, tensor in pair.base_parameters.items():
        same_bits(tensor, kept[name], f"the base's {name} after 3 steps", "before")
    for name in pair.names:
        if name.startswith("frozen_"):
            same_bits(now[name], before[name], f"{name} after 3 steps", "before")
        elif not torch.equal(now[name], own[name]):  # so may be what is inf
            near(now[name], own[name], f"{name} after 3 steps", "theirs", 10 * pair.within)
    for mode in (True, False):
        got, want = (pair.run(layer.train(mode), pair.x()) for layer in (pair.mine, pair.theirs))
        if got.isfinite().all() and want.isfinite().all():
            what = "y after 3 steps" + " in evaluation" * (not mode)
            near(got, want, what, "theirs", 100 * pair.within)


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
        elif name in before and f"frozen_{name}" not in own:
            same_bits(now[name], before[name], f"{name}, which is no task's, after grow", "before")
    alike(pair, now, "after grow")
    pair.copy()
    x = pair.x()
    got, want = pair.run(pair.mine, x), pair.run(pair.theirs, x)
    near(got, want, "y after grow", "theirs", pair.within)


def birth(pair: Pair) -> None:
    """What a task adds is drawn anew, and alike: as theirs is spread, no row twice."""
    D = max(pair.case.settings["rank"], min(2048, 16384 // pair.case.settings["rank"]))
    O = max(pair.case.settings["rank"], D // 2)
    wide = Pair(replace(pair.case, D=D, O=O, tasks=1), pair.mapped, pair.device)
    theirs = wide.case.build(copy.deepcopy(wide.theirs.base))
    own, mine = tensors(theirs), wide.born
    for name in (name for name in wide.names if not name.startswith("frozen_")):
        drawn_alike(mine[name], own[name], f"{name} at birth")
    if pair.mapped.grow is None:
        return
    wide.grow()
    torch.manual_seed(pair.case.seed + 3)  # whatever mine has set it to
    for name, want in theirs.fresh().items():
        got = wide.read()[name]
        if torch.equal(got, mine[name]) and not torch.equal(want, own[name]):
            raise Broken(f"{name} after grow is what it was at birth")
        drawn_alike(got, want.to(got.device), f"{name} after grow")


def drawn_alike(got: Tensor, want: Tensor, name: str) -> None:
    """Not for certain: of 10⁶ equal ones one is refused (Kolmogorov and Smirnov's test)."""
    from scipy.stats import ks_2samp

    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    many = got.numel() >= 64
    # what stands there several times, as AdaMix's keys, was drawn once
    once = [u if len(u := t.unique()) >= 64 else t.flatten() for t in (got, want)]
    if many and ks_2samp(*once, method="asymp").pvalue < 1e-6:
        both = (f"mean {t.mean():.2g}, deviation {t.std():.2g}" for t in (got, want))
        size = tuple(got.shape)
        raise Broken(f"{name} {size} is drawn otherwise than by fresh(): {', theirs '.join(both)}")
    got, want = (t.reshape(*t.shape[:1] or (1,), -1) for t in (got, want))
    n, m = ((t != 0).sum(1) for t in (got, want))
    if m.unique().numel() == 1 and not torch.equal(n, m):
        raise Broken(f"{name} has {n.tolist()} numbers in its rows that are not 0, theirs {m[0]}")
    columns, theirs = (int((t != 0).any(0).sum()) for t in (got, want))
    if columns < 0.8 * theirs:
        raise Broken(f"{name} has {columns} columns that are not 0, theirs {theirs}")
    if len(got.unique(dim=0)) < len(want.unique(dim=0)):
        raise Broken(f"{name} has one row twice")


def precision(pair: Pair) -> None:
    """In float32 and 16 bits mine is as near to float64 as theirs, backward too."""
    x = 30 * pair.x(64)
    want = passed(pair, pair.theirs, x)
    for dtype, auto in (
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float16, False),
        (torch.bfloat16, True),
    ):
        if dtype != torch.float32 and pair.case.settings.get("tau") == SHARP:
            continue  # which of two is chosen is rounding
        errors, named = [], "autocast to " * auto + f"{dtype}".removeprefix("torch.")
        for layer in (pair.theirs, pair.mine):
            with naming(named):
                own = torch.float32 if auto else dtype
                with torch.autocast(x.device.type, dtype, enabled=auto):
                    got = passed(pair, copy.deepcopy(layer).to(own), x.to(own))
                if got[0].dtype != dtype or not got[0].isfinite().all():
                    text = f"{got[0].dtype}" + ", not finite" * (got[0].dtype == dtype)
                    raise Broken(f"y is {text}")
                errors.append([off(g.double(), w) for g, w in zip(got, want, strict=True)])
        for what, ours, mine, exact in zip(("y", "dx"), *errors, want, strict=True):
            rounding = torch.finfo(dtype).eps * float(exact.norm(dim=-1).median())
            if math.isfinite(ours) and not mine <= 4 * ours + 4 * rounding:
                said = f"of {what} the median token's error is {mine:.3g}, theirs {ours:.3g}"
                raise Broken(f"{named}: {said}")


def passed(pair: Pair, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx."""
    x = x.detach().requires_grad_()
    y = pair.run(layer, x)
    (dx,) = torch.autograd.grad(y, x, pair.case.dy(x.shape[:-1]).to(y))
    return y.detach(), dx


def off(got: Tensor, want: Tensor) -> float:
    """The median token's error."""
    return float((got - want).norm(dim=-1).median())


def usual(pair: Pair) -> None:
    """Adapters claim and save the same, have the same defaults, refuse the same."""
    theirs, mine = type(pair.theirs), pair.mapped.build
    if not (isinstance(mine, type) and issubclass(mine, Adapter)) or hasattr(mine, "function"):
        raise LeftOut
    state = pair.mine.state_dict()
    for name, tensor in pair.theirs.state_dict().items():
        if name not in state:
            raise Broken(f"state_dict has no {name}")
        same_bits(state[name], tensor, f"state_dict's {name}", "theirs")
    made = [scheme(nn.Linear(128, 128)) for scheme in (theirs, mine)]
    ours, own = (layer.settings() for layer in made)
    for name in ours:
        if name in own and ours[name] != own[name]:
            raise Broken(f"{name} is {own[name]} by itself, theirs {ours[name]}")
    for name, value in [("rank", 8), *itertools.product((n for n in ours if n in own), ODD)]:
        said = [claims_with(scheme, name, value) for scheme in (theirs, mine)]
        if (said[0] is None) != (said[1] is None):
            verb = "allowed" if said[0] is None else "refused"
            raise Broken(f"{name} {value} is {verb}, and not by theirs")
        if said[0] != said[1]:
            raise Broken(f"at {name} {value} claims are {said[1]}, theirs {said[0]}")


ODD = (-1, -0.5, 0, 0.5, 1, 2, 3, 4, math.nan, math.inf)  # values that a setting may refuse


def claims_with(scheme: Callable[..., Any], name: str, value: float) -> Any:
    """What a layer claims that has this setting; None if the scheme refuses it."""
    try:
        with torch.random.fork_rng(devices=[]):
            return scheme(nn.Linear(128, 128), **{name: value}).claims
    except Exception:
        return None


Step = Callable[[Pair], None]
STEPS: tuple[Step, ...] = (
    rows, chosen, weights, pruned, y, gradients, counts, steps, growth, birth, precision, usual,
)  # fmt: skip
EXAMPLES: Mapping[Step, int] = {birth: 1, precision: 8, usual: 1}  # at most
MODES: Mapping[Step, bool] = {chosen: True, weights: True, pruned: False}  # of others both


def same(
    mine: Mine,
    theirs: type[Adapter],
    /,
    device: str = "cpu",
    within: float = WITHIN,
    examples: int = 40,
    **settings: Any,
) -> list[Row]:
    """Hold mine to a scheme: a Row for each of STEPS. After the first that differs no other is
    looked at.

    within: what of the largest number they may differ by: 1e-4 if mine computes in float32, as many
    kernels do. examples: cases of each step, of some steps fewer.

    settings: of both; what is not given of rank, top_k and DRAWN is drawn, or stays at theirs'
    default where mine does not take it. Raises TypeError if mine is none of the three, ValueError
    if theirs needs more than x and mine is no Adapter, and as `require_ways`.
    """
    require_ways(device, within)
    held = mapped(mine, theirs)
    _, *known = inspect.signature(theirs).parameters.values()  # but base
    others = untaken(held, [parameter.name for parameter in known])
    hard_wired = [name for name in others if name not in UNSEEN]  # and theirs has its default
    settings = {p.name: p.default for p in known if p.name in others} | settings
    claims = claimed(theirs, settings)
    given: dict[str, Any] = {"rank": 2} | settings
    size = max(8, given["rank"])
    if isinstance(mine, Mapped) and theirs(nn.Linear(size, size), **given).needs():
        raise ValueError(f"{theirs.__name__} needs a context, allowed for mine: an Adapter")
    values = allowed(theirs, settings)
    if not isinstance(mine, type):
        values = {name: values[name] for name in values if name not in UNSEEN}
    most = 1 if held.grow is None else 4
    found: list[Row] = []
    for step in STEPS:
        if any(row.verdict == "broken" for row in found):
            found.append(Row(step.__name__, "not claimed", "not looked at"))
            continue
        of, those = settings, values
        if step is birth:
            of = {"rank": 8} | settings  # of few numbers nobody can say how they are spread
        elif step is precision and "tau" in values:
            those = values | {"tau": [*values["tau"], SHARP]}
        cases = twins(theirs, of, those, claims, most, MODES.get(step))
        most_cases = min(examples, EXAMPLES.get(step, examples))

        def test(case: Case, step: Step = step) -> None:
            step(Pair(case, held, device, within))

        row = drawn(step.__name__, test, cases, most_cases)
        if row.verdict == "broken" and row.case is None:
            row = Row(step.__name__, "not claimed", row.evidence)  # nowhere to be seen
        elif row.verdict == "broken" and row.case is not None:
            seen = clear(row.case, settings, values, most, MODES.get(step))
            make = partial(Pair, mine=held, device=device, within=within)
            with torch.random.fork_rng(devices=[]):
                why = guess(step.__name__, step, make, row.case, seen)
            lacks = f"(mine takes no {', '.join(hard_wired)})" if hard_wired else ""
            start = " ".join(part for part in (why, lacks) if part)
            row = replace(row, evidence=f"{start}: {row.evidence}" if start else row.evidence)
        elif step is rows and hard_wired:
            row = replace(row, evidence=f"{row.evidence}; mine takes no {', '.join(hard_wired)}")
        found.append(row)
    return found


def require_ways(device: str, within: float) -> None:
    """Raises ValueError if torch cannot compute there, or numbers cannot be so far apart."""
    device_is_here(device)
    require(0 < within < 0.1, "within", within, "above 0 and below 0.1")


def allowed(theirs: type[Adapter], settings: Mapping[str, Any]) -> dict[str, list[float]]:
    """Of DRAWN, what theirs has, is not given, and does not refuse."""
    known = inspect.signature(theirs).parameters
    names = [name for name in DRAWN if name in known and name not in settings]
    return {n: [v for v in DRAWN[n] if claims_with(theirs, n, v)] for n in names}


def clear(
    case: Case,
    given: Mapping[str, Any],
    values: Mapping[str, Sequence[float]],
    most: int,
    mode: bool | None,
) -> Iterator[Case]:
    """Cases like it that are large enough to see into; what is not given is drawn otherwise."""
    for i in range(12):
        tasks, rank = min(most, 2 + i % 3), given.get("rank", 2 + i % 2)
        settings = {**case.settings, "rank": rank}
        settings |= {name: values[name][i % len(values[name])] for name in values}
        settings |= {n: v for n, v in {"detach_gate": False, "experts": 1}.items() if n in values}
        if "top_k" in settings:
            experts = tasks * (rank if case.claims.expert == "rank" else 1)
            settings["top_k"] = max(1, (experts // 2, experts // 2 + 1, 1, experts - 1)[i % 4])
        sizes = {"T": 8, "D": rank + 5, "O": rank * tasks + 4, "tasks": tasks, "seed": i}
        made = replace(case, settings=settings | dict(given), bias=True, path="auto", **sizes)
        yield replace(made, training=i % 2 == 0 if mode is None else mode)


def twins(
    scheme: type[Adapter],
    settings: dict[str, Any],
    values: Mapping[str, Sequence[float]],
    claims: Any,
    most: int,
    mode: bool | None,
) -> "SearchStrategy[Case]":
    """How cases are drawn: up to `most` tasks, and as many outputs as tell all ranks apart; now and
    then a large one. mode: whether in training; None: in both."""
    from hypothesis import strategies

    @strategies.composite
    def case(draw: "DrawFn") -> Case:
        def number(low: int, high: int) -> int:
            return draw(strategies.integers(low, high))

        large = number(0, 9) > 7
        tasks = number(1, most) if not large or most == 1 else number(5, 8)
        rank = settings.get("rank") or (number(4, 12) if large else number(1, 3))
        sizes = {"rank": rank}
        for name, those in values.items():
            sizes[name] = draw(strategies.sampled_from(those))
        if sizes.get("experts", 1) > 1:
            sizes["experts"] = rank
        if claims.top_k:
            per_task = (sizes | settings).get("experts", 1) if claims.expert == "block" else rank
            sizes["top_k"] = number(1, tasks * per_task + 1) if number(0, 2) else 1
        return Case(
            scheme,
            sizes | settings,
            claims,
            T=number(200, 600) if large else number(1, 5),
            D=number(rank, 300) if large else number(rank, rank + 5),
            O=tasks * rank + number(2, 200 if large else 5),
            tasks=tasks,
            bias=draw(strategies.booleans()),
            training=draw(strategies.booleans()) if mode is None else mode,
            seed=number(0, 999),
            path=draw(strategies.sampled_from(DRAWN_PATHS)),
        )

    return case()
