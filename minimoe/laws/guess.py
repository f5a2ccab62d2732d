"""As if which step of the equation were another.

A list of what is done wrong in gates, each as something that can be seen: who speaks, what a
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

import torch
from torch import Tensor

from ..adapter import Adapter
from ..continual.probe import dense_gate
from .pair import Pair, gradient, gradient_of

SPEAKS = 1e-11  # of the largest g z: what is below is rounding
OTHER = "logits are multiplied by"
Numbers = Tensor | float


@dataclass(frozen=True)
class Sight:
    """What is seen of one case. layer is theirs, with its settings; of each token and rank, (T, R):

    g, h        the weights of theirs and of mine
    ours, mine  who speaks
    z           what ranks see
    s           what theirs chooses by: z, or the router's logit of a rank's expert
    kept        the k of largest s
    full        theirs' weights, were all kept
    """

    layer: Adapter
    settings: Mapping[str, Any]
    training: bool
    x: Tensor
    g: Tensor
    h: Tensor
    ours: Tensor
    mine: Tensor
    z: Tensor
    s: Tensor
    k: int
    kept: Tensor
    full: Tensor
    routed: bool


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
        speak(gz),
        speak(hz),
        z,
        s,
        k,
        top(s, k),
        full,
        routed,
    )


def speak(gz: Tensor) -> Tensor:
    """Who says something, of g ⊙ z (T, R)."""
    return gz.abs() > SPEAKS * (1 + gz.abs().max())


def top(s: Tensor, k: int) -> Tensor:
    """True at the k largest of each token: (T, R)."""
    none = torch.zeros_like(s, dtype=torch.bool)
    return none.scatter(-1, s.topk(min(max(k, 0), s.shape[1])).indices, True)


# Who speaks


def of_choice(v: Sight) -> set[str]:
    block = v.layer.block
    wrong = {
        "no rank speaks": torch.zeros_like(v.kept),
        "the choice is by size, not by sign": above(v, top(v.s.abs(), v.k)),
        "the smallest are kept": above(v, top(-v.s, v.k)),
        "all ranks speak": torch.ones_like(v.kept),
        "one more is kept": above(v, top(v.s, v.k + block)),
        "one less is kept": above(v, top(v.s, v.k - block)),
    }
    true = {name for name, who in wrong.items() if torch.equal(v.mine, who)}
    if not v.training and torch.equal(v.mine, v.kept):
        true.add("there is no threshold")
    # among the kept, whoever speaks scores more than whoever does not
    least = torch.where(v.kept & v.mine, v.s, math.inf).amin(-1)
    most = torch.where(v.kept & ~v.mine, v.s, -math.inf).amax(-1)
    if bool((v.mine <= v.kept).all()) and bool((least > most).all()):
        true.add("the threshold prunes in training too" if v.training else OTHER_THRESHOLD)
    return true


OTHER_THRESHOLD = "the threshold is another"


def above(v: Sight, kept: Tensor) -> Tensor:
    """Of those kept, who is above theirs' threshold."""
    if v.training or "delta" not in v.settings:
        return kept
    s = v.s if v.routed else v.z / v.z.norm(dim=-1, keepdim=True)
    return kept & (s >= v.settings["delta"])


# What weights, or logits, are multiplied by


def of_weights(v: Sight) -> set[str]:
    factor, slope = factors(v), slopes(v)
    true = {name for name, want in wrong_factors(v).items() if agrees(factor, want)}
    true |= {name for name, want in wrong_slopes(v).items() if agrees(slope, want)}
    found = slope[~slope.isnan()]
    if len(found) and agrees(slope, float(found[0])):
        true.add(f"{OTHER} {found[0]:.4g}")
    g, h = (torch.where(v.ours, w, 0.0).sort(-1).values for w in (v.g, v.h))
    if torch.allclose(g, h, rtol=1e-5):
        true.add("weights are given to other ranks than theirs")
    return true


def factors(v: Sight) -> Tensor:
    """h / g of each token (T,), nan where its ranks do not have the same."""
    ratio = torch.where(v.ours, v.h / v.g, math.nan)
    mean = ratio.nanmean(-1, keepdim=True)
    same = (~v.ours | ((ratio - mean).abs() < 1e-6 * mean.abs())).all(-1)
    return torch.where(same, mean[:, 0], math.nan)


