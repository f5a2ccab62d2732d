"""The rank-sparse products in Triton, for a GPU: one kernel sums weighted rows, one takes dots.

Both read only the chosen rows, and sum in float32 (float64 for float64) in a fixed order: no
atomics, so the same bits on every run. An index out of range reads nothing and adds nothing.

Axes as in sparse.py; N rows in source, S bags, P pairs (row, weight) in all.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 128  # read at once by one program
CHUNK = 64  # pairs that one program of long_bag sums


@triton.jit
def bag_kernel(
    rows, weights, starts, ends, source, out, N, O,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, end = tl.load(starts + s), tl.load(ends + s)
    total = tl.zeros([COLUMNS], WIDE)
    for first in range(start, end, ROWS):
        p = first + tl.arange(0, ROWS)
        row = tl.load(rows + p, mask=p < end, other=-1)
        here = (row >= 0) & (row < N)
        weight = tl.load(weights + p, mask=here, other=0).to(WIDE)
        at = source + row[:, None] * O + o[None, :]
        block = tl.load(at, mask=here[:, None] & (o < O)[None, :], other=0).to(WIDE)
        total += tl.sum(weight[:, None] * block, axis=0)
    tl.store(out + s * O + o, total.to(out.dtype.element_ty), mask=o < O)


@triton.jit
def dots_kernel(
    idx, g, source, out, N, K, O,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = tl.load(idx + t * K + k, mask=k < K, other=-1)
    here = (row >= 0) & (row < N)
    total = tl.zeros([ROWS], WIDE)
    for first in range(0, O, COLUMNS):
        o = first + tl.arange(0, COLUMNS)
        at = source + row[:, None] * O + o[None, :]
        block = tl.load(at, mask=here[:, None] & (o < O)[None, :], other=0).to(WIDE)
        total += tl.sum(block * tl.load(g + t * O + o, mask=o < O, other=0).to(WIDE)[None, :], 1)
    tl.store(out + t * K + k, total.to(out.dtype.element_ty), mask=k < K)


def bag(
    rows: Tensor, weights: Tensor, starts: Tensor, ends: Tensor, source: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """y[s] = sum of weights[p] · source[rows[p]] over starts[s] <= p < ends[s].

    rows (P,) int64, weights (P,), starts and ends (S,) int64, source (N, O). Returns (S, O) in
    dtype, by default that of source.
    """
    S, (N, O) = len(starts), source.shape
    out = source.new_empty(S, O, dtype=dtype or source.dtype)
    if out.numel():
        grid = (S, triton.cdiv(O, COLUMNS))
        bag_kernel[grid](
            rows.contiguous(), weights.contiguous(), starts, ends, source.contiguous(), out, N, O,
            WIDE=_wide(source), ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
    return out


def long_bag(rows: Tensor, weights: Tensor, bounds: Tensor, source: Tensor) -> Tensor:
    """y[s] = sum of weights[p] · source[rows[p]] over bounds[s] <= p < bounds[s + 1].

    bounds (S + 1,) int64. As `bag`, for few and long bags: each is cut into chunks of CHUNK pairs,
    the chunks are summed side by side, then the chunks of each bag. How many there are is only
    known to the device; all launch shapes come from a bound, P / CHUNK + S, so nothing waits.
    """
    S = len(bounds) - 1
    count = (bounds.diff() + CHUNK - 1) // CHUNK  # chunks per bag
    last = count.cumsum(0)
    chunk = torch.arange(len(rows) // CHUNK + S, device=rows.device)
    s = torch.searchsorted(last, chunk, right=True).clamp_max(S - 1)
    start = bounds[s] + (chunk - (last - count)[s]) * CHUNK  # past its bag's end: an empty chunk
    end = torch.minimum(start + CHUNK, bounds[s + 1])
    wide = torch.promote_types(source.dtype, torch.float32)
    part = bag(rows, weights, start, end, source, wide)
    return bag(chunk, part.new_ones(len(part)), last - count, last, part, source.dtype)


def dots(idx: Tensor, g: Tensor, source: Tensor) -> Tensor:
    """s[t, k] = g[t] · source[idx[t, k]], for idx (T, K) int64, g (T, O), source (N, O): (T, K)."""
    (T, K), (N, O) = idx.shape, source.shape
    out = g.new_empty(T, K)
    if out.numel():
        grid = (T, triton.cdiv(K, ROWS))
        dots_kernel[grid](
            idx.contiguous(), g.contiguous(), source.contiguous(), out, N, K, O,
            WIDE=_wide(source), ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
    return out


def _wide(source: Tensor) -> Any:
    return tl.float64 if source.dtype == torch.float64 else tl.float32
