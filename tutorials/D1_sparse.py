# %% [markdown]
# # The sparse product: which work can be left out
#
# **Goals.** At the end you can
#
# 1. write a product of few chosen rows as a gather, and its gradient to these rows;
# 2. count what a product multiplies and moves, and compare the count with a measured time;
# 3. say which part of a MoRA layer has to be computed, and what leaving out the rest gains.
#
# **Time.** 60 minutes, of which the computer needs half a minute. In class 45: sections 1 to 5
# without the parts marked *at home* (P / M, `auto`, Aᵀ A), and the exit ticket. At home 15: these
# parts and section 6.
# **You need** notebook 03, and the gradient of a matrix product. A GPU is used where there is one.

# %% install
from importlib.util import find_spec

from IPython import get_ipython

SOURCE = "minimoe-0.1.0-py3-none-any.whl"  # the teacher sets it: a wheel, or git+URL@TAG
NEEDED = "numpy matplotlib scikit-learn safetensors hypothesis joblib pydantic scipy tqdm "
NEEDED += "typing_extensions"
missing = [n for n in NEEDED.split() if find_spec(n.replace("scikit-learn", "sklearn")) is None]
if missing:  # none of these brings a torch with it
    get_ipython().run_line_magic("pip", f"install -q {' '.join(missing)}")
if find_spec("minimoe") is None:
    get_ipython().run_line_magic("pip", f"install -q --no-deps {SOURCE}")
print("torch is there" if find_spec("torch") else "get torch first: pytorch.org says how")

# %%
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import embedding_bag
from torch.utils.flop_counter import FlopCounterMode

import minimoe
from minimoe import MoRA
from minimoe.bench import Clock, DenseMasked, rounds
from minimoe.lesson import claim, expect, figures, numbers, predict
from minimoe.sparse import CROSSOVER, SMALL, rank_sparse, spmm, top_scores
from minimoe.tools.exercise import exercise

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)
torch.manual_seed(0)

# %% picture alt="Five boxes in a row: x, z, s, g, y. z and y are marked as today's."
figures.equation(today="zy")

# %% [markdown]
# The steps of every notebook. Today is about what the two products cost: z = x Aᵀ, and (g ⊙ z) B
# when most of g is 0.

# %% [markdown]
# ## 1. One product (9 min)
#
# A layer reads T **tokens**, that is, vectors. It has R **ranks** in all: of each the **key** is a
# row of A, which is multiplied with the input, and the **value** a row of B, which is added to the
# output. The **gate** gives each rank a weight, and keeps K of the R: the others get weight 0.
#
# Call `idx[t, k]` the ranks that token t keeps, and `v[t, k]` the weight of each times its z. The
# **update**, which is added to the output of a **frozen** layer, one that is not trained, is
#
#     y[t] = Σ_k  v[t, k] · B[idx[t, k]]          B (R, O)
#
# With `v` written at `idx` in a matrix H (T, R) of zeros, this is y = H B. The usual code makes H,
# multiplies, and so computes with all the zeros: a GEMM, a dense product of two matrices.

# %% small alt="A matrix of 4 tokens by 6 ranks. Each row has two numbers that are not zero."
v = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.8, 0.2]])
idx = torch.tensor([[0, 3], [3, 5], [1, 2], [3, 1]])
H = torch.zeros(4, 6).scatter(1, idx, v)
down, across = ([f"{what} {i}" for i in range(n)] for what, n in (("token", 4), ("rank", 6)))
figures.matrix(H, "H: K = 2 of R = 6 ranks for each token", down, across)

# %% [markdown]
# 8 of the 24 numbers are not 0. Token 0 keeps ranks 0 and 3. Rank 3 is kept by three tokens, rank 4
# by none.
#
# **Complete.** The product without H. `rows` is `B[idx]`, (T, K, O): the K rows that each token
# keeps. Weight them with `v` (T, K), add, and return y (T, O).
#
# <details><summary>Hint</summary>
# <code>v[..., None]</code> is (T, K, 1), and multiplies all O numbers of a row.
# </details>


# %% exercise 1
def gathered(v, rows):
    raise NotImplementedError


