"""The rank-sparse products: every path against loops and against one dense float64 reference."""

import importlib.util
import json

import pytest
import torch

from minimoe import sparse
from minimoe.sparse import CROSSOVER, rank_scores, rank_sparse, sddmm, spmm, spmm_t, top_scores

no_triton = pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="triton is not installed (Linux only)"
)
PATHS = ["plain", "dense", "gather", "compact", pytest.param("triton", marks=no_triton)]
# the kernels' interpreter takes its time
LONG = [*PATHS[:-1], pytest.param("triton", marks=[no_triton, pytest.mark.slow])]
HALF = [torch.float16, torch.bfloat16]


def draw(T, K, F, r, O, dtype=torch.float64, repeat=False):
    idx = torch.rand(T, F + r).argsort(1)[:, :K]
    if repeat:
        idx[:, -1] = idx[:, 0]
    v = torch.randn(T, K, dtype=dtype, requires_grad=True)
    frozen = torch.randn(F, O, dtype=dtype)
    live = torch.randn(r, O, dtype=dtype, requires_grad=True)
    return v, idx, frozen, live


def loop(v, idx, frozen, live):
    B = torch.cat([frozen, live])
    rows = [
        sum(w * B[i] for w, i in zip(vt, it, strict=True)) for vt, it in zip(v, idx, strict=True)
    ]
    return torch.stack(rows)


def loop_scores(x, idx, frozen, live):
    A = torch.cat([frozen, live])
    rows = [torch.stack([xt @ A[i] for i in it]) for xt, it in zip(x, idx, strict=True)]
    return torch.stack(rows)


