"""The Triton kernels beyond what test_sparse.py asks of every path. Without a GPU they run in
Triton's interpreter, one program after another, so all sizes here are small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed (Linux only)")
import triton.language as tl

from minimoe import kernels, sparse
from minimoe.sparse import rank_scores, rank_sparse, top_scores


def test_nothing_is_written_beyond_the_output():
    """Of all tests the first, as what is written there may end the process."""
    T, K, R, O = kernels.TOKENS + 1, 3, 4, kernels.COLUMNS + 1
    idx, v, g = torch.randint(0, R, (T, K)), torch.randn(T, K), torch.randn(T, O)
    source, starts = torch.randn(R, O), torch.arange(T) * K
    size = {"WIDE": tl.float32, "PLACE": tl.int32}
    strip = size | {"COLUMNS": kernels.COLUMNS}
    y, z, s = (torch.full((n + 4096,), torch.nan) for n in (T * O, T * O, T * K))
    kernels.spmm_kernel[2, 2](idx, v, source, y, T, K, R, O, **strip, TOKENS=kernels.TOKENS)
    kernels.bag_kernel[T, 2](
        idx, v, starts, starts + K, source, z, R, O, **strip, ROWS=kernels.ROWS
    )  # fmt: skip
    kernels.dots_kernel[1,](
        idx, g, source, s, T * K, K, R, O, **size, PAIRS=kernels.PAIRS, STEP=kernels.STEP
    )  # fmt: skip
    for out, used in ((y, T * O), (z, T * O), (s, T * K)):
        assert out[:used].isfinite().all() and out[used:].isnan().all()


# T, K, R, O: one token; tokens and pairs that fill one program and a bit; that fill some to the
# last, with K 1 and R 1; columns that fill one strip, or two steps, and one more
SIZES = [
    (1, 3, 5, 33),
    (kernels.TOKENS + 1, 4, 7, 33),
    (2 * kernels.PAIRS, 1, 1, 5),
    (3, 2, 9, kernels.COLUMNS + 1),
]


@pytest.mark.parametrize("limit", [kernels.LIMIT, 0])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("size", SIZES)
def test_products_equal_the_dense_ones(size, index, limit, monkeypatch):
    monkeypatch.setattr(kernels, "LIMIT", limit)
    assert kernels._place(torch.zeros(1)) == (tl.int32 if limit else tl.int64)
    T, K, R, O = size
    idx = torch.randint(0, R, (T, K)).to(index)
    v, g, source = (torch.randn(n, dtype=torch.float64) for n in ((T, K), (T, O), (R, O)))
    H = v.new_zeros(T, R).scatter_add(1, idx.long(), v)
    y, s = kernels.spmm(idx, v, source), kernels.dots(idx, g, source)
    assert torch.allclose(y, H @ source, rtol=0, atol=1e-12)
    assert torch.allclose(s, (g @ source.T).gather(1, idx.long()), rtol=0, atol=1e-12)
    assert torch.equal(y, kernels.spmm(idx, v, source))
    rank, pairs = idx.flatten().sort(stable=True)
    bounds = torch.searchsorted(rank, torch.arange(R + 1).to(index))
    d = kernels.long_bag((pairs // K).to(index), v.flatten()[pairs], bounds, g)
    assert torch.allclose(d, H.T @ g, rtol=0, atol=1e-12)


@pytest.mark.parametrize("limit", [kernels.LIMIT, 0])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_equal_the_plain_paths(size, index, limit, monkeypatch):
    monkeypatch.setattr(kernels, "LIMIT", limit)
    T, K, R, O = size
    idx = torch.randint(0, R, (T, K)).to(index)
    v, g, rows = (
        torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((T, K), (T, O), (R, O))
    )
    frozen, live = rows[: R // 2].detach(), rows[R // 2 :]
    for given, product in ((v, rank_sparse), (g, rank_scores)):
        got = [product(given, idx, frozen, live, path) for path in ("triton", "plain")]
        dy = torch.randn_like(got[0])
        grads = [torch.autograd.grad(y, [given, rows], dy, retain_graph=True) for y in got]
        for mine, plain in zip((got[0], *grads[0]), (got[1], *grads[1]), strict=True):
            assert torch.allclose(mine, plain, rtol=0, atol=1e-12)


def test_a_place_beyond_32_bits():
    """The last row of over 2^31 numbers. Its memory is asked for, and only that row of it used."""
    last = 2**24
    source, ones = torch.empty(last + 1, 128, dtype=torch.bfloat16), torch.ones(1, 1)
    source[last] = torch.arange(128)
    idx, start = torch.tensor([[last]]), torch.tensor([0])
    assert kernels._place(source) == tl.int64 and kernels._place(source[:-1]) == tl.int64
    assert torch.equal(kernels.spmm(idx, ones, source)[0], source[last])
    assert kernels.dots(idx, torch.ones(1, 128), source).item() == 127 * 64
    assert torch.equal(kernels.bag(idx[0], ones[0], start, start + 1, source)[0], source[last])


def test_a_token_sums_alike_wherever_it_stands():
    """To the bit: the order of a sum does not depend on the other tokens, nor on their number."""
    T = 2 * kernels.TOKENS + 3
    idx, v = torch.randint(0, 7, (T, 5)), torch.randn(T, 5)
    g, source, moved = torch.randn(T, 70), torch.randn(7, 70), torch.randperm(T)
    y, s = kernels.spmm(idx, v, source), kernels.dots(idx, g, source)
    assert torch.equal(kernels.spmm(idx[moved], v[moved], source), y[moved])
    assert torch.equal(kernels.dots(idx[moved], g[moved], source), s[moved])
    assert torch.equal(kernels.spmm(idx[:1], v[:1], source), y[:1])
    assert torch.equal(kernels.dots(idx[:1], g[:1], source), s[:1])


class NothingWaits(TorchDispatchMode):
    """No operator that hands a number, or a length, from the device to Python."""

    WAIT = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func.name().split("::")
        if space == "minimoe":  # a mode does not see what an operator calls, so call it here
            with self:
                return getattr(sparse, f"_{name}")(*args)
        assert name.split(".")[0] not in self.WAIT and not name.startswith("unique"), name
        indices = args[1] if name.startswith("index.Tensor") else []
        assert all(i is None or i.dtype != torch.bool for i in indices), name  # as nonzero
        return func(*args, **(kwargs or {}))


def step(path, kept, detach):
    """Forward and backward of all that a layer asks for. Of 60 ranks, 3 wide, z is kept for it up
    to 3 tokens (`top_scores`)."""
    T = 3 if kept else 4
    x, v = torch.randn(T, 3, requires_grad=True), torch.randn(T, 4, requires_grad=True)
    frozen, live = torch.randn(55, 3), torch.randn(5, 3, requires_grad=True)
    with NothingWaits():
        top, idx, norm = top_scores(x, frozen, live, 4, path, detach)
        y = rank_sparse(v * top / norm, idx, frozen, live, path, check=False)
        z = rank_scores(x, idx, frozen, live, path, check=False)
        (y.square().sum() + z.sum()).backward()


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("detach", [True, False])
def test_nothing_waits_for_the_device(kept, detach):
    step("triton", kept, detach)


@pytest.mark.parametrize("path", ["compact", "gather"])
def test_what_waits_is_seen(path):
    with pytest.raises(AssertionError, match=r"nonzero|_local_scalar_dense"):
        step(path, True, True)


def test_bags_of_any_length():
    """Empty, shorter than a block of rows, of one block, and of several."""
    bounds = torch.tensor([0, 0, 5, 5, 21, 21 + 2 * kernels.ROWS + 1])
    rows = torch.randint(0, 9, (int(bounds[-1]),))
    weights, source = torch.randn(len(rows)), torch.randn(9, 11)
    y = kernels.bag(rows, weights, bounds[:-1], bounds[1:], source)
    for s in range(5):
        p = slice(bounds[s], bounds[s + 1])
        assert torch.allclose(y[s], weights[p] @ source[rows[p]], atol=1e-5)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 128, 200])
def test_long_bags_around_the_size_of_a_chunk(length):
    """The first pairs belong to no bag, as those of frozen ranks do; one bag is empty."""
    assert kernels.CHUNK == 64
    bounds = torch.tensor([3, 3 + length, 3 + length, 10 + length])
    rows, weights = torch.randint(0, 9, (10 + length,)), torch.randn(10 + length)
    source = torch.randn(9, 5)
    y = kernels.long_bag(rows, weights, bounds, source)
    for s in range(3):
        p = slice(bounds[s], bounds[s + 1])
        assert torch.allclose(y[s], weights[p] @ source[rows[p]], atol=1e-5)


def test_long_bags_keep_float32_between_chunks():
    """1 + 1/256 + ... in bfloat16 would stay 1 where a chunk's sum were rounded to it."""
    count = 10 * kernels.CHUNK
    weights = torch.full((count,), 1 / 256, dtype=torch.bfloat16)
    source = torch.ones(1, 1, dtype=torch.bfloat16)
    weights[0] = 1.0  # sum: 1 + 639/256 = 3.496, which bfloat16 gives as 3.5, or 3.484 cut off
    y = kernels.long_bag(
        torch.zeros(count, dtype=torch.long), weights, torch.tensor([0, count]), source
    )
    assert y.item() in (3.5, 3.484375)