# %%
with exercise("1"):
    for T, R, K, O in ((2, 4, 3, 2), (3, 5, 1, 3), (1, 3, 2, 1)):
        idx, B = torch.rand(T, R).topk(K).indices, torch.randint(1, 9, (R, O)).float()
        v, rows = torch.randint(2, 9, (T, K)).float(), B[idx]
        each, want = v[..., None] * rows, embedding_bag(idx, B, per_sample_weights=v, mode="sum")
        slips = {
            "The weights v are left out.": rows.sum(1),
            "The K rows of a token are to be added: this is their mean.": each.mean(1),
            "The sum is over tokens: add over the K rows of each token, dim 1.": each.sum(0),
            "The K weighted rows of a token are not added yet.": each,
            "v @ rows takes every token's v with every token's rows.": v @ rows,
        }
        expect(f"v = {v.tolist()}, rows = {rows.tolist()}", gathered(v, rows), want, slips=slips)

# %% [markdown]
# That is a gather: read the chosen rows, and add them. Torch has it as one call, an **embedding
# bag**: a weighted sum of chosen rows of a table. In the package B comes in two parts: frozen rows,
# and **live** ones, which are in training. The product is
# `rank_sparse(v, idx, frozen, live, path)`, and `path` says how it is computed:
#
# | path | what it does | multiply-adds |
# |---|---|---|
# | `plain` | makes H, one GEMM; its backward pass is autograd's | T·R·O |
# | `dense` | the same; its backward pass is that of section 2 | T·R·O |
# | `gather` | an embedding bag | T·K·O |
# | `compact` | as dense, over the ranks that some token keeps | T·(ranks used)·O |
# | `triton` | as gather, in our own kernel, for a GPU | T·K·O |
#
# Torch counts the multiply-adds of its matrix products (two FLOPs each).


