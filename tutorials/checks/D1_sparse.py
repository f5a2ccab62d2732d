# %% install
assert not missing

# %% small
assert int((H != 0).sum()) == 8 and H.numel() == 24
assert (H != 0).sum(0).tolist() == [1, 2, 1, 3, 0, 1]

# %% paths
assert apart < 1e-10 and counted(lambda: H @ B) == T * R * O
assert int((H != 0).sum()) == T * K and bool((H @ B != 0).all())
twice = torch.tensor([[7, 7, 3]], device=device)  # a rank named twice counts twice
weights = torch.tensor([[1.0, 2.0, 0.0]], **wide)
assert torch.allclose(rank_sparse(weights, twice, B[:48], B[48:], "gather"), 3 * B[7:8])

# %% kinds
from minimoe.sparse import rank_scores, sddmm, spmm_t

assert len(set(names)) == 3 == len(set(names[:3]))
assert (names[3:]) == [names[0], names[2], names[1], names[0]]


def masked_matrix(v):
    return torch.zeros(T, R, **wide).scatter(1, idx, v)


def grads_alike(ours, dense, inputs, given):
    """Both products, and their gradients, are the same."""
    assert torch.allclose(ours, dense, atol=1e-10)
    pairs = (torch.autograd.grad(each, inputs, given) for each in (ours, dense))
    return all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*pairs, strict=True))


S, Z = torch.randn(T, K, **wide), torch.randn(R, O, **wide)
for path in ("dense", "gather", "compact"):
    ours, dense = spmm(idx, v, none, B, path), masked_matrix(v) @ B
    assert grads_alike(ours, dense, (v, B), dy.detach())
    ours, dense = sddmm(idx, dy, none, B, path), (dy @ B.T).gather(1, idx)
    assert grads_alike(ours, dense, (dy, B), S)
    ours, dense = spmm_t(idx, v, dy, 0, R, path), masked_matrix(v).T @ dy
    assert grads_alike(ours, dense, (v, dy), Z)
    live_only = spmm_t(idx, v, dy, 48, R, path)
    assert torch.allclose(live_only, dense[48:], atol=1e-10)
assert torch.allclose(torch.einsum("to,tko->tk", dy, B[idx]), sddmm(idx, dy, none, B, "dense"))
inputs, keys = torch.randn(T, 20, **wide), torch.randn(R, 20, **wide)
for path in ("plain", "gather"):
    ours = rank_scores(inputs, idx, keys[:48], keys[48:], path)
    assert torch.allclose(ours, (inputs @ keys.T).gather(1, idx))

# %% moved
assert multiplied["dense"] == 64 * multiplied["gather"]
assert abs(moved["gather"] / moved["dense"] - 2.27) < 0.01
for ranks, least in ((8, 0), (64, 20), (512, 63), (4096, 80)):
    assert 2 * T * ranks * O / (4 * (T * ranks + ranks * O + T * O)) > least
assert abs(2 * multiplied["dense"] / (4 * moved["dense"]) - 64) < 0.1
assert abs(2 * multiplied["gather"] / (4 * moved["gather"]) - 0.44) < 0.01

# %% bars
if device == "cpu":
    assert 2 / 64 < time["gather"] < 0.7
assert abs(groups["multiply-adds"][1] - 0.02) < 0.005

# %% roofline
if device == "cpu":
    assert 0.44 < P / M < 64 and faster > 2

# %% here
if device == "cpu":
    assert max(ratio[512][0], ratio[2048][0], ratio[2048][1]) < 0.7

# %% stored
from minimoe.bench import POOL

assert (bench["tokens"], bench["width"], bench["top_k"], POOL) == (4096, 768, 16, 64)
table = (
    (0.85, 0.39, 0.26, 0.17, 0.07),
    (1.27, 0.53, 0.33, 0.21, 0.09),
    (1.15, 1.25, 1.15, 1.08, 1.03),
    (float("nan"), 0.63, 0.33, 0.19, 0.05),
)
for told, line in zip(table, lines.values(), strict=True):
    assert all(abs(a - b) < 0.006 or a != a != b for a, b in zip(told, line, strict=True))
assert all(line == sorted(line, reverse=True) for line in list(lines.values())[:2])

# %% auto
assert SMALL["cpu"] == SMALL["cuda"] == 2**15
assert CROSSOVER["cpu"] == {"spmm": 2, "sddmm": 5, "spmm_t": 14}
assert CROSSOVER["cuda"] == {"spmm": 72, "sddmm": 72, "spmm_t": 128}
assert same == [sparse]
from minimoe.sparse import is_plain

edge = torch.empty(SMALL[device] // 64 + 1, 1, device=device)
assert is_plain("auto", edge[1:], 64) and not is_plain("auto", edge, 64)

# %% small-layer
found = {}
for path in ("auto", "plain", "gather"):
    small.path = path
    found[path] = small(x)
assert torch.equal(found["auto"], found["plain"])
assert torch.allclose(found["gather"], found["plain"], atol=1e-4)

# %% gains
assert 1.99 < work_ratio(768, 768, 10**6, 16) < 2
assert all(1 <= work_ratio(768, 768, R, 16) < 2 for R in (16, 256, 4096, 2**20, 2**40))
assert abs(work_ratio(768, 4 * 768, 10**9, 16) - 5) < 0.01
assert abs(work_ratio(4 * 768, 768, 10**9, 16) - 1.25) < 0.01

# what is said of the stored measurement of whole layers
rows = {(r["part"], r["pass"], r["R"], r["name"], r["routing"]): r for r in bench["rows"]}


def ms(part, which, R, name):
    return rows[part, which, R, name, "random"]["ms"]


linear = {which: ms("beside", which, 128, "linear") for which in ("forward", "training")}
ours = {key: ms("layer", *key, "mora") for key in ((w, R) for w in linear for R in RANKS)}
assert all(each / linear[which] > 1 for (which, R), each in ours.items())
assert abs(ours["forward", 64] / linear["forward"] - 1.5) < 0.06
assert abs(ours["forward", 4096] / linear["forward"] - 7.8) < 0.06
masked = {key: ms("layer", *key, "dense-masked") / each for key, each in ours.items()}
assert all(abs(masked[which, 64] - 1) < 0.1 for which in linear)
assert abs(masked["forward", 4096] - 1.8) < 0.06 and abs(masked["training", 4096] - 2.6) < 0.06
held = [rows["layer", "training", 4096, n, "random"]["peak"] for n in ("dense-masked", "mora")]
assert abs(held[0] / held[1] - 5.3) < 0.06
for part, told in (("scoring", 2.0), ("top-k", 0.9), ("up", 0.2)):
    share = rows["growth", "training", 1600, part, "random"]["ratio"]
    assert abs(share - told) < 0.06
late = rows["weight gradient", "training", 16, "R 4096", "random"]["ratio"]
assert 0.8 < late < 1.2

# %% bracket
assert apart < 1e-10 and (T + R) * D * D < T * R * D  # the second way is used
tokens, width = 4096, 768
assert [(tokens + r) * width < tokens * r for r in (945, 946)] == [False, True]

# %% tiles
assert apart < 1e-10 and T % TOKENS and O % COLUMNS

# %% kernel
assert "tl.load" in source and "tl.store" in source

# %% interpreted
assert not find_spec("triton") or "within 1e-10 of dense: True" in tried.stdout

assert (1000 * 64 * 100, 1000 * 4 * 100) == (6_400_000, 400_000)
