"""The rank-sparse product: what the chosen ranks say, without the ranks that were not chosen.

    y[t] = sum_k  v[t, k] · B[idx[t, k]]          (T, O)

Row t of the (T, R) matrix H has K non-zeros, v[t, k] at rank idx[t, k]; then y = H B. A masked
dense layer stores H. Three products do without it, and serve every pass: each one's gradients are
the other two.

    spmm     y = H B            y[t] = sum_k v[t, k] · B[idx[t, k]]                      (T, O)
    sddmm    s = g Bᵀ at idx    s[t, k] = g[t] · B[idx[t, k]]                            (T, K)
    spmm_t   d = Hᵀ g           d[i] = sum of v[t, k] · g[t] over all idx[t, k] = i      (R, O)

Each can be computed in five ways: the same sums in another order.

    plain    scatter v into H and let autograd do the rest. The reference, and where layers are
             small the fastest: the others' bookkeeping costs more than their arithmetic saves.
    dense    scatter v into H, then one GEMM: T·R·O multiply-adds, whatever K is.
    gather   read the K chosen rows of B for each token: T·K·O multiply-adds, but no GEMM.
    triton   the same in our own kernels, for a GPU (kernels.py).
    compact  dense over only those ranks that some token chose.

Axes: T tokens (any leading shape), D in, O out, R ranks in all, K kept; F frozen rows come first,
r live ones last, R = F + r. Frozen rows are constants: nothing here computes a gradient for them,
so a task's weight gradients cost the same after 100 tasks as after 1.
"""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from .frozen import gram, joined

PATHS = ("auto", "plain", "dense", "gather", "compact", "triton")

# `auto` is plain up to so many tokens times ranks. CPU: measured, a step of MoRA and of LoRA-MoE at
# D = O = 64 to 768, T 64 to 4096, one thread: at 2^14 plain takes .53 to 1.06 of the others' time,
# at 2^15 .59 to 1.28, at 2^16 .67 to 1.85. CUDA: nobody has measured it.
SMALL = {"cpu": 2**15, "cuda": 2**15}

# `auto` leaves dense once there are this many rows per kept rank: R/K, and for spmm_t, which is
# asked for live rows only, r/K. CPU: measured at T 4096, O 768, K 8 to 32, fp32, 2 threads.
# CUDA: arithmetic for an H100 (T 4096, O 1024, bf16); nobody has measured it. Where the environment
# variable MINIMOE_BENCH names a bench.json, its numbers stand for these on a device of its kind.
CROSSOVER = {
    "cpu": {"spmm": 2, "sddmm": 5, "spmm_t": 14},
    "cuda": {"spmm": 72, "sddmm": 72, "spmm_t": 128},
}


def read_measured(path: str) -> dict[str, dict[str, int]] | ValueError:
    """{"cpu" or "cuda": the thresholds that a bench.json suggests}; the error if it is none, to be
    raised where they are asked for."""
    if not path:
        return {}
    try:
        entry = json.loads(Path(path).read_text(encoding="utf-8"))
        found = {name: int(value) for name, value in entry["suggested"].items()}
        return {"cpu" if entry["device"] == "cpu" else "cuda": found}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        allowed = "allowed: a bench.json of `minimoe bench`"
        return ValueError(f"MINIMOE_BENCH is {path!r} ({reason}), {allowed}")


MEASURED = read_measured(os.environ.get("MINIMOE_BENCH", ""))


def threshold(name: str, cuda: bool) -> int:
    """What `auto` goes by on this kind of device: of SMALL ("small"), or a product's CROSSOVER.
    Raises ValueError if MINIMOE_BENCH is no bench.json."""
    kind = "cuda" if cuda else "cpu"
    if isinstance(MEASURED, ValueError):
        raise MEASURED
    if name in (measured := MEASURED.get(kind, {})):
        return measured[name]
    return SMALL[kind] if name == "small" else CROSSOVER[kind][name]


# whether torch.export runs: torch 2.6 does not say
exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


def is_plain(path: str, x: Tensor, R: int) -> bool:
    """Whether products of tokens x (..., D) with R ranks are computed plainly. In torch.export auto
    is plain: a program is for all sizes, and may run where only torch's operators are known."""
    if path != "auto":
        return path == "plain"
    return exporting() or x.shape[:-1].numel() * R <= threshold("small", x.is_cuda)


TINY = torch.finfo(torch.float32).tiny  # the least norm to divide by


