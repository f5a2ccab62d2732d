"""The skeleton of all schemes: the one equation, frozen and live ranks, and growth.

    z = x Aᵀ                            what every rank sees
    y = x W0ᵀ + scale · (g ⊙ z) B       what the chosen ranks say

A scheme is a subclass that fills in the gate g. lora.py is the simplest: read it first.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept ranks,
k kept experts. x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values: rank i is the pair
(A[i], B[i]).
"""

import inspect
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .claims import Claims
from .frozen import with_room
from .sparse import at, is_plain, plain, rank_scores, rank_sparse
from .tools.outgrown import outgrow, refuse_old_wrapper, refuse_shards
from .wrapped import Wrapped


class Gate(NamedTuple):
    """What a gate says of each token of x (..., D); in training also what it leaves beside, of the
    tokens that `mask(x)` counts."""

    idx: Tensor | None  # (..., K) the kept ranks; None keeps all R, in order
    weight: Tensor | float  # (..., K) g of each
    z: Tensor  # (..., K) what each sees, x Aᵀ at idx
    loss: Tensor | None = None  # auxiliary loss, a number; 0 for no tokens
    counts: Tensor | None = None  # (R,) int64, how often each rank was kept


def require(holds: bool, name: str, value: Any, allowed: str) -> None:
    """Raise ValueError "NAME is VALUE, allowed: ALLOWED" unless the condition holds."""
    if not holds:
        raise ValueError(f"{name} is {value}, allowed: {allowed}")


