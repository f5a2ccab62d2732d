"""The three problems of a growing mixture, measured: interference, redundancy, ambiguity.

A `Recorder` holds fixed inputs of every task, the probes. After every task it runs them through the
model and looks at each adapted layer's gate and output. What it records are arrays over (i, j): i
tasks learned, on the probes of task j; row 0 is the model before any task. The measures below read
them, as metrics.py's read the accuracy matrix.

    p_nr = |g_nr| / Σ_r |g_nr|              input n's weight on rank r, as a share
    drift = ‖y - y'‖ / ‖y'‖                 y' the layer's output just after task j was learned
    mass_t = Σ_{r of task t} p_nr           the task of a rank being that in which it was added
    entropy = - Σ_e p_ne ln p_ne / ln E     over experts; 0 where E = 1
    turnover = 1 - |S ∩ S'| / |S ∪ S'|      S the ranks with weight, S' just after task j
    silent = 1 where all g are 0            such an input has no p, and is left out of the above
    alike = max over older ranks q of |cos(A_r, A_q) cos(B_r, B_q)|, for a rank r of the last task

each a mean over inputs (alike: over ranks), then over layers; all lie in [0, 1], drift from 0 up.
(|cos| of the keys times |cos| of the values is |cos| of the rank-1 matrices B_r A_rᵀ.)

The three names are those of MoRA's abstract (arXiv 2506.21035), which gives no formulas: these are
this package's.

Axes: J tasks, N inputs, D in, O out, R ranks in all, E experts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapt import adapters
from ..adapter import Adapter
from .metrics import mean_or_nan


def dense_gate(layer: Adapter, x: Tensor) -> Tensor:
    """g of every rank, kept or not: (..., R) for x (..., D)."""
    idx, g, z, *_ = layer.gate(layer.samples_first(layer.cast(x)))
    g = torch.as_tensor(g, dtype=z.dtype, device=z.device).expand(z.shape)
    if idx is None:
        return g
    return g.new_zeros(*g.shape[:-1], layer.ranks).scatter_add(-1, idx, g)


def alike(A: Tensor, B: Tensor, old: int) -> Tensor:
    """For each rank from `old` on, its largest |cosine| as a rank-1 update with one before.

    A (R, D), B (R, O), 1 <= old < R; returns (R - old,) in [0, 1]. A rank of zeros is like none.
    """
    A, B = (F / F.norm(dim=-1, keepdim=True).clamp_min(1e-30) for F in (A.double(), B.double()))
    return ((A[old:] @ A[:old].T) * (B[old:] @ B[:old].T)).abs().amax(-1)


class Recorder:
    """Looks at fixed inputs of every task, one `record` before the first task and one after each.

    Args:
        probes: J tensors, inputs of each task as the model takes them.

    Every linear layer under a scheme is looked at; a model without any gives nothing but nan.

    records: {"drift", "entropy", "turnover", "silent": (J + 1, J), "mass": (J + 1, J, J), its last
    axis the task of origin, "alike": (J + 1,)}, float64, nan where there is nothing to say: before
    task j is learned, in a record that was `skip`ped, in the mass of a task that added no ranks.
    """

    def __init__(self, probes: Sequence[Tensor]):
        self.probes = list(probes)
        J = len(self.probes)
        self.learned = -1  # of the last record
        self.records = {
            name: torch.full((J + 1, J), math.nan, dtype=torch.float64)
            for name in ("drift", "entropy", "turnover", "silent")
        }
        self.records["mass"] = torch.full((J + 1, J, J), math.nan, dtype=torch.float64)
        self.records["alike"] = torch.full((J + 1,), math.nan, dtype=torch.float64)
        self.then: dict[str, Tensor] = {}  # y and S just after a task, by task and layer
        self.ranks: dict[str, Tensor] = {}  # R in each record, by layer

    @torch.no_grad()
    def record(self, model: nn.Module, call: Callable[[Tensor, int], Any] | None = None) -> None:
        """Look at the probes of all tasks now that one more is learned (the first time: none).

        call(x, j) runs the model on inputs of task j, by default model(x). The model is looked at
        in evaluation and left in the mode it was in. Raises ValueError on a record too many.
        """
        i, layers = self._count(model), dict(adapters(model))
        new = []
        for name, layer in layers.items():
            old = int(self.ranks[name][i - 1]) if i > 1 else layer.ranks
            if 0 < old < layer.ranks:  # 0: the layer had no adapter yet
                new.append(alike(layer.keys, layer.rows("B"), old).mean())
        if new:
            self.records["alike"][i] = torch.stack(new).mean()
        modes = {module: module.training for module in model.modules()}
        model.eval()
        gates: dict[str, list[tuple[Tensor, Tensor]]] = {}
        hooks = [layer.register_forward_hook(_keep_gates(gates, n)) for n, layer in layers.items()]
        try:
            for j, x in enumerate(self.probes[:i]):
                gates.clear()
                model(x) if call is None else call(x, j)
                measured = [
                    self._measure(
                        i, j, name, layers[name], *map(torch.cat, zip(*calls, strict=True))
                    )
                    for name, calls in gates.items()
                ]
                for key in measured[0] if measured else ():
                    each = torch.stack([one[key] for one in measured])
                    self.records[key][i, j] = each.nanmean(0)
        finally:
            for hook in hooks:
                hook.remove()
            for module, mode in modes.items():
                module.training = mode

    def skip(self, model: nn.Module) -> None:
        """Count one more task as learned, and the ranks it added, without looking."""
        self._count(model)

    def _count(self, model: nn.Module) -> int:
        if self.learned == len(self.probes):
            raise ValueError(f"all {len(self.probes)} tasks are recorded already")
        self.learned += 1
        for name, layer in adapters(model):
            self.ranks.setdefault(name, torch.zeros(len(self.probes) + 1, dtype=torch.int64))
            self.ranks[name][self.learned :] = layer.ranks
        return self.learned

    def _measure(
        self, i: int, j: int, name: str, layer: Adapter, g: Tensor, y: Tensor
    ) -> dict[str, Tensor]:
        """What one layer's gate g (N, R) and output y (N, O) say of task j, i tasks learned."""
        total = g.sum(-1)
        speaks = total > 0
        p = g[speaks] / total[speaks].unsqueeze(-1)
        experts = p.unflatten(-1, (-1, layer.block)).sum(-1)
        E = experts.shape[-1]
        entropy = torch.special.entr(experts).sum(-1) / math.log(max(E, 2))
        added = torch.arange(layer.ranks, device=g.device)
        origin = torch.bucketize(added, self.ranks[name][1 : i + 1].to(g.device), right=True)
        mass = p.new_zeros(len(p), len(self.probes)).index_add_(1, origin, p)
        if i == j + 1:
            self.then[f"{j}.{name}.y"], self.then[f"{j}.{name}.kept"] = y.cpu(), (g > 0).cpu()
        before = self.then.get(f"{j}.{name}.y")
        if before is None:  # skipped just after task j
            drift = turnover = torch.full((1,), math.nan, dtype=torch.float64)
        else:
            before, kept = before.to(y), g > 0
            drift = (y - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-30)
            was = torch.zeros_like(kept)
            was[:, : self.then[f"{j}.{name}.kept"].shape[1]] = self.then[f"{j}.{name}.kept"].to(g)
            either = (kept | was).sum(-1)
            turnover = 1 - (kept & was).sum(-1)[either > 0] / either[either > 0]
        each = {"drift": drift, "entropy": entropy, "mass": mass, "turnover": turnover}
        means = {key: values.double().mean(0).cpu() for key, values in each.items()}
        means["mass"][origin.cpu().bincount(minlength=len(self.probes)) == 0] = math.nan
        return means | {"silent": 1 - speaks.double().mean().cpu()}


