import pytest
import torch

from minimoe import sparse
from minimoe.sparse import CROSSOVER, rank_sparse


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


# T, K, F, r, O: odd widths, one rank kept, all kept, nothing frozen, nothing chosen that is live
@pytest.mark.parametrize(
    "size", [(5, 3, 4, 3, 7), (1, 1, 0, 4, 1), (6, 5, 2, 3, 3), (13, 2, 60, 3, 11), (4, 1, 9, 1, 2)]
)
@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("path", ["dense", "gather"])
def test_output_and_gradients_equal_a_loops(path, repeat, size):
    v, idx, frozen, live = draw(*size, repeat=repeat)
    y, wanted = rank_sparse(v, idx, frozen, live, path), loop(v, idx, frozen, live)
    assert torch.allclose(y, wanted, atol=1e-12)
    dy = torch.randn_like(wanted)
    got = torch.autograd.grad(y, [v, live], dy)
    for mine, theirs in zip(got, torch.autograd.grad(wanted, [v, live], dy), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


@pytest.mark.parametrize("path", ["dense", "gather"])
def test_gradcheck_and_the_same_bits_twice(path):
    v, idx, frozen, live = draw(6, 3, 5, 4, 5)
    assert torch.autograd.gradcheck(lambda v, B: rank_sparse(v, idx, frozen, B, path), (v, live))
    v, idx, frozen, live = draw(300, 8, 50, 8, 33, torch.float32)
    twice = []
    for _ in range(2):
        y = rank_sparse(v, idx, frozen, live, path)
        twice.append((y, *torch.autograd.grad(y.square().sum(), [v, live])))
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


@pytest.mark.parametrize("path", ["dense", "gather"])
def test_shapes(path):
    v, idx, frozen, live = draw(24, 3, 4, 3, 7)
    flat = rank_sparse(v, idx, frozen, live, path)
    shaped = rank_sparse(v.view(2, 3, 4, 3), idx.view(2, 3, 4, 3), frozen, live, path)
    assert torch.equal(shaped, flat.view(2, 3, 4, 7))
    none = rank_sparse(v[:0], idx[:0], frozen, live, path)
    assert none.shape == (0, 7)
    none.sum().backward()
    assert torch.equal(live.grad, torch.zeros(3, 7))
    strided = rank_sparse(v.T.contiguous().T, idx.T.contiguous().T, frozen, live, path)
    assert torch.equal(strided, flat)
    strided.sum().backward()  # a gradient of stride 0


def test_no_idx_means_every_rank_in_order():
    v, _, frozen, live = draw(5, 7, 4, 3, 6)
    every = torch.arange(7).expand(5, 7)
    assert torch.allclose(
        rank_sparse(v, None, frozen, live), rank_sparse(v, every, frozen, live, "gather")
    )


def test_auto_takes_the_path_of_the_table(monkeypatch):
    taken = []
    real = sparse.embedding_bag
    monkeypatch.setattr(
        "minimoe.sparse.embedding_bag", lambda *a, **k: taken.append("gather") or real(*a, **k)
    )
    for training, limit in (("forward", 2), ("training", 4)):
        monkeypatch.setitem(CROSSOVER["cpu"], training, limit)
        for R, gathers in ((4 * limit - 1, False), (4 * limit, True)):
            v, idx, frozen, live = draw(3, 4, R - 3, 3, 5)
            with torch.set_grad_enabled(training == "training"):
                rank_sparse(v, idx, frozen, live)
            assert bool(taken) == gathers
            taken.clear()


def test_what_does_not_fit_is_named():
    v, idx, frozen, live = draw(5, 3, 4, 3, 7)
    with pytest.raises(ValueError, match="path is 'best', allowed: auto, dense, gather"):
        rank_sparse(v, idx, frozen, live, "best")
    with pytest.raises(ValueError, match=r"idx \(5, 2\) and v \(5, 3\) differ"):
        rank_sparse(v, idx[:, :2], frozen, live)
    with pytest.raises(ValueError, match="v has 3 ranks and no idx, but there are 7 values"):
        rank_sparse(v, None, frozen, live)