def widened(z: Tensor) -> Tensor:
    """z in float32 at least: 16 bits lose small scores, and overflow in large norms."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def rank_sparse(
    v: Tensor,
    idx: Tensor | None,
    frozen: Tensor,
    live: Tensor,
    path: str = "auto",
    check: bool | None = None,
) -> Tensor:
    """What the kept ranks say: y[t] = sum_k v[t, k] · B[idx[t, k]], B being frozen, then live.

    Args:
        v: (..., K) what each kept rank says: its gate times its raw activation.
        idx: (..., K) int32 or int64, the kept ranks, from 0 to R - 1. None: all R, in order.
            A rank named twice counts twice; one that is to say nothing keeps its index and v = 0.
        frozen: (F, O) rows of finished tasks; they get no gradient. F may be 0.
        live: (r, O) rows in training.
        path: "plain", "dense", "gather", "compact", "triton", or "auto": plain up to `SMALL` and
            in torch.export, beyond that each product by `CROSSOVER`.
        check: look at every index first. By default so on a CPU; on a GPU the look waits for the
            device, and without it torch's kernels stop at an index out of range (Triton's read
            nothing there).

    Returns: (..., O). All is computed in live's dtype, or autocast's, with sums kept in float32
    (float64 for float64). Twice differentiable. The same input gives the same bits; the one
    exception is "dense" on CUDA where one token names one rank three times or more.
    Raises ValueError, before any kernel runs, if a shape, device, dtype, path or index does not
    fit the others.
    """
    _check(frozen, live, path, v=v, idx=idx)
    K, F = v.shape[-1], frozen.shape[0]
    R = F + live.shape[0]
    if idx is None:
        if R != K:
            raise ValueError(f"v has {K} ranks, no idx, and there are {R}")
        v, frozen, live = _cast(live, v, frozen, live)
        if F and is_plain(path, v, R):
            return v @ torch.cat([frozen.detach(), live])
        return v[..., F:] @ live + v[..., :F] @ frozen if F else v @ live
    if idx.shape != v.shape:
        raise ValueError(f"idx {tuple(idx.shape)} and v {tuple(v.shape)} differ in shape")
    idx = _ranks(idx, R, check)
    v, frozen, live = _cast(live, v, frozen, live)
    if is_plain(path, v, R):
        return plain(v, idx, torch.cat([frozen.detach(), live]))
    y = spmm(idx.reshape(-1, K), v.reshape(-1, K), frozen, live, path)
    return y.reshape(*v.shape[:-1], live.shape[1])


def plain(v: Tensor, idx: Tensor, B: Tensor) -> Tensor:
    """y = H B (..., O), for autograd to see through: v (..., K) scattered into H (..., R). Raises
    ValueError, on a CPU, if an index is none of R's: the scatter looks at each by itself."""
    if idx.shape != v.shape:
        raise ValueError(f"idx {tuple(idx.shape)} and v {tuple(v.shape)} differ in shape")
    idx = _ranks(idx, len(B), False)
    try:
        H = v.new_zeros(*v.shape[:-1], len(B)).scatter_add(-1, idx, v)
    except RuntimeError:
        _ranks(idx, len(B), True)
        raise
    return H @ B


def at(z: Tensor, idx: Tensor) -> Tensor:
    """z (..., R) at idx (..., K). Raises ValueError, on a CPU, if an index is none of R's."""
    if idx.shape[:-1] != z.shape[:-1]:
        raise ValueError(f"idx {tuple(idx.shape)} and z {tuple(z.shape)} differ in tokens")
    idx = _ranks(idx, z.shape[-1], False)
    try:
        return z.gather(-1, idx)
    except RuntimeError:
        _ranks(idx, z.shape[-1], True)
        raise


def rank_scores(
    x: Tensor,
    idx: Tensor,
    frozen: Tensor,
    live: Tensor,
    path: str = "auto",
    check: bool | None = None,
) -> Tensor:
    """What the kept ranks see: z[t, k] = x[t] · A[idx[t, k]], A being frozen, then live.

    x (..., D), idx (..., K), frozen (F, D), live (r, D); returns (..., K). The rest is as in
    `rank_sparse`.
    """
    _check(frozen, live, path, x=x, idx=idx)
    if x.shape[-1] != live.shape[1]:
        raise ValueError(f"x is {x.shape[-1]} wide, allowed: {live.shape[1]}, as the rows are")
    if idx.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"idx {tuple(idx.shape)} and x {tuple(x.shape)} differ in tokens")
    idx = _ranks(idx, len(frozen) + len(live), check)
    x, frozen, live = _cast(live, x, frozen, live)
    if is_plain(path, x, len(frozen) + len(live)):
        return at(x @ torch.cat([frozen.detach(), live]).T, idx)
    flat = idx.reshape(-1, idx.shape[-1])
    return sddmm(flat, x.reshape(-1, x.shape[-1]), frozen, live, path).reshape(idx.shape)


