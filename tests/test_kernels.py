"""The Triton kernels beyond what test_sparse.py asks of every path. Without a GPU they run in
Triton's interpreter, one program after another, so all sizes here are small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (Linux only)")
from minimoe import kernels


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


def test_indices_out_of_range_read_nothing():
    source, idx = torch.randn(4, 5), torch.tensor([[0, 4], [-1, 3]])
    starts = torch.tensor([0, 2])
    y = kernels.bag(idx.flatten(), torch.ones(4), starts, starts + 2, source)
    assert torch.equal(y, source[[0, 3]])
    s = kernels.dots(idx, torch.ones(2, 5), source)
    assert s[0, 1] == s[1, 0] == 0
    assert torch.allclose(s[[0, 1], [0, 1]], source[[0, 3]].sum(1))


@pytest.mark.parametrize("K", [1, 16, 17])
def test_dots_wider_than_a_block(K):
    source, g = torch.randn(9, kernels.COLUMNS + 3), torch.randn(2, kernels.COLUMNS + 3)
    idx = torch.randint(0, 9, (2, K))
    assert torch.allclose(kernels.dots(idx, g, source), (g @ source.T).gather(1, idx), atol=1e-4)


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
@pytest.mark.parametrize(("columns", "fits"), [(0, True), (4096, False)])
def test_compiled_for_an_h100_nothing_spills(columns, fits, tmp_path):
    """Ahead of time, with no GPU; blocks of 4096 columns show that a spill would be seen."""
    script = Path(__file__).with_name("compile_ahead.py")
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environ["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, script, tmp_path, str(columns)],
        env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    assert len(used) == (17 if fits else 8)
    for name, use in used.items():
        assert (use["STACK"] == use["LOCAL"] == 0) == fits, (name, use)
        assert use["REG"] <= 128
