"""The three problems of a growing mixture, measured: interference, redundancy, ambiguity.

A `Recorder` holds fixed inputs of every task, the probes. After every task it runs them through the
model and looks at each adapted layer: at its gate, and at what each expert says. An expert is what
has one weight (Claims.expert): a block of ranks, or a single rank. What is recorded are arrays over
(i, j): i tasks learned, on the probes of task j; row 0 is the model before any task. The measures
below read them, as metrics.py's read the accuracy matrix.

Of one input, with g and z of its gate, and q' for q just after task j was learned:

    p_e = Σ_{r of e} |g_r| / Σ_r |g_r|            expert e's share of the gate's weight
    u_e = Σ_{r of e} g_r z_r B_r                  what it says
    q_e = ‖u_e‖ / Σ_e ‖u_e‖                       its share of what is said
    mass_t, said_t = Σ_{e of task t} p_e, q_e     an expert's task is the one that added it
    undecided = (1 / Σ_e p_e² - 1) / (k - 1)      1 / Σ p²: the effective number of experts; k: how
                                                  many may be kept, E without a top_k; 0 if k = 1
    turnover = ½ Σ_e |q_e - q'_e|
    silent = 1 if all g are 0, else 0

Each is a mean over inputs, then over layers, and lies in [0, 1]. An input without any weight has no
p, and one to which nothing is said has no q: they are left out. (In turnover only those to which
nothing was said either; silence counts as one expert more.) Of all inputs n of task j together:

    drift = Σ_n ‖y - y'‖ / Σ_n ‖u'‖               y the layer's output, u the update in it; a layer
                                                  where u' is 0 has no drift
    learned = Σ_n ‖u'‖ / Σ_n ‖y'‖

Of the weights, for an expert s that the last task added, ⟨ , ⟩ and ‖ ‖ being of all entries:

    ΔW_e = Σ_{r of e} B_r A_rᵀ                    (O, D)
    alike = max over older e of |⟨ΔW_s, ΔW_e⟩| / (‖ΔW_s‖ ‖ΔW_e‖)
    chance                                        alike, of keys and values drawn from N(0, 1)

each a mean over such experts, then over layers; an expert whose ΔW is 0 is left out. (A layer that
adds no expert for a task, as others do, gives 0 of its mass and of what it says to that task.)

What all of them hold, while the gate weighs the same: they do not change with the order of ranks
and experts, with the basis in which a block is written (A to M A, B to M⁻ᵀ B), or as a factor moves
from a key to its value; nor with experts that have no weight, nor, but for p, that say nothing.

The three names are those of MoRA's abstract (arXiv 2506.21035), which gives no formulas: these are
this package's.

Axes: J tasks, N inputs, D in, O out, R ranks in all, r ranks of one expert, E experts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..adapt import adapters
from ..adapter import Adapter
from .metrics import mean_or_nan

ROUNDING = 1e-6  # of an output: an update below it is none
DRAWS = 8  # of random updates, for the chance level


def dense_gate(layer: Adapter, x: Tensor) -> Tensor:
    """g of every rank, kept or not: (..., R) for x (..., D)."""
    return _dense(layer, x)[0]


def _dense(layer: Adapter, x: Tensor) -> tuple[Tensor, Tensor]:
    """g and g z of every rank, kept or not: each (..., R)."""
    idx, g, z, *_ = layer.gate(layer.samples_first(layer.cast(x)))
    g = torch.as_tensor(g, dtype=z.dtype, device=z.device).expand(z.shape)
    if idx is None:
        return g, g * z
    none = g.new_zeros(*g.shape[:-1], layer.ranks)
    return none.scatter_add(-1, idx, g), none.scatter_add(-1, idx, g * z)


def lengths(gz: Tensor, B: Tensor, block: int = 1) -> Tensor:
    """‖u_e‖ of each expert (..., E), for gz (..., R) and values B (R, O), of `block` ranks each."""
    gz, B = gz.unflatten(-1, (-1, block)), B.unflatten(0, (-1, block))  # (..., E, r), (E, r, O)
    squares = torch.einsum("...er,erq,...eq->...e", gz, B @ B.mT, gz)
    return squares.clamp_min(0).sqrt()


def alike(A: Tensor, B: Tensor, old: int, block: int = 1) -> Tensor:
    """For each expert from rank `old` on, the largest |cosine| of its update with one before it.

    A (R, D), B (R, O), experts of `block` ranks, old < R a multiple of block. Returns one number in
    [0, 1] per new expert: 1 for an older one's update, whatever its length, sign or basis. nan for
    an expert whose update is 0, and where all older ones are 0.
    """
    A, B = A.double(), B.double()
    inner = ((A @ A.T) * (B @ B.T)).unflatten(0, (-1, block)).unflatten(-1, (-1, block)).sum((1, 3))
    length = inner.diagonal().clamp_min(0).sqrt()  # (E,), of inner (E, E)
    cosine = (inner.abs() / (length.unsqueeze(1) * length)).clamp_max(1)[old // block :]
    older = cosine[:, : old // block].nan_to_num(-1).amax(-1)  # -1: an expert of 0 is like none
    return older.where(older >= 0, math.nan)


def chance_alike(A: Tensor, B: Tensor, old: int, block: int = 1) -> float:
    """The mean of `alike` for keys and values N(0, 1) instead, of as many experts as say something:
    the mean of DRAWS seeded draws. nan as `alike` is."""
    speaks = (A.any(1) & B.any(1)).view(-1, block).any(1)  # (E,)
    before, ranks = (block * int(some.sum()) for some in (speaks[: old // block], speaks))
    if before in (0, ranks):
        return math.nan
    draw = torch.Generator().manual_seed(0)
    means = []
    for _ in range(DRAWS):
        keys, values = (torch.randn(ranks, F.shape[1], generator=draw).double() for F in (A, B))
        means.append(alike(keys, values, before, block).nanmean())
    return float(torch.stack(means).mean())


class Seen(NamedTuple):
    """Of one layer and N inputs, all tokens in a row but for padding; on the CPU.

    p, q: shares (N, E), 0 where nothing has weight or is said. y (N, O): the output. u (N,): ‖u‖.
    """

    p: Tensor
    q: Tensor
    y: Tensor
    u: Tensor

    @classmethod
    def by(cls, layer: Adapter, x: Tensor, y: Tensor) -> "Seen":
        """Of a layer's input x and output y."""
        y = layer.samples_first(y)
        g, gz = _dense(layer, x)
        weight = g.abs().double().unflatten(-1, (-1, layer.block)).sum(-1)  # (..., E)
        said = lengths(gz.double(), layer.rows("B").double(), layer.block)
        u = layer.update(layer.samples_first(layer.cast(x))).norm(dim=-1)
        counts = layer.mask(y).flatten() > 0
        parts = (_shares(weight), _shares(said), y, u.unsqueeze(-1))
        p, q, y, u = (part.flatten(0, -2)[counts].cpu() for part in parts)
        return cls(p, q, y, u.squeeze(-1))


