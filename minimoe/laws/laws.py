"""The laws, and the table of which claim (claims.Claims) calls for which.

A law's docstring gives the law, why it matters, and what breaks it. A law compares layers that were
built alike, not one layer with itself, wherever a call may leave something behind; and it seeds
torch before each call, so that noise in training breaks no law.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
"""

import copy
import importlib.util
import math
import os
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..claims import Claims
from ..sparse import PATHS
from .case import (
    DRAWN_PATHS,
    Broken,
    Case,
    LeftOut,
    expert_weights,
    live,
    naming,
    near,
    noiseless,
    nudged,
    same_bits,
    tensors,
)

HUGE = 1e60  # no sum of float64 in which this takes part stays the same


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
        layer = case.build(base, **one).train(case.training)
        same_bits(case.run(x, layer), want, "y of a fresh layer", "W0 x")


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
            near(y, flat, f"y of x {tuple(x.shape)}", "y of the same tokens in one row")


def equation(case: Case) -> None:
    """y = x W0ᵀ + scale · (g ⊙ x Aᵀ) B, with the g of `gate`.

    Over all ranks, frozen and live. The thesis of this package. What breaks it in practice: a scale
    that is lost where ranks are frozen, or a normalised score multiplied in where the raw z
    belongs."""
    settings: dict[str, Any] = {} if "scale" in case.settings else {"scale": 0.7}
    x = case.x()
    case = noiseless(case, x)
    layer = case.layer(**settings)
    torch.manual_seed(case.seed + 3)
    with case.context(layer, x):
        idx, g, z, *_ = layer.gate(x)
    idx = torch.arange(layer.ranks).expand(case.T, -1) if idx is None else idx
    near(z, (x @ layer.keys.T).gather(-1, idx), "z as gate gives it", "x Aᵀ")
    want = layer.base(x) + layer.scale * torch.einsum("tk,tko->to", g * z, layer.rows("B")[idx])
    near(case.run(x, case.layer(**settings)), want, "y", "x W0ᵀ + scale · (g ⊙ z) B")


def granularity(case: Case) -> None:
    """A token's output depends on no other token (or sample).

    On no other token if the claimed granularity is "token", no other sample if "sample". Otherwise
    what a model answers depends on who else is in the batch, and accuracy on the batch size. Looked
    at by shuffling the tokens, and by replacing all but the first. (Tokens in one row: what a gate
    does with a sample's tokens is looked at by any_shape.)"""
    x = case.x((case.T + 1, 3))
    if case.claims.granularity == "token":
        x = x.flatten(0, 1)
    case = noiseless(case, x)
    y, order = case.run(x), torch.randperm(len(x))
    near(case.run(x[order]), y[order], "y of shuffled x", "y, shuffled")
    others = torch.cat([x[:1], -2 * x[1:]])
    near(case.run(others)[0], y[0], "y[0], all but x[0] replaced", "y[0] before")