def top_scores(
    x: Tensor, frozen: Tensor, live: Tensor, k: int, path: str = "auto", detach: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """What all ranks see, z = x Aᵀ, as far as a self-scoring gate needs it: the k largest, and ‖z‖.

    The forward pass is one GEMM over all ranks: the norm needs every z. The backward need not be.
    With c = (dloss/d‖z‖) / ‖z‖, one number per token,

        dx = spmm(idx, dtop, A) + c · z A            z A = x (Aᵀ A): (D, D), however many ranks
        dA = (H(idx, dtop) + c · z)ᵀ x               for the live ranks only

    so the exact gradient costs T·R·D or (T + R)·D·D, whichever is less, and in the second case z
    is not kept, and the frozen rows' part of R·D·D is paid once a task (frozen.py). With `detach`
    the norm has no gradient, and the backward reads only chosen ranks.

    x (..., D), frozen (F, D), live (r, D), 1 <= k <= R. Returns top (..., k) in descending order,
    idx (..., k) int64, and norm (..., 1) in float32 (float64 for float64). Differentiable once.
    Raises as `rank_sparse` does.
    """
    _check(frozen, live, path, x=x)
    if x.shape[-1] != live.shape[1]:
        raise ValueError(f"x is {x.shape[-1]} wide, allowed: {live.shape[1]}, as the rows are")
    if not 1 <= k <= len(frozen) + len(live):
        raise ValueError(f"k is {k}, allowed: 1 to {len(frozen) + len(live)}")
    x, frozen, live = _cast(live, x, frozen, live)
    out = _TopScores.apply(x.reshape(-1, x.shape[-1]), frozen, live, k, path, detach)
    top, idx, norm = (t.reshape(*x.shape[:-1], t.shape[-1]) for t in out)
    return top, idx, norm


class _TopScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen: Tensor, live: Tensor, k: int, path: str, detach: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        A = joined(frozen, live)
        (T, D), R = x.shape, len(A)
        z = x @ A.T
        found = _kernels().row_top(z, k) if path == "triton" else None
        if found:
            top, idx, norm = found[0], found[1].long(), found[2]
        else:
            wide = torch.promote_types(z.dtype, torch.float32)
            norm = torch.linalg.vector_norm(z, dim=1, keepdim=True, dtype=wide)
            top, idx = z.topk(k)
        cheaper = T * R * D <= (T + R) * D * D  # z A than x (Aᵀ A)
        ctx.save_for_backward(x, frozen, live, idx, norm, z if cheaper and not detach else None)
        ctx.path, ctx.detach = path, detach
        ctx.mark_non_differentiable(*((idx, norm) if detach else (idx,)))
        return top, idx, norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtop: Tensor, _: Any, dnorm: Tensor) -> tuple[Tensor | None, ...]:
        x, frozen, live, idx, norm, z = ctx.saved_tensors
        F, R = len(frozen), len(frozen) + len(live)
        if not ctx.detach:
            c = (dnorm / norm.clamp_min(TINY)).to(x.dtype)
        dx = None
        if z is not None:
            dz = (c * z).scatter_add_(1, idx, dtop)
            dx = dz @ joined(frozen, live) if ctx.needs_input_grad[0] else None
            return dx, None, dz[:, F:].T @ x, None, None, None
        if ctx.needs_input_grad[0]:
            dx = spmm(idx, dtop, frozen, live, ctx.path)
            if not ctx.detach:
                dx.addcmul_(c, x @ gram(frozen, live))
        if ctx.detach:
            return dx, None, spmm_t(idx, dtop, x, F, R, ctx.path), None, None, None
        dz = _columns(idx, dtop, F, R).addcmul_(c, x @ live.T)  # of the live ranks, all tokens
        return dx, None, dz.T @ x, None, None, None


# The three products and their gradients: of each, the other two. All are flat: idx (T, K) int64 in
# range, v (T, K), g (T, O), and rows of one dtype.