@pytest.mark.parametrize("limit", [kernels.LIMIT, 0])
def test_indices_out_of_range_read_nothing(limit, monkeypatch):
    """Nor do those that 32 bits would bring back into range. Around the rows all is nan."""
    monkeypatch.setattr(kernels, "LIMIT", limit)
    around = torch.full((6, 5), torch.nan)
    source = around[1:5].normal_()
    idx, starts = torch.tensor([[0, 4], [-1, 3], [2**32 + 1, 1 - 2**32]]), torch.tensor([0, 2, 4])
    wanted = torch.stack([source[0], source[3], torch.zeros(5)])
    assert torch.equal(kernels.spmm(idx, torch.ones(3, 2), source), wanted)
    assert torch.equal(kernels.spmm(idx[:2].int(), torch.ones(2, 2), source), wanted[:2])
    y = kernels.bag(idx.flatten(), torch.ones(6), starts, starts + 2, source)
    assert torch.equal(y, wanted)
    s = kernels.dots(idx, torch.ones(3, 5), source)
    assert torch.allclose(s.sum(1), wanted.sum(1)) and (s == 0).sum() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("R", "k"), [(1, 1), (5, 1), (16, 16), (37, 5), (64, 16), (129, 16)])
def test_the_row_pass_is_a_stable_sort(R, k, dtype):
    z = torch.randn(4, R).to(dtype)
    z[0, ::2] = z[0, 0]  # ties
    z[1], z[1, R // 2], z[1, R // 3] = 0.0, -0.0, -1.0  # both zeros are equal
    z[2, R // 2] = -torch.inf
    top, idx, norm = kernels.row_top(z, k)
    values, places = z.float().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(idx.long(), places[:, :k]) and idx.dtype == torch.int32
    assert torch.equal(top.float(), values[:, :k]) and top.dtype == dtype
    assert torch.allclose(norm, z.float().norm(dim=1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_comes_first_and_is_in_the_norm(dtype):
    z = torch.randn(3, 20).to(dtype)
    z[1, 7], z[1, 3], z[2, 5] = torch.nan, torch.inf, -torch.nan
    top, idx, norm = kernels.row_top(z, 3)
    assert idx[1, :2].tolist() == [7, 3] and idx[2, 0] == 5
    assert top.isnan().sum(1).tolist() == norm.isnan().sum(1).mul(1).tolist() == [0, 1, 1]


def test_what_the_row_pass_leaves_to_torch():
    assert kernels.row_top(torch.randn(2, 9, dtype=torch.float64), 3) is None
    assert kernels.row_top(torch.randn(9, 2).T, 3) is None
    assert kernels.row_top(torch.randn(1, kernels.LONGEST + 1), 3) is None
    assert [len(found) for found in kernels.row_top(torch.randn(0, 9), 3)] == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 32])
def test_compiled_for_an_h100_nothing_spills(times, tmp_path):
    """Ahead of time, with no GPU. With up to 64 registers a thread, a multiprocessor holds 8
    programs of the products at once. Tiles 32 times as wide show that a spill would be seen."""
    script = Path(__file__).with_name("compile_ahead.py")
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environ["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, script, tmp_path, str(times)],
        env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    assert len(used) == (45 if times == 1 else 3)
    for name, use in used.items():
        if times > 1:
            assert use["STACK"] + use["LOCAL"] > 0, (name, use)
            continue
        most = 112 if name.startswith("row") else 144 if "fp64" in name else 72
        assert use["STACK"] == use["LOCAL"] == 0 and use["REG"] <= most, (name, use)
        assert use["I64"] or "places int32" in name, name
        assert not (use["I64"] and "idx i32, places int32" in name), name
