# %% [markdown]
# # The sparse product: from a masked GEMM to a gather to Triton, and where each pays
#
# A gate that keeps K of R ranks leaves a matrix that is nearly all zeros. This notebook computes
# with it in five ways that give the same numbers, counts what each costs, and measures where the
# sparse one is faster, and where the dense one is.
#
# Before this: notebook 01. A quarter of a minute on a laptop; nothing is trained.

# %%
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator, NullFormatter
from torch import nn
from torch.nn.functional import embedding_bag
from torch.utils.flop_counter import FlopCounterMode

import minimoe
from minimoe import MoRA
from minimoe.bench import Clock, DenseMasked, rounds
from minimoe.sparse import (
    CROSSOVER,
    SMALL,
    is_plain,
    rank_scores,
    rank_sparse,
    sddmm,
    spmm,
    spmm_t,
    top_scores,
)
from minimoe.tools.exercise import exercise
from minimoe.tools.plots import COLOURS, MARKERS, draw_growth

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)
torch.manual_seed(0)
plt.rcParams["figure.dpi"] = 80
plt.rcParams["figure.constrained_layout.use"] = True


def close(a, b):
    """Equal to rounding, in float64."""
    return a.shape == b.shape and bool((a - b).abs().max() < 1e-10)


# %% [markdown]
# ## One product
#
# Of R ranks each token keeps K. Call `idx[t, k]` the ranks that token t keeps, and `v[t, k]` what
# each of them says (its gate times what it sees). The update is
#
#     y[t] = Σ_k  v[t, k] · B[idx[t, k]]        B (R, O), one row per rank
#
# or, with a matrix H (T, R) that holds `v` at `idx` and zeros elsewhere, y = H B. A masked dense
# layer stores H. Letters as everywhere in the package: T tokens, D in, O out, R ranks in all, K
# kept.

# %%
T, R, K, O = 48, 64, 4, 32
wide = {"device": device, "dtype": torch.float64}
idx = torch.rand(T, R, device=device).topk(K).indices  # K different ranks for each token
v = torch.randn(T, K, **wide)
B = torch.randn(R, O, **wide)

H = torch.zeros(T, R, **wide).scatter(1, idx, v)
y = H @ B

