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
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..claims import Claims
from ..context import context
from ..saving import load, save
from ..sparse import PATHS
from .case import (
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
    seeded,
    tensors,
)

HUGE = 1e60  # no sum of float64 in which this takes part stays the same


def zero_at_birth(case: Case) -> None:
    """A fresh layer is the base layer, bit for bit.

    So putting adapters into a trained model changes nothing until they have learned something, and
    whatever a comparison shows later was learned."""
    one = {"top_k": 1} if case.claims.top_k else {}
    for dtype in (torch.float32, torch.bfloat16):
        seeded(case.seed)
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
    seeded(case.seed + 3)
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
    at by shuffling the tokens, by replacing all but the first, and by leaving out all but the last,
    of a thousand too: their number matters only there. (Tokens in one row: what a gate does with a
    sample's tokens is looked at by any_shape.)"""
    token = case.claims.granularity == "token"
    x, many = case.x((case.T + 1, 3)), case.x((334, 3))
    if token:
        x, many = x.flatten(0, 1), many.flatten(0, 1)
    case = noiseless(case, x)
    y, order = case.run(x), torch.randperm(len(x))
    near(case.run(x[order]), y[order], "y of shuffled x", "y, shuffled")
    others = torch.cat([x[:1], -2 * x[1:]])
    near(case.run(others)[0], y[0], "y[0], all but x[0] replaced", "y[0] before")
    all_of_many, what = case.run(many), "tokens" if token else "samples"
    for last in (1, len(x)):
        got, want = case.run(many[len(many) - last :]), all_of_many[len(many) - last :]
        near(got, want, f"y of the last {last} {what} alone", f"that among {len(many)}")
    near(case.run(x[1:]), y[1:], f"y without the first of {len(x)} {what}", "y with it")


def support(case: Case) -> None:
    """At most top_k experts have a weight for a token, whatever top_k is.

    The promise of sparsity: what a token costs does not grow with the tasks. On the first task
    there are often fewer experts than top_k: then it keeps all, and that must be no error."""
    E = case.experts
    for top_k in some_top_k(E):
        with naming(f"top_k {top_k}"):
            w = expert_weights(case, case.layer(top_k=top_k))
            most = int((w != 0).sum(-1).max())
            if most > min(top_k, E):
                raise Broken(f"{most} of {E} experts have a weight for one token")


def simplex(case: Case) -> None:
    """Weights are 0 or more and sum to 1; in evaluation, to 1 at most.

    One weight per expert, whatever top_k is; in evaluation a scheme may prune. Then the update's
    size does not depend on how many experts there are, and a weight can be read as a share. (A
    scheme may claim a sum as large as the number of experts that it keeps: then a mean of 1.)"""
    every: list[dict[str, Any]]
    E = case.experts
    every = [{"top_k": k} for k in some_top_k(E)[:-1]] if case.claims.top_k else [{}]
    for settings in every:
        w = expert_weights(case, case.layer(**settings))
        at = "".join(f"top_k {top_k}: " for top_k in settings.values())
        total = min(settings.get("top_k", E), E)
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
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and case.T <= 64  # more takes too long
    kernels = torch.cuda.is_available() or interpreted
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
    shape = (case.T,) if case.seed % 2 else (2, case.T)  # a gate may do otherwise with samples
    x, layer = case.x(shape), case.layer()
    got, dy = case.gradients(x, layer), case.dy(shape)
    layer = case.layer()
    for name, tensor in {"x": x, **live(layer)}.items():
        seeded(case.seed + 4)
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


def learns_from_birth(case: Case) -> None:
    """Something in a fresh layer has a gradient, and in a grown one.

    By a loss of the output. A layer that starts where nothing can move, as with keys and values of
    0, trains without an error and never learns, and it looks as if the method had failed. The layer
    is as the scheme makes it, task by task, and keeps all experts; of several draws of its noise
    one must do."""
    case = replace(case, D=case.D + 3)  # so that what a gate is told of 64 tokens names every task
    x, draws = case.x((64,)), 5
    every = {"top_k": case.tasks * case.settings["rank"]} if case.claims.top_k else {}
    seeded(case.seed)
    layer = case.build(nn.Linear(case.D, case.O, case.bias, dtype=torch.float64), **every).train()
    for task in range(case.tasks):
        if task > 0:
            layer.grow()
        learns = [p for p in layer.parameters() if p.requires_grad]
        for draw in range(draws):
            seeded(case.seed + draw)
            with case.context(layer, x):
                y = layer(x)
            grads = torch.autograd.grad(y.square().mean(), learns, materialize_grads=True)
            if any(bool(grad.any()) for grad in grads):
                break
        else:
            raise Broken(f"of {task + 1} tasks: every gradient is 0")


def round_trips(case: Case) -> None:
    """state_dict, save, deepcopy and pickle give the same layer.

    Of a layer that has been trained: a fresh one with its state answers the same bits in both
    modes, learns the same in the next step, and grows on. So whatever training or after_step moves
    is part of the state. Every setting is kept under its own name: a layer made by `settings()`
    loads what `save` wrote. Otherwise a checkpoint loads, and answers otherwise than the model that
    was saved."""
    layer = case.layer()
    case.train(layer)

    def fresh(**settings: Any) -> Adapter:
        return case.build(copy.deepcopy(layer.base), **settings).train(layer.training)

    def loaded() -> Adapter:
        other = fresh()
        other.load_state_dict(layer.state_dict())
        return other

    def from_file() -> Adapter:
        settings = layer.settings()
        for name, given in case.settings.items():
            if repr(settings.get(name)) != repr(given):
                raise Broken(f"{name} {given!r} is kept as {settings.get(name)!r}")
        other = fresh(**settings)
        if repr(other.settings()) != repr(settings):
            raise Broken(f"made by settings() {settings}, it has {other.settings()}")
        with tempfile.TemporaryDirectory() as folder:
            save(layer, f"{folder}/layer.safetensors")
            load(other, f"{folder}/layer.safetensors")
        return other

    ways: dict[str, Callable[[], Adapter]] = {
        "state_dict in a fresh layer": loaded,
        "save and load": from_file,
        "deepcopy": lambda: copy.deepcopy(layer),
        "pickle": lambda: pickle.loads(pickle.dumps(layer)),
    }
    copies = {}
    for name, way in ways.items():
        with naming(name):
            copies[name] = way()
    want = life(case, layer)
    if not all(tensor.isfinite().all() for tensor in want.values()):
        raise LeftOut  # training has diverged
    for name, other in copies.items():
        with naming(f"by {name}"):
            for what, got in life(case, other).items():
                same_bits(got, want[what], what, "the layer's own")
            ranks = other.ranks
            other.grow()
            if other.ranks != layer.ranks + layer.rank:
                raise Broken(f"grown, {ranks} ranks became {other.ranks}")


def eval_is_still(case: Case) -> None:
    """Evaluation draws nothing and changes nothing.

    Nor do train() and eval() touch a weight. Then an answer can be repeated, and a model saved in
    either mode is the same model. (Merging hidden in eval() cost the first LoRA library years of
    bugs.)"""
    layer, x = case.layer().train(), case.x()
    before = copy.deepcopy(tensors(layer))
    layer.eval()
    with case.context(layer, x):
        seeded(case.seed + 3)
        first = layer(x)
        seeded(case.seed + 4)
        same_bits(layer(x), first, "y in evaluation, again", "y in evaluation")
    if layer.counts is not None:
        raise Broken("evaluation leaves counts, and after_step would move by them")
    for mode in ("eval", "train"):
        now = tensors(getattr(layer, mode)())
        for name, tensor in before.items():
            same_bits(now[name], tensor, f"{name} after {mode}()", "before")


def padding_is_left_out(case: Case) -> None:
    """Padding changes no loss, no count, and no other token's output.

    Tokens that the batch's mask leaves out (adapt.context) may hold anything: another batch pads
    them otherwise. Padding alone leaves a loss and counts of 0. Otherwise short samples train on
    what is not there, and what is balanced is padding, which some batches have most of."""
    case = replace(case, training=True)
    x = case.x((3, case.T + 1))
    mask = torch.arange(case.T + 1) < torch.tensor([[case.T + 1], [1], [0]])
    padded = torch.where(mask.unsqueeze(-1), x, 3 - 2 * x)
    said = x[:, 0]  # each sample's context is as this says
    want, got = (left(case, [[content]], said, mask) for content in (x, padded))
    for name, tensor in want.items():
        if case.claims.granularity != "batch" or name in ("aux_loss", "counts"):
            near(got[name], tensor, f"{name} with other padding", "before")
    for name, tensor in left(case, [[x]], said, mask & False).items():
        if name in ("aux_loss", "counts"):
            near(tensor, torch.zeros_like(tensor), f"{name} of padding alone", "that of nothing")


def passes_add_up(case: Case) -> None:
    """What the passes of one step leave adds up: losses, counts, gradients.

    A layer may be called twice in a batch, as where weights are shared; and a step may be of many
    micro-batches. Two passes in one context leave what they leave in two, and then after_step moves
    what it moves after one pass of all their tokens (where a pass draws no noise). What breaks it:
    a loss or counts that a layer keeps of its last pass alone."""
    case = replace(case, training=True)
    with naming("after_step before any pass"):
        case.layer().after_step()
    parts = list(case.x((2 * case.T,)).split(case.T))
    want, got = left(case, [[x] for x in parts]), left(case, [parts])
    for name, tensor in want.items():
        near(got[name], tensor, f"{name} of two passes in one context", "that of two contexts")
    if noiseless(case, parts[0]).training:
        for name, tensor in left(case, [[torch.cat(parts)]]).items():
            if name.startswith("after_step"):
                near(want[name], tensor, f"{name} of two passes", "that of one")


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
    trained networks can be; an answer that is beyond the type in float64 too can tell nothing."""
    x = 30 * case.x((64,))
    for dtype, auto in (
        (torch.float16, False),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ):
        layer = case.layer(dtype)
        wide = copy.deepcopy(layer).double()
        ours = x.to(dtype).requires_grad_()
        want, noise = case.run(ours.detach().double(), wide), []
        if not want.abs().max() < torch.finfo(dtype).max:
            continue  # the answer itself is beyond the type
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
    x, layer = case.x(), case.layer()
    want = case.gradients(x, case.layer())
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        compiled: Any = torch.compile(
            layer, backend="aot_eager_default_partitioner", fullgraph=True
        )
        got = case.gradients(x, layer, compiled)
    for name, tensor in got.items():
        near(tensor, want[name], f"{name}, compiled", name)


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

    Padding is zero, and a ReLU's output can be: all tokens, or one among others. What breaks it: a
    division by a norm."""
    among = case.x().clone()
    among.flatten(0, -2)[:1] = 0
    zeros = torch.zeros(case.T, case.D, dtype=torch.float64)
    for which, x in (("", zeros), (" where one token is 0", among)):
        for name, tensor in case.gradients(x, case.layer()).items():
            if not tensor.isfinite().all():
                raise Broken(f"{name} is not finite{which}")


def active_is_read(case: Case) -> None:
    """active() is how many parameters a token's output depends on.

    Of the adapter's own, frozen and live: the number by which schemes are compared at equal cost.
    Counted the slow way: a parameter is read if making it huge, up or down, or any of some ordinary
    numbers, changes the output. Of layers of two tasks or more, as a router over one expert decides
    nothing; the most that any of 4 tokens depends on; in training, if that draws no noise. A scheme
    may claim that this is at most active(); then "huge" is all that is tried."""
    sizes = {name: min(getattr(case, name), max(18, case.settings["rank"])) for name in "DO"}
    case = replace(case, **sizes)  # more takes too long
    # a product with a weight of 0 would read what is not kept, to see nothing of it
    case = replace(case, tasks=max(case.tasks, 2), training=True, path="gather")
    if case.claims.top_k:
        E = case.experts
        every, more = (case.layer(top_k=k).active() for k in (E, E + 1))
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
        """The most that any token of x (n, 1, D) depends on."""
        want, found = poked(x), torch.zeros(len(x))

        def changed(at: Tensor, value: float) -> Tensor:
            return (poked(x, at, value) != want).flatten(1).any(-1)  # (n,)

        for row in (row for tensor, _ in own for row in tensor.view(*tensor.shape[:1] or (1,), -1)):
            # to see that none of a long row is read, one look is enough
            read = changed(row, math.nan) if len(row) > 1 else found >= 0
            for at in row if read.any() else ():
                seen = ~read
                for value in values:
                    if not seen.all():
                        seen = seen | changed(at, value)
                found += seen & read
        return int(found.max())

    coarse = [HUGE, -HUGE, *(n / 4 for n in range(-16, 17))]
    fine = [*coarse, *(n / 32 for n in range(-48, 49))]  # what changes a choice may be a small step
    # at once, unless a token may read others
    some = case.x((4, 1)).split(1 if case.claims.granularity == "batch" else 4)
    with torch.no_grad():
        most = max(count(x, coarse[: 2 if case.claims.active_at_most else None]) for x in some)
        if case.claims.active_at_most and most <= layer.active():
            return
        for x in some:
            if most < layer.active():  # fine is slow
                most = max(most, count(x, fine))
    if most != layer.active():
        of = f"of {case.tasks} tasks, in training: "
        raise Broken(f"{of}active() is {layer.active()}, and an output depends on {most}")


# What laws share.


def some_top_k(E: int) -> list[int]:
    """From 1 to one more than there are experts; of many, every 6th in between."""
    return [*range(1, min(E, 10)), *range(10, E, 6), E, E + 1]


def life(case: Case, layer: Adapter) -> dict[str, Tensor]:
    """How a layer goes on: what it answers, what it learns in a step, and what it answers then."""
    answers = {}
    for when in ("", " after one more step"):
        for mode in (True, False):
            y = case.run(case.x(), layer.train(mode))
            answers[f"y in {'training' if mode else 'evaluation'}{when}"] = y.detach()
        if not when:
            case.train(layer, 1)
    return answers


def left(
    case: Case, batches: list[list[Tensor]], said: Tensor | None = None, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """What a step leaves, of batches of passes: y of the tokens that count, all losses (without the
    weights' own), counts, gradients, and what after_step has moved, by how much.

    said: what the samples' context is made of, by default themselves."""
    layer, ys, losses = case.layer(), [], torch.zeros((), dtype=torch.float64)
    with context(layer) as weights:
        penalty = weights.aux_loss
    for batch in batches:
        total = torch.zeros((), dtype=torch.float64)
        with context(layer) as outer:
            for x in batch:
                seeded(case.seed + 3)
                with case.context(layer, x if said is None else said, mask):
                    y = layer(x)
                ys.append(y.flatten(0, -2) if mask is None else y[mask])
                total = total + ys[-1].square().sum()
        loss = outer.aux_loss - penalty
        (total + loss).backward(retain_graph=True)  # the penalty is in each of them
        losses = losses + loss
    found = {"y": torch.cat(ys), "aux_loss": losses}
    if layer.counts is not None:
        found["counts"] = layer.counts.double()
    for name, parameter in live(layer).items():
        found[f"d{name}"] = torch.zeros(()) if parameter.grad is None else parameter.grad
    before = {name: tensor.detach().clone() for name, tensor in tensors(layer).items()}
    layer.after_step()
    for name, tensor in tensors(layer).items():
        move = tensor.double() - before[name].double()
        found[f"after_step's move of {name}"] = move.nan_to_num()
    return {name: tensor.detach() for name, tensor in found.items()}


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
    learns_from_birth: lambda claims: True,
    round_trips: lambda claims: True,
    eval_is_still: lambda claims: True,
    padding_is_left_out: lambda claims: True,
    passes_add_up: lambda claims: True,
    degenerates_to_lora: lambda claims: claims.as_lora is not None,
    merge_is_equal: lambda claims: claims.mergeable,
    half_precision: lambda claims: True,
    compiles: lambda claims: True,
    nan_stays: lambda claims: claims.granularity != "batch",
    zero_is_finite: lambda claims: True,
    active_is_read: lambda claims: True,
}
EXAMPLES: dict[Law, int] = {
    compiles: 2,
    half_precision: 6,
    active_is_read: 4,
    round_trips: 15,
}  # others 30
