"""The laws: what every routing scheme must keep, runnable on anyone's.

    from minimoe.laws import check
    for row in check(MyScheme, top_k=2):
        print(row)

A law is a function of one `Case`: a layer of drawn sizes that has lived through some tasks. It
returns if the law holds there, raises `Broken` with the numbers if not, and `LeftOut` where it
cannot be told. Hypothesis draws the cases, the same ones in every run, and when one breaks a law
looks for the smallest that does. `LAWS`, at the end, says which claim (lora.Claims) calls for which
law; most are for everyone.

A law compares layers that were built alike, not one layer with itself, wherever a call may leave
something behind; and it seeds torch before each call, so that noise in training breaks no law.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
"""

import contextlib
import copy
import importlib.util
import itertools
import math
import os
import pickle
import sys
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import strategies
from torch import Tensor, nn

from .adapt import adapters, told
from .lora import Adapter, Claims
from .probe import dense_gate
from .sparse import PATHS

HUGE = 1e60  # no sum of float64 in which this takes part stays the same


class Broken(AssertionError):
    """A law does not hold; the message is the evidence."""


class LeftOut(Exception):
    """In this case it cannot be told whether the law holds."""


@dataclass(frozen=True)
class Case:
    """One drawn situation: sizes, a number of tasks lived through, a mode, and a seed."""

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

    def __str__(self) -> str:
        said = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        mode = "training" if self.training else "evaluation"
        bias = "" if self.bias else ", no bias"
        sizes = f"T {self.T}, D {self.D}, O {self.O}{bias}, tasks {self.tasks}"
        return f"{sizes}, {said}, {mode}, seed {self.seed}"

    def layer(self, dtype: torch.dtype = torch.float64, **settings: Any) -> Adapter:
        """The layer after its tasks, each of which left what it trains at random values; what
        is not trained is as the scheme made it. The same values every time, whatever the dtype."""
        torch.manual_seed(self.seed)
        base = nn.Linear(self.D, self.O, bias=self.bias, dtype=torch.float64)
        layer = self.scheme(base, **self.settings | settings)
        for task in range(self.tasks):
            if task > 0:
                layer.grow()
            for parameter in live(layer).values():
                # a lone number is a knob, such as a mixing weight: it stays near where it starts
                nn.init.normal_(parameter, std=1.0 if parameter.numel() > 1 else 0.01)
        return layer.to(dtype).train(self.training)

    def x(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """Inputs (*shape, D), by default (T, D), float64 and normal."""
        source = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(
            *((self.T,) if shape is None else shape), self.D, generator=source, dtype=torch.float64
        )

    def dy(self) -> Tensor:
        """A gradient to come in at y (T, O), float64 and normal."""
        source = torch.Generator().manual_seed(self.seed + 2)
        return torch.randn(self.T, self.O, generator=source, dtype=torch.float64)

    def run(self, x: Tensor, layer: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """y of x, by a layer of this case's own if none is given."""
        layer = self.layer() if layer is None else layer
        torch.manual_seed(self.seed + 3)
        with self.tell(layer, x):
            return layer(x)

    def tell(self, layer: Any, x: Tensor) -> contextlib.AbstractContextManager[None]:
        """Inside, layer is told something of each sample in x, if it hears anything (adapt.told):
        the same of the same sample, whatever else is in x, and nothing that a small change of x
        would change. So a law may look at it as at any function of x."""
        _, adapter = next(adapters(layer))
        bits = (x > 0).double() @ (2.0 ** torch.arange(x.shape[-1], device=x.device)).double()
        said = {}
        for name, what in adapter.hears().items():
            if isinstance(what, range):
                said[name] = bits.long() % len(what)
            else:
                source = torch.Generator().manual_seed(self.seed + 5)
                vectors = torch.randn(7, what, generator=source, dtype=torch.float64)
                said[name] = vectors.to(x.device)[bits.long() % 7]
        return told(layer, **said)

    def gradients(
        self, x: Tensor, layer: Adapter, call: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """y (T, O), and the gradients of (y · dy) by x and by what learns; `call` for layer."""
        leaves = {"x": x.detach().requires_grad_(), **live(layer)}
        y = self.run(leaves["x"], layer if call is None else call)
        dy = self.dy().to(y.device)
        grads = torch.autograd.grad(y, list(leaves.values()), dy, materialize_grads=True)
        return {"y": y.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}

    @property
    def experts(self) -> int:
        """E."""
        layer = self.layer()
        return layer.ranks // layer.block


@dataclass(frozen=True)
class Row:
    """What came of one law.

    verdict: "held", "broken" or "not claimed". evidence: how many cases it held for; or what broke
    it, and the smallest case found that does. That case is in `case`: LAWS' function of it raises
    again, and case.layer() and case.x() are what it was looked at with.
    """

    law: str
    verdict: str
    evidence: str
    case: Case | None = None

    def __str__(self) -> str:
        return f"{self.law}: {self.verdict}" + f" ({self.evidence})" * bool(self.evidence)


# The laws.


def zero_at_birth(case: Case) -> None:
    """A fresh layer is the base layer, bit for bit.

    So putting adapters into a trained model changes nothing until they have learned something, and
    whatever a comparison shows later was learned."""
    one = {"top_k": 1} if case.claims.top_k else {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(case.seed)
        base = nn.Linear(case.D, case.O, bias=case.bias, dtype=dtype)
        x = case.x().to(dtype)
        want = base(x)
        layer = case.scheme(base, **case.settings | one).train(case.training)
        _equal(case.run(x, layer), want, "y of a fresh layer", "W0 x")


def any_shape(case: Case) -> None:
    """x may have any leading shape, also an empty one.

    A linear layer takes them all, so a model may call it with any: a lone vector, tokens, samples
    of tokens, and the empty batch that a filter leaves."""
    for shape in ((), (case.T,), (2, case.T), (2, 1, case.T), (0,), (2, 0)):
        x = case.x(shape)
        y = case.run(x)
        if y.shape != (*shape, case.O):
            raise Broken(f"x {tuple(x.shape)} gives y {tuple(y.shape)}, not {(*shape, case.O)}")
        if case.claims.granularity == "token" and x.numel():
            flat = case.run(x.reshape(-1, case.D)).reshape(y.shape)
            _close(y, flat, f"y of x {tuple(x.shape)}", "y of the same tokens in one row")


def equation(case: Case) -> None:
    """y = x W0ᵀ + scale · (g ⊙ x Aᵀ) B, with the g of `gate`.

    Over all ranks, frozen and live. The thesis of this package. What breaks it in practice: a scale
    that is lost where ranks are frozen, or a normalised score multiplied in where the raw z
    belongs."""
    settings: dict[str, Any] = {} if "scale" in case.settings else {"scale": 0.7}
    x = case.x()
    case = _still(case, x)
    layer = case.layer(**settings)
    torch.manual_seed(case.seed + 3)
    with case.tell(layer, x):
        idx, g, z = layer.gate(x)
    idx = torch.arange(layer.ranks).expand(case.T, -1) if idx is None else idx
    _close(z, (x @ layer.keys.T).gather(-1, idx), "z as gate gives it", "x Aᵀ")
    want = layer.base(x) + layer.scale * torch.einsum("tk,tko->to", g * z, layer.rows("B")[idx])
    _close(case.run(x, case.layer(**settings)), want, "y", "x W0ᵀ + scale · (g ⊙ z) B")


def granularity(case: Case) -> None:
    """A token's output depends on no other token (or sample).

    On no other token if the claimed granularity is "token", no other sample if "sample". Otherwise
    what a model answers depends on who else is in the batch, and accuracy on the batch size. Looked
    at by shuffling the tokens, and by replacing all but the first. (Tokens in one row: what a gate
    does with a sample's tokens is looked at by any_shape.)"""
    x = case.x((case.T + 1, 3))
    if case.claims.granularity == "token":
        x = x.flatten(0, 1)
    case = _still(case, x)
    y, order = case.run(x), torch.randperm(len(x))
    _close(case.run(x[order]), y[order], "y of shuffled x", "y, shuffled")
    others = torch.cat([x[:1], -2 * x[1:]])
    _close(case.run(others)[0], y[0], "y[0], all but x[0] replaced", "y[0] before")


def support(case: Case) -> None:
    """At most top_k experts speak for a token, whatever top_k is.

    The promise of sparsity: what a token costs does not grow with the tasks. On the first task
    there are often fewer experts than top_k: then it keeps all, and that must be no error."""
    for top_k in range(1, case.experts + 2):
        with _at(f"top_k {top_k}"):
            w = _weights(case, case.layer(top_k=top_k))
            most = int((w != 0).sum(-1).max())
            if most > min(top_k, case.experts):
                raise Broken(f"{most} of {case.experts} experts speak for one token")


def simplex(case: Case) -> None:
    """Weights are 0 or more and sum to 1; in evaluation, to 1 at most.

    One weight per expert, whatever top_k is; in evaluation a scheme may prune. Then the update's
    size does not depend on how many experts there are, and a weight can be read as a share. (A
    scheme may claim a sum as large as the number of experts that it keeps: then a mean of 1.)"""
    every: list[dict[str, Any]]
    every = [{"top_k": k + 1} for k in range(case.experts)] if case.claims.top_k else [{}]
    for settings in every:
        w = _weights(case, case.layer(**settings))
        at = "".join(f"top_k {top_k}: " for top_k in settings.values())
        total = min(settings.get("top_k", case.experts), case.experts)
        over = w.sum(-1) / (total if case.claims.simplex == "kept" else 1) - 1
        if w.min() < 0:
            raise Broken(f"{at}a weight is {w.min():.4g}")
        if over.max() > 1e-12 or (case.training and over.min() < -1e-12):
            worst = over[over.abs().argmax()]
            each = f"{total} times " * (case.claims.simplex == "kept")
            raise Broken(f"{at}a token's weights sum to {each}1 {worst:+.3g}")


def paths_agree(case: Case) -> None:
    """All paths of the sparse product give the same output and gradients.

    Compared in float64. A path is a way to compute, not another method: speed may not change
    results. (Triton takes part on a GPU, or in its interpreter where TRITON_INTERPRET=1 is set.)"""
    kernels = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for path in PATHS:
        if path == "triton" and not (kernels and importlib.util.find_spec("triton")):
            continue
        layer = case.layer().to(device)
        layer.path = path
        with _at(f"path {path}"):
            found[path] = case.gradients(case.x().to(device), layer)
    for path, ours in found.items():
        for name, want in found["dense"].items():
            _close(ours[name], want, f"path {path}: {name}", "dense's")


def exact_gradient(case: Case) -> None:
    """The backward pass gives the derivative of the output.

    By x, and by everything that learns. Checked by a central difference along one random direction
    per tensor, where the output is smooth: near a tie of the top k the two one-sided differences
    disagree, and the case is left out. What breaks it: a norm, a softmax or a scale treated as a
    constant in backward."""
    x, layer = case.x(), case.layer()
    got, dy = case.gradients(x, layer), case.dy()
    layer = case.layer()
    for name, tensor in {"x": x, **live(layer)}.items():
        torch.manual_seed(case.seed + 4)
        way = torch.randn_like(tensor)
        start, f = tensor.detach().clone(), []
        for step in (-1e-6, 0.0, 1e-6):
            with torch.no_grad():
                tensor.copy_(start + step * way)
                f.append((case.run(x, layer) * dy).sum().item() / 1e-6)
        with torch.no_grad():
            tensor.copy_(start)
        left, right, wide = f[1] - f[0], f[2] - f[1], 1 + abs(f[2] - f[0])
        if not abs(right - left) < 1e-2 * wide:
            raise LeftOut
        want, have = (f[2] - f[0]) / 2, (got[f"d{name}"] * way).sum().item()
        if not abs(have - want) <= 1e-4 * wide:
            raise Broken(f"derivative along a direction of {name}: {have:.5g}, not {want:.5g}")


def only_live_learns(case: Case) -> None:
    """Training moves live rows only, and gives each a gradient.

    Base and frozen rows keep every bit. A frozen rank that moves is forgetting that no figure
    shows. A parameter without a gradient stops data-parallel training."""
    layer = case.layer().train()
    before = copy.deepcopy(layer.state_dict())
    optimiser = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        optimiser.zero_grad()
        loss = case.run(case.x((case.T + step,)), layer).square().mean()
        (loss if layer.aux is None else loss + layer.aux).backward()
        optimiser.step()
        layer.after_step()
    for name, parameter in live(layer).items():
        if parameter.grad is None:
            raise Broken(f"{name} has no gradient")
    for name, tensor in layer.state_dict().items():
        if name.startswith(("base.", "frozen_")):
            _equal(tensor, before[name], f"{name} after 3 steps", "before")


def grow_keeps(case: Case) -> None:
    """grow() keeps all rows as and where they are, and adds r.

    Live rows are frozen behind the older ones. What was learned is kept bit for bit, and rank i
    stays rank i, so that what is known of it (which task it is from, how often it was chosen) stays
    true."""
    layer = case.layer()
    before, ranks = copy.deepcopy(layer.state_dict()), layer.ranks
    layer.grow()
    after = layer.state_dict()
    for name, tensor in before.items():
        if name.startswith("base."):
            _equal(after[name], tensor, f"{name} after grow", "before")
        elif f"frozen_{name}" in before:
            rows = torch.cat([before[f"frozen_{name}"], tensor])
            _equal(after[f"frozen_{name}"], rows, f"frozen_{name} after grow", "all rows before")
            learns = name in layer.fixed or getattr(layer, name).requires_grad
            if after[name].shape != tensor.shape or not learns:
                raise Broken(f"{name} after grow is {tuple(after[name].shape)}, or does not learn")
        elif not name.startswith("frozen_"):
            _equal(after[name], tensor, f"{name}, which belongs to no task, after grow", "before")
    if layer.ranks != ranks + layer.rank:
        raise Broken(f"{ranks} ranks became {layer.ranks}, with rank {layer.rank}")


def round_trips(case: Case) -> None:
    """state_dict, deepcopy and pickle give the same layer.

    The state_dict of a grown layer loads into a fresh one, and what comes of each grows on.
    Otherwise a checkpoint loads, and answers otherwise than the model that was saved."""
    layer, x = case.layer(), case.x()
    want = case.run(x, case.layer())
    fresh = case.scheme(nn.Linear(case.D, case.O, bias=case.bias).double(), **case.settings)
    fresh.load_state_dict(layer.state_dict())
    copies = {
        "state_dict in a fresh layer": fresh.train(case.training),
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
    }
    for name, other in copies.items():
        with _at(name):
            _equal(case.run(x, other), want, f"y by {name}", "y")
            other.grow()
            if other.ranks != layer.ranks + layer.rank:
                raise Broken(f"by {name} and grown, {layer.ranks} ranks became {other.ranks}")


def eval_is_still(case: Case) -> None:
    """Evaluation draws nothing and changes nothing.

    Nor do train() and eval() touch a weight. Then an answer can be repeated, and a model saved in
    either mode is the same model. (Merging hidden in eval() cost the first LoRA library years of
    bugs.)"""
    layer, x = case.layer().train(), case.x()
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    with case.tell(layer, x):
        torch.manual_seed(case.seed + 3)
        first = layer(x)
        torch.manual_seed(case.seed + 4)
        _equal(layer(x), first, "y in evaluation, again", "y in evaluation")
    for mode in ("eval", "train"):
        now = getattr(layer, mode)().state_dict()
        for name, tensor in before.items():
            _equal(now[name], tensor, f"{name} after {mode}()", "before")


def degenerates_to_lora(case: Case) -> None:
    """Where all experts weigh the same, the layer is dense LoRA.

    Its update is divided by E if the weights are claimed to sum to 1. The one setting at which
    every scheme can be held against the same known layer."""
    claims = case.claims
    given: dict[str, Any] = dict(claims.as_lora or {})
    rows = [name for name in given if hasattr(case.layer(), f"frozen_{name}")]
    settings = {name: given[name] for name in given if name not in rows}
    layer = case.layer(**settings | ({"top_k": case.experts} if claims.top_k else {})).train()
    for name in rows:
        for key in (name, f"frozen_{name}"):
            getattr(layer, key).data.fill_(given[name])
    x, c = case.x(), layer.scale / (case.experts if claims.simplex is True else 1)
    want = layer.base(x) + c * (x @ layer.keys.T) @ layer.rows("B")
    at = ", ".join(f"{name} {value:g}" for name, value in given.items()) or "all kept"
    _close(case.run(x, layer), want, f"y at {at}", "LoRA's", 1e-6)


def merge_is_equal(case: Case) -> None:
    """A merged layer answers as before; unmerge() restores every bit.

    Merging is for speed: a plain linear layer at the end. Repeated merging may not wear the base
    down."""
    settings: dict[str, Any] = {} if "scale" in case.settings else {"scale": 0.7}
    layer: Any = case.layer(**settings)
    x, W0 = case.x(), layer.base.weight.detach().clone()
    want = case.run(x, layer)
    for _ in range(2):
        layer.merge()
        _close(layer(x), want, "y merged", "y")
        _close(layer.base(x), want, "the base's y, merged", "y")
        layer.unmerge()
        _equal(layer.base.weight, W0, "W0 after unmerge", "before")


def half_precision(case: Case) -> None:
    """16-bit results are finite, and near those of float64.

    In bfloat16, float16 and under autocast, outputs and gradients. The bound: the median token's
    error is at most 8 times what the rounding of inputs and weights alone brings about (a token
    near a tie may choose otherwise; a median does not mind). Inputs are as large as activations in
    trained networks can be."""
    x = 30 * case.x((64,))
    for dtype, auto in (
        (torch.float16, False),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ):
        layer = case.layer(dtype)
        wide = copy.deepcopy(layer).double()
        ours = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=auto):
            got = case.run(ours, layer.float() if auto else layer)
        at = "autocast to " * auto + str(dtype).removeprefix("torch.")
        if got.dtype != dtype:
            raise Broken(f"{at}: y is {got.dtype}")
        (got.float() * torch.randn(got.shape)).mean().backward()
        for name, tensor in {"y": got, "dx": ours.grad, **_grads(layer)}.items():
            if tensor is not None and not tensor.isfinite().all():
                raise Broken(f"{at}: {name} is not finite")
        want, noise = case.run(ours.double(), wide), []
        for _ in range(4):
            nudged = copy.deepcopy(wide)
            for tensor in [*nudged.parameters(), *nudged.buffers()]:
                tensor.data = _nudge(tensor.data, dtype)
            y = case.run(_nudge(ours.detach().double(), dtype), nudged)
            noise.append((y - want).norm(dim=-1))
        error = (got.double() - want).norm(dim=-1).median()
        rounding = torch.finfo(dtype).eps * want.norm(dim=-1).median()  # of y itself
        allowed = 8 * torch.stack(noise).median() + rounding
        if error > allowed:
            raise Broken(f"{at}: the median token's error is {error:.3g}, allowed: {allowed:.3g}")


def compiles(case: Case) -> None:
    """torch.compile gives the same output and gradients, in one graph.

    A number fetched from a tensor (.item(), an `if` on a tensor) cuts the graph, and on a GPU makes
    every layer wait. Resets the compiler's caches (torch.compiler.reset)."""
    x, layer = case.x(), case.layer()
    want = case.gradients(x, case.layer())
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
        got = case.gradients(x, layer, compiled)
    for name, tensor in got.items():
        _close(tensor, want[name], f"{name}, compiled", name)


def nan_stays(case: Case) -> None:
    """A token of nan or inf spoils no other token (or sample).

    One bad input in a batch is common; it may cost one answer, not all. A maximum taken over the
    whole batch before a softmax is enough to spread it, though it changes no finite result."""
    x = case.x((case.T + 1, 3))
    if case.claims.granularity == "token":
        x = x.flatten(0, 1)
    want = case.run(x)[1:]
    for bad in (math.nan, math.inf, -math.inf):
        spoilt = x.clone()
        spoilt[0] = bad
        _close(case.run(spoilt)[1:], want, f"y[1:] with x[0] {bad}", "y[1:]")


def zero_is_finite(case: Case) -> None:
    """x = 0 gives finite outputs and gradients.

    Padding is zero, and a ReLU's output can be. What breaks it: a division by a norm."""
    layer, x = case.layer(), torch.zeros(case.T, case.D, dtype=torch.float64)
    for name, tensor in case.gradients(x, layer).items():
        if not tensor.isfinite().all():
            raise Broken(f"{name} is not finite")


def active_is_read(case: Case) -> None:
    """active() is how many parameters a token's output depends on.

    Of the adapter's own, frozen and live: the number by which schemes are compared at equal cost.
    Counted the slow way: a parameter is read if making it huge, up or down, or any of some ordinary
    numbers, changes the output. Of layers of two tasks or more, as a router over one expert decides
    nothing; the most that any of 4 tokens depends on; in training, if that draws no noise."""
    case = replace(case, tasks=max(case.tasks, 2), training=True)
    if case.claims.top_k:
        most, more = (case.layer(top_k=case.experts + n).active() for n in (0, 1))
        if most != more:
            raise Broken(f"active() is {most} with all experts kept, {more} with one more than all")
    layer = _still(case, case.x()).layer()
    own = [
        (tensor, tensor.clone())
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]
        if not name.startswith("base.") and tensor.is_floating_point()
    ]

    def poked(x: Tensor, at: Tensor | None = None, value: float = 0.0) -> Tensor:
        for tensor, before in own:  # training may have moved a buffer
            tensor.copy_(before)
        if at is not None:
            at.fill_(value)
        return case.run(x, layer)

    counts = []
    values = (HUGE, -HUGE, *(n / 4 for n in range(-16, 17)))
    with torch.no_grad():
        for x in case.x((4,)):
            want = poked(x)
            rows = [row for tensor, _ in own for row in tensor.view(len(tensor), -1)]
            counts.append(
                sum(
                    any(not torch.equal(poked(x, at, value), want) for value in values)
                    for row in rows  # to see that none of a long row is read, one look is enough
                    if len(row) == 1 or not torch.equal(poked(x, row, math.nan), want)
                    for at in row
                )
            )
    if max(counts) != layer.active():
        raise Broken(f"active() is {layer.active()}, and an output depends on {max(counts)}")


# Which claim calls for which law.

Law = Callable[[Case], None]

LAWS: dict[Law, Callable[[Claims], bool]] = {
    zero_at_birth: lambda claims: claims.zero_at_birth,
    any_shape: lambda claims: True,
    equation: lambda claims: claims.equation,
    granularity: lambda claims: claims.granularity != "batch",
    support: lambda claims: claims.top_k,
    simplex: lambda claims: bool(claims.simplex),
    paths_agree: lambda claims: True,
    exact_gradient: lambda claims: claims.exact_gradient,
    only_live_learns: lambda claims: True,
    grow_keeps: lambda claims: True,
    round_trips: lambda claims: True,
    eval_is_still: lambda claims: True,
    degenerates_to_lora: lambda claims: claims.as_lora is not None,
    merge_is_equal: lambda claims: claims.mergeable,
    half_precision: lambda claims: True,
    compiles: lambda claims: True,
    nan_stays: lambda claims: claims.granularity != "batch",
    zero_is_finite: lambda claims: True,
    active_is_read: lambda claims: True,
}
EXAMPLES: dict[Law, int] = {compiles: 2, half_precision: 6, active_is_read: 4}  # others 30


def check(scheme: type[Adapter], /, **settings: Any) -> list[Row]:
    """Hold a scheme to all laws, one Row each, in the order of LAWS.

    settings are the scheme's; rank, and top_k if the scheme claims it, are drawn where they are
    not given. Leaves torch's random state as it was. Raises as `claimed` does.
    """
    return [hold(law, scheme, **settings) for law in LAWS]


def hold(law: Law, scheme: type[Adapter], /, **settings: Any) -> Row:
    """Hold a scheme to one law. Raises as `claimed` does."""
    claims = claimed(scheme, settings)
    if not LAWS[law](claims):
        return Row(law.__name__, "not claimed", "")
    last: Case | None = None
    kept = 0

    @hypothesis.settings(
        max_examples=EXAMPLES.get(law, 30),
        deadline=None,
        database=None,
        derandomize=True,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    @hypothesis.given(_cases(scheme, settings, claims))
    def held(case: Case) -> None:
        nonlocal last, kept
        last = case
        try:
            law(case)
        except LeftOut:
            hypothesis.reject()
        kept += 1

    with torch.random.fork_rng(devices=[]):
        try:
            held()
        except hypothesis.errors.Unsatisfiable:
            return Row(law.__name__, "broken", "no case at which it could be looked at")
        except Exception as error:  # whatever a scheme raises is evidence
            what = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
            return Row(law.__name__, "broken", f"{' '.join(what.split())}; {last}", last)
    return Row(law.__name__, "held", f"{kept} cases")


_loaded = itertools.count()


def load(path: str | Path, name: str) -> type[Adapter]:
    """The scheme `name` of a Python file, which is run. Raises FileNotFoundError; ValueError if
    the file fails, or holds no such class, or the class is no scheme."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    alias = f"{path.stem}_{next(_loaded)}"  # two files of one name, or one file twice, are two
    module = types.ModuleType(alias)
    module.__file__ = str(path)
    sys.modules[alias] = module  # pickle looks a class up there
    sys.path.insert(0, str(path.parent))  # as Python does for a script
    try:
        exec(compile(path.read_bytes(), path, "exec"), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[alias]
        raise ValueError(f"{path} fails: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    there = {n: c for n, c in vars(module).items() if isinstance(c, type) and c is not Adapter}
    schemes = [n for n, c in there.items() if issubclass(c, Adapter)]
    if name not in schemes:
        odd = "is no scheme (a subclass of minimoe.Adapter)" if name in there else "is not there"
        raise ValueError(f"{path}: {name} {odd}; schemes there: {', '.join(schemes) or 'none'}")
    return there[name]


def says(law: Law) -> str:
    """The law itself: the first line of its docstring."""
    return (law.__doc__ or "").splitlines()[0]


def table(results: dict[str, list[Row]]) -> str:
    """Laws down, schemes across, and below it the evidence for every broken one."""
    names = list(results)
    width = [max(len(name), len("BROKEN")) for name in names]
    first = max(len(law.__name__) for law in LAWS)
    head = "  ".join(["law".ljust(first), *(n.ljust(w) for n, w in zip(names, width, strict=True))])
    lines = [f"{head}  what it says", "-" * (len(head) + 2 + max(len(says(law)) for law in LAWS))]
    marks = {"held": "held", "broken": "BROKEN", "not claimed": "–"}
    for i, law in enumerate(LAWS):
        cells = [marks[results[n][i].verdict].ljust(w) for n, w in zip(names, width, strict=True)]
        lines.append("  ".join([law.__name__.ljust(first), *cells, says(law)]))
    lines += ["", "–: not claimed by the scheme."]
    for name in names:
        for row in results[name]:
            if row.verdict == "broken":
                lines += ["", *textwrap.wrap(f"{name} breaks {row.law}: {row.evidence}", 100)]
    return "\n".join(lines)


# What the laws are made with.


def live(layer: Adapter) -> dict[str, nn.Parameter]:
    """What the adapter trains, by name."""
    return {
        name: parameter
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad and not name.startswith("base.")
    }


def _grads(layer: Adapter) -> dict[str, Tensor | None]:
    return {f"d{name}": parameter.grad for name, parameter in live(layer).items()}


def claimed(scheme: type[Adapter], settings: dict[str, Any]) -> Claims:
    """What a scheme claims at these settings, asked of an ordinary layer.

    Raises TypeError if scheme is no class of adapters, ValueError if its constructor raises, or if
    its claims are not of those that there are.
    """
    if not (isinstance(scheme, type) and issubclass(scheme, Adapter)):
        raise TypeError(f"scheme is {scheme!r}, allowed: a subclass of minimoe.Adapter")
    given = {"rank": 2} | settings
    size = max(8, given["rank"])
    try:
        with torch.random.fork_rng(devices=[]):
            claims = scheme(nn.Linear(size, size), **given).claims
    except Exception as error:
        said = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(
            f"{scheme.__name__}(nn.Linear({size}, {size}), {said}) raises "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(claims, Claims):
        raise ValueError(f"{scheme.__name__}.claims is {claims!r}, allowed: a minimoe.Claims")
    for name, allowed in (
        ("granularity", ("token", "sample", "batch")),
        ("expert", ("rank", "block")),
        ("simplex", (True, False, "kept")),
    ):
        if getattr(claims, name) not in allowed:
            raise ValueError(
                f"{scheme.__name__} claims {name} {getattr(claims, name)!r}, "
                f"allowed: {', '.join(map(str, allowed))}"
            )
    return claims


@strategies.composite
def _cases(draw, scheme: type[Adapter], settings: dict[str, Any], claims: Claims) -> Case:
    def number(low: int, high: int) -> int:
        return draw(strategies.integers(low, high))

    tasks, rank = number(1, 3), settings.get("rank") or number(1, 3)
    drawn = {"rank": rank}
    if claims.top_k:
        drawn["top_k"] = number(1, tasks * (1 if claims.expert == "block" else rank))
    return Case(
        scheme,
        drawn | settings,
        claims,
        T=number(1, 5),
        D=number(rank, rank + 5),
        O=number(rank, rank + 5),
        tasks=tasks,
        bias=draw(strategies.booleans()),
        training=draw(strategies.booleans()),
        seed=number(0, 999),
    )


def _still(case: Case, x: Tensor) -> Case:
    """The case in a mode in which its layer draws no noise: its own, or else the other one."""
    for training in (case.training, not case.training):
        mode = replace(case, training=training)
        layer, before = mode.layer(), torch.get_rng_state()
        with mode.tell(layer, x):
            layer(x)
        if torch.equal(torch.get_rng_state(), before):
            return mode
    raise LeftOut


def _weights(case: Case, layer: Adapter) -> Tensor:
    """One weight per token and expert, (T, E)."""
    x = case.x()
    with case.tell(layer, x):
        g = dense_gate(layer, x)
    if case.claims.expert == "rank":
        return g
    blocks = g.unflatten(-1, (-1, layer.block))  # (T, E, r)
    if not torch.equal(blocks, blocks[..., :1].expand(blocks.shape)):
        raise Broken("ranks of one block have different weights")
    return blocks[..., 0]


def _nudge(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As far off as rounding to dtype can take it."""
    if not tensor.is_floating_point():
        return tensor
    return tensor * (1 + torch.finfo(dtype).eps * (torch.rand_like(tensor) - 0.5))


@contextlib.contextmanager
def _at(what: str) -> Iterator[None]:
    """Say in what goes wrong inside that it was at `what`."""
    try:
        yield
    except Broken as error:
        raise Broken(f"{what}: {error}") from error
    except Exception as error:
        raise Broken(f"{what}: {type(error).__name__}: {error}") from error


def _equal(got: Tensor, want: Tensor, what: str, other: str) -> None:
    """Raise Broken unless all bits are the same (nan is no number, and never the same)."""
    if not torch.equal(got, want):
        _close(got, want, what, other)
        worst = (got - want).detach().abs().max()
        raise Broken(f"{what} differs in bits from {other}, by up to {worst:.3g}")


def _close(got: Tensor, want: Tensor, what: str, other: str, within: float = 1e-9) -> None:
    """Raise Broken, with the worst place, unless equal within `within` of the largest entry."""
    if got.shape != want.shape:
        raise Broken(f"{what} is {tuple(got.shape)}, {other} is {tuple(want.shape)}")
    got, want = got.detach(), want.detach()
    off = (got - want).abs()
    if got.numel() and not off.max() <= within * max(1.0, float(want.abs().max())):
        at = int(off.nan_to_num(math.inf).argmax())
        mine, theirs = got.flatten()[at].item(), want.flatten()[at].item()
        raise Broken(f"{what} is {mine:.6g} where {other} is {theirs:.6g}")