def _shares(parts: Tensor) -> Tensor:
    """Parts (..., E) of their sum; 0 where that is 0."""
    total = parts.sum(-1, keepdim=True)
    return (parts / total).where(total > 0, 0.0)


def drift(then: Seen, now: Seen) -> float:
    """Σ_n ‖y - y'‖ / Σ_n ‖u'‖; nan where u' is lost in y's rounding."""
    moved, learned = (now.y - then.y).norm(dim=-1).double().sum(), then.u.double().sum()
    said = then.y.norm(dim=-1).double().sum()
    return float(moved / learned) if learned > ROUNDING * said else math.nan


def turnover(then: Seen, now: Seen) -> float:
    """The mean of ½ Σ_e |q_e - q'_e| over inputs to which something is said, or was. Silence counts
    as one expert more."""
    was, q = torch.zeros_like(now.q), now.q
    was[:, : then.q.shape[1]] = then.q
    silence = q.sum(-1) - was.sum(-1)  # 0, or ±1 where one of both is silent
    each = ((q - was).abs().sum(-1) + silence.abs()) / 2
    return float(each[q.sum(-1) + was.sum(-1) > 0].mean())


class Recorder:
    """Looks at fixed inputs of every task, one `record` before the first task and one after each.

    Args:
        probes: J tensors, inputs of each task as the model takes them.

    Every linear layer under a scheme is looked at; a model without any gives nothing but nan.

    records: {"drift", "learned", "undecided", "turnover", "silent": (J + 1, J), "mass", "said":
    (J + 1, J, J), the last axis the task of origin, "alike", "chance": (J + 1,)}, float64, nan
    where there is nothing to say: before task j is learned, in a record that was `skip`ped, in the
    shares of a task that added no ranks, and as the module says.
    """

    def __init__(self, probes: Sequence[Tensor]):
        self.probes = list(probes)
        J = len(self.probes)
        self.learned = -1  # of the last record
        self.records = {
            name: torch.full((J + 1, *ends), math.nan, dtype=torch.float64)
            for name, ends in {
                **dict.fromkeys(("drift", "learned", "undecided", "turnover", "silent"), (J,)),
                **dict.fromkeys(("mass", "said"), (J, J)),
                **dict.fromkeys(("alike", "chance"), ()),
            }.items()
        }
        self.then: dict[tuple[int, str], Seen] = {}  # just after a task, by task and layer
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
                rows = (layer.keys, layer.rows("B"), old, layer.block)
                new.append(torch.tensor([alike(*rows).nanmean(), chance_alike(*rows)]))
        if new:
            both = torch.stack(new).double().nanmean(0)
            self.records["alike"][i], self.records["chance"][i] = both
        modes = {module: module.training for module in model.modules()}
        model.eval()
        seen: dict[str, list[Seen]] = {}
        hooks = [layer.register_forward_hook(_look(seen, n)) for n, layer in layers.items()]
        try:
            for j, x in enumerate(self.probes[:i]):
                seen.clear()
                model(x) if call is None else call(x, j)
                measured = [
                    self._measure(
                        i, j, name, layers[name], Seen(*map(torch.cat, zip(*passes, strict=True)))
                    )
                    for name, passes in seen.items()
                ]
                for key in measured[0] if measured else ():
                    mean = torch.stack([one[key] for one in measured]).nanmean(0)
                    known = self._added(i) if mean.ndim else torch.tensor(True)
                    self.records[key][i, j] = mean.where(known, math.nan)
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

    def _added(self, i: int) -> Tensor:
        """(J,): whether any layer has experts of task t, i tasks learned."""
        ranks = torch.stack([*self.ranks.values()])  # (layers, J + 1)
        ranks[:, 0], ranks[:, i:] = 0, ranks[:, i : i + 1]
        return ranks.diff().sum(0) > 0

    def _measure(self, i: int, j: int, name: str, layer: Adapter, now: Seen) -> dict[str, Tensor]:
        """What was seen of one layer says, on the inputs of task j, i tasks learned."""
        if i == j + 1:
            self.then[j, name] = now
        then = self.then.get((j, name))  # None: skipped just after task j
        E, J = now.p.shape[1], len(self.probes)
        first = torch.arange(E) * layer.block  # rank of each expert
        origin = torch.bucketize(first, self.ranks[name][1 : i + 1], right=True)  # (E,)

        def by_task(shares: Tensor) -> Tensor:
            return shares.new_zeros(len(shares), J).index_add_(1, origin, shares).mean(0)

        p, q = (shares[shares.sum(-1) > 0] for shares in (now.p, now.q))
        k = layer.kept if layer.claims.top_k else E
        undecided = (1 / p.square().sum(-1) - 1) / max(k - 1, 1)
        numbers = {
            "drift": drift(then, now) if then else math.nan,
            "learned": then.u.double().sum() / then.y.norm(dim=-1).double().sum()
            if then
            else math.nan,
            "turnover": turnover(then, now) if then else math.nan,
            "undecided": undecided.mean(),
            "silent": (now.p.sum(-1) == 0).double().mean(),
        }
        means = {key: torch.as_tensor(one, dtype=torch.float64) for key, one in numbers.items()}
        return means | {"mass": by_task(p), "said": by_task(q)}