class Adapter(Wrapped):
    """A frozen linear layer, and ranks beside it that learn.

    Ranks in training are parameters (`A`, `B`); those of finished tasks are buffers (`frozen_A`,
    `frozen_B`) and come first. Nothing happens by itself: the caller says when a task ends
    (`grow`), when the optimiser has made a step (`after_step`), and where a batch begins and ends
    (`context`, in context.py: also what a gate needs beyond x, and what it leaves beside y).

    A scheme states its `claims`, its `gate`, its `active` parameters, and in `fresh` the rows that
    a task adds. It keeps each argument of its constructor under the argument's own name.

    Args:
        base: the linear layer to adapt. It is wrapped, not copied; its weights are frozen. The
            adapter is on its device and in its mode, and in float32 where base is of 16 bits.
        rank: r, the ranks at the start, and those that each `grow` adds.
        scale: the factor on the whole update.

    Raises TypeError if base is no linear layer, ValueError if a setting is out of its range.
    """

    claims = Claims()
    buffer_rows: tuple[str, ...] = ()  # rows that no gradient trains: buffers, also while live
    path = "auto"  # how the products are computed (sparse.py)
    top_k: int  # k, where the scheme has it
    experts = 1  # that a task adds, where experts are blocks
    A: Tensor
    B: Tensor
    frozen_A: Tensor
    frozen_B: Tensor

    def __init__(self, base: nn.Linear, rank: int = 16, scale: float = 1.0):
        super().__init__(base)
        self.rank, self.scale = rank, scale
        kinds = {"top_k": int} | inspect.get_annotations(type(self).__init__) | {"rank": int}
        for value, name in [(vars(self).get(n, 1), n) for n in kinds if kinds[n] in (int, "int")]:
            require(hasattr(value, "__index__"), name, value, "a whole number")
        require(math.isfinite(scale), "scale", scale, "a number")
        most = min(self.in_features, self.out_features)
        require(1 <= rank <= most, "rank", rank, f"1 to {most} for this layer")
        fresh, shared = self.fresh(), self.task_agnostic()
        self.require_no_clash({*fresh, *shared, *(f"frozen_{name}" for name in fresh)})
        for name, rows in fresh.items():
            self.register_buffer(f"frozen_{name}", rows[:0].clone())
            if name in self.buffer_rows:
                self.register_buffer(name, rows)
            else:
                self.register_parameter(name, nn.Parameter(rows))
        for name, tensor in shared.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def gate(self, x: Tensor) -> Gate:
        """Which ranks are kept for x (..., D), their weights, and what they see; in training, what
        the pass leaves beside. It changes nothing."""
        raise NotImplementedError

    def update(self, x: Tensor) -> Tensor:
        """scale · (g ⊙ z) B (..., O) of x (..., D)."""
        idx, g, z, *beside = self.gate(x)
        self.leave(*beside)
        v = self.scale * g * z
        if idx is not None and is_plain(self.path, x, self.ranks):
            return plain(self.cast(v), idx, self.rows("B"))  # rank_sparse's checks cost a tenth
        return rank_sparse(v, idx, self.frozen_B, self.B, self.path)

    def forward(self, input: Tensor) -> Tensor:
        self.use.called, self.step.used = True, {}
        if self.unmerged is not None:
            return self.call_base(input)
        if self.training:
            refuse_old_wrapper(self)
        update = self.update(self.samples_first(self.cast(input)))
        y = self.call_base(input)
        update = self.samples_first(update, back=True).to(y.dtype)
        if type(self).update is Adapter.update and not update.requires_grad:
            # one array of (..., O) less; in training autograd would copy the view four times
            return self.hold(update.add_(y))
        return self.hold(update + y)

    def active(self) -> int:
        """How many of the adapter's parameters one token's output depends on by value."""
        raise NotImplementedError

    def speaking(self) -> int:
        """How many of its keys' and values' numbers belong to ranks with a weight for one token, at
        most: K (D + O), of the K ranks that may be kept."""
        ranks = self.kept * self.block if self.claims.top_k else self.ranks
        return ranks * (self.in_features + self.out_features)

    # Rows: what is learned, task by task

    def fresh(self) -> dict[str, Tensor]:
        """The rows that one task adds: keys kaiming_uniform(a=sqrt 5), values zero, so that a
        fresh layer is the base layer, bit for bit."""
        A = nn.init.kaiming_uniform_(self.empty(self.rank, self.in_features), a=math.sqrt(5))
        return {"A": A, "B": self.empty(self.rank, self.out_features).zero_()}

    def fresh_router(self) -> Tensor:
        """A router's rows (n, D) for the n experts that a task adds: N(0, .02)."""
        return self.empty(self.rank // self.block, self.in_features).normal_(std=0.02)

    def task_agnostic(self) -> dict[str, Tensor]:
        """What belongs to no task: every task trains it. By default nothing."""
        return {}

    def grow(self) -> None:
        """A task ends: freeze every live row and add fresh ones.

        The fresh rows are new parameters: give them a new optimiser. Raises RuntimeError if the
        layer is merged, or sharded by FSDP.
        """
        self.stop_if_merged()
        refuse_shards(self.B, self.where)
        for name, rows in self.fresh().items():
            outgrow(getattr(self, name), self, name)
            setattr(self, f"frozen_{name}", with_room(self.rows(name).detach(), len(rows)))
            setattr(self, name, rows if name in self.buffer_rows else nn.Parameter(rows))
        self.end_step()

    def after_step(self) -> None:
        """The optimiser has made a step: what the scheme does between steps. By default nothing."""

    def rows(self, name: str) -> Tensor:
        """All rows of that name, the frozen ones first."""
        return torch.cat([getattr(self, f"frozen_{name}"), getattr(self, name)])

    @property
    def keys(self) -> Tensor:
        """A (R, D), of all ranks."""
        return self.rows("A")

    def project(self, x: Tensor, name: str) -> Tensor:
        """x (..., D) against all rows of that name: (..., rows). In two products where layers are
        large, so that the live rows' gradient costs nothing for frozen ones."""
        x, frozen, live = self.cast(x), getattr(self, f"frozen_{name}"), getattr(self, name)
        if not len(frozen):
            return F.linear(x, live)
        if is_plain(self.path, x, len(frozen) + len(live)):
            return F.linear(x, torch.cat([frozen, live]))
        return torch.cat([F.linear(x, frozen), F.linear(x, live)], dim=-1)

    def gate_blocks(self, x: Tensor, expert: Tensor, w: Tensor, loss: Tensor | None = None) -> Gate:
        """The gate that keeps whole blocks of ranks: expert (..., k) and their weights w."""
        ranks = torch.arange(self.block, device=x.device)
        idx = (expert.unsqueeze(-1) * self.block + ranks).flatten(-2)  # (..., K)
        return Gate(idx, self.of_ranks(w), self.seen(x, idx), loss)

    def seen(self, x: Tensor, idx: Tensor) -> Tensor:
        """What the ranks idx (..., K) see of x (..., D): z = x Aᵀ at idx."""
        if is_plain(self.path, x, self.ranks):
            return at(self.project(x, "A"), idx)
        return rank_scores(x, idx, self.frozen_A, self.A, self.path)

    def of_ranks(self, w: Tensor) -> Tensor:
        """w (..., k) of experts, for each of their ranks: (..., k · block)."""
        return w.unsqueeze(-1).expand(*w.shape, self.block).flatten(-2)

    # Sizes and settings

    @property
    def ranks(self) -> int:
        """R, frozen and live."""
        return self.frozen_B.shape[0] + self.B.shape[0]

    @property
    def block(self) -> int:
        """Ranks of one expert: where experts are blocks, a task's, shared out among them."""
        return self.rank // self.experts if self.claims.expert == "block" else 1

    @property
    def n_experts(self) -> int:
        """E."""
        return self.ranks // self.block

    @property
    def kept(self) -> int:
        """k: `top_k`, at most E."""
        return min(self.top_k, self.n_experts)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, without base."""
        _, _, *names = inspect.signature(type(self).__init__).parameters  # but self and base
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in {"ranks": self.ranks, **self.settings()}.items())