# %% counted
def counted(f):
    """Multiply-adds of the matrix products in a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        f()
    return counter.get_total_flops() // 2


# %% paths
T, R, K, O = 48, 64, 4, 32
wide = {"device": device, "dtype": torch.float64}
idx = torch.rand(T, R, device=device).topk(K).indices
v, B = torch.randn(T, K, **wide), torch.randn(R, O, **wide)
H = torch.zeros(T, R, **wide).scatter(1, idx, v)
ways = {p: rank_sparse(v, idx, B[:48], B[48:], p) for p in ("plain", "dense", "gather", "compact")}
apart = max((y - H @ B).abs().max().item() for y in ways.values())
claim("Four paths differ from H B by at most 1e-10", apart, apart < 1e-10)
print(f"H B: {counted(lambda: H @ B):,} multiply-adds; T·R·O {T * R * O:,}, T·K·O {T * K * O:,}")

# %% [markdown]
# ## 2. The gradients (11 min)
#
# Call dy (T, O) the gradient of the loss with respect to y. Then the gradient to `v` is
#
#     dv[t, k] = dy[t] · B[idx[t, k]]          (dy Bᵀ) at idx
#
# which reads the same chosen rows: `torch.einsum("to,tko->tk", dy, B[idx])`. The gradient to B is
# Hᵀ dy.
#
# **Write.** The gradient to B (R, O) from `v` and `idx` (T, K), `dy` (T, O) and R, without a matrix
# product with H (those are counted; the check does not see what else is made):
#
#     dB[i] = Σ  v[t, k] · dy[t]   over all (t, k) with idx[t, k] = i
#
# On paper first: in the picture above, which terms does row 3 get, and which does row 4?
#
# <details><summary>Hint 1</summary>
# Row 3 gets three terms, of tokens 0, 1 and 3; row 4 gets none and is 0. So start with zeros, and
# add each of the T · K terms to its row.
# </details>
#
# <details><summary>Hint 2</summary>
# <code>zeros.index_add(0, rows, terms)</code> adds terms[n] to the row rows[n], for n from 0 to
# T · K - 1. Of the terms (T, K, O) and of idx (T, K), flatten T and K into one.
# </details>


# %% exercise 2
def gradient_to_rows(v, idx, dy, R):
    raise NotImplementedError


# %%
with exercise("2"):
    for T, R, K, O in ((3, 3, 2, 2), (5, 4, 3, 2), (2, 6, 1, 1)):
        idx, none = torch.rand(T, R).topk(K).indices, torch.zeros(R, O)
        v, dy = torch.randint(2, 9, (T, K)).float(), torch.randint(1, 9, (T, O)).float()
        H, terms = torch.zeros(T, R).scatter(1, idx, v), v[..., None] * dy[:, None]
        flat, by_k = idx.flatten(), none.clone()
        for k in range(K):
            by_k[idx[:, k]] += terms[:, k]
        once = "A row that is named more than once keeps its last term: add them all (index_add)."
        slips = {
            once: none.index_copy(0, flat, terms.flatten(0, 1)),
            "Two tokens may name one row at the same k: += keeps only one of them.": by_k,
            "The weights v are left out.": (H > 0).float().T @ dy,
            "These are the terms, one for each (t, k): add each to its row.": terms,
            "This is (O, R): transpose it.": (H.T @ dy).T,
        }
        case = f"idx = {idx.tolist()}, v = {v.tolist()}, dy = {dy.tolist()}, R = {R}"
        expect(case, gradient_to_rows(v, idx, dy, R), H.T @ dy, slips=slips)
        work = counted(lambda a=(v, idx, dy, R): gradient_to_rows(*a))
        assert work <= T * K * O, f"{work} multiply-adds, T·K·O is {T * K * O}: is there an H?"

# %% [markdown]
# Both gradients are sums over the chosen rows. They have gradients in turn, and these too.
# **Predict**: with y = H B itself, how many different products is that in all, whatever order of
# derivative one takes?

# %% predict-1
kinds = predict("different products in all derivatives", None)

# %% kinds
T, R, K, O = 48, 64, 4, 32
idx, none = torch.rand(T, R, device=device).topk(K).indices, torch.zeros(0, O, **wide)
v, B, dy = (torch.randn(*s, **wide, requires_grad=True) for s in ((T, K), (R, O), (T, O)))


def derived(product, inputs):
    return torch.autograd.grad(product.square().sum(), inputs, create_graph=True)


y = spmm(idx, v, none, B, "gather")
dv, dB = torch.autograd.grad(y, (v, B), dy, create_graph=True)
again = *derived(dv, (dy, B)), *derived(dB, (v, dy))
names = [product.grad_fn.name() for product in (y, dv, dB, *again)]  # what computes its gradients
print(*names, sep="\n")
kinds.beside(len(set(names)))

# %% [markdown]
# Three, and all are there after the first derivative: each one's gradients are the other two.
#
# | name | equation | dense form | its gradients |
# |---|---|---|---|
# | `spmm` | y[t] = Σ_k v[t, k] · B[idx[t, k]] | H B | to v `sddmm`, to B `spmm_t` |
# | `sddmm` | s[t, k] = dy[t] · B[idx[t, k]] | (dy Bᵀ) at idx | to dy `spmm`, to B `spmm_t` |
# | `spmm_t` | d[i] = Σ v[t, k] · dy[t] where idx[t, k] = i | Hᵀ dy | to v `sddmm`, to dy `spmm` |
#
# So nothing else has to be written for training. `rank_scores` is `sddmm` for a gate that has
# chosen before: z[t, k] = x[t] · A[idx[t, k]]. Frozen rows get no gradient, and `spmm_t` is asked
# for live rows only: it costs the same however many rows are frozen.

# %% [markdown]
# ## 3. What is multiplied, and what is moved (9 min)
#
# Less arithmetic is not yet less time: numbers have to be moved, too. Dense reads H and B. The
# gather reads for each token K rows of B, K weights and K indices (an index is as long as two
# numbers of float32). Both write y. With T 512, R 512, K 8 and O 256 the gather has 64 times fewer
# multiply-adds than dense.
#
# **Predict**: how many numbers does it move, as a multiple of what dense moves?

# %% predict-2
numbers_moved = predict("what the gather moves ÷ what dense moves", None)

# %% moved
T, R, K, O = 512, 512, 8, 256
multiplied = {"dense": T * R * O, "gather": T * K * O}
moved = {"dense": T * R + R * O + T * O, "gather": T * K * O + 3 * T * K + T * O}
for path in ("dense", "gather"):
    intensity = 2 * multiplied[path] / (4 * moved[path])
    counts = f"{multiplied[path]:10,} multiply-adds, {moved[path]:9,} numbers moved"
    print(f"{path:6} {counts}, {intensity:5.2f} FLOP per byte")
numbers_moved.beside(moved["gather"] / moved["dense"])

# %% [markdown]
# It moves 2.27 times as many. A GEMM uses each number that it fetches for many tokens, a gather for
# one. So dense does 64 FLOPs for each byte, the gather less than half of one, whatever R is.
#
# 64 times fewer multiply-adds, 2.27 times as many numbers. **Predict**: the gather's time as a
# share of dense's?

# %% predict-3
time_share = predict("time of the gather ÷ time of dense, at 512 ranks", None)

# %% [markdown]
# On a shared machine one time means little. So each **round** runs every contender once, in an
# order that turns; a ratio is taken within its round, so that a slow moment affects both sides; and
# we take the median over rounds.

# %% timing
clock = Clock(device)


def compared(contenders, repeats=25):
    """Of each contender: the median over rounds of its time ÷ that of the first."""
    times = rounds(contenders, repeats, clock)
    first = next(iter(times.values()))
    each = {name: zip(row, first, strict=True) for name, row in times.items()}
    return {name: statistics.median(t / f for t, f in pairs) for name, pairs in each.items()}


def forward(v, idx, B, path):
    with torch.no_grad():
        rank_sparse(v, idx, B[:0], B, path)


# %% bars alt="Bars of dense and gather in three groups: multiply-adds, numbers moved, time here."
idx = torch.rand(T, R, device=device).topk(K).indices
v, B = torch.randn(T, K, device=device), torch.randn(R, O, device=device)
time = compared({path: partial(forward, v, idx, B, path) for path in ("dense", "gather")})
groups = {"multiply-adds": multiplied, "numbers moved": moved, "time here": time}
groups = {name: (1, each["gather"] / each["dense"]) for name, each in groups.items()}
figures.bars(groups, ["dense", "gather"], "Each as a share of dense's")
time_share.beside(time["gather"])

# %% [markdown]
# The gather has .02 of the multiply-adds and moves 2.27 times the numbers. On a CPU its time is in
# between: below .7 of dense's, and at least twice the .02. **Explain**, in one sentence, before you
# open this.
#
# <details><summary>An answer</summary>
# Dense spends its time on multiply-adds, the gather on reading: what takes the time is another part
# of the machine in each, so neither ratio is that of the times.
# </details>
#
# **At home, to the end of the section.** This can be said in numbers. A machine that does
# P FLOPs and moves M bytes in a second needs P / M FLOPs for each byte to be busy. Below that the
# memory decides, and the rate is about M times the FLOPs per byte: the **roofline**. (It is a
# reference: a small B, as here, stays in a cache, which is faster than memory.)

# %% roofline
square, long = torch.randn(1024, 1024, device=device), torch.randn(2**24, device=device)
target = torch.empty_like(long)
best = rounds({"gemm": lambda: square @ square, "copy": lambda: target.copy_(long)}, 7, clock)
P, M = 2 * 1024**3 / min(best["gemm"]), 2 * long.nbytes / min(best["copy"])
claim("P / M is between the gather's .44 FLOP per byte and dense's 64", P / M, 0.44 < P / M < 64)
faster = multiplied["dense"] / multiplied["gather"] * time["gather"]
claim("In a second dense does more than twice the gather's FLOPs", faster, faster > 2)

# %% [markdown]
# By these counts, reading decides for the gather, and arithmetic for dense. The gather does fewer
# FLOPs in a second. It is faster on a CPU all the same, as it has R / K times fewer to do.

# %% [markdown]
# ## 4. Where it pays (11 min)
#
# That was R / K = 64. The next cell is for other R, and for a training step, too.


# %% here
def step(v, idx, B, dy, path):
    y = rank_sparse(v.requires_grad_(), idx, B[:0].detach(), B.requires_grad_(), path)
    torch.autograd.grad(y, (v, B), dy)


ratio = {}
for R in (8, 64, 512, 2048):
    idx = torch.rand(T, R, device=device).topk(K).indices
    v, B, dy = (torch.randn(*s, device=device) for s in ((T, K), (R, O), (T, O)))
    pair = [
        compared({p: partial(f, *given, p) for p in ("dense", "gather")}, 15)["gather"]
        for f, given in ((forward, (v, idx, B)), (step, (v, idx, B, dy)))
    ]
    ratio[R] = pair
    print(f"R / K {R // K:3}: gather ÷ dense  forward {pair[0]:.2f}, training step {pair[1]:.2f}")

# %% [markdown]
# With R / K = 1 there is nothing to leave out, and on a CPU a training step by gather takes longer.
# As R grows, dense has more to do and the gather has not.
#
# The stored measurement is of larger sizes, on a CPU with two threads. In `random` tokens choose
# any ranks; in `pool` all choose among the same 64, as a batch of one kind of input may. All are
# forward passes but one, a training step.

# %% stored alt="Four lines over R from 64 to 4,096: time as a share of dense's."
bench = numbers("bench")
RANKS = (64, 256, 512, 1024, 4096)
LINES = {
    "gather": ("gather", "forward", "random"),
    "gather, step": ("gather", "training", "random"),
    "compact": ("compact", "forward", "random"),
    "compact, pool": ("compact", "forward", "pool"),
}
product = [row for row in bench["rows"] if row["part"] == "up-projection"]
stored = {(r["name"], r["pass"], r["routing"], r["R"]): r["ratio"] for r in product}
lines = {n: [stored.get((*of, R), float("nan")) for R in RANKS] for n, of in LINES.items()}
figures.lines(RANKS, lines, "R, of which 16 are kept", "time ÷ dense's", "T 4,096, O 768", (0, 1.5))

# %% [markdown]
# | | 64 | 256 | 512 | 1,024 | 4,096 |
# |---|---|---|---|---|---|
# | gather, forward | .85 | .39 | .26 | .17 | .07 |
# | gather, training step | 1.27 | .53 | .33 | .21 | .09 |
# | compact, forward | 1.15 | 1.25 | 1.15 | 1.08 | 1.03 |
# | compact, forward, pool | - | .63 | .33 | .19 | .05 |
#
# The gather's share falls from one R to the next, to .07 forward and .09 in training. Where tokens
# choose at random, all ranks are used, and compact takes a little longer than dense; where they
# choose among 64, it takes .05 of dense's time at 4,096 ranks.
#
# **Write.** From such a measurement: the smallest R from which on, there and at all larger R, the
# share is below a limit; None if there is none. `R` is sorted, `shares` has one number for each.


# %% exercise 3
def pays_from(R, shares, limit):
    raise NotImplementedError


# %%
with exercise("3"):
    trials = [((8, 16, 32, 64), (0.4, 0.6, 0.3, 0.2), 32), ((8, 16), (0.9, 0.5), None)]
    trials += [((8, 16), (0.4, 0.3), 8)]
    trials += [(RANKS, *each) for each in zip(lines.values(), (256, 512, None, 512), strict=True)]
    for R, shares, want in trials:
        below = [r for r, share in zip(R, shares, strict=True) if share < 0.5] or [None]
        place = R.index(want) if want else None
        earlier = R[place - 1] if place else want
        slips = {
            "A share equal to the limit is not below it.": R[-1] if shares[-1] == 0.5 else want,
            "That is the first R below the limit; a larger R is above it again.": below[0],
            "That is the largest R: the smallest is meant.": below[-1],
            "That is the place in the list: return the R that stands there.": place,
            "That is the R before it: there the share is not below.": earlier,
        }
        case = f"R = {R}, shares = {shares}, limit = 0.5"
        expect(case, pays_from(R, shares, 0.5), want, slips=slips)

# %% [markdown]
# **At home, to the end of the section.** `auto`, the package's default, goes by such numbers:
# dense below the R / K that the next cell prints, sparse from there on, for each product by itself.
# (`spmm_t` counts live rows only.) Those of a CPU were measured. **Those of a GPU were worked out
# and not measured**: its GEMM is so fast that leaving out has to save a factor of seventy.
# `minimoe bench --device cuda` measures them on yours, and the environment variable `MINIMOE_BENCH`
# makes `auto` use them. Up to `SMALL` tokens times ranks the whole layer is plain.

# %% auto
print(f"SMALL {SMALL[device]:,}, CROSSOVER {CROSSOVER}")
sparse = "triton" if device == "cuda" and find_spec("triton") else "gather"
many = SMALL[device] // K + 1  # tokens, so that no R is small
for share in (1, 4, 256):
    idx = torch.rand(many, share * K, device=device).topk(K).indices
    v, B = torch.randn(many, K, device=device), torch.randn(share * K, O, device=device)
    bits = {path: rank_sparse(v, idx, B[:0], B, path) for path in ("auto", "dense", sparse)}
    same = [path for path in ("dense", sparse) if torch.equal(bits["auto"], bits[path])]
    print(f"R / K {share:3}: auto has the bits of {same[0]}")

# %% [markdown]
# Why plain? Take one MoRA layer, 64 tokens, 4 of 64 ranks kept: R / K is 16. **Predict**: how long
# does a step by gather take, as a multiple of plain's?

# %% predict-4
small_layer = predict("time of a step by gather ÷ by plain, 64 tokens", None)

# %% small-layer
small = MoRA(nn.Linear(64, 64), rank=64, top_k=4).to(device)
nn.init.normal_(small.B)
x = torch.randn(64, 64, device=device)


def layer_step(path):
    small.path = path
    small(x).sum().backward()


paths = {path: partial(layer_step, path) for path in ("plain", "gather")}
small_layer.beside(compared(paths, 101)["gather"])

# %% [markdown]
# On a CPU gather takes longer, though plain computes with 16 times as many ranks. **Explain**, in
# one sentence, before you open this.
#
# <details><summary>An answer</summary>
# Each call has a cost of its own, whatever its size; in so small a layer it is more than the
# arithmetic that is left out.
# </details>

# %% [markdown]
# ## 5. The whole layer (11 min)
#
# In MoRA a rank's **score** is its z divided by the norm of all R of them, and the K ranks of
# largest score are kept. So all of z = x Aᵀ is computed, whatever is kept. A forward pass of a
# layer has three products: the frozen layer's x W0ᵀ, z, and the update. A masked layer computes the
# update with all R rows of B, MoRA with K.
#
# **Predict**: D = O = 768, K = 16, and a million ranks: the multiply-adds of the masked layer ÷
# those of MoRA?

# %% predict-5
million = predict("multiply-adds, masked ÷ MoRA, at a million ranks", None)

# %% [markdown]
# **Write.** The multiply-adds of a forward pass, for one token: of the masked layer, and of MoRA,
# each with its frozen layer. Return both. (Norm and softmax do not count.) What you return is
# compared with what torch counts.
#
# <details><summary>Hint</summary>
# One token (1, D) times a matrix (D, O) is D · O multiply-adds.
# </details>


# %% exercise 4
def work_of_masked_and_mora(D, O, R, K):
    raise NotImplementedError


# %%
with exercise("4"):
    for D, O, R, K in ((24, 40, 12, 3), (50, 20, 18, 18), (64, 64, 64, 1)):
        layer, x = MoRA(nn.Linear(D, O), rank=R, top_k=K), torch.randn(1, D)
        masked = counted(partial(DenseMasked(layer), x))
        scores = counted(partial(torch.mm, x, layer.keys.T))
        update = counted(partial(torch.mm, torch.randn(1, K), torch.randn(K, O)))
        mora = counted(partial(layer.base, x)) + scores + update
        slips = {
            "The frozen layer's D · O is left out.": (masked - D * O, mora - D * O),
            "MoRA scores all R ranks, not only the K that it keeps.": (masked, mora - D * (R - K)),
            "A multiply-add counts once: these are FLOPs.": (2 * masked, 2 * mora),
            "MoRA's product with B has K rows for each token, not R.": (masked, masked),
            "The two are in each other's place.": (mora, masked),
            "That is the masked layer alone: return both.": masked,
        }
        got = work_of_masked_and_mora(D, O, R, K)
        expect(f"D {D}, O {O}, R {R}, K {K}", got, (masked, mora), slips=slips)


# %% gains
def work_ratio(D, O, R, K):
    """Multiply-adds of a masked layer's forward pass ÷ those of MoRA's."""
    return (D * O + D * R + R * O) / (D * O + D * R + K * O)


for R in (16, 256, 4096, 10**6):
    print(f"R {R:9,}: masked ÷ MoRA {work_ratio(768, 768, R, 16):.2f}")
million.beside(work_ratio(768, 768, 10**6, 16))

# %% [markdown]
# Just below 2. The GEMM that scores stays, and with D = O it is as large as the one that is left
# out: at most half of the forward pass can go, however many ranks there are.
#
# In the [stored measurement](results/bench-cpu.md) of whole layers (D = O = 768, 16 live ranks),
# every MoRA layer takes longer than the plain `nn.Linear`: 1.5 times at 64 ranks, 7.8 times forward
# at 4,096. Beside the masked layer it saves little at 64 ranks; at 4,096 the masked one takes 1.8
# times as long forward, 2.6 times in a training step, and holds 5.3 times the memory in it. With
# 1,600 ranks z takes 2.0 times the frozen layer's forward pass, torch's top k .9, the update .2.
#
# **Break.** The half was for D = O. Return sizes D, O, R, K for which the masked layer multiplies
# more than 4 times as much as MoRA.


# %% exercise 5
def unequal_sizes():
    raise NotImplementedError


# %%
with exercise("5"):
    got = unequal_sizes()
    assert isinstance(got, tuple | list) and len(got) == 4, f"return D, O, R, K: this is {got!r}"
    D, O, R, K = got
    assert min(got) >= 1 and K <= R, f"at least 1 each, and K at most R: {got}"
    why = "D is as large as O, or larger: so is the GEMM that scores" if D >= O else "O is larger"
    why += f", and with any R it stays below {1 + O / D:.3g}"
    less = work_ratio(*got)
    assert less > 4, f"masked ÷ MoRA is {less:.2f} for D, O, R, K = {got}: {why}"

# %% [markdown]
# **Explain**: a transformer has layers from D to 4 D and from 4 D to D. What can MoRA leave out in
# each, at most, and why?
#
# <details><summary>An answer</summary>
# For many ranks masked ÷ MoRA comes near to (D + O) / D: 5 for the layer from D to 4 D, 1.25 for
# the one back. Scoring costs D for each rank, the product O, and only the product can be left out.
# </details>
#
# **At home, and optional,** with the next cell, `bracket`. In training, the norm brings one more
# product: its gradient to x has all of z in it, c · z A, with one number c for each token. But
# z A = x (Aᵀ A), and Aᵀ A is (D, D) however large R is. So `top_scores`, which MoRA's gate calls,
# takes the cheaper of T · R · D and (T + R) · D · D multiply-adds. Both are the exact gradient. At
# T 4,096 and D 768 the second is cheaper from 946 ranks on.

# %% bracket
T, D, R, K = 200, 24, 96, 4
x, A = (torch.randn(n, D, **wide, requires_grad=True) for n in (T, R))


def some_loss(top, norm):
    return ((top / norm / 0.1).softmax(-1) * top).square().sum()


top, idx, norm = top_scores(x, A[:0].detach(), A, K)
mine = torch.autograd.grad(some_loss(top, norm), (x, A))
z = x @ A.T
plain = torch.autograd.grad(some_loss(z.topk(K).values, z.norm(dim=1, keepdim=True)), (x, A))
apart = max((a - b).abs().max().item() for a, b in zip(mine, plain, strict=True))
claim("Its gradients differ from plain autograd's by at most 1e-10", apart, apart < 1e-10)

# %% [markdown]
# ## 6. A GPU: tiles (4 min)
#
# Triton compiles Python functions to GPU kernels. A kernel is written for one **program**, and
# thousands of them run side by side. Each computes a **tile** of the output, some tokens and some
# columns, and no other program writes there. Where a tile hangs over the edge it is cut off. With
# tensors of torch in place of Triton's:

# %% tiles
T, R, K, O, TOKENS, COLUMNS = 48, 64, 4, 32, 5, 12  # no multiples
idx = torch.rand(T, R, device=device).topk(K).indices
v, B, tiles = (torch.randn(*s, **wide) for s in ((T, K), (R, O), (T, O)))


def program(i, j):
    t = torch.arange(i * TOKENS, min((i + 1) * TOKENS, T), device=device)
    o = torch.arange(j * COLUMNS, min((j + 1) * COLUMNS, O), device=device)
    total = torch.zeros(len(t), len(o), **wide)
    for k in range(K):
        total += v[t, k, None] * B[idx[t, k]][:, o]
    tiles[t[:, None], o] = total


for j in range(-(-O // COLUMNS)):  # one strip of columns of B at a time stays in a cache
    for i in range(-(-T // TOKENS)):
        program(i, j)
apart = (tiles - rank_sparse(v, idx, B[:0], B, "dense")).abs().max().item()
claim("The tiles differ from dense by at most 1e-10", apart, apart < 1e-10)

# %% [markdown]
# The kernel itself, with what it multiplies and moves, is the next cell's output: `tl.load` reads
# at an address, unless its mask says no, and `tl.store` writes.

# %% kernel
source = Path(minimoe.__file__).with_name("kernels.py").read_text(encoding="utf-8")
start = source.index("@triton.jit\ndef spmm_kernel")
print(source[start : source.index("\n\n\n", start)])

# %% [markdown]
# The stored outputs of this notebook are from a machine without a GPU. There Triton's interpreter
# runs the kernel on the CPU, slowly: that tells whether its sums are right, and nothing about time.
# It gets a process of its own, as `TRITON_INTERPRET` is read at the import.

# %% interpreted
TRY = """
import sys, torch
from minimoe.sparse import rank_sparse
wide = {"dtype": torch.float64, "device": sys.argv[1]}
idx = torch.rand(12, 24, device=sys.argv[1]).topk(4).indices
v, B = torch.randn(12, 4, **wide), torch.randn(24, 17, **wide)
y, dense = (rank_sparse(v, idx, B[:8], B[8:], path) for path in ("triton", "dense"))
print("within 1e-10 of dense:", bool((y - dense).abs().max() < 1e-10))
"""
if find_spec("triton"):
    interpret = {} if device == "cuda" else {"TRITON_INTERPRET": "1"}
    call = [sys.executable, "-c", TRY, device]
    tried = subprocess.run(call, env=os.environ | interpret, capture_output=True, text=True)
    print(device, (tried.stdout or tried.stderr).strip())
else:
    print("triton is not installed here; on Linux: pip install triton")

# %% [markdown]
# ## 7. Exit ticket (5 min)
#
# **Summary.** Keeping K of R ranks leaves a matrix of zeros, and its product is a gather: three
# products serve every derivative. A gather multiplies less and moves more, so it pays from some
# R / K on, which has to be measured, and in small layers not at all. Around it, a self-scoring
# gate's GEMM over all ranks stays.
#
# **1.** T = 1,000 tokens keep 4 of 64 ranks, O = 100. How many multiply-adds has y = H B by dense,
# and how many by gather?
#
# <details><summary>Answer</summary>
# 1,000 · 64 · 100 = 6,400,000, and 1,000 · 4 · 100 = 400,000.
# </details>
#
# **2.** Two tokens keep the same rank. What must the gradient to B do that the gather need not?
#
# <details><summary>Answer</summary>
# Add: both terms go to the same row. The gather only reads, and each token has an output row of its
# own. On a GPU such sums need locks, or an order.
# </details>
#
# **3.** "It keeps 8 of 4,096 ranks, so the update costs 1/512 of the masked one." What is left out?
#
# <details><summary>Answer</summary>
# The gate scores all 4,096 ranks, which with D = O is as much work as the product that is saved: of
# the update's work half stays. And fewer multiply-adds are not that much less time.
# </details>