assert int((H != 0).sum()) == T * K and bool((y != 0).all())  # of T · R; of T · O
assert close(y, torch.stack([sum(v[t, k] * B[idx[t, k]] for k in range(K)) for t in range(T)]))

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.7), width_ratios=[1.6, 1])
shown = H.abs().cpu()
left.imshow(shown, cmap="cividis", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
left.set(xlabel="rank", ylabel="token", title=f"H: {K} of {R} in a row are not zero")
right.imshow(y.abs().cpu(), cmap="cividis", vmin=0, vmax=6, aspect="auto", interpolation="nearest")
right.set(xlabel="output", ylabel="token", title="y = H B has no zeros")
plt.show()

# %% [markdown]
# ## Five paths, the same numbers
#
# `rank_sparse(v, idx, frozen, live, path)` is that product; B comes in two parts, rows of finished
# tasks and rows in training. `path` says how it is computed, and changes nothing else:
#
# | path | what it does | multiply-adds |
# |---|---|---|
# | `plain` | scatter v into H, one GEMM; its backward is autograd's | T·R·O |
# | `dense` | the same; its backward is the products of the next section | T·R·O |
# | `gather` | read the K chosen rows of each token, weight and add them | T·K·O |
# | `compact` | dense, over only the ranks that some token chose | T·(ranks used)·O |
# | `triton` | as gather, in a kernel of its own, for a GPU | T·K·O |
#
# Gather is one call of torch. An *embedding bag* is a sum of weighted rows of a table, the same
# equation: rows `idx[t]` of B, weights `v[t]`.

# %%
frozen, live = B[:48], B[48:]
for path in ("plain", "dense", "gather", "compact"):
    assert close(rank_sparse(v, idx, frozen, live, path), y), path
assert close(embedding_bag(idx, B, per_sample_weights=v, mode="sum"), y)

# a rank named twice counts twice; one that is to say nothing has v = 0, and needs no branch
twice = torch.tensor([[7, 7, 3]], device=device)
values = torch.tensor([[1.0, 2.0, 0.0]], **wide)
assert close(rank_sparse(values, twice, frozen, live, "gather"), 3 * B[7:8])

# %% [markdown]
# ## The same product on a GPU, in tiles
#
# Triton compiles Python functions to GPU kernels. A kernel is written for one *program*, and
# thousands of programs run side by side. Each computes one *tile* of the output, here a few tokens
# and a few columns, and nobody else writes there: so nothing has to be locked, and the sums have
# one order. A tile has a fixed size; where it hangs over the edge it is *masked*, that is, cut off.
# With tensors of torch in place of Triton's, one program after another:

# %%
TOKENS, COLUMNS = 5, 12  # of a tile; 48 tokens and 32 columns are no multiples of these


def program(i, j):
    """The tile of y in place (i, j) of the grid."""
    t = i * TOKENS + torch.arange(TOKENS, device=device)
    o = j * COLUMNS + torch.arange(COLUMNS, device=device)
    t, o = t[t < T], o[o < O]  # masked
    total = torch.zeros(len(t), len(o), **wide)
    for k in range(K):
        row = idx[t, k]  # one row of B for each token of the tile
        total += v[t, k, None] * B[row[:, None], o[None, :]]
    tiles[t[:, None], o[None, :]] = total


tiles = torch.full_like(y, torch.nan)
for j in range(-(-O // COLUMNS)):  # a strip of columns at a time: its part of B stays in a cache
    for i in range(-(-T // TOKENS)):
        program(i, j)
assert close(tiles, y)

# %% [markdown]
# This is the kernel, all of it, with what it computes and moves in its docstring. In place of
# `idx[t, k]` stands an address, `idx + t * K + k`: `tl.load` reads there, unless the mask says no,
# and `tl.store` writes. A rank that B does not have is masked too.

# %%
source = Path(minimoe.__file__).with_name("kernels.py").read_text(encoding="utf-8")
start = source.index("@triton.jit\ndef spmm_kernel")
print(source[start : source.index("\n\n\n", start)])

# %% [markdown]
# `dots_kernel` beside it is `sddmm`, the second product of the next section; `row_kernel` finds in
# one look over a token's scores the k largest and the norm, which torch does in several. Without a
# GPU, Triton's interpreter runs the same source on the CPU: slow, and the same sums.
# `TRITON_INTERPRET` must be set before triton is imported: it gets a process of its own.

# %%
TRY = """
import sys, torch
from minimoe.sparse import rank_sparse, sddmm
torch.manual_seed(0)
T, R, K, O, wide = 12, 24, 3, 17, {"dtype": torch.float64, "device": sys.argv[1]}
idx = torch.rand(T, R, device=sys.argv[1]).topk(K).indices
v, B, g = torch.randn(T, K, **wide), torch.randn(R, O, **wide), torch.randn(T, O, **wide)
y = [rank_sparse(v, idx, B[:8], B[8:], path) for path in ("triton", "dense")]
s = [sddmm(idx, g, B[:8], B[8:], path) for path in ("triton", "dense")]
gap = max((a - b).abs().max().item() for a, b in (y, s))
print("triton and dense differ by", "less than 1e-10" if gap < 1e-10 else gap)
"""
if importlib.util.find_spec("triton"):
    interpret = {} if device == "cuda" else {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", TRY, device],
        env=os.environ | interpret,
        capture_output=True,
        text=True,
    )
    print((run.stdout or run.stderr).strip())
    assert "less than 1e-10" in run.stdout
else:
    print("triton is not installed here, so its path is not tried; on Linux: pip install triton")

# %% [markdown]
# ## Three products are enough for training
#
# Of y = H B one needs the gradient to `v` and to B. With g = dloss/dy these are
#
# | product | equation | dense form |
# |---|---|---|
# | `spmm` | y[t] = Σ_k v[t, k] · B[idx[t, k]] | H B |
# | `sddmm` | s[t, k] = g[t] · B[idx[t, k]] | (g Bᵀ) at idx |
# | `spmm_t` | d[i] = Σ v[t, k] · g[t] over all (t, k) with idx[t, k] = i | Hᵀ g |
#
# and the gradients of each of the three are the other two. So nothing else has to be written, not
# for the forward, not for the backward, and not for a gradient of a gradient.


# %%
def grads(output, inputs, gradient):
    return torch.autograd.grad(output, inputs, gradient)


def masked(v):
    return torch.zeros(T, R, **wide).scatter(1, idx, v)


none = B[:0]  # no frozen rows
a, b = v.clone().requires_grad_(), B.clone().requires_grad_()
c = torch.randn(T, O, **wide).requires_grad_()
G, S, Z = torch.randn(T, O, **wide), torch.randn(T, K, **wide), torch.randn(R, O, **wide)

for path in ("dense", "gather", "compact"):
    # spmm: to v an sddmm, to B an spmm_t
    dv, dB = grads(masked(a) @ b, (a, b), G)  # autograd, of the dense form
    assert close(sddmm(idx, G, none, B, path), dv)
    assert close(spmm_t(idx, v, G, 0, R, path), dB)
    for mine, dense in zip(grads(spmm(idx, a, none, b, path), (a, b), G), (dv, dB), strict=True):
        assert close(mine, dense)

    # sddmm: to g an spmm, to B an spmm_t
    dg, dB = grads((c @ b.T).gather(1, idx), (c, b), S)
    assert close(spmm(idx, S, none, B, path), dg)
    assert close(spmm_t(idx, S, c.detach(), 0, R, path), dB)
    for mine, dense in zip(grads(sddmm(idx, c, none, b, path), (c, b), S), (dg, dB), strict=True):
        assert close(mine, dense)

    # spmm_t: to v an sddmm, to g an spmm
    dv, dg = grads(masked(a).T @ c, (a, c), Z)
    assert close(sddmm(idx, c.detach(), none, Z, path), dv)
    assert close(spmm(idx, v, none, Z, path), dg)
    both = grads(spmm_t(idx, a, c, 0, R, path), (a, c), Z)
    for mine, dense in zip(both, (dv, dg), strict=True):
        assert close(mine, dense)

# rank_scores is sddmm for a gate: what the kept ranks see, z[t, k] = x[t] · A[idx[t, k]]
x, A = torch.randn(T, 20, **wide), torch.randn(R, 20, **wide)
for path in ("plain", "gather"):
    assert close(rank_scores(x, idx, A[:48], A[48:], path), (x @ A.T).gather(1, idx))

# frozen rows get no gradient, and none is computed: spmm_t is asked for the live ranks only
F = 48
assert close(spmm_t(idx, v, G, F, R, "gather"), spmm_t(idx, v, G, 0, R, "dense")[F:])

# %% [markdown]
# ## Counting
#
# A multiply-add is two FLOPs. Torch counts those of its matrix products, so that a formula can be
# held against what runs.


# %%
def counted(f):
    """Multiply-adds of the matrix products in a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        f()
    return counter.get_total_flops() // 2


assert counted(lambda: H @ B) == T * R * O

# %% [markdown]
# Less arithmetic is not yet less time. For each number that a GEMM fetches it does many
# multiply-adds; a gather does one. *Arithmetic intensity* is FLOPs per byte moved. With float32 and
# int64 indices, and each operand read once by the GEMM, each chosen row once per token by the
# gather:
#
#     dense     2·T·R·O / (4·(T·R + R·O + T·O))
#     gather    2·T·K·O / (4·T·K·O + 12·T·K + 4·T·O)        < 1/2, whatever R is
#
# A machine that does P FLOPs and moves M bytes in a second runs at min(P, M · intensity) at most:
# its *roofline*.


# %%
def intensity(path, T, R, K, O):
    if path == "dense":
        return 2 * T * R * O / (4 * (T * R + R * O + T * O))
    return 2 * T * K * O / (4 * T * K * O + 12 * T * K + 4 * T * O)


T, K, O = 512, 8, 256
for R in (64, 512, 4096):
    work = [2 * T * rows * O / 1e6 for rows in (R, K)]
    rate = [intensity(path, T, R, K, O) for path in ("dense", "gather")]
    print(
        f"R {R:5}   dense {work[0]:7.1f} MFLOP at {rate[0]:5.1f} FLOP/byte"
        f"   gather {work[1]:5.1f} MFLOP at {rate[1]:.2f}"
    )
    assert rate[0] > 20 and rate[1] < 0.5 and work[0] / work[1] == R / K

# %% [markdown]
# ## Measured, here and now
#
# Each of the `rounds` runs every contender once, in rotating order, and ratios are taken within a
# round, so that a slow moment affects both sides. The median over rounds is reported. `Clock` times
# one call, on a GPU by its events.


# %%
def forward(v, idx, B, path):
    with torch.no_grad():
        rank_sparse(v, idx, B[:0], B, path)


def step(v, idx, B, dy, path):
    a, b = v.requires_grad_(), B.requires_grad_()
    torch.autograd.grad(rank_sparse(a, idx, b[:0].detach(), b, path), (a, b), dy)


clock = Clock(device)
PATHS = ("dense", "gather")
SHARES = (1, 2, 4, 8, 16, 64, 256)  # R / K
ms, ratio = {}, {}
for share in SHARES:
    R = share * K
    idx = torch.rand(T, R, device=device).topk(K).indices
    v, B, dy = (torch.randn(*s, device=device) for s in ((T, K), (R, O), (T, O)))
    calls = {
        "forward": {path: partial(forward, v, idx, B, path) for path in PATHS},
        "training": {path: partial(step, v, idx, B, dy, path) for path in PATHS},
    }
    for which, contenders in calls.items():
        times = rounds(contenders, 15, clock)
        for path in PATHS:
            ms[which, path, share] = statistics.median(times[path])
            each = [t / d for t, d in zip(times[path], times["dense"], strict=True)]
            ratio[which, path, share] = statistics.median(each)

print(f"T {T}, O {O}, K {K}, {device}; time of gather ÷ dense")
for which in calls:
    cells = "  ".join(f"{share}: {ratio[which, 'gather', share]:.2f}" for share in SHARES)
    print(f"{which:9} at R/K  {cells}")
if device == "cpu":
    assert ratio["forward", "gather", 64] < 0.7
    assert ratio["training", "gather", 256] < 0.7
    assert ratio["training", "gather", 1] > 1  # no zeros to skip

# %% [markdown]
# Where every rank is kept (R/K = 1) there is nothing to skip, and the GEMM trains faster. As R
# grows, the GEMM's work grows with it and the gather's does not. The stored measurement is of
# larger sizes and on two cores (`minimoe bench`; bars are as long as between the quartiles).

# %%
bench = json.loads(Path("results/bench-cpu.json").read_text(encoding="utf-8"))
RANKS = sorted({row["R"] for row in bench["rows"] if row["part"] == "layer"})


def row(part, which, R, name, routing="random"):
    """One row of the stored measurement."""
    wanted = {"part": part, "pass": which, "R": R, "name": name, "routing": routing}
    (match,) = [each for each in bench["rows"] if wanted.items() <= each.items()]
    return match


figure, grid = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
for i, which in enumerate(("forward", "training")):
    for j, path in enumerate(("gather", "compact")):
        style = {"color": COLOURS[j], "marker": MARKERS[2 * i + j], "ls": "-" if i == 0 else "--"}
        label = f"{path}, {'forward' if i == 0 else 'training step'}"
        if path in PATHS:
            here = [ratio[which, path, share] for share in SHARES]
            grid[0].plot(SHARES, here, ms=5, **style)
        there = [row("up-projection", which, R, path)["ratio"] for R in RANKS]
        grid[1].errorbar(
            [R / bench["top_k"] for R in RANKS],
            [r["median"] for r in there],
            [r["iqr"] / 2 for r in there],
            label=label,
            ms=5,
            capsize=2,
            **style,
        )
grid[0].set_title(f"here: T {T}, O {O}, K {K}", fontsize=10)
grid[1].set_title(
    f"stored: T {bench['tokens']}, O {bench['width']}, K {bench['top_k']}, CPU", fontsize=10
)
for axes in grid:
    axes.axhline(1, color="black", lw=1)
    axes.set(xlabel="ranks in all per rank kept, R/K", xscale="log", yscale="log", xlim=(0.8, 320))
    axes.set_xticks(SHARES, SHARES)
    axes.set_xticks([], minor=True)
    axes.set_yticks([0.03, 0.1, 0.3, 1, 3], ["0.03", "0.1", "0.3", "1", "3"])
    axes.set_yticks([], minor=True)
    axes.grid(alpha=0.3)
grid[0].set_ylabel("time ÷ dense's")
figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
figure.suptitle("The more ranks there are to skip, the more a gather wins", fontsize=11)
plt.show()

for which in ("forward", "training"):
    stored = [row("up-projection", which, R, "gather")["ratio"]["median"] for R in RANKS]
    assert stored == sorted(stored, reverse=True) and stored[-1] < 0.2
    for R in RANKS:  # tokens that choose at random use all ranks: compact has nothing to leave out
        assert row("up-projection", which, R, "compact")["ratio"]["median"] > 0.8
# over 64 times the ranks: rows of a larger B are less often in a cache, and that is all
grown = {
    path: row("up-projection", "forward", RANKS[-1], path)["ms"]["median"]
    / row("up-projection", "forward", RANKS[0], path)["ms"]["median"]
    for path in ("dense", "gather")
}
print(f"R {RANKS[0]} to {RANKS[-1]}: dense takes {grown['dense']:.0f} x as long,", end=" ")
print(f"gather {grown['gather']:.1f} x")
assert grown["dense"] > 10 and grown["gather"] < 10
# where all tokens choose among the same 64 ranks, as a batch of one task may, compact pays
assert row("up-projection", "forward", 1024, "compact", "pool")["ratio"]["median"] < 0.5

# %% [markdown]
# On the roofline, the roof being the best rate seen here of any GEMM, and a plain copy's. The time
# of dense includes the making of H. Where the gather stands above the slope, its rows come from a
# cache, which is faster than memory. The gather has a lower rate of FLOPs than dense; it is faster
# only because it does R/K times less work.

# %%
side = 1024
square = torch.randn(side, side, device=device)
POINTS = [(path, share) for path in ("dense", "gather") for share in SHARES]
large = torch.randn(2**24, device=device)
target = torch.empty_like(large)
roof = rounds({"gemm": lambda: square @ square, "copy": lambda: target.copy_(large)}, 7, clock)
work = {(path, n): 2 * T * O * K * (n if path == "dense" else 1) for path, n in POINTS}
rate = {(path, n): work[path, n] / ms["forward", path, n] / 1e6 for path, n in POINTS}  # GFLOP/s
peak = max(2 * side**3 / min(roof["gemm"]) / 1e6, *rate.values())
speed = 2 * large.nbytes / min(roof["copy"]) / 1e6  # GB/s
if device == "cpu":
    assert rate["dense", 64] > rate["gather", 64]

figure, axes = plt.subplots(figsize=(8, 3))
x = [0.1, peak / speed, 400]
axes.plot(x, [min(peak, speed * i) for i in x], color="black", lw=1.5, label="roof")
for j, path in enumerate(("dense", "gather")):
    at = [intensity(path, T, share * K, K, O) for share in SHARES]
    heights = [rate[path, share] for share in SHARES]
    axes.plot(at, heights, MARKERS[j], color=COLOURS[j], label=f"{path}, R/K = 1 to {SHARES[-1]}")
axes.set(xlabel="arithmetic intensity (FLOP per byte)", ylabel="GFLOP per second")
axes.set(xscale="log", yscale="log")
for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
axes.set_title(
    "Among many ranks dense does more in a second; the gather has less to do", fontsize=11
)
axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## What `auto` picks
#
# Up to `SMALL` tokens times ranks `auto` is `plain`: in a small layer the bookkeeping of the other
# paths costs more than their arithmetic saves. All of such a layer is plain, MoRA's gate too.

# %%
print(SMALL)
tokens = torch.empty(SMALL[device] // 64 + 1, 1, device=device)
assert is_plain("auto", tokens[1:], 64) and not is_plain("auto", tokens, 64)

small = MoRA(nn.Linear(64, 64), rank=64, top_k=4).to(device)
nn.init.normal_(small.B)
x = torch.randn(64, 64, device=device)


def layer_step(path):
    small.path = path
    y = small(x)
    y.sum().backward()
    return y


y = {path: layer_step(path) for path in ("auto", "plain", "gather")}
assert torch.equal(y["auto"], y["plain"])  # the same bits
assert torch.allclose(y["gather"], y["plain"], atol=1e-4)  # the same numbers

times = rounds({path: partial(layer_step, path) for path in ("plain", "gather")}, 15, clock)
each = [g / p for g, p in zip(times["gather"], times["plain"], strict=True)]
print(f"64 tokens, 64 ranks: gather takes {statistics.median(each):.1f} x as long as plain")
if device == "cpu":
    assert statistics.median(each) > 1

# %% [markdown]
# In larger layers each of the three products chooses by itself, at a number of rows per kept rank
# that was measured on a CPU and, for a GPU, only worked out (an H100's GEMM is so fast that
# skipping has to save a factor of seventy). `spmm_t` counts live rows only. On a device of your own
# `minimoe bench --device cuda` measures these numbers, and the environment variable `MINIMOE_BENCH`
# makes `auto` go by them.

# %%
print(CROSSOVER)
assert CROSSOVER["cpu"]["spmm"] == 2 and CROSSOVER["cpu"]["sddmm"] == 5
assert all(CROSSOVER["cuda"][product] > CROSSOVER["cpu"][product] for product in CROSSOVER["cpu"])

# the same path gives the same bits, another path others: the bits say what auto picked
sparse = "triton" if device == "cuda" and importlib.util.find_spec("triton") else "gather"
many = SMALL[device] // K + 1  # tokens, so that no R of these is small
for share in (1, 4, 256):
    R = share * K
    idx = torch.rand(many, R, device=device).topk(K).indices
    v, B = torch.randn(many, K, device=device), torch.randn(R, O, device=device)
    bits = {path: rank_sparse(v, idx, B[:0], B, path) for path in ("auto", "dense", sparse)}
    (pick,) = [path for path in ("dense", sparse) if torch.equal(bits["auto"], bits[path])]
    print(f"R/K {share:3}: {pick}")
    assert pick == ("dense" if share < CROSSOVER[device]["spmm"] else sparse)

# %% [markdown]
# ## The whole layer: what cannot be skipped
#
# MoRA scores all its ranks, z = x Aᵀ, and needs every z for ‖z‖. That GEMM stays. Counted in
# multiply-adds of a forward pass, beside the same layer with a mask:
#
#     masked    T·(D·O + D·R + R·O)
#     MoRA      T·(D·O + D·R + K·O)
#
# so with D = O no more than half of it can go, however many ranks there are.

# %%
for R in (16, 256, 4096, 2**20):
    D, O, K = 768, 768, 16
    gain = (D * O + D * R + R * O) / (D * O + D * R + K * O)
    print(f"R {R:8,}: masked ÷ MoRA {gain:.2f}")
    assert 1 <= gain < 2

# %% [markdown]
# Training has one more dense term. The gradient through the norm is dense in z: with
# c = (dloss/d‖z‖) / ‖z‖, one number per token,
#
#     dx = (sparse part) + c · z A          z A = x Aᵀ A = x (Aᵀ A)
#
# and the bracket on the right is the trick of `top_scores`, which MoRA's gate calls unless it is
# plain: AᵀA is (D, D) whatever R is. It costs (T + R)·D·D instead of T·R·D, and z itself need not
# be kept. It is the exact gradient. The frozen rows' part of AᵀA is the same in all steps of a
# task, and is kept: a step costs (T + r)·D·D then, for r live rows.

# %%
T, D, R, K = 200, 24, 96, 4  # (T + R)·D·D < T·R·D: the bracket is used
x, A = torch.randn(T, D, **wide), torch.randn(R, D, **wide)
assert (T + R) * D * D < T * R * D
assert close((x @ A.T) @ A, x @ (A.T @ A))


def speaks(top, norm):  # like a gate: the kept scores over the norm
    return ((top / norm / 0.1).softmax(-1) * top).square().sum()


a, b = x.clone().requires_grad_(), A.clone().requires_grad_()
top, idx, norm = top_scores(a, A[:0], b, K)
mine = torch.autograd.grad(speaks(top, norm), (a, b))

z = a @ b.T  # as plain autograd has it
plain = torch.autograd.grad(speaks(z.topk(K).values, z.norm(dim=1, keepdim=True)), (a, b))
for got, wanted in zip(mine, plain, strict=True):
    assert close(got, wanted)

tokens, width = bench["tokens"], bench["width"]
least = tokens * width / (tokens - width)  # T·R·D > (T + R)·D·D above this R
print(f"at T {tokens}, D {width} the bracket is cheaper from R = {least:.0f}")
assert 900 < least < 1000

# %% [markdown]
# One can also hold the gate constant in the backward pass (`MoRA(detach_gate=True)`): then only
# chosen ranks are touched. That is another method, not a faster way to the same. How much the
# gradient to x turns depends on how sharp the gate is:

# %%
D = O = 64
cosine = {}
for tau in (1.0, 0.1, 0.02, 0.005):
    torch.manual_seed(0)
    turned = []
    for detach in (False, True):
        torch.manual_seed(0)
        layer = MoRA(nn.Linear(D, O), rank=32, top_k=8, tau=tau, detach_gate=detach)
        for _ in range(7):
            layer.grow()
        layer = layer.to(**wide)
        with torch.no_grad():
            layer.frozen_B.normal_()
            layer.B.normal_()
        x = torch.randn(64, D, **wide).requires_grad_()
        update = layer(x) - layer.base(x)
        turned.append(torch.autograd.grad(update, x, torch.randn(64, O, **wide))[0].flatten())
    cosine[tau] = torch.cosine_similarity(*turned, dim=0).item()
    print(f"tau {tau:5}: cosine of the detached gradient to the exact one {cosine[tau]:.3f}")
assert cosine[1.0] > 0.98 and cosine[1.0] > cosine[0.1] > cosine[0.02] > cosine[0.005]
assert cosine[0.005] < 0.9

# %% [markdown]
# ## Where dense wins
#
# Stored, of a whole MoRA layer (16 ranks live, D = O = 768): time as a multiple of the plain
# `nn.Linear` of that size, and what a training step holds in memory.

# %%
base = {w: row("beside", w, 128, "linear")["ms"]["median"] for w in ("forward", "training")}
cost, MiB = {}, {}
for name in ("dense-masked", "mora", "mora detached"):
    for which in ("forward", "training"):
        for R in RANKS:
            cost[name, which, R] = row("layer", which, R, name)["ms"]["median"] / base[which]
            MiB[name, which, R] = row("layer", which, R, name)["peak"] / 2**20

figure, grid = plt.subplots(1, 3, figsize=(9, 3.2))
panels = [
    ("forward", cost, "forward: time ÷ plain linear's"),
    ("training", cost, "step: time ÷ plain linear's"),
    ("training", MiB, "step: memory held (MiB)"),
]
for axes, (which, what, title) in zip(grid, panels, strict=True):
    for j, name in enumerate(("dense-masked", "mora", "mora detached")):
        line = [what[name, which, R] for R in RANKS]
        axes.plot(RANKS, line, color=COLOURS[j], marker=MARKERS[j], ms=5, label=name)
    if what is cost:
        axes.axhline(1, color="black", lw=1)
    axes.set(xscale="log", yscale="log", xlabel="ranks in all, R")
    axes.set_title(title, fontsize=10)
    axes.set_xticks(RANKS, RANKS)
    axes.set_xticks([], minor=True)
    ticks = [1, 2, 5, 10, 20] if what is cost else [50, 100, 200, 400]
    axes.set_yticks(ticks, ticks)
    axes.set_yticks([], minor=True)
    axes.grid(alpha=0.3)
figure.legend(
    *grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
)
figure.suptitle(
    "All take longer than the plain layer; among many ranks the mask by far", fontsize=11
)
plt.show()

for (name, which, R), times in cost.items():
    assert times > 1, (name, which, R)  # at every R, of either kind
for R in RANKS:  # in memory the mask is worse, among many ranks much worse
    assert MiB["dense-masked", "training", R] > MiB["mora", "training", R]
assert MiB["dense-masked", "training", 4096] > 5 * MiB["mora", "training", 4096]
# at the largest R: under 2 x forward, as counted; more in a step, by the bracket
assert 1.4 < cost["dense-masked", "forward", 4096] / cost["mora", "forward", 4096] < 2
assert cost["dense-masked", "training", 4096] / cost["mora", "training", 4096] > 2.5
# at 64 ranks next to nothing; at 256 some
gains = {
    (which, R): cost["dense-masked", which, R] / cost["mora", which, R]
    for which in ("forward", "training")
    for R in RANKS
}
assert all(abs(gains[which, 64] - 1) < 0.15 for which in ("forward", "training"))
assert 1.05 < gains["forward", 256] < gains["training", 256] < 1.5
# the live ranks' gradient costs the same among 4,096 as among 64
late = row("weight gradient", "training", 16, "R 4096")["ratio"]["median"]
assert 0.8 < late < 1.2

# %% [markdown]
# And as tasks add up, 16 ranks each: what a step is made of. *Gradients* is the whole backward
# pass, the base's too. What grows is the scoring, which no gate that scores itself can skip,
# torch's top k beside it, and up to R of about the width the gradient through the norm. The
# up-projection hardly grows: K rows of B a token, however many there are.

# %%
growth = {
    (r["R"] // 16, r["name"]): r["ratio"]["median"] for r in bench["rows"] if r["part"] == "growth"
}
figure, axes = plt.subplots(figsize=(7, 3.2))
draw_growth(axes, bench)
axes.set_title("A step among 100 tasks: scoring and top k grow, what speaks does not", fontsize=11)
axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
plt.show()

more = {part: growth[100, part] - growth[1, part] for part in ("scoring", "top-k", "up")}
assert more["up"] < 0.3 * more["scoring"] and more["top-k"] > more["up"]
assert growth[100, "step"] < 0.7 * growth[100, "dense-masked"]

# %% [markdown]
# So, on a CPU, in layers that are not small: the sparse product alone pays from R of about 2 K on,
# 5 K and 14 K in the backward. A layer around it saves at most half of its forward pass, and after
# the GEMMs torch's top k is what it waits for. At 64 ranks a masked layer is as fast, and simpler;
# with 1,600 a MoRA step takes less than .7 of its time. For a GPU the crossover is arithmetic so
# far, not measurement: dense up to R/K of about seventy.
#
# ## Exercises
#
# **1.** Write the gather yourself, for float64 inputs and one table B: index the chosen rows
# (`index_select`, or `B[idx]`), weight and add them (`torch.einsum`). No matrix H, no GEMM over all
# ranks. Gradients come by autograd. (It is right, and slow: it stores T·K·O numbers. The package
# uses the embedding bag.)


# %% exercise 1
def gathered(v, idx, B):
    """v (T, K), idx (T, K), B (R, O) -> y (T, O)"""
    return ...


# %%
with exercise("1"):
    for T, R, K, O in ((30, 17, 4, 9), (5, 3, 8, 2), (1, 1, 1, 1)):
        idx = torch.randint(R, (T, K), device=device)  # ranks may come twice
        v = torch.randn(T, K, **wide).requires_grad_()
        B = torch.randn(R, O, **wide).requires_grad_()
        got, wanted = gathered(v, idx, B), rank_sparse(v, idx, B[:0].detach(), B, "dense")
        assert isinstance(got, torch.Tensor), f"{type(got).__name__} is no tensor"
        assert got.shape == wanted.shape, f"y is {tuple(got.shape)}, not {tuple(wanted.shape)}"
        assert torch.allclose(got, wanted), f"wrong numbers at T {T}, R {R}, K {K}, O {O}"
        dy = torch.randn(T, O, **wide)
        for name, g, w in zip(
            ("v", "B"), grads(got, (v, B), dy), grads(wanted, (v, B), dy), strict=True
        ):
            assert torch.allclose(g, w), f"wrong gradient to {name}"
        work = counted(lambda v=v, idx=idx, B=B: gathered(v, idx, B))
        assert work <= T * K * O, f"{work} multiply-adds, allowed: {T * K * O}"

# %% [markdown]
# **2.** Count the multiply-adds of a forward pass over T tokens: of the masked layer, and of MoRA,
# each with its base layer. Sums over K or R numbers per token (norm, softmax) do not count. How
# large is the gain of MoRA at 8 kept of 512 ranks, D = O = 512?


# %% exercise 2
def work_of_masked(T, D, O, R):
    return 0


def work_of_mora(T, D, O, R, K):
    return 0


gain = None  # masked over MoRA at D = O = 512, R = 512, K = 8

# %%
with exercise("2"):
    for T, D, O, R, K in ((10, 24, 40, 12, 3), (7, 50, 20, 18, 18), (33, 16, 16, 64, 1)):
        layer = MoRA(nn.Linear(D, O), rank=1, top_k=K).to(device)
        for _ in range(R - 1):
            layer.grow()
        x, H, B = (torch.randn(*s, device=device) for s in ((T, D), (T, K), (K, O)))
        in_torch = counted(lambda layer=layer, x=x: DenseMasked(layer)(x))
        assert work_of_masked(T, D, O, R) == in_torch, f"masked: torch counts {in_torch}"
        parts = (
            partial(layer.base, x),
            partial(torch.mm, x, layer.keys.T),
            partial(torch.mm, H, B),
        )
        assert work_of_mora(T, D, O, R, K) == sum(map(counted, parts)), f"MoRA at {D, O, R, K}"
    assert isinstance(gain, float), f"the gain is {gain}"
    assert abs(gain * work_of_mora(9, 512, 512, 512, 8) / work_of_masked(9, 512, 512, 512) - 1) < (
        0.01
    ), "the gain"

# %% [markdown]
# **3.** From the stored measurement (`row`, random routing, training steps): the smallest R in it
# at which (a) the product by gather takes less than half of dense's time, (b) MoRA's layer takes
# less than half the time of dense-masked, (c) MoRA's layer holds less than half its memory.

# %% exercise 3
half_the_time = None
half_of_masked = None
half_the_memory = None

# %%
with exercise("3"):

    def smallest(R, holds, what):
        assert R in RANKS, f"{what}: {R} is none of {RANKS}"
        assert holds(R), f"{what}: not at R = {R}"
        assert not any(map(holds, RANKS[: RANKS.index(R)])), f"{what}: at a smaller R already"

    def time(part, name):
        return lambda R: row(part, "training", R, name)["ratio"]["median"]

    by_gather = time("up-projection", "gather")
    layer, masked = time("layer", "mora"), time("layer", "dense-masked")
    smallest(half_the_time, lambda R: by_gather(R) < 0.5, "half the time")
    smallest(half_of_masked, lambda R: layer(R) < masked(R) / 2, "half of dense-masked")
    held = {R: MiB["mora", "training", R] / MiB["dense-masked", "training", R] for R in RANKS}
    smallest(half_the_memory, lambda R: held[R] < 0.5, "half the memory")
