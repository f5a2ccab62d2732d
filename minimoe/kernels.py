"""The rank-sparse products in Triton, for a GPU: one kernel sums weighted rows, one takes dots; and
one finds, in a single look over all scores of a token, the largest and the norm.

The first two read only the chosen rows. All sum in float32 (float64 for float64) in a fixed order:
no atomics, so the same bits on every run. An index out of range reads nothing and adds nothing.

Axes as in sparse.py; N rows in source, S bags, P pairs (row, weight) in all; G neighbours.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 128  # read at once by one program
CHUNK = 64  # pairs that one program of long_bag sums
LONGEST = 16384  # ranks that one program of row_top holds in registers


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


@triton.jit
def keys_of(z, column, R, HALF: tl.constexpr):
    """Integers in the order of z: nan first, then the largest, of equal ones the lower column; what
    is beyond R last. The column is in the low bits, of 16 or of 32."""
    if HALF:
        bits = z.to(tl.int16, bitcast=True).to(tl.int32)
        order = tl.where(bits < 0, (bits ^ 0x7FFF) + 1, bits)  # -0 is 0
        order = tl.where(z.to(tl.float32) != z.to(tl.float32), 32767, order)
        return tl.where(column < R, order * 65536 + (65535 - column), -2147483648)
    else:
        bits = z.to(tl.int32, bitcast=True)
        order = tl.where(bits < 0, (bits ^ 0x7FFFFFFF) + 1, bits)
        order = tl.where(z != z, 2147483647, order).to(tl.int64)
        key = order * 4294967296 + (2147483647 - column)
        return tl.where(column < R, key, -9223372036854775808)


@triton.jit
def row_kernel(
    z, top, idx, sumsq, R, k,
    HALF: tl.constexpr, COLUMNS: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    LAST: tl.constexpr = 65535 if HALF else 2147483647
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, COLUMNS)
    row = tl.load(z + t * R + c, mask=c < R, other=0)
    wide = row.to(tl.float32)
    tl.store(sumsq + t, tl.sum(wide * wide, 0))
    # The k largest are in those k groups of neighbours whose own largest are the largest.
    best = tl.max(tl.reshape(keys_of(row, c, R, HALF), [COLUMNS // G, G]), 1)
    group = (LAST - (tl.topk(best, K) & LAST)).to(tl.int32) // G
    c = tl.reshape(group[:, None] * G + tl.arange(0, G)[None, :], [K * G])
    some = tl.load(z + t * R + c, mask=c < R, other=0)
    c = (LAST - (tl.topk(keys_of(some, c, R, HALF), K) & LAST)).to(tl.int32)
    j = tl.arange(0, K)
    tl.store(idx + t * k + j, c, mask=j < k)
    tl.store(top + t * k + j, tl.load(z + t * R + c, mask=j < k), mask=j < k)


def row_top(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """(top, idx, norm) of top, idx = z.topk(k) and norm = ‖z‖, for z (T, R) in float32 or 16 bits.

    top (T, k) in descending order, idx (T, k) int32, norm (T, 1) float32. Of equal ones the lower
    rank comes first, as in a stable sort; nan before all. None where a row is too long (`LONGEST`),
    in float64, and where z is not contiguous.

    A token costs 2 R FLOPs and some 4 R comparisons, and R numbers read from memory; K G of them
    once more, from a cache. torch.topk alone reads them three times or more.
    """
    T, R = z.shape
    half = z.dtype in (torch.float16, torch.bfloat16)
    if R > LONGEST or not (half or z.dtype == torch.float32) or not z.is_contiguous():
        return None
    K = triton.next_power_of_2(k)
    columns = triton.next_power_of_2(max(R, K))
    G = min(triton.next_power_of_2(math.isqrt(columns // K)), columns // K)
    top, idx = z.new_empty(T, k), torch.empty(T, k, dtype=torch.int32, device=z.device)
    sumsq = torch.empty(T, 1, device=z.device)
    if T:
        row_kernel[(T,)](
            z, top, idx, sumsq, R, k,
            HALF=half, COLUMNS=columns, G=G, K=K, num_warps=warps_of(columns),
        )  # fmt: skip
    return top, idx, sumsq.sqrt()


def warps_of(columns: int) -> int:
    """Of 32 threads, for a row: 1024 numbers each."""
    return min(max(columns // 1024, 1), 8)


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