def _look(seen: dict[str, list[Seen]], name: str) -> Callable[..., None]:
    """A forward hook that keeps what is seen of a layer in each pass."""

    def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.setdefault(name, []).append(Seen.by(layer, inputs[0], output))

    return hook


# The measures. Each takes a Recorder's records and returns a float, nan where it says nothing.


def interference(records: dict[str, Any]) -> float:
    """Σ_j learned[J, j] drift[J, j] / Σ_j learned[J, j] over old tasks j < J - 1: how far later
    learning has moved what layers say to old inputs, in units of how far learning had moved it. A
    task counts by what it taught: one that the model knew before has little to lose. 0 or more: 0
    if nothing moved, 1 if as much was moved as was learned, √2 if an update gave way to another as
    large that has nothing to do with it. nan where nothing was learned (a learning rate of 0): read
    it beside metrics.plasticity, as who learns little has little to move."""
    moved, learned = (_array(records, name)[-1, :-1] for name in ("drift", "learned"))
    known = ~np.isnan(moved)
    return float(np.average(moved[known], weights=learned[known])) if known.any() else math.nan


def intrusion(records: dict[str, Any]) -> float:
    """Mean over old tasks j < J - 1 of Σ_{t > j} said[J, j, t]: the share of what is said to old
    inputs that later experts say, where there are any. In [0, 1]; ½ by chance, if every task's
    experts say as much. New experts with B = 0 say nothing."""
    later = [row[j + 1 :] for j, row in enumerate(_array(records, "said")[-1])]
    return mean_or_nan([np.nansum(said) for said in later if not np.isnan(said).all()])