def support(case: Case) -> None:
    """At most top_k experts speak for a token, whatever top_k is.

    The promise of sparsity: what a token costs does not grow with the tasks. On the first task
    there are often fewer experts than top_k: then it keeps all, and that must be no error."""
    for top_k in range(1, case.experts + 2):
        with naming(f"top_k {top_k}"):
            w = expert_weights(case, case.layer(top_k=top_k))
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
        w = expert_weights(case, case.layer(**settings))
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
    results. The plain equation is the reference. (Triton takes part on a GPU, or in its interpreter
    where TRITON_INTERPRET=1 is set.)"""
    kernels = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {}
    for path in PATHS:
        if path == "triton" and not (kernels and importlib.util.find_spec("triton")):
            continue
        layer = case.layer().to(device)
        layer.path = path
        with naming(f"path {path}"):
            results[path] = case.gradients(case.x().to(device), layer)
    for path, ours in results.items():
        for name, want in results["plain"].items():
            near(ours[name], want, f"path {path}: {name}", "plain's")


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
    before = copy.deepcopy(tensors(layer))
    optimiser = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        optimiser.zero_grad()
        x = case.x((case.T + step,))
        with case.context(layer, x) as batch:
            (case.run(x, layer).square().mean() + batch.aux_loss).backward()
        optimiser.step()
        layer.after_step()
    for name, parameter in live(layer).items():
        if parameter.grad is None:
            raise Broken(f"{name} has no gradient")
    for name, tensor in tensors(layer).items():
        if name.startswith(("base.", "frozen_")):
            same_bits(tensor, before[name], f"{name} after 3 steps", "before")


def grow_keeps(case: Case) -> None:
    """grow() keeps all rows as and where they are, and adds r.

    Live rows are frozen behind the older ones. What was learned is kept bit for bit, and rank i
    stays rank i, so that what is known of it (which task it is from, how often it was chosen) stays
    true."""
    layer = case.layer()
    before, ranks = copy.deepcopy(tensors(layer)), layer.ranks
    layer.grow()
    after = tensors(layer)
    for name, tensor in before.items():
        if name.startswith("base."):
            same_bits(after[name], tensor, f"{name} after grow", "before")
        elif f"frozen_{name}" in before:
            rows = torch.cat([before[f"frozen_{name}"], tensor])
            same_bits(after[f"frozen_{name}"], rows, f"frozen_{name} after grow", "all rows before")
            learns = name in layer.buffer_rows or getattr(layer, name).requires_grad
            if after[name].shape != tensor.shape or not learns:
                raise Broken(f"{name} after grow is {tuple(after[name].shape)}, or does not learn")
        elif not name.startswith("frozen_"):
            same_bits(
                after[name], tensor, f"{name}, which belongs to no task, after grow", "before"
            )
    if layer.ranks != ranks + layer.rank:
        raise Broken(f"{ranks} ranks became {layer.ranks}, with rank {layer.rank}")


def round_trips(case: Case) -> None:
    """state_dict, deepcopy and pickle give the same layer.

    The state_dict of a grown layer loads into a fresh one, and what comes of each grows on.
    Otherwise a checkpoint loads, and answers otherwise than the model that was saved."""
    layer, x = case.layer(), case.x()
    want = case.run(x, case.layer())
    fresh = case.build(nn.Linear(case.D, case.O, bias=case.bias).double())
    fresh.load_state_dict(layer.state_dict())
    copies = {
        "state_dict in a fresh layer": fresh.train(case.training),
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
    }
    for name, other in copies.items():
        with naming(name):
            same_bits(case.run(x, other), want, f"y by {name}", "y")
            other.grow()
            if other.ranks != layer.ranks + layer.rank:
                raise Broken(f"by {name} and grown, {layer.ranks} ranks became {other.ranks}")


def eval_is_still(case: Case) -> None:
    """Evaluation draws nothing and changes nothing.

    Nor do train() and eval() touch a weight. Then an answer can be repeated, and a model saved in
    either mode is the same model. (Merging hidden in eval() cost the first LoRA library years of
    bugs.)"""
    layer, x = case.layer().train(), case.x()
    before = copy.deepcopy(tensors(layer))
    layer.eval()
    with case.context(layer, x):
        torch.manual_seed(case.seed + 3)
        first = layer(x)
        torch.manual_seed(case.seed + 4)
        same_bits(layer(x), first, "y in evaluation, again", "y in evaluation")
    for mode in ("eval", "train"):
        now = tensors(getattr(layer, mode)())
        for name, tensor in before.items():
            same_bits(now[name], tensor, f"{name} after {mode}()", "before")


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
    near(case.run(x, layer), want, f"y at {at}", "LoRA's, as as_lora claims,", 1e-6)


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
        near(layer(x), want, "y merged", "y")
        near(layer.base(x), want, "the base's y, merged", "y")
        layer.unmerge()
        same_bits(layer.base.weight, W0, "W0 after unmerge", "before")


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
        grads = {f"d{name}": parameter.grad for name, parameter in live(layer).items()}
        for name, tensor in {"y": got, "dx": ours.grad, **grads}.items():
            if tensor is not None and not tensor.isfinite().all():
                raise Broken(f"{at}: {name} is not finite")
        want, noise = case.run(ours.double(), wide), []
        for _ in range(4):
            other = copy.deepcopy(wide)
            for tensor in [*other.parameters(), *other.buffers()]:
                tensor.data = nudged(tensor.data, dtype)
            y = case.run(nudged(ours.detach().double(), dtype), other)
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
    for path in DRAWN_PATHS:
        at, x = replace(case, path=path), case.x()
        layer, want = at.layer(), at.gradients(x, at.layer())
        torch.compiler.reset()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
            compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
            got = at.gradients(x, layer, compiled)
        for name, tensor in got.items():
            near(tensor, want[name], f"path {path}: {name}, compiled", name)


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
        near(case.run(spoilt)[1:], want, f"y[1:] with x[0] {bad}", "y[1:]")


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
        every, more = (case.layer(top_k=case.experts + n).active() for n in (0, 1))
        if every != more:
            raise Broken(
                f"active() is {every} with all experts kept, {more} with one more than all"
            )
    layer = noiseless(case, case.x()).layer()
    own = [
        (tensor, tensor.clone())
        for name, tensor in tensors(layer).items()
        if not name.startswith("base.") and tensor.is_floating_point()
    ]

    def poked(x: Tensor, at: Tensor | None = None, value: float = 0.0) -> Tensor:
        for tensor, before in own:  # training may have moved a buffer
            tensor.copy_(before)
        if at is not None:
            at.fill_(value)
        return case.run(x, layer)

    def count(x: Tensor, values: Sequence[float]) -> int:
        want = poked(x)
        rows = [row for tensor, _ in own for row in tensor.view(len(tensor), -1)]
        return sum(
            any(not torch.equal(poked(x, at, value), want) for value in values)
            for row in rows  # to see that none of a long row is read, one look is enough
            if len(row) == 1 or not torch.equal(poked(x, row, math.nan), want)
            for at in row
        )

    coarse = [HUGE, -HUGE, *(n / 4 for n in range(-16, 17))]
    fine = [*coarse, *(n / 32 for n in range(-48, 49))]  # what changes a choice may be a small step
    with torch.no_grad():
        most = max(count(x, coarse) for x in case.x((4,)))
        for x in case.x((4,)):
            if most < layer.active():  # fine is slow
                most = max(most, count(x, fine))
    if most != layer.active():
        raise Broken(f"active() is {layer.active()}, and an output depends on {most}")


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
