"""As if which step of the equation were another.

A list of what is done wrong in gates, each as something that can be seen: who is used, what a
token's weights are multiplied by, or what its logits are. Said is what is true in every case that
shows a difference.

Axes: T tokens, D in, R ranks in all, r ranks per task, E experts, k kept experts.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..adapter import Adapter
from ..continual.probe import dense_gate
from .case import Case
from .pair import Pair, gradient, gradient_of

FLOAT32 = 1e-4  # what float32 may be off by
OTHER, LOUDER = "logits are multiplied by", "the update is multiplied by the number"
Numbers = Tensor | float


@dataclass(frozen=True)
class Sight:
    """What is seen of one case. layer is theirs, with its settings; of each token and rank, (T, R):

    g, h        the weights of theirs and of mine
    ours, mine  who speaks
    loud        who is so loud in theirs that the ratio h / g is no rounding
    z           what ranks see
    s           what theirs chooses by: z, or the router's logit of a rank's expert
    kept        the k of largest s
    live        (R,) who is of the last task
    full        theirs' weights, were all kept

    within      as of Pair
    """

    layer: Adapter
    settings: Mapping[str, Any]
    training: bool
    x: Tensor
    g: Tensor
    h: Tensor
    ours: Tensor
    mine: Tensor
    loud: Tensor
    z: Tensor
    s: Tensor
    k: int
    kept: Tensor
    live: Tensor
    full: Tensor
    routed: bool
    within: float


def sight(pair: Pair) -> Sight:
    layer, x = pair.theirs, pair.tokens()
    gz, hz, z = pair.gates()
    routed = hasattr(layer, "router")
    s = (x @ layer.rows("router").T if routed else z).detach()
    s = s.repeat_interleave(z.shape[1] // s.shape[1], -1)
    k = layer.kept * layer.block if pair.case.claims.top_k else z.shape[1]
    every = copy.deepcopy(layer).train()
    every.top_k = every.n_experts
    with torch.no_grad(), pair.context(every, x):
        full = dense_gate(every, x)
    return Sight(
        layer,
        layer.settings(),
        pair.case.training,
        x,
        gz / z,
        hz / z,
        pair.speak(gz),
        pair.speak(hz),
        pair.speak(gz, loud=True),
        z,
        s,
        k,
        top(s, k),
        torch.arange(z.shape[1], device=x.device) >= z.shape[1] - layer.rank,
        full,
        routed,
        pair.within,
    )


def top(s: Tensor, k: int) -> Tensor:
    """True at the k largest of each token: (T, R)."""
    none = torch.zeros_like(s, dtype=torch.bool)
    return none.scatter(-1, s.topk(min(max(k, 0), s.shape[1])).indices, True)


# Who speaks


def of_choice(v: Sight) -> set[str]:
    block = v.layer.block
    wrong = {
        "no rank is used": torch.zeros_like(v.kept),
        "the choice is by size, not by sign": above(v, top(v.s.abs(), v.k)),
        "the smallest are kept": above(v, top(-v.s, v.k)),
        "all ranks are used": torch.ones_like(v.kept),
        "one more is kept": above(v, top(v.s, v.k + block)),
        "one less is kept": above(v, top(v.s, v.k - block)),
        "r are kept, and not k": above(v, top(v.s, v.layer.rank)),
        "only live ranks are chosen from": above(
            v, top(v.s.where(v.live, -math.inf), v.k) & v.live
        ),
    }
    true = {name for name, who in wrong.items() if torch.equal(v.mine, who)}
    if not v.training and torch.equal(v.mine, v.kept):
        true.add("there is no threshold")
    # among the kept, who is used scores more than who is not
    least = torch.where(v.kept & v.mine, v.s, math.inf).amin(-1)
    most = torch.where(v.kept & ~v.mine, v.s, -math.inf).amax(-1)
    if bool((v.mine <= v.kept).all()) and bool((least > most).all()):
        true.add(PRUNED if v.training else OTHER_THRESHOLD)
    return true


OTHER_THRESHOLD = "the threshold is another, or of another number"
PRUNED = "of the kept those of small scores say nothing, in training too"


def above(v: Sight, kept: Tensor) -> Tensor:
    """Of those kept, who is above theirs' threshold."""
    if v.training or "delta" not in v.settings:
        return kept
    s = v.s if v.routed else v.z / v.z.norm(dim=-1, keepdim=True)
    return kept & (s >= v.settings["delta"])


