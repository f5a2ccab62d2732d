"""Every path of the products against float64, before anything is timed."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import sparse
from .contenders import triton, widest

# T, K, R, O: one that fills some programs, odd ones, and one token that keeps one rank
SIZES = ((256, 16, 512, 96), (37, 3, 600, 33), (1, 1, 17, 1))
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def errors(device: str, sizes: Iterable[tuple[int, ...]] = SIZES) -> list[dict[str, Any]]:
    """For each dtype, path and product the largest error of its outputs and gradients, against
    torch's own products in float64 on the same numbers, over the largest number there; and what is
    allowed: 1e-10 in float64, 1e-4 in float32 (GPUs may round its products), two roundings in 16
    bits."""
    rows = []
    for dtype in DTYPES:
        allowed = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 2 * torch.finfo(dtype).eps)
        for path in ("plain", "dense", "gather", "compact", *triton(device)):
            for name, product in (
                ("rank_sparse", _rank_sparse),
                ("rank_scores", _rank_scores),
                ("top_scores", _top_scores),
            ):
                worst = 0.0
                for size in sizes:
                    torch.manual_seed(0)
                    T, K, R, O = size
                    idx = torch.rand(T, R, device=device).topk(K)[1]
                    drawn = [
                        torch.randn(shape, device=device).to(dtype)
                        for shape in ((T, K), (T, O), (R, O))
                    ]
                    got = product(idx, drawn, path)
                    wanted = product(idx, [each.double() for each in drawn], "", got[-1])
                    for mine, truth in zip(got[:-1], wanted[:-1], strict=True):
                        gap = (mine.double() - truth.double()).abs().max().nan_to_num(torch.inf)
                        worst = max(worst, (gap / truth.abs().max().clamp_min(1e-30)).item())
                rows.append(
                    {"product": name, "path": path, "dtype": str(dtype).removeprefix("torch.")}
                    | {"error": worst, "allowed": allowed}
                )
    return rows


# Each gives its output and gradients, and last what its reference must choose alike. Without a path
# it is the reference, as torch's own products have it.


def _rank_sparse(idx: Tensor, drawn: list[Tensor], path: str = "", _: Any = None) -> list[Any]:
    v, dy, B = drawn
    frozen = B[: len(B) // 2]

    def product(v: Tensor, live: Tensor) -> Tensor:
        if path:
            return sparse.rank_sparse(v, idx, frozen, live, path)
        H = v.new_zeros(len(v), len(B)).scatter_add(1, idx, v)
        return H @ torch.cat([frozen, live])

    return [*_grads(product, v, B, dy), None]


def _rank_scores(idx: Tensor, drawn: list[Tensor], path: str = "", _: Any = None) -> list[Any]:
    dz, x, A = drawn
    frozen = A[: len(A) // 2]

    def product(x: Tensor, live: Tensor) -> Tensor:
        if path:
            return sparse.rank_scores(x, idx, frozen, live, path)
        return (x @ torch.cat([frozen, live]).T).gather(1, idx)

    return [*_grads(product, x, A, dz), None]


def _top_scores(_: Tensor, drawn: list[Tensor], path: str = "", chosen: Any = None) -> list[Any]:
    dz, x, A = drawn
    x, frozen = x.detach().requires_grad_(), A[: len(A) // 2]
    live = A[len(frozen) :].detach().requires_grad_()
    if path:
        top, idx, norm = sparse.top_scores(x, frozen, live, dz.shape[1], path)
    else:  # at the ranks that were chosen: 16 bits have ties, which float64 does not have
        z, idx = x @ torch.cat([frozen, live]).T, chosen
        top, norm = z.gather(1, idx), torch.linalg.vector_norm(z, dim=1, keepdim=True)
    out = (top * dz).to(widest(top)).sum() + norm.sum()
    return [top.detach(), norm.detach(), *torch.autograd.grad(out, (x, live)), idx]


def _grads(f: Any, given: Tensor, rows: Tensor, out: Tensor) -> list[Tensor]:
    given, live = given.detach().requires_grad_(), rows[len(rows) // 2 :].detach().requires_grad_()
    y = f(given, live)
    return [y.detach(), *torch.autograd.grad(y, (given, live), out)]