def _keep_gates(gates: dict[str, list[tuple[Tensor, Tensor]]], name: str) -> Callable[..., None]:
    """A forward hook that keeps a layer's |g| (N, R) and output (N, O), all tokens in a row but for
    padding."""

    def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        g, y = dense_gate(layer, inputs[0]).abs(), layer.samples_first(output)
        counts = layer.mask(y).flatten() > 0
        gates.setdefault(name, []).append(
            (g.flatten(0, -2)[counts].double(), y.flatten(0, -2)[counts])
        )

    return hook


# The measures. Each takes a Recorder's records and returns a float, nan where it says nothing.


def interference(records: dict[str, Any]) -> float:
    """Mean over old tasks j < J - 1 of drift[J, j]: how far later ranks have moved what the layers
    say to old inputs, in units of what they said. 0 or more; 0 if nothing moved."""
    drift = _array(records, "drift")
    return mean_or_nan(drift[-1, :-1])


def intrusion(records: dict[str, Any]) -> float:
    """Mean over old tasks j < J - 1 of Σ_{t > j} mass[J, j, t]: the share of the gate's weight that
    old inputs give to later ranks, where there are any. In [0, 1]."""
    later = [row[j + 1 :] for j, row in enumerate(_array(records, "mass")[-1])]
    return mean_or_nan([np.nansum(mass) for mass in later if not np.isnan(mass).all()])


def redundancy(records: dict[str, Any]) -> float:
    """Mean over tasks after the first of alike: 1 if every new rank repeats an old one, up to
    length. In [0, 1]; not 0 for random ranks (the largest cosine of many is not)."""
    return mean_or_nan(_array(records, "alike")[2:])


def ambiguity(records: dict[str, Any]) -> float:
    """Mean over tasks of entropy[J, j]: 0 if one expert has all the weight, 1 if all experts have
    the same. In [0, 1]."""
    return mean_or_nan(_array(records, "entropy")[-1])


def instability(records: dict[str, Any]) -> float:
    """Mean over old tasks j < J - 1 of turnover[J, j]: the share of the ranks chosen for an old
    input, then or now, that were not chosen both times. In [0, 1]."""
    return mean_or_nan(_array(records, "turnover")[-1, :-1])


PROBLEMS: dict[str, Callable[[dict[str, Any]], float]] = {
    f.__name__: f for f in (interference, intrusion, redundancy, ambiguity, instability)
}


def _array(records: dict[str, Any], name: str) -> np.ndarray:
    return np.asarray(records[name], dtype=np.float64)