class _Spmm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, idx: Tensor, v: Tensor, frozen: Tensor, live: Tensor, path: str
    ) -> Tensor:
        ctx.save_for_backward(idx, v, frozen, live)
        ctx.path = path
        return torch.ops.minimoe.spmm(idx, v, frozen, live, path)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        idx, v, frozen, live = ctx.saved_tensors
        F, R = len(frozen), len(frozen) + len(live)
        dv = sddmm(idx, dy, frozen, live, ctx.path) if ctx.needs_input_grad[1] else None
        dlive = spmm_t(idx, v, dy, F, R, ctx.path) if ctx.needs_input_grad[3] else None
        return None, dv, None, dlive, None


class _Sddmm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, idx: Tensor, g: Tensor, frozen: Tensor, live: Tensor, path: str
    ) -> Tensor:
        ctx.save_for_backward(idx, g, frozen, live)
        ctx.path = path
        return torch.ops.minimoe.sddmm(idx, g, frozen, live, path)

    @staticmethod
    def backward(ctx: Any, ds: Tensor) -> tuple[Tensor | None, ...]:
        idx, g, frozen, live = ctx.saved_tensors
        F, R = len(frozen), len(frozen) + len(live)
        dg = spmm(idx, ds, frozen, live, ctx.path) if ctx.needs_input_grad[1] else None
        dlive = spmm_t(idx, ds, g, F, R, ctx.path) if ctx.needs_input_grad[3] else None
        return None, dg, None, dlive, None


class _SpmmT(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, idx: Tensor, v: Tensor, g: Tensor, first: int, end: int, path: str
    ) -> Tensor:
        ctx.save_for_backward(idx, v, g)
        ctx.first, ctx.path = first, path
        return torch.ops.minimoe.spmm_t(idx, v, g, first, end, path)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        idx, v, g = ctx.saved_tensors
        zeros = d.new_zeros(ctx.first, d.shape[1])
        dv = sddmm(idx, g, zeros, d, ctx.path) if ctx.needs_input_grad[1] else None
        dg = spmm(idx, v, zeros, d, ctx.path) if ctx.needs_input_grad[2] else None
        return None, dv, dg, None, None, None


spmm, sddmm, spmm_t = _Spmm.apply, _Sddmm.apply, _SpmmT.apply


# How each is computed. As operators of torch, so that torch.compile sees each as one node; defined
# by the plain calls, which cost a small layer less time than torch.library.custom_op.


