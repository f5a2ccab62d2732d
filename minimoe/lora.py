"""Dense LoRA, and the skeleton that every sibling shares.

LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., arXiv 2106.09685, section 4.1.

The one equation of this package, of which every scheme fills in g:

    z = x Aᵀ                                what every rank sees
    y = x W0ᵀ + scale · (g ⊙ z) B           what the chosen ranks say

and for dense LoRA

    g = 1                                   every rank speaks, at full weight

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values: rank i is the pair (A[i], B[i]).

Departures: the paper writes B as (O, r) and its scale as alpha / r; here scale is given as it
is. No dropout on the adapter's input.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sparse import rank_scores, rank_sparse


@dataclass(frozen=True)
class Claims:
    """What a scheme says of itself. `minimoe check` holds it to that, law by law (laws.py).

    zero_at_birth: a fresh layer is the base layer, bit for bit.
    granularity: what else a token's output may depend on: "token" nothing, "sample" the rest of its
        sample, x being (samples, tokens, D), "batch" anything.
    expert: what has one weight: each "rank", or each "block" of as many as `block` says.
    top_k: at most as many experts as the setting `top_k` speak for a token.
    simplex: their weights are 0 or more and sum to 1, or, if it is "kept", to the number of experts
        kept; in evaluation, to that at most.
    as_lora: where all experts weigh the same, if top_k keeps all: settings, and numbers to fill
        other rows with. There the layer is LoRA, its update divided by E if weights sum to 1.
    mergeable: it has merge() and unmerge(), as LoRA has.
    equation: the layer is the one equation, g and z being what `gate` says.
    exact_gradient: nothing is left out of the backward pass.

    The last two are claimed unless taken back.
    """

    zero_at_birth: bool = False
    granularity: str = "batch"
    expert: str = "rank"
    top_k: bool = False
    simplex: bool | str = False
    as_lora: Mapping[str, float] | None = None
    mergeable: bool = False
    equation: bool = True
    exact_gradient: bool = True


class Adapter(nn.Module):
    """The skeleton: a frozen nn.Linear, frozen and live ranks, and the one equation.

    A scheme is a subclass that states its `claims`, its `gate`, what a token reads (`active`), in
    `fresh` whatever it grows beside keys and values, and in `shared` what all tasks train on. Ranks
    of finished tasks are buffers (`frozen_A`, `frozen_B`), ranks in training are parameters (`A`,
    `B`); frozen ones come first. Nothing happens by itself: `grow` is what the caller says when a
    task ends, `after_step` when the optimiser has made a step, and what a gate needs beyond x comes
    from where the caller says it (adapt.told).

    Args:
        base: the linear layer to adapt. It is wrapped, not copied; its weights are frozen.
        rank: r, the number of ranks at the start, and of those that each `grow` adds.
        scale: the factor on the whole update.

    A scheme keeps each argument of its constructor under the argument's own name.
    Raises TypeError if base is no nn.Linear, ValueError if a setting is out of its range.
    """

    claims = Claims()
    fixed: tuple[str, ...] = ()  # rows that no gradient trains: buffers, while live too
    path = "auto"  # of the rank-sparse product (sparse.py)
    aux: Tensor | None = None  # auxiliary loss of the last forward pass in training, if any
    counts: Tensor | None = None  # (R,) how often each rank was chosen there, if it is counted
    told: Mapping[str, Tensor] = {}  # what is said of the inputs, by name (adapt.told)
    A: Tensor
    B: Tensor
    frozen_A: Tensor
    frozen_B: Tensor

    def __init__(self, base: nn.Linear, rank: int = 16, scale: float = 1.0):
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"base is {type(base).__name__}, allowed: nn.Linear")
        most = min(base.in_features, base.out_features)
        if not 1 <= rank <= most:
            raise ValueError(f"rank is {rank}, allowed for this layer: 1 to {most}")
        self.base, self.rank, self.scale = base.requires_grad_(False), rank, scale
        for name, rows in self.fresh().items():
            self.register_buffer(f"frozen_{name}", rows[:0].clone())
            if name in self.fixed:
                self.register_buffer(name, rows)
            else:
                self.register_parameter(name, nn.Parameter(rows))
        for name, tensor in self.shared().items():
            self.register_parameter(name, nn.Parameter(tensor))

    @property
    def ranks(self) -> int:
        """R, frozen and live."""
        return len(self.frozen_B) + len(self.B)

    @property
    def block(self) -> int:
        """Ranks of one expert; where experts are blocks, by default those of one task."""
        return self.rank if self.claims.expert == "block" else 1

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, without base."""
        names = inspect.signature(type(self)).parameters
        return {name: getattr(self, name) for name in names if name != "base"}

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in {"ranks": self.ranks, **self.settings()}.items())

    def fresh(self) -> dict[str, Tensor]:
        """The rows that one task adds: keys kaiming_uniform(a=sqrt 5), values zero, so that a
        fresh layer is the base layer, bit for bit."""
        W0 = self.base.weight
        O, D = W0.shape
        A = nn.init.kaiming_uniform_(W0.new_empty(self.rank, D), a=math.sqrt(5))
        return {"A": A, "B": W0.new_zeros(self.rank, O)}

    def shared(self) -> dict[str, Tensor]:
        """What is learned but belongs to no task: every task trains on it. By default nothing."""
        return {}

    def grow(self) -> None:
        """A task ends: freeze every live row and add fresh ones.

        The fresh rows are new parameters: give them a new optimiser.
        """
        self.counts = None
        for name, rows in self.fresh().items():
            setattr(self, f"frozen_{name}", self.rows(name).detach())
            setattr(self, name, rows if name in self.fixed else nn.Parameter(rows))

    def after_step(self) -> None:
        """The optimiser has made a step: do what the scheme does between steps. By default
        nothing."""

    def rows(self, name: str) -> Tensor:
        """All rows of that name, the frozen ones first."""
        return torch.cat([getattr(self, f"frozen_{name}"), getattr(self, name)])

    @property
    def keys(self) -> Tensor:
        """A (R, D), of all ranks."""
        return self.rows("A")

    def project(self, x: Tensor, name: str) -> Tensor:
        """x against the frozen rows of that name, then against the live ones.

        Two products, so that the weight gradient of the live rows costs nothing for frozen ones.
        """
        frozen, live = getattr(self, f"frozen_{name}"), getattr(self, name)
        return torch.cat([F.linear(x, frozen), F.linear(x, live)], dim=-1)

    def gate(self, x: Tensor) -> tuple[Tensor | None, Tensor | float, Tensor]:
        """(idx, g, z) for x (..., D): the kept ranks, their weights, and what they see, x Aᵀ at
        idx; each (..., K). idx None keeps all ranks, in order."""
        raise NotImplementedError

    def of_blocks(self, x: Tensor, expert: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `gate` returns where whole blocks are kept: expert (..., k), their weights w."""
        ranks = torch.arange(self.block, device=x.device)
        idx = (expert.unsqueeze(-1) * self.block + ranks).flatten(-2)  # (..., K)
        z = rank_scores(x, idx, self.frozen_A, self.A, self.path)
        return idx, w.repeat_interleave(self.block, -1), z

    def hears(self) -> dict[str, range | int]:
        """What the gate must be told of each sample, in the mode that the layer is in: by name, the
        range of an index, or the width of a vector. By default nothing."""
        return {}

    def hear(self, name: str, x: Tensor) -> Tensor:
        """What is said by that name of the samples in x (..., D), which are x's first axes: an
        index (...) or a vector (..., F), with an axis of 1 for each of x's token axes.

        Raises RuntimeError if nothing is said, ValueError if it is of other samples than x's, or
        an index out of its range (looked at on a CPU only: a GPU would have to be waited for).
        """
        if name not in self.told:
            call = f"with told(model, {name}=...): model(x)"
            raise RuntimeError(f"{type(self).__name__} must be told the {name}: {call}")
        said, what = self.told[name], self.hears()[name]
        width = () if isinstance(what, range) else (what,)
        samples = said.shape[: said.ndim - len(width)]
        if (*samples, *width) != said.shape or samples != x.shape[:-1][: len(samples)]:
            raise ValueError(
                f"{name} is {tuple(said.shape)}, allowed for x {tuple(x.shape)}: its first axes"
                + "".join(f", then {size}" for size in width)
            )
        look = said.device.type == "cpu" and not torch.compiler.is_compiling()
        if isinstance(what, range) and look and said.numel():
            for end in (int(said.min()), int(said.max())):
                if end not in what:
                    raise ValueError(f"{name} is {end}, allowed: 0 to {len(what) - 1}")
        return said.reshape((*samples, *[1] * (x.ndim - 1 - len(samples)), *width))

    def active(self) -> int:
        """How many of the adapter's parameters the output for one token depends on by value."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        idx, g, z = self.gate(x)  # (..., K) each
        y = self.base(x)
        update = rank_sparse(self.scale * g * z, idx, self.frozen_B, self.B, self.path)
        return update.to(y.dtype).add_(y)  # in place: one array of (..., O) less

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """A grown layer's state loads into a fresh one: frozen rows take the size that comes."""
        for name in [n for n in self._buffers if n.startswith("frozen_")]:
            rows, here = state_dict.get(prefix + name), getattr(self, name)
            if rows is not None and rows.shape[1:] == here.shape[1:]:
                setattr(self, name, here.new_empty(rows.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out what belongs to one step."""
        return self.__dict__ | {"aux": None, "counts": None, "told": {}}


class LoRA(Adapter):
    """Dense LoRA. Parameters: R (D + O), all of them active.

    Without `grow` it is the sequential baseline, one update that every task overwrites; with
    it, ranks are added per task and all are always on.
    """

    claims = Claims(zero_at_birth=True, granularity="token", as_lora={}, mergeable=True)

    def __init__(self, base: nn.Linear, rank: int = 16, scale: float = 1.0):
        super().__init__(base, rank, scale)
        self.unmerged: Tensor | None
        self.register_buffer("unmerged", None, persistent=False)  # W0 while merged

    def gate(self, x: Tensor) -> tuple[Tensor | None, Tensor | float, Tensor]:
        return None, 1.0, self.project(x, "A")

    def active(self) -> int:
        return self.ranks * (self.base.in_features + self.base.out_features)

    # What a gate of 1 allows and no other gate does: one matrix does it all.

    def merge(self) -> None:
        """W0 <- W0 + scale · (Aᵀ B)ᵀ. Only for use: a merged layer does not train, grow or save."""
        self._stop_if_merged()
        W0 = self.base.weight
        self.unmerged = W0.detach().clone()
        with torch.no_grad():
            W0 += self.scale * (self.rows("B").T @ self.keys)

    def unmerge(self) -> None:
        """Put W0 back, bit for bit."""
        if self.unmerged is None:
            raise RuntimeError("the layer is not merged")
        self.base.weight.data.copy_(self.unmerged)
        self.unmerged = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.unmerged is None else self.base(x)

    def grow(self) -> None:
        self._stop_if_merged()
        super().grow()

    def _save_to_state_dict(self, *args) -> None:
        self._stop_if_merged()
        super()._save_to_state_dict(*args)

    def _stop_if_merged(self) -> None:
        if self.unmerged is not None:
            raise RuntimeError("the layer is merged: call unmerge() first")