def slopes(v: Sight) -> Tensor:
    """Of log h on log g, of each token (T,), nan where it is no line: what logits are multiplied
    by under a softmax."""
    seen = v.ours & (v.g > 0) & (v.h > 0)
    logs = [torch.where(seen, w.clamp_min(1e-300).log(), math.nan) for w in (v.g, v.h)]
    x, y = (w - w.nanmean(-1, keepdim=True) for w in logs)
    slope = (x * y).nansum(-1) / (x * x).nansum(-1)
    off = (y - slope[:, None] * x).nan_to_num(0.0).abs().amax(-1)
    known = (off < 1e-6) & (x.nan_to_num(0.0).abs().amax(-1) > 1e-4) & (seen == v.ours).all(-1)
    return torch.where(known, slope, math.nan)


def agrees(found: Tensor, want: Numbers) -> bool:
    """Wherever found is a number, and it is one somewhere."""
    known = ~found.isnan()
    want = torch.as_tensor(want, dtype=found.dtype).expand_as(found)
    return bool(known.any()) and torch.allclose(found[known], want[known], rtol=1e-4, atol=1e-9)


def wrong_factors(v: Sight) -> dict[str, Numbers]:
    layer, block = v.layer, v.layer.block
    wrong: dict[str, Numbers] = {
        "the softmax is over all, before the top k": (v.full * v.kept).sum(-1) / block,
        "z / ‖z‖ is said, not z": 1 / v.z.norm(dim=-1),
        "the update's sign is turned": -1.0,
    }
    if bool((v.kept & ~v.ours).any()):
        wrong["weights are divided by their sum after the threshold"] = block / v.g.sum(-1)
    sizes = {"scale": layer.scale, "k": v.k // block, "E": layer.n_experts}
    for name, size in {**sizes, "r": layer.rank, "R": layer.ranks}.items():
        if size != 1:
            wrong[f"the update is multiplied by {name}"] = float(size)
            wrong[f"the update is divided by {name}"] = 1 / size
    return wrong


def wrong_slopes(v: Sight) -> dict[str, Numbers]:
    length = v.z.norm(dim=-1)
    wrong: dict[str, Numbers] = {
        "scores are not normalised": length,
        "the norm is over the kept ranks only": length / (v.z * v.kept).norm(dim=-1),
        "the norm is the sum of sizes": length / v.z.abs().sum(-1),
        "the norm is the largest size": length / v.z.abs().amax(-1),
        "scores are divided by the root of R": v.z.shape[1] ** -0.5,
        "scores are divided by the root of D": v.x.shape[1] ** -0.5,
        "x is normalised before it is scored": 1 / v.x.norm(dim=-1),
        "all that speak weigh the same": 0.0,
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
    return {name for name, want in wrong.items() if torch.allclose(off, want.expand_as(off))}


def of_gradients(pair: Pair) -> set[str]:
    def differ(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
        return [n for n in one if not torch.allclose(one[n], other[n], rtol=1e-6, atol=1e-8)]

    def constant(x: Tensor) -> Tensor:
        layer = pair.theirs
        g = dense_gate(layer, x).detach()
        return layer.base(x) + layer.scale * (g * (x @ layer.keys.T)) @ layer.rows("B")

    ours, mine = gradient(pair)
    names = differ(ours, mine)
    true = {f"the gradient of {name} is left out" for name in names if not mine[name].any()}
    if all(name.startswith("frozen_") for name in names):
        true.add("what is frozen learns")
    if not differ(gradient_of(pair, constant), mine):
        true.add("weights are constants in the backward pass")
    return true


Look = Callable[[Pair], set[str]]
LOOKS: Mapping[str, Look] = {
    "chosen": lambda pair: of_choice(sight(pair)),
    "weights": lambda pair: of_weights(sight(pair)),
    "pruned": lambda pair: of_pruned(sight(pair)),
    "y": of_output,
    "gradients": of_gradients,
}


def guess(step: str, test: Callable[[Pair], None], pairs: Iterable[Pair]) -> str:
    """What is true of all pairs at which the test of a step fails; "" if nothing that is known."""
    if step not in LOOKS:
        return ""
    found: list[set[str]] = []
    for pair in pairs:
        try:
            test(pair)
        except Exception:
            with contextlib.suppress(Exception):  # a case that cannot be seen into says nothing
                found.append(LOOKS[step](pair))
    true = set.intersection(*found) if found else set()
    vague = (OTHER, OTHER_THRESHOLD)
    return f"as if {min(true, key=lambda name: (name.startswith(vague), name))}" if true else ""