# T, K, F, r, O: odd widths, one token, one rank kept, all kept, nothing frozen, nothing chosen
# that is live
SIZES = [(5, 3, 4, 3, 7), (1, 1, 0, 4, 1), (6, 5, 2, 3, 3), (13, 2, 60, 3, 11), (4, 1, 9, 1, 2)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("path", ["auto", *PATHS])
@pytest.mark.parametrize("product", ["rank_sparse", "rank_scores"])
def test_output_and_gradients_equal_a_loops(product, path, repeat, size):
    v, idx, frozen, live = draw(*size, repeat=repeat)
    if product == "rank_sparse":
        given, y, wanted = v, rank_sparse(v, idx, frozen, live, path), loop(v, idx, frozen, live)
    else:
        given = torch.randn(len(v), live.shape[1], dtype=torch.float64, requires_grad=True)
        y = rank_scores(given, idx, frozen, live, path)
        wanted = loop_scores(given, idx, frozen, live)
    assert torch.allclose(y, wanted, rtol=0, atol=1e-12)
    dy = torch.randn_like(wanted)
    got = torch.autograd.grad(y, [given, live], dy)
    for mine, theirs in zip(got, torch.autograd.grad(wanted, [given, live], dy), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", LONG)
def test_first_and_second_derivatives(path):
    v, idx, frozen, live = draw(2, 3, 2, 2, 2, repeat=True)
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda v, B: rank_sparse(v, idx, frozen, B, path), (v, live))
        assert check(lambda x, A: rank_scores(x, idx, frozen, A, path), (x, live))


@pytest.mark.parametrize("path", LONG)
def test_the_same_bits_twice(path):
    v, idx, frozen, live = draw(120, 8, 50, 8, 33, torch.float32)
    twice = []
    for _ in range(2):
        y = rank_sparse(v, idx, frozen, live, path)
        twice.append((y, *torch.autograd.grad(y.square().sum(), [v, live])))
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("path", PATHS)
def test_no_more_than_the_dtypes_own_rounding(path, dtype):
    """Sums of up to 40 terms: kept in float32, then rounded once. A float64 sum of the same
    numbers, in absolute value too, bounds the error: half a unit in the last place of the result,
    and float32's on the way. (Triton's interpreter cuts bfloat16 off where a GPU rounds.)"""
    v, idx, frozen, live = draw(40, 24, 20, 20, 19, dtype)
    dy = torch.randn(40, 19, dtype=dtype)
    y = rank_sparse(v, idx, frozen, live, path)
    got = (y, *torch.autograd.grad(y, [v, live], dy))

    B = torch.cat([frozen, live]).double()
    h = torch.zeros(40, 40, dtype=torch.float64).scatter(1, idx, v.double())
    exact = (h @ B, (dy.double() @ B.T).gather(1, idx), (h.T @ dy.double())[20:])
    size = (h.abs() @ B.abs(), (dy.double().abs() @ B.T.abs()).gather(1, idx))
    size = (*size, (h.abs().T @ dy.double().abs())[20:])
    half, way = torch.finfo(dtype).eps / 2, 40 * torch.finfo(torch.float32).eps
    if path == "triton" and dtype == torch.bfloat16:
        half *= 2
    for mine, truth, terms in zip(got, exact, size, strict=True):
        assert mine.dtype == dtype
        assert ((mine.double() - truth).abs() <= 1.001 * half * truth.abs() + way * terms).all()


@pytest.mark.parametrize("path", PATHS)
def test_shapes_strides_and_index_types(path):
    v, idx, frozen, live = draw(24, 3, 4, 3, 7)
    flat = rank_sparse(v, idx, frozen, live, path)
    shaped = rank_sparse(v.view(2, 3, 4, 3), idx.view(2, 3, 4, 3), frozen, live, path)
    assert torch.equal(shaped, flat.view(2, 3, 4, 7))
    assert torch.equal(rank_sparse(v[0], idx[0], frozen, live, path), flat[0])
    assert torch.equal(rank_sparse(v, idx.int(), frozen, live, path), flat)
    strided = rank_sparse(v.T.contiguous().T, idx.T.contiguous().T, frozen, live, path)
    assert torch.equal(strided, flat)
    strided.sum().backward()  # a gradient of stride 0
    wide = torch.randn(7, 24, dtype=torch.float64).T
    z = rank_scores(wide, idx, frozen, live, path)
    assert torch.allclose(z, rank_scores(wide.contiguous(), idx.int(), frozen, live, path))


@pytest.mark.parametrize("path", ["auto", *PATHS])
def test_no_tokens(path):
    v, idx, frozen, live = draw(4, 3, 4, 3, 7)
    none = rank_sparse(v[:0], idx[:0], frozen, live, path)
    assert none.shape == (0, 7)
    none.sum().backward()
    assert torch.equal(live.grad, torch.zeros(3, 7))
    x = torch.randn(0, 7, dtype=torch.float64, requires_grad=True)
    top, kept, norm = top_scores(x, frozen, live, 2, path)
    assert top.shape == kept.shape == (0, 2) and norm.shape == (0, 1)
    (top.sum() + norm.sum()).backward()
    assert x.grad.shape == (0, 7)


@pytest.mark.parametrize("path", LONG)
def test_one_rank_for_every_token_and_slots_that_say_nothing(path):
    v, _, frozen, live = draw(90, 2, 3, 2, 5)
    idx = torch.full((90, 2), 4)  # 180 pairs fall to one live rank: more than one chunk
    y = rank_sparse(v, idx, frozen, live, path)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert torch.allclose(y, v.sum(1, keepdim=True) * live[1])
    assert torch.allclose(live.grad[1], (v.sum(1, keepdim=True) * dy).sum(0))
    assert (live.grad[0] == 0).all()
    silent = torch.zeros(90, 2, dtype=torch.float64, requires_grad=True)
    y = rank_sparse(silent, idx, frozen, live, path)
    y.backward(dy)
    assert (y == 0).all()
    assert torch.allclose(silent.grad, (dy @ live[1]).unsqueeze(1).expand(-1, 2))


def test_no_idx_means_every_rank_in_order():
    v, _, frozen, live = draw(5, 7, 4, 3, 6)
    every = torch.arange(7).expand(5, 7)
    assert torch.allclose(
        rank_sparse(v, None, frozen, live), rank_sparse(v, every, frozen, live, "gather")
    )


@pytest.mark.parametrize("path", PATHS)
def test_only_what_is_asked_for_is_computed(path, monkeypatch):
    v, idx, frozen, live = draw(5, 3, 4, 3, 7)
    y = rank_sparse(v, idx, frozen.requires_grad_(), live.detach(), path)
    asked = []
    monkeypatch.setattr(sparse, "spmm_t", lambda *a: asked.append("spmm_t"))
    y.sum().backward()
    assert frozen.grad is None and v.grad is not None and not asked


# 60 ranks, 3 wide, 20 tokens: z is not kept for the backward pass; with 2 tokens it is
@pytest.mark.parametrize("T", [20, 2])
@pytest.mark.parametrize("path", PATHS)
def test_top_scores_and_their_gradients_equal_the_dense_ones(path, T):
    _, _, frozen, live = draw(1, 1, 55, 5, 3)
    x = torch.randn(2, T // 2, 3, dtype=torch.float64, requires_grad=True)
    top, idx, norm = top_scores(x, frozen, live, 4, path)
    z = x @ torch.cat([frozen, live]).T
    wanted = z.topk(4)[0], torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    assert torch.equal(idx, z.topk(4)[1])
    for mine, theirs in zip((top, norm), wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)
    dtop, dnorm = torch.randn_like(top), torch.randn_like(norm)
    for outputs, grads in (((0, 1), (dtop, dnorm)), ((0,), (dtop,)), ((1,), (dnorm,))):
        got = torch.autograd.grad(
            [(top, norm)[i] for i in outputs], [x, live], grads, retain_graph=True
        )
        want = torch.autograd.grad(
            [wanted[i] for i in outputs], [x, live], grads, retain_graph=True
        )
        for mine, theirs in zip(got, want, strict=True):
            assert torch.allclose(mine, theirs, rtol=0, atol=1e-10)


def test_top_scores_keep_z_only_while_that_is_cheaper():
    def kept(T, R, D):
        x = torch.randn(T, D, requires_grad=True)
        top, _, _ = top_scores(x, torch.randn(R - 1, D), torch.randn(1, D, requires_grad=True), 1)
        node = top.grad_fn.next_functions[0][0]  # past the reshape
        return node.saved_tensors[-1] is not None

    # T·R·D against (T + R)·D·D, at T = 12, D = 3: 36 R against 9 (12 + R), equal at R = 4
    assert kept(12, 4, 3) and not kept(12, 5, 3)


def test_top_scores_with_ties_keep_k_of_the_equal_ones():
    live = torch.ones(6, 2, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    top, idx, norm = top_scores(x, live[:0].detach(), live, 4)
    assert top.tolist() == [[3.0] * 4] and len(set(idx[0].tolist())) == 4
    assert torch.allclose(norm, torch.tensor(54.0, dtype=torch.float64).sqrt())
    top.sum().backward()  # the gradient goes to those that were kept, and to no other
    chosen = torch.zeros(6, dtype=torch.bool).scatter(0, idx[0], True)
    assert torch.equal(live.grad[chosen], x.expand(4, 2)) and (live.grad[~chosen] == 0).all()


def test_top_scores_have_no_second_derivative_and_say_so():
    _, _, frozen, live = draw(1, 1, 5, 5, 3)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    top, _, _ = top_scores(x, frozen, live, 2)
    (dx,) = torch.autograd.grad(top.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("rows", [9, 10])
def test_auto_chooses_each_products_path_by_the_table(rows, monkeypatch):
    monkeypatch.setitem(CROSSOVER, "cpu", {"spmm": 5, "sddmm": 5, "spmm_t": 5})
    idx, v, g = torch.zeros(3, 2, dtype=torch.long), torch.randn(3, 2), torch.randn(3, 5)
    frozen, live = torch.randn(rows - 1, 5), torch.randn(1, 5)
    dense, gather = (v.new_zeros(3, 5) + n for n in (1, 2))
    monkeypatch.setattr(sparse, "_bag", lambda *a: gather)
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda *a: dense)
    assert spmm(idx, v, frozen, live, "auto").equal(gather if rows == 10 else dense)
    # of spmm_t it is the rows asked for that count
    assert spmm_t(idx, v, g, 7, 7 + rows, "auto").equal(gather if rows == 10 else dense)
    monkeypatch.undo()
    monkeypatch.setitem(CROSSOVER, "cpu", {"sddmm": 5})
    monkeypatch.setattr(torch.Tensor, "gather", lambda *a: dense[:, :2])
    taken = sddmm(idx, g, frozen, live, "auto").equal(dense[:, :2])
    assert taken == (rows == 9)


def test_what_does_not_fit_is_named():
    v, idx, frozen, live = draw(5, 3, 4, 3, 7)
    x = torch.randn(5, 7, dtype=torch.float64)
    cases = [
        (
            lambda: rank_sparse(v, idx, frozen, live, "best"),
            "path is 'best', allowed: auto, plain, dense, gather, compact, triton",
        ),
        (lambda: rank_sparse(v, idx[:, :2], frozen, live), r"idx \(5, 2\) and v \(5, 3\) differ"),
        (lambda: rank_sparse(v, None, frozen, live), "v has 3 ranks, no idx, and there are 7"),
        (lambda: rank_sparse(v, idx + 4, frozen, live), "idx holds 10, allowed: 0 to 6"),
        (lambda: rank_sparse(v, idx - 7, frozen, live), "idx holds -7, allowed: 0 to 6"),
        (lambda: rank_scores(x, idx + 4, frozen, live), "idx holds 10, allowed: 0 to 6"),
        (lambda: rank_sparse(v, idx.double(), frozen, live), "idx is torch.float64, allowed: "),
        (lambda: rank_sparse(v, idx, frozen[:, :2], live), r"frozen \(4, 2\) and live \(3, 7\)"),
        (lambda: rank_sparse(v, idx, frozen, live[0]), r"frozen \(4, 7\) and live \(7,\)"),
        (lambda: rank_sparse(v.to("meta"), idx, frozen, live), "v is on meta, live on cpu"),
        (lambda: rank_sparse(v, idx.to("meta"), frozen, live), "idx is on meta, live on cpu"),
        (lambda: rank_sparse(v, idx, frozen.to("meta"), live), "frozen is on meta, live on cpu"),
        (lambda: rank_scores(x[:, :6], idx, frozen, live), "x is 6 wide, allowed: 7"),
        (lambda: rank_scores(x[:4], idx, frozen, live), r"idx \(5, 3\) and x \(4, 7\) differ in"),
        (lambda: top_scores(x[:, :6], frozen, live, 2), "x is 6 wide, allowed: 7"),
        (lambda: top_scores(x, frozen, live, 8), "k is 8, allowed: 1 to 7"),
        (lambda: top_scores(x, frozen, live, 0), "k is 0, allowed: 1 to 7"),
    ]
    assert idx.max() == 6 and idx.min() == 0
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_no_kernel_runs_before_the_look(monkeypatch):
    v, idx, frozen, live = draw(5, 3, 4, 3, 7)
    ran = []
    monkeypatch.setattr(sparse, "spmm", lambda *a: ran.append(1))
    with pytest.raises(ValueError, match="idx holds"):
        rank_sparse(v, idx + 4, frozen, live)
    assert not ran


def test_triton_is_asked_for_where_it_can_run(monkeypatch):
    v, idx, frozen, live = draw(5, 3, 4, 3, 7)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"is for CUDA, live is on cpu|not installed"):
        rank_sparse(v, idx, frozen, live, "triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="path is 'triton', and triton is not installed"):
        rank_sparse(v, idx, frozen, live, "triton")


@pytest.mark.parametrize("path", PATHS)
def test_torchs_own_checks_of_the_operators(path):
    v, idx, frozen, live = draw(5, 3, 4, 3, 7)
    g = torch.randn(5, 7, dtype=torch.float64)
    v, live = v.detach(), live.detach()
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.minimoe
    torch.library.opcheck(ops.spmm, (idx, v, frozen, live, path), test_utils=checks)
    torch.library.opcheck(ops.sddmm, (idx, g, frozen, live, path), test_utils=checks)
    torch.library.opcheck(ops.spmm_t, (idx, v, g, 4, 7, path), test_utils=checks)


@pytest.mark.parametrize("path", ["dense", "gather"])
def test_autocast_computes_in_its_dtype_and_gradients_keep_theirs(path):
    v, idx, frozen, live = draw(9, 3, 4, 3, 7, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = rank_sparse(v, idx, frozen, live, path)
        z = rank_scores(y.detach().float(), idx, frozen, live, path)
        top, _, norm = top_scores(y.detach().float(), frozen, live, 2, path)
    assert y.dtype == z.dtype == top.dtype == torch.bfloat16 and norm.dtype == torch.float32
    half = [t.detach().bfloat16().requires_grad_() for t in (v, frozen, live)]
    by_hand = rank_sparse(half[0], idx, half[1], half[2], path)
    assert torch.equal(y, by_hand)
    dy = torch.randn(9, 7).bfloat16()
    y.backward(dy)
    by_hand.backward(dy)
    assert v.grad.dtype == live.grad.dtype == torch.float32
    assert torch.equal(v.grad, half[0].grad.float())
    assert torch.equal(live.grad, half[2].grad.float())


def test_auto_goes_by_a_bench_if_there_is_one(tmp_path, monkeypatch):
    file = tmp_path / "bench.json"
    numbers = {"small": 10, "spmm": 3, "sddmm": 4, "spmm_t": 6}
    file.write_text(json.dumps({"device": "cpu", "suggested": numbers}))
    monkeypatch.setattr(sparse, "MEASURED", sparse.read_measured(str(file)))
    assert {name: sparse.threshold(name, False) for name in numbers} == numbers
    assert sparse.threshold("spmm", True) == CROSSOVER["cuda"]["spmm"]  # of another device
    assert sparse.is_plain("auto", torch.zeros(2, 7), 5)
    assert not sparse.is_plain("auto", torch.zeros(2, 7), 6)
    # of a device; and what was not timed there stays
    file.write_text(json.dumps({"device": "NVIDIA H200", "suggested": {"sddmm": 4}}))
    monkeypatch.setattr(sparse, "MEASURED", sparse.read_measured(str(file)))
    assert [sparse.threshold(n, True) for n in ("sddmm", "spmm")] == [4, CROSSOVER["cuda"]["spmm"]]
    assert sparse.threshold("small", False) == sparse.SMALL["cpu"]
    assert sparse.read_measured("") == {}


INFINITE = '{"device": "cpu", "suggested": {"spmm": Infinity}}'


@pytest.mark.parametrize("text", [None, "", "[]", "{}", INFINITE, '{"device": 1}'])
def test_a_bench_that_is_none_is_named(text, tmp_path, monkeypatch):
    file = tmp_path / "bench.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(sparse, "MEASURED", sparse.read_measured(str(file)))
    with pytest.raises(ValueError, match=r"MINIMOE_BENCH is .*bench.json.*allowed: a bench.json"):
        sparse.threshold("spmm", False)


def test_an_idx_that_does_not_fit_is_named_on_the_plain_path_too():
    v, B, z = torch.randn(6, 3), torch.randn(8, 5), torch.randn(6, 8)
    for idx, message in (
        (torch.zeros(6, 2).long(), r"idx \(6, 2\) and v \(6, 3\) differ in shape"),
        (torch.zeros(2, 3).long(), r"idx \(2, 3\) and v \(6, 3\) differ in shape"),
        (torch.zeros(6, 3), "idx is torch.float32, allowed: torch.int32, torch.int64"),
        (torch.ones(6, 3).bool(), "idx is torch.bool"),
        (torch.full((6, 3), 8), "idx holds 8, allowed: 0 to 7, as there are 8 ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse.plain(v, idx, B)
    for idx, message in (
        (torch.zeros(2, 3).long(), r"idx \(2, 3\) and z \(6, 8\) differ in tokens"),
        (torch.zeros(6, 3), "idx is torch.float32, allowed: torch.int32, torch.int64"),
        (torch.full((6, 3), -1), "idx holds -1, allowed: 0 to 7, as there are 8 ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse.at(z, idx)
