"""Rules: what can be done with trained experts, without training. A layer in, a changed one out.

use, keep, prune         how much each expert is used; some of them; the best of them
merge, skip, quantise    those kept take in the others; a weak second falls silent; fewer bits
nudge, upcycle           a router that prefers some; one LoRA as many experts
extract, merged          one expert as LoRA; all of them in a plain linear layer
choose_experts           of whole adapted models, a few that are able and unlike

An expert is what has one weight: a rank, or a block of them (Claims.expert). The layer given stays
as it is. The new one stands on the same base, and may take its place: `net.fc1 = keep(net.fc1, S)`.
minimoe.adapt saves and loads it. x is what the layer is given, (..., D), in the mode that it is in;
what its gate needs beside x comes from an open `context`. Padding does not count.

Axes: D in, O out, R ranks in all, E experts. A (R, D) keys, B (R, O) values: ΔW = Σ B_i A_iᵀ.

All raise ValueError if layer is no adapter of the one equation (MoCLE has a term more), and
RuntimeError if it is merged.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import Adapter, Gate, require
from .continual.probe import dense_gate
from .frozen import with_room
from .hooks import move_hooks
from .lora import LoRA
from .lora_moe import LoRAMoE
from .saving import adapters
from .sparse import TINY, rank_sparse


@torch.no_grad()
def use(layer: Adapter, x: Tensor) -> Tensor:
    """(E,): each expert's share of the gate's weight on x, Σ |g_e| / Σ |g|; 0 if all g are."""
    counts = _known(layer).mask(layer.samples_first(x)) > 0
    g = dense_gate(layer, x)[counts].unflatten(-1, (-1, layer.block)).abs().sum((0, -1))
    return g / g.sum().clamp_min(TINY)


def keep(layer: Adapter, experts: Iterable[int]) -> Any:
    """The layer with these experts only: keys, values, router rows, biases, and whatever else there
    is of each, in the order they had. The gate is computed anew among them, as in 2402.14800: one
    that was never chosen is not missed where each is scored for itself; in MoRA it still stood in
    ‖z‖. What counts experts, a label or DSelectK's bits, counts those kept.

    As many are live as before, the last ones, even if they were frozen (call `grow` to freeze all);
    so settings stay as they are. Where fewer are kept, all are live, and rank is theirs.

    Raises ValueError if experts are none, repeated, or not in 0 to E - 1.
    """
    new, S, E = _copy(layer), _these(layer, experts), layer.n_experts
    live = min(layer.rank // layer.block, len(S))
    for name in _rows(layer):
        rows = layer.rows(name).detach().unflatten(0, (E, -1))[S]  # (kept, those of one, ...)
        old, own = rows[:-live].flatten(0, 1), rows[-live:].flatten(0, 1).clone()
        setattr(new, f"frozen_{name}", with_room(old, len(own)))
        setattr(new, name, own if name in layer.buffer_rows else nn.Parameter(own))
    new.rank = live * layer.block
    if "experts" in layer.settings():
        new.experts = live
    return new


@torch.no_grad()
def prune(layer: Adapter, x: Tensor, n: int) -> Any:
    """`keep` the n experts with which the output on x changes least, ‖y - y'‖_F: of all subsets if
    E <= 12, else dropping one at a time (Lu et al., 2402.14800). Of equals the first stay.

    To drop those used least (Chen et al., 2206.00277, do so step by step while training):
    keep(layer, use(layer, x).topk(n).indices). Raises ValueError if n is not 1 to E.
    """
    S = tuple(range(_known(layer).n_experts))
    require(1 <= n <= len(S) and n % 1 == 0, "n", n, f"1 to {len(S)}")
    before, drop = _said(layer, x), len(S) - n if len(S) <= 12 else 1

    def change(S: Iterable[int]) -> float:
        one = keep(layer, S)
        one.step = layer.step  # where its context is
        return float((_said(one, x) - before).norm())

    while len(S) > n:
        S = min(combinations(S, len(S) - drop), key=change)
    return keep(layer, S)


@torch.no_grad()
def merge(layer: Adapter, experts: Iterable[int]) -> Any:
    """`keep`, and every other rank i is taken in by the kept rank j whose key is most like its own:

        B_j <- B_j + (A_i · A_j / ‖A_j‖²) B_i        j = argmax |cos(A_i, A_j)|

    the nearest to B_i A_iᵀ that key A_j can say; all of it if the keys are parallel. So duplicates
    merge without change under g = 1; a gate weighs what j took in as j. (Rank form of Zhou et al.,
    2509.10377, who recombine neurons by what is "most compatible": reconstructed.) Errors: keep's.
    """
    S = [*experts]
    new, A, B = keep(layer, S), layer.keys, layer.rows("B")
    kept = layer.of_ranks(torch.tensor([e in S for e in range(layer.n_experts)], device=B.device))
    norm = A[kept].norm(dim=-1).clamp_min(TINY)
    inner = A[~kept] @ A[kept].T / norm  # (others, kept)
    j = inner.abs().argmax(-1, keepdim=True)
    taken = inner.gather(-1, j) / norm[j] * B[~kept]
    frozen, live = B[kept].index_add(0, j.flatten(), taken).split([len(new.frozen_B), len(new.B)])
    new.frozen_B.copy_(frozen)
    new.B.copy_(live)
    return new


@torch.no_grad()
def skip(layer: Adapter, x: Tensor) -> Any:
    """In evaluation, of two kept experts with weights w1 >= w2, the second is silent where w2 <
    beta w1, and the first has the weight of both; beta: the median of w2 / w1 on x (2402.14800).
    No file holds this. Raises ValueError if the gate does not keep two, with weights >= 0."""
    new, kind = _copy(layer), layer.claims
    two = kind.top_k and kind.simplex and layer.kept == 2
    require(bool(two), "layer", type(layer).__name__, "a simplex of two kept experts")
    x = layer.samples_first(layer.cast(x))
    w = torch.as_tensor(layer.gate(x).weight)[layer.mask(x) > 0].unflatten(-1, (2, -1))[..., 0]
    beta = (w.amin(-1) / w.amax(-1).clamp_min(TINY)).median()
    vars(new)["gate"] = partial(_skipping, new, beta.item())
    return new


def _skipping(layer: Adapter, beta: float, x: Tensor) -> Gate:
    gate = type(layer).gate(layer, x)
    if layer.training:
        return gate
    w = torch.as_tensor(gate.weight).unflatten(-1, (2, -1))  # (..., 2, ranks of one)
    first, second = w.amax(-2, keepdim=True), w.amin(-2, keepdim=True)
    alone = (w == first) * (first + second)
    return gate._replace(weight=alone.where(second < beta * first, w).flatten(-2))


@torch.no_grad()
def quantise(layer: Adapter, bits: int) -> Any:
    """Keys and values at steps of equal size; routers and biases stay (MoQE, 2310.02410):

        v' = s · round(v / s),    s = max |v| / (2^(bits - 1) - 1)      so |v - v'| <= s / 2

    v is one rank's key, or its value: a column of a LoRA's two matrices as its paper writes them,
    and the same for a rank as an expert as for a block. A second time changes nothing. Raises
    ValueError if bits is not a whole number, 2 or more.
    """
    new = _copy(layer)
    require(bits >= 2 and bits % 1 == 0, "bits", bits, "whole numbers from 2 on")
    for name in ("frozen_A", "A", "frozen_B", "B"):
        if (v := new._parameters.get(name, new._buffers.get(name))) is not None:
            most, steps = v.abs().amax(-1, keepdim=True), 2 ** (bits - 1) - 1
            v.copy_(most * ((v / most.where(most > 0, 1) * steps).round() / steps))
    return new


def nudge(layer: Adapter, experts: Iterable[int], delta: float) -> Any:
    """In evaluation, a router that prefers the experts S, its rows as they were:

        l_e <- l_e - delta    for e not in S

    which is l_e + delta in S to a softmax; at inf only S speak. Bandarkar et al., 2510.04694, take
    for S what a task uses in one domain more than text in general does (reconstructed from the
    abstract): (use(layer, task) - use(layer, general)).topk(n).indices. No file holds this.

    Raises ValueError if there is no router (MoRA's logits are what ranks see), if delta < 0, or for
    experts as `keep`.
    """
    new, S = _copy(layer), _these(layer, experts)
    require("router" in _rows(layer), "layer", type(layer).__name__, "schemes with a router")
    require(delta >= 0, "delta", delta, "0 or more")
    vars(new)["project"] = partial(_nudged, new, S, delta)
    return new


def _nudged(layer: Adapter, S: list[int], delta: float, x: Tensor, name: str) -> Tensor:
    l = type(layer).project(layer, x, name)
    if layer.training or name != "router":
        return l
    less = l.new_full((layer.n_experts, 1), -delta)
    less[S] = 0
    return (l.unflatten(-1, (len(less), -1)) + less).flatten(-2)  # an expert may have several rows


def upcycle(
    layer: LoRA, experts: int, scheme: type[LoRAMoE] = LoRAMoE, noise: float = 0.0, **settings: Any
) -> Any:
    """A LoRA as `experts` copies of it, all live, under a fresh router: of another scheme, with its
    settings (sparse upcycling, as in CLIP-UP, 2502.00965). E · R ranks must fit the layer.

    Weights that sum to 1 leave the output as it was, whatever the router says; a top k that is not
    renormalised (AdaMoE) scales the update by Σ p of the kept. While copies are alike the router
    has no gradient: noise, N(0, noise²) on values, makes them differ.

    Raises ValueError if layer is no LoRA, experts < 1 or noise < 0, and what the scheme raises.
    """
    require(isinstance(layer, LoRA), "layer", type(layer).__name__, "LoRA")
    require(experts >= 1, "experts", experts, "1 or more")
    require(noise >= 0, "noise", noise, "0 or more")
    A, B = (layer.rows(name).detach().repeat(experts, 1) for name in ("A", "B"))
    B = B + noise * torch.randn_like(B)
    return _instead(layer, scheme, A, B, experts=experts, **settings)


def extract(layer: Adapter, expert: int) -> LoRA:
    """One expert at weight 1, as a LoRA: the same as the whole layer wherever that gives this one
    weight 1 and no other any, as ToldLoRA does by its label, and a renormalised top 1 (task-level
    routing, 2110.03742). Raises ValueError if expert is not in 0 to E - 1."""
    one = keep(layer, [expert])
    return _instead(layer, LoRA, one.keys, one.rows("B"))


@torch.no_grad()
def merged(layer: Adapter, weights: Tensor | Sequence[float] | float) -> nn.Linear:
    """A plain linear layer of W0 + scale · Σ_e w_e ΔW_e (O, D), and base's bias; weights: one for
    each expert, or for all. 1 is LoRA itself; 1 / E a soup of the experts, any other number task
    arithmetic (2212.04089). Raises ValueError if weights are neither, RuntimeError as LoRA.merge.
    """
    copied, base, E = _copy(layer), layer.base, layer.n_experts
    layer.require_plain_weight()
    w = torch.as_tensor(weights, dtype=layer.dtype, device=layer.B.device)
    require(w.shape in ((), (E,)), "weights", tuple(w.shape), f"() and ({E},)")
    W0 = base.weight if isinstance(base, nn.Linear) else base.weight.T  # transformers' Conv1D
    plain = nn.Linear(layer.in_features, layer.out_features, base.bias is not None).to(W0)
    plain.weight.copy_(W0 + _delta(layer, layer.of_ranks(w.expand(E))))
    if base.bias is not None:
        plain.bias.copy_(base.bias)
    move_hooks(copied, plain)
    return plain.requires_grad_(False).train(layer.training)


@torch.no_grad()
def choose_experts(candidates: Sequence[nn.Module], x: Tensor, y: Tensor, n: int) -> list[int]:
    """Which of some adapted models to take, at most n, by a few examples: x, and classes y (N,) of
    which a model(x) gives logits (N, C). (Yang et al., 2408.15915: by performance, perplexity and
    diversity. Reconstructed.)

    Able is one that is right more often than its commonest class is, with a mean cross-entropy
    below ln C. First comes the best of them: most often right, then by cross-entropy. Then always
    the one least like its likest among those taken, by the cosine of ΔW, all layers as one vector;
    what repeats one is not taken. Raises ValueError if n < 1, or the adapted layers' sizes differ.
    """
    require(n >= 1, "n", n, "1 or more")
    deltas = [[_delta(a).double().flatten() for _, a in adapters(model)] for model in candidates]
    sizes = [[len(delta) for delta in one] for one in deltas]
    same = bool(sizes) and all(one == sizes[0] != [] for one in sizes)
    require(same, "candidates", sizes, "some, adapted alike")
    scores = []
    for i, model in enumerate(candidates):
        l = model(x)
        wrong, loss = float((l.argmax(-1) != y).sum()), float(F.cross_entropy(l, y))
        if wrong < len(y) - y.bincount().max() and loss < math.log(l.shape[-1]):
            scores.append((wrong, loss, i))
    able = [i for *_, i in sorted(scores)]
    unit = F.normalize(torch.stack([torch.cat(delta) for delta in deltas]), dim=-1)
    far, taken = 1 - unit @ unit.T, able[:1]
    while able and len(taken) < n:
        best = max(able, key=lambda i: far[i, taken].min())
        if far[best, taken].min() < 1e-6:
            break
        taken.append(best)
    return taken


def _delta(layer: Adapter, g: Tensor | float = 1.0) -> Tensor:
    """scale · Σ over ranks of g_i B_i A_iᵀ (O, D)."""
    return layer.scale * (g * layer.rows("B").T) @ layer.keys


def _said(layer: Adapter, x: Tensor) -> Tensor:
    """The update (tokens, O) of x; nothing is left beside it."""
    x = layer.samples_first(layer.cast(x))
    idx, g, z, *_ = layer.gate(x)
    u = rank_sparse(layer.scale * g * z, idx, layer.frozen_B, layer.B, layer.path)
    return u[layer.mask(x) > 0]


def _these(layer: Adapter, experts: Iterable[int]) -> list[int]:
    """Some of the layer's experts, in their order."""
    given, every = [int(e) if e == int(e) else e for e in experts], range(layer.n_experts)
    S = [e for e in every if e in given]
    require(0 < len(S) == len(given), "experts", given, f"some of 0 to {every[-1]}, each once")
    return S


def _rows(layer: Adapter) -> list[str]:
    """What each expert has rows of, by name."""
    names = [name for name, _ in layer.named_buffers(recurse=False)]
    return [name.removeprefix("frozen_") for name in names if name.startswith("frozen_")]


def _known(layer: Adapter) -> Adapter:
    """The layer, if it is one of which the rules know."""
    known = isinstance(layer, Adapter) and layer.claims.equation
    require(known, "layer", type(layer).__name__, "adapters of the one equation")
    layer.stop_if_merged()
    return layer


def _copy(layer: Adapter) -> Any:
    """The layer again, on the same base, with the same hooks."""
    same = (_known(layer).base, layer.use)  # hooks of the base know its use
    return copy.deepcopy(layer, {id(part): part for part in same})


def _instead(layer: Adapter, scheme: type[Adapter], A: Tensor, B: Tensor, **settings: Any) -> Any:
    """A layer of another scheme with these ranks, to take this one's place."""
    one = _copy(layer)
    new = scheme(one.base, rank=len(A), scale=one.scale, **settings)
    for name in ("name", "tied", "warned", "use", "path", "batch_first", "training"):
        setattr(new, name, getattr(one, name))
    for tensor in (*new.parameters(recurse=False), *new.buffers(recurse=False)):
        tensor.data = tensor.data.to(one.dtype if tensor.is_floating_point() else tensor.dtype)
    new.A.data, new.B.data = A.detach(), B.detach()
    move_hooks(one, new)
    return new