def _operator(fake: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Any]:
    """Make a function of tensors the operator minimoe::name, with its output's shape in fake."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = f"minimoe::{function.__name__.strip('_')}"
        torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(name, "CompositeExplicitAutograd")(function)
        torch.library.register_fake(name)(fake)
        return function

    return register


@_operator(lambda idx, v, frozen, live, path: v.new_empty(v.shape[0], live.shape[1]))
def _spmm(idx: Tensor, v: Tensor, frozen: Tensor, live: Tensor, path: str) -> Tensor:
    """y[t] = sum_k v[t, k] · B[idx[t, k]], (T, O)."""
    B = joined(frozen, live)
    path = _choose(path, "spmm", len(B), idx)
    if path == "compact":
        used, idx = _compact(idx, len(B))
        B, path = B[used], "dense"
    if path == "dense":
        return v.new_zeros(len(v), len(B)).scatter_add_(1, idx, v) @ B
    if path == "triton":
        return _kernels().spmm(idx, v, B)
    T, K = idx.shape
    starts = torch.arange(T, device=v.device) * K
    return _bag(idx.flatten(), v.flatten(), starts, B)


@_operator(lambda idx, g, frozen, live, path: g.new_empty(idx.shape))
def _sddmm(idx: Tensor, g: Tensor, frozen: Tensor, live: Tensor, path: str) -> Tensor:
    """s[t, k] = g[t] · B[idx[t, k]], (T, K)."""
    B = joined(frozen, live)
    path = _choose(path, "sddmm", len(B), idx)
    if path == "compact":
        used, idx = _compact(idx, len(B))
        B, path = B[used], "dense"
    if path == "dense":
        return (g @ B.T).gather(1, idx)
    if path == "triton":
        return _kernels().dots(idx, g, B)
    # the gradient that torch's own embedding_bag gives its weights: one dot product per pair
    T, K = idx.shape
    pair = torch.arange(T * K, device=g.device)
    dot = torch.ops.aten._embedding_bag_per_sample_weights_backward
    flat = idx.flatten().contiguous()
    return dot(g.contiguous(), B, flat, pair[::K], pair // K, 0, -1).view(T, K)


@_operator(lambda idx, v, g, first, end, path: g.new_empty(end - first, g.shape[1]))
def _spmm_t(idx: Tensor, v: Tensor, g: Tensor, first: int, end: int, path: str) -> Tensor:
    """d[i - first] = sum of v[t, k] · g[t] over all (t, k) with idx[t, k] = i, for the ranks i from
    first to end - 1: (end - first, O).

    Dense: those columns of H, then one GEMM. Gather and triton: a stable sort by rank gives each
    rank one run of pairs (t, k), and every run is summed in its order: no atomics.
    """
    path = _choose(path, "spmm_t", end - first, idx)
    if path == "compact":
        used, idx = _compact(idx, end)
        old = int((used < first).sum())
        rows = _spmm_t(idx, v, g, old, len(used), "dense")
        return g.new_zeros(end - first, g.shape[1]).index_copy_(0, used[old:] - first, rows)
    if path == "dense":
        return _columns(idx, v, first, end).T @ g
    key = idx.flatten().clamp(-1, end).int()  # half the bytes to sort
    rank, pairs = key.sort(stable=True)  # pair p is token p // K, slot p % K
    tokens, weights = pairs // idx.shape[1], v.flatten()[pairs]
    ranks = torch.arange(first, end + 1, device=rank.device, dtype=rank.dtype)
    bounds = torch.searchsorted(rank, ranks)
    if path == "triton":
        return _kernels().long_bag(tokens, weights, bounds, g)
    old = int(bounds[0])
    return _bag(tokens[old:], weights[old:], bounds[:-1] - old, g)


def _columns(idx: Tensor, v: Tensor, first: int, end: int) -> Tensor:
    """Columns first to end - 1 of H, (T, end - first)."""
    column = (idx - first).clamp_min(-1) + 1  # 0 for every rank before first, then dropped
    return v.new_zeros(len(v), end - first + 1).scatter_add_(1, column, v)[:, 1:]


def _bag(rows: Tensor, weights: Tensor, starts: Tensor, source: Tensor) -> Tensor:
    """y[s] = sum of weights[p] · source[rows[p]] over the p from starts[s] to the next start."""
    rows, weights, source = (tensor.contiguous() for tensor in (rows, weights, source))
    return embedding_bag(rows, source, starts, per_sample_weights=weights, mode="sum")


def _kernels() -> Any:
    from . import kernels

    return kernels


def _compact(idx: Tensor, R: int) -> tuple[Tensor, Tensor]:
    """The ranks that idx names, in order (U,), and idx as places among them."""
    seen = torch.zeros(R, dtype=torch.bool, device=idx.device)
    seen[idx.flatten()] = True
    return seen.nonzero().squeeze(1), (seen.cumsum(0) - 1)[idx]


def _choose(path: str, product: str, rows: int, idx: Tensor) -> str:
    if path != "auto":
        return "dense" if path == "plain" else path
    if rows < threshold(product, idx.is_cuda) * idx.shape[1]:
        return "dense"
    return "triton" if idx.is_cuda and importlib.util.find_spec("triton") else "gather"


def _check(frozen: Tensor, live: Tensor, path: str, **others: Tensor | None) -> None:
    """Raise ValueError, with names, if rows, path and devices do not fit each other."""
    if path not in PATHS:
        raise ValueError(f"path is {path!r}, allowed: {', '.join(PATHS)}")
    if frozen.dim() != 2 or live.dim() != 2 or frozen.shape[1] != live.shape[1]:
        raise ValueError(
            f"frozen {tuple(frozen.shape)} and live {tuple(live.shape)}: not rows of one width"
        )
    for name, tensor in {"frozen": frozen, **others}.items():
        if tensor is not None and tensor.device != live.device:
            raise ValueError(f"{name} is on {tensor.device}, live on {live.device}")
    if path == "triton":
        if not importlib.util.find_spec("triton"):
            raise ValueError("path is 'triton', and triton is not installed")
        if not live.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"path 'triton' is for CUDA, live is on {live.device}")


def _ranks(idx: Tensor, R: int, check: bool | None) -> Tensor:
    """idx as int64, looked at if check says so."""
    if idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"idx is {idx.dtype}, allowed: torch.int32, torch.int64")
    look = not idx.is_cuda if check is None else check
    if look and idx.numel() and not torch.compiler.is_compiling():
        low, high = (int(end) for end in idx.aminmax())
        if low < 0 or high >= R:
            outside = low if low < 0 else high
            raise ValueError(f"idx holds {outside}, allowed: 0 to {R - 1}, as there are {R} ranks")
    return idx.long()


def _cast(live: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype to compute in: live's, or autocast's as for any matrix product."""
    kind, dtype = live.device.type, live.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return [t if t.dtype == dtype else t.to(dtype) for t in tensors]