# What weights, or logits, are multiplied by


def of_weights(v: Sight) -> set[str]:
    factor, slope = factors(v), slopes(v)
    true = {name for name, want in wrong_factors(v).items() if agrees(v, factor, want)}
    true |= {name for name, want in wrong_slopes(v).items() if agrees(v, slope, want)}
    for name, seen in ((OTHER, slope), (LOUDER, factor)):
        first = float(next(iter(seen[~seen.isnan()]), 1.0))
        if agrees(v, seen, first) and not agrees(v, seen, 1.0):
            true.add(f"{name} {first:.4g}")
    g, h = (torch.where(v.ours, w, 0.0) for w in (v.g, v.h))
    sorted_alike = torch.allclose(g.sort(-1).values, h.sort(-1).values, rtol=10 * v.within)
    if sorted_alike and not torch.allclose(g, h, rtol=FLOAT32):
        true.add("weights are given to other ranks than theirs")
    return true


def factors(v: Sight) -> Tensor:
    """h / g of each token (T,), nan where its ranks do not have the same."""
    ratio = torch.where(v.loud, v.h / v.g, math.nan)
    mean = ratio.nanmean(-1, keepdim=True)
    same = (~v.loud | ((ratio - mean).abs() < 1e3 * v.within * mean.abs())).all(-1)
    return torch.where(same, mean[:, 0], math.nan)


def slopes(v: Sight) -> Tensor:
    """Of log h on log g, of each token (T,), nan where it is no line: what logits are multiplied
    by under a softmax."""
    seen = v.loud & (v.g > 0) & (v.h > 0)
    logs = [torch.where(seen, w.clamp_min(1e-300).log(), math.nan) for w in (v.g, v.h)]
    x, y = (w - w.nanmean(-1, keepdim=True) for w in logs)
    slope = (x * y).nansum(-1) / (x * x).nansum(-1)
    off = (y - slope[:, None] * x).nan_to_num(0.0).abs().amax(-1)
    known = (
        (off < 1e3 * v.within)
        & (x.nan_to_num(0.0).abs().amax(-1) > 1e-4)
        & (seen == v.loud).all(-1)
    )
    return torch.where(known, slope, math.nan)


def agrees(v: Sight, found: Tensor, want: Numbers) -> bool:
    """Wherever found is a number, and it is one somewhere."""
    known, near = ~found.isnan(), max(1e-4, 100 * v.within)
    want = torch.as_tensor(want, dtype=found.dtype).expand_as(found)
    return bool(known.any()) and torch.allclose(found[known], want[known], rtol=near, atol=v.within)


