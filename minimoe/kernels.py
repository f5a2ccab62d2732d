"""The rank-sparse products in Triton, for a GPU: `spmm` and `dots`, in which each token has K pairs
(row, weight), and `bag`, for runs of pairs of any length. And `row_top`, which finds, in a single
look over all scores of a token, the largest and the norm.

A kernel is written for one program. The grid says how many programs there are; `tl.program_id` says
which one this is. A program computes one tile of the output, and nobody else writes there. A tile
has a fixed size, a power of two: where it hangs over the edge, the load and the store are masked,
that is, left out. Programs start in order, those along axis 0 of the grid first.

The products read only the chosen rows. All sum in float32 (float64 for float64) in a fixed order:
no atomics, so the same bits on every run. An index out of range reads nothing and adds nothing.
Addresses are computed in 32 bits where every array is short enough (`LIMIT`), else in 64.

Axes as in sparse.py; N rows in source, S bags, P pairs in all; G neighbours. A number has b bytes,
an index i.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, PAIRS, ROWS = 8, 32, 16  # taken at once by one program of spmm, dots, bag
COLUMNS = 128  # of a row, by one program of spmm and bag
STEP = 64  # columns that one program of dots takes at a time
CHUNK = 64  # pairs that one program of long_bag sums
LONGEST = 16384  # ranks that one program of row_top holds in registers
LIMIT = 2**31 - 2**14  # numbers in an array: int32 holds their places, and a tile's beyond the edge


@triton.jit
def spmm_kernel(
    idx, v, source, out, T, K, R, O,
    WIDE: tl.constexpr, PLACE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y[t] = sum_k v[t, k] · source[idx[t, k]].

    A program computes y for TOKENS tokens t and COLUMNS columns o: K times it adds a row to each t.
    Masked: tokens from T on, columns from O on, and rows that source does not have.

    2 T K O FLOPs. It reads T K O b bytes of rows, and T K (i + b) of pairs for each strip of
    COLUMNS columns; it writes T O b. Strips are the slow axis of the grid: all tokens of one strip
    come before the next, so that its R COLUMNS b bytes of source stay in the L2 cache. Then memory
    is asked for R O b bytes of rows, and L2 for the rest.
    """
    t = tl.program_id(0).to(PLACE) * TOKENS + tl.arange(0, TOKENS)
    o = tl.program_id(1).to(PLACE) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([TOKENS, COLUMNS], WIDE)
    for k in range(K):
        row = tl.load(idx + t * K + k, mask=t < T, other=-1)
        here = (row >= 0) & (row < R)
        weight = tl.load(v + t * K + k, mask=here, other=0).to(WIDE)
        at = source + row.to(PLACE)[:, None] * O + o[None, :]
        block = tl.load(at, mask=here[:, None] & (o < O)[None, :], other=0).to(WIDE)
        total += weight[:, None] * block
    at = out + t[:, None] * O + o[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(t < T)[:, None] & (o < O)[None, :])


