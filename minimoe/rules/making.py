"""One LoRA as many experts, one expert as a LoRA, all as a plain layer; whom to take of a bank.

Axes, errors: those of rules/__init__.py.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Adapter, require
from ..hooks import move_hooks
from ..lora import LoRA
from ..lora_moe import LoRAMoE
from ..saving import adapters
from .parts import copied, delta_of, instead, known, these


def upcycle(
    layer: LoRA, experts: int, scheme: type[LoRAMoE] = LoRAMoE, noise: float = 0.0, **settings: Any
) -> Any:
    """A LoRA as `experts` copies of it, all live, under a fresh router: of another scheme, with its
    settings (sparse upcycling, as in CLIP-UP, 2502.00965). E · R ranks must fit the layer.

    Weights that sum to 1 leave the output as it was, whatever the router says; a top k that is not
    renormalised (AdaMoE) scales the update by Σ p of the kept. While copies are alike the router
    has no gradient: noise, N(0, noise²) on values, makes them differ.

    Raises ValueError if layer is no LoRA, experts < 1, noise < 0 or the scheme has no setting
    experts, and what the scheme raises.
    """
    require(isinstance(layer, LoRA), "layer", type(layer).__name__, "LoRA")
    require(experts >= 1, "experts", experts, "1 or more")
    takes = "experts" in inspect.signature(scheme).parameters
    require(takes, "scheme", scheme.__name__, "one with a setting experts")
    require(noise >= 0, "noise", noise, "0 or more")
    A, B = (layer.rows(name).detach().repeat(experts, 1) for name in ("A", "B"))
    B = B + noise * torch.randn_like(B)
    return instead(layer, scheme, A, B, experts=experts, **settings)


def extract(layer: Adapter, expert: int) -> LoRA:
    """One expert at weight 1, as a LoRA: the same as the whole layer wherever that gives this one
    weight 1 and no other any, as ToldLoRA does by its label, and a renormalised top 1 (task-level
    routing, 2110.03742). Raises ValueError if expert is not in 0 to E - 1."""
    e = these(known(layer), [expert])
    A, B = (
        rows.unflatten(0, (layer.n_experts, -1))[e[0]] for rows in (layer.keys, layer.rows("B"))
    )
    return instead(layer, LoRA, A, B)


@torch.no_grad()
def merged(layer: Adapter, weights: Tensor | Sequence[float] | float) -> nn.Linear:
    """A plain linear layer of W0 + scale · Σ_e w_e ΔW_e (O, D), and base's bias; weights: one for
    each expert, or for all. 1 is LoRA itself; 1 / E a soup of the experts, any other number task
    arithmetic (2212.04089). Raises ValueError if weights are neither, RuntimeError as LoRA.merge.
    """
    again, base, E = copied(layer), layer.base, layer.n_experts
    layer.require_plain_weight()
    w = torch.as_tensor(weights, dtype=layer.dtype, device=layer.B.device)
    require(w.shape in ((), (E,)), "weights", tuple(w.shape), f"() and ({E},)")
    W0 = base.weight if isinstance(base, nn.Linear) else base.weight.T  # transformers' Conv1D
    plain = nn.Linear(layer.in_features, layer.out_features, base.bias is not None).to(W0)
    plain.weight.copy_(W0 + delta_of(layer, layer.of_ranks(w.expand(E))))
    if base.bias is not None:
        plain.bias.copy_(base.bias)
    move_hooks(again, plain)
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
    deltas = [[delta_of(a).double().flatten() for _, a in adapters(model)] for model in candidates]
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