def wrong_factors(v: Sight) -> dict[str, Numbers]:
    layer, block = v.layer, v.layer.block
    wrong: dict[str, Numbers] = {
        "the softmax is over all, before the top k": (v.full * v.kept).sum(-1) / block,
        "z / ‖z‖ is said, not z": 1 / v.z.norm(dim=-1),
        "the update's sign is turned": -1.0,
    }
    if bool((v.kept & ~v.ours).any()):
        wrong["weights are divided by their sum after the threshold"] = block / v.g.sum(-1)
    sizes = {"scale": layer.scale, "k": v.k // block, "r": layer.rank, "R": layer.ranks}
    for name, size in (sizes | ({"E": layer.n_experts} if block > 1 else {})).items():
        if size != 1:
            wrong[f"the update is multiplied by {name}"] = float(size)
            wrong[f"the update is divided by {name}"] = 1 / size
    return wrong


def wrong_slopes(v: Sight) -> dict[str, Numbers]:
    length = v.z.norm(dim=-1)
    wrong: dict[str, Numbers] = {
        "scores are not normalised": length,
        "the norm is over the kept ranks only": length / (v.z * v.kept).norm(dim=-1),
        "the norm is over live ranks only": length / (v.z * v.live).norm(dim=-1),
        "the norm is over frozen ranks only": length / (v.z * ~v.live).norm(dim=-1),
        "the norm is the sum of sizes": length / v.z.abs().sum(-1),
        "the norm is the largest size": length / v.z.abs().amax(-1),
        "scores are divided by the root of R": v.z.shape[1] ** -0.5,
        "scores are divided by the root of D": v.x.shape[1] ** -0.5,
        "x is normalised before it is scored": 1 / v.x.norm(dim=-1),
        "all that are used weigh the same": 0.0,
        "the smallest weigh most": -1.0,
    }
    if tau := v.settings.get("tau"):
        wrong |= {"tau is applied twice": 1 / tau, "tau is not applied": tau}
        wrong["logits are multiplied by tau, not divided"] = tau * tau
    return wrong


def of_pruned(v: Sight) -> set[str]:
    return of_weights(v) if torch.equal(v.mine, v.ours) else of_choice(v)


# The base, and the backward pass


def of_output(pair: Pair) -> set[str]:
    x = pair.tokens()
    with torch.no_grad():
        off = pair.run(pair.mine, x) - pair.run(pair.theirs, x)
        base, bias = pair.theirs.base(x), pair.theirs.base.bias
    wrong = {"the base is left out": -base, "the base counts twice": base}
    if bias is not None:
        wrong |= {"the bias is left out": -bias, "the bias counts twice": bias}
    return {
        name
        for name, want in wrong.items()
        if torch.allclose(off, want.expand_as(off), atol=10 * pair.within)
    }


def of_gradients(pair: Pair) -> set[str]:
    def differ(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
        rtol, atol = max(1e-6, 100 * pair.within), 10 * pair.within
        return [n for n in one if not torch.allclose(one[n], other[n], rtol, atol)]

    def summed(g: Tensor, z: Tensor, x: Tensor) -> Tensor:
        return pair.theirs.base(x) + pair.theirs.scale * (g * z) @ pair.theirs.rows("B")

    def constant_g(x: Tensor) -> Tensor:
        return summed(dense_gate(pair.theirs, x).detach(), x @ pair.theirs.keys.T, x)

    def constant_z(x: Tensor) -> Tensor:
        return summed(dense_gate(pair.theirs, x), (x @ pair.theirs.keys.T).detach(), x)

    def constant_norm(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm

        def constant(*args: Any, **more: Any) -> Tensor:
            return norm(*args, **more).detach()

        pair.theirs.path = "plain"
        with mock.patch.object(torch.linalg, "vector_norm", constant):
            return summed(dense_gate(pair.theirs, x), x @ pair.theirs.keys.T, x)

    shape = (2, pair.case.T)
    ours, mine = gradient(pair, *shape)
    names = differ(ours, mine)
    if not any(bool(tensor.any()) for tensor in mine.values()):
        return {"nothing has a gradient"}
    true = {f"the gradient of {name} is left out" for name in names if not mine[name].any()}
    if all(name.startswith("frozen_") for name in names):
        true.add("what is frozen learns")
    wrong = {
        "weights are": constant_g,
        "what ranks see, z, is": constant_z,
        "‖z‖ is": constant_norm,
    }
    for name, call in wrong.items():
        if not differ(gradient_of(pair, call, *shape), mine):
            true.add(f"{name} constant in the backward pass")
    return true


Look = Callable[[Pair], set[str]]
LOOKS: Mapping[str, Look] = {
    "chosen": lambda pair: of_choice(sight(pair)),
    "weights": lambda pair: of_weights(sight(pair)),
    "pruned": lambda pair: of_pruned(sight(pair)),
    "y": of_output,
    "gradients": of_gradients,
}


def guess(
    step: str,
    test: Callable[[Pair], None],
    make: Callable[[Case], Pair],
    case: Case,
    others: Iterable[Case],
) -> str:
    """Said of a case at which the test of a step fails: what is true of all others at which it
    does; "" if nothing that is known."""
    if step not in LOOKS:
        return ""
    found: list[set[str]] = []
    for other in others:
        if fails(test, make, other):
            with contextlib.suppress(Exception, SystemExit):  # what cannot be seen says nothing
                found.append(LOOKS[step](make(other)))
    true = set.intersection(*found) if found else set()
    # who speaks at all is said of what is louder than 100 times that
    if not true and not fails(test, make, case, FLOAT32 / 100 if step == "chosen" else FLOAT32):
        true = {f"it is computed in fewer bits, or by another eps, within {FLOAT32:g} the same"}
    vague = (OTHER, LOUDER, OTHER_THRESHOLD, PRUNED)
    return f"as if {min(true, key=lambda name: (name.startswith(vague), name))}" if true else ""


def fails(
    test: Callable[[Pair], None], make: Callable[[Case], Pair], case: Case, within: float = 0.0
) -> bool:
    """Whether the test does; within: allow at least that."""
    try:
        pair = make(case)
        pair.within = max(pair.within, within)
        test(pair)
    except (Exception, SystemExit):
        return True
    return False