def redundancy(records: dict[str, Any]) -> float:
    """Mean over tasks after the first of alike: 1 if every new expert repeats an old one, in
    whatever basis, length and sign. In [0, 1]; by chance `redundancy_chance`, not 0 (the largest
    cosine of many is not)."""
    return _mean_of_known(_array(records, "alike")[2:])


def redundancy_chance(records: dict[str, Any]) -> float:
    """What redundancy would be if keys and values were drawn at random, as many and as wide. In
    [0, 1]; with one older expert 2 / (π √(D O)) of single ranks, 1.25 times that of large blocks;
    more with more of them."""
    return _mean_of_known(_array(records, "chance")[2:])


def ambiguity(records: dict[str, Any]) -> float:
    """Mean over tasks of undecided[J, j]: 0 if one expert has all the weight (as where the task is
    told), 1 if all that may be kept weigh the same, linear in the effective number of experts
    between. In [0, 1] under every scheme; it is of the gate alone, whatever the experts say."""
    return _mean_of_known(_array(records, "undecided")[-1])


def instability(records: dict[str, Any]) -> float:
    """Mean over old tasks j < J - 1 of turnover[J, j]: the share of what is said to an old input
    that other experts say than just after its task. In [0, 1]: 0 if nothing changed, 1 if no expert
    that was used then is used now. At least what intrusion is: what is above it has moved among
    older experts."""
    return _mean_of_known(_array(records, "turnover")[-1, :-1])


PROBLEMS: dict[str, Callable[[dict[str, Any]], float]] = {
    f.__name__: f
    for f in (interference, intrusion, redundancy, redundancy_chance, ambiguity, instability)
}


def _array(records: dict[str, Any], name: str) -> np.ndarray:
    return np.asarray(records[name], dtype=np.float64)


def _mean_of_known(values: np.ndarray) -> float:
    return mean_or_nan(values[~np.isnan(values)])