@triton.jit
def dots_kernel(
    idx, g, source, out, P, K, R, O,
    WIDE: tl.constexpr, PLACE: tl.constexpr, PAIRS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """s[t, k] = g[t] · source[idx[t, k]], for the P = T K pairs p = t K + k.

    A program computes s for PAIRS pairs, those of several tokens. It walks over the columns o, STEP
    at a time, and keeps STEP sums for each pair; at the end they become one.
    Masked: pairs from P on, columns from O on, and rows that source does not have.

    2 T K O FLOPs. It reads T K O b bytes of rows, T K i of indices, and T K O b of g: each token's
    K times, but T O b from L2, as its pairs are neighbours. It writes T K b. All programs walk over
    the columns in the same order, so those that run together read the same strip of source from L2.
    """
    p = tl.program_id(0).to(PLACE) * PAIRS + tl.arange(0, PAIRS)
    row = tl.load(idx + p, mask=p < P, other=-1)
    here = (row >= 0) & (row < R)
    total = tl.zeros([PAIRS, STEP], WIDE)
    for first in range(0, O, STEP):
        o = first + tl.arange(0, STEP)
        mask = here[:, None] & (o < O)[None, :]
        ours = tl.load(g + (p // K)[:, None] * O + o[None, :], mask=mask, other=0).to(WIDE)
        block = tl.load(source + row.to(PLACE)[:, None] * O + o[None, :], mask=mask, other=0)
        total += ours * block.to(WIDE)
    tl.store(out + p, tl.sum(total, 1).to(out.dtype.element_ty), mask=p < P)


@triton.jit
def bag_kernel(
    rows, weights, starts, ends, source, out, N, O,
    WIDE: tl.constexpr, PLACE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y[s] = sum of weights[p] · source[rows[p]] over starts[s] <= p < ends[s].

    A program computes y for one bag s and COLUMNS columns o: it takes ROWS pairs p at a time.
    Masked: pairs from ends[s] on, columns from O on, and rows that source does not have.

    2 P O FLOPs. It reads P O b bytes of rows, and P (i + b) of pairs for each strip of COLUMNS
    columns; it writes S O b. Strips are the slow axis of the grid, as in `spmm_kernel`.
    """
    s = tl.program_id(0).to(PLACE)
    o = tl.program_id(1).to(PLACE) * COLUMNS + tl.arange(0, COLUMNS)
    start, end = tl.load(starts + s).to(PLACE), tl.load(ends + s).to(PLACE)
    total = tl.zeros([COLUMNS], WIDE)
    for first in range(start, end, ROWS):
        p = first + tl.arange(0, ROWS)
        row = tl.load(rows + p, mask=p < end, other=-1)
        here = (row >= 0) & (row < N)
        weight = tl.load(weights + p, mask=here, other=0).to(WIDE)
        at = source + row.to(PLACE)[:, None] * O + o[None, :]
        block = tl.load(at, mask=here[:, None] & (o < O)[None, :], other=0).to(WIDE)
        total += tl.sum(weight[:, None] * block, axis=0)
    tl.store(out + s * O + o, total.to(out.dtype.element_ty), mask=o < O)


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
    """top, idx = z.topk(k) and the sum of squares of z, for each token of z (T, R).

    A program takes one token, and holds its whole row in COLUMNS registers. Masked: columns from R
    on, which count as the least; and of the K sorted, a power of two, those from k on.

    T (2 R FLOPs and some 4 R comparisons). It reads T R b bytes, and T K G b once more, from a
    cache; it writes T (k (b + 4) + 4).
    """
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


def row_top(
    z: Tensor, k: int, warps: int | None = None, G: int | None = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(top, idx, norm) of top, idx = z.topk(k) and norm = ‖z‖, for z (T, R) in float32 or 16 bits.

    top (T, k) in descending order, idx (T, k) int32, norm (T, 1) float32. Of equal ones the lower
    rank comes first, as in a stable sort; nan before all. None where a row is too long (`LONGEST`),
    in float64, and where z is not contiguous. It reads z once; torch.topk alone reads it three
    times or more. warps of 32 threads hold a row, and G neighbours make a group, a power of two:
    by default a warp for 1024 ranks, and √(R/k).
    """
    T, R = z.shape
    half = z.dtype in (torch.float16, torch.bfloat16)
    if R > LONGEST or not (half or z.dtype == torch.float32) or not z.is_contiguous():
        return None
    K = triton.next_power_of_2(k)
    columns = triton.next_power_of_2(max(R, K))
    G = min(G or triton.next_power_of_2(math.isqrt(columns // K)), columns // K)
    top, idx = z.new_empty(T, k), torch.empty(T, k, dtype=torch.int32, device=z.device)
    sumsq = torch.empty(T, 1, device=z.device)
    if T:
        row_kernel[(T,)](
            z, top, idx, sumsq, R, k,
            HALF=half, COLUMNS=columns, G=G, K=K, num_warps=warps or warps_of(columns),
        )  # fmt: skip
    return top, idx, sumsq.sqrt()


def warps_of(columns: int) -> int:
    """Of 32 threads, for a row: 1024 numbers each."""
    return min(max(columns // 1024, 1), 8)


def spmm(idx: Tensor, v: Tensor, source: Tensor) -> Tensor:
    """y[t] = sum_k v[t, k] · source[idx[t, k]].

    idx (T, K) int32 or int64, v (T, K), source (R, O). Returns (T, O) in source's dtype.
    """
    (T, K), (R, O) = idx.shape, source.shape
    out = source.new_empty(T, O)
    if out.numel():
        grid = (triton.cdiv(T, TOKENS), triton.cdiv(O, COLUMNS))
        spmm_kernel[grid](
            idx.contiguous(), v.contiguous(), source.contiguous(), out, T, K, R, O,
            WIDE=_wide(source), PLACE=_place(idx, source, out), TOKENS=TOKENS, COLUMNS=COLUMNS,
        )  # fmt: skip
    return out


def dots(idx: Tensor, g: Tensor, source: Tensor) -> Tensor:
    """s[t, k] = g[t] · source[idx[t, k]].

    idx (T, K) int32 or int64, g (T, O), source (R, O). Returns (T, K) in g's dtype.
    """
    (T, K), (R, O) = idx.shape, source.shape
    out = g.new_empty(T, K)
    if out.numel():
        dots_kernel[(triton.cdiv(T * K, PAIRS),)](
            idx.contiguous(), g.contiguous(), source.contiguous(), out, T * K, K, R, O,
            WIDE=_wide(source), PLACE=_place(idx, g, source), PAIRS=PAIRS, STEP=STEP,
        )  # fmt: skip
    return out


def bag(
    rows: Tensor, weights: Tensor, starts: Tensor, ends: Tensor, source: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """y[s] = sum of weights[p] · source[rows[p]] over starts[s] <= p < ends[s].

    rows (P,), starts and ends (S,) int32 or int64, weights (P,), source (N, O). Returns (S, O) in
    dtype, by default that of source.
    """
    S, (N, O) = len(starts), source.shape
    out = source.new_empty(S, O, dtype=dtype or source.dtype)
    if out.numel():
        grid = (S, triton.cdiv(O, COLUMNS))
        bag_kernel[grid](
            rows.contiguous(), weights.contiguous(), starts, ends, source.contiguous(), out, N, O,
            WIDE=_wide(source), PLACE=_place(rows, source, out), ROWS=ROWS, COLUMNS=COLUMNS,
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


def _wide(source: Tensor) -> Any:
    return tl.float64 if source.dtype == torch.float64 else tl.float32


def _place(*tensors: Tensor) -> Any:
    """Integers that hold every place in the tensors."""
    return tl.int32 if all(t.numel() < LIMIT for t in tensors) else tl.int64
