"""The rank-sparse product: what the chosen ranks say, without the ranks that were not chosen.

    y[t] = sum_k  v[t, k] · B[idx[t, k]]          (T, O)

Row t of the (T, R) matrix H has K non-zeros, v[t, k] at rank idx[t, k]; then y = H B. Two paths
compute the same sum, and every gate that keeps K of R ranks goes through one of them:

    dense    scatter v into H, then one GEMM: 2·T·R·O multiply-adds, whatever K is. The reference.
    gather   read the K chosen rows of B for each token: 2·T·K·O multiply-adds, but no GEMM.

Axes: T tokens (any leading shape), O out, R ranks in all, K kept; F frozen ranks come first in
B, r live ones last. Frozen values are constants: neither path computes a gradient for them, so
a task's weight gradients cost the same after 100 tasks as after 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PATHS = ("auto", "dense", "gather")

# `auto` gathers once R/K reaches this many ranks per kept one. CPU: measured at T 4096, O 768,
# K 16, fp32, 2 threads. CUDA: arithmetic for an H100 only, nobody has measured it.
CROSSOVER = {"cpu": {"forward": 2, "training": 8}, "cuda": {"forward": 128, "training": 128}}


def rank_sparse(
    v: Tensor, idx: Tensor | None, frozen: Tensor, live: Tensor, path: str = "auto"
) -> Tensor:
    """y[t] = sum_k v[t, k] · B[idx[t, k]], with B the rows of `frozen`, then those of `live`.

    Args:
        v: (..., K) what each kept rank says: its gate times its raw activation.
        idx: (..., K) int64, the kept ranks in [0, R). None: all R ranks in order (K = R).
            A rank named twice counts twice; one that is to say nothing keeps its index and v = 0.
        frozen: (F, O) values of finished tasks; they get no gradient. F may be 0.
        live: (r, O) values in training; R = F + r.
        path: "dense", "gather", or "auto" (the faster of the two by `CROSSOVER`).

    Returns: (..., O). Raises ValueError on an unknown path or shapes that do not fit.
    """
    R, K = len(frozen) + len(live), v.shape[-1]
    if path not in PATHS:
        raise ValueError(f"path is {path!r}, allowed: {', '.join(PATHS)}")
    if idx is None and K != R:
        raise ValueError(f"v has {K} ranks and no idx, but there are {R} values")
    if idx is not None and idx.shape != v.shape:
        raise ValueError(f"idx {tuple(idx.shape)} and v {tuple(v.shape)} differ in shape")
    if path == "auto":
        grows = torch.is_grad_enabled() and (v.requires_grad or live.requires_grad)
        least = CROSSOVER["cuda" if v.is_cuda else "cpu"]["training" if grows else "forward"]
        path = "gather" if idx is not None and least * K <= R else "dense"
    if path == "gather" and idx is not None:
        y = _gather(v.reshape(-1, K), idx.reshape(-1, K), frozen, live)
        return y.reshape(*v.shape[:-1], live.shape[1])
    h = v if idx is None else v.new_zeros(*v.shape[:-1], R).scatter_add(-1, idx, v)  # (..., R)
    y = h[..., len(frozen) :] @ live
    return y + h[..., : len(frozen)] @ frozen if len(frozen) else y


def _gather(v: Tensor, idx: Tensor, frozen: Tensor, live: Tensor) -> Tensor:
    """The gather path on (T, K): one embedding bag, whose own backward gives the gradient to v."""
    B = torch.cat([frozen, live.detach()])
    v = v.to(B.dtype)  # under autocast a gate may come in another one
    y = F.embedding_bag(idx, B, per_sample_weights=v, mode="sum")
    return _LiveGradient.apply(y, v.detach(), idx, live, len(frozen))


class _LiveGradient(torch.autograd.Function):
    """Forward, the identity on y; backward, y's gradient to the live values and to no others.

    dB[i] = sum of v[t, k] · dy[t] over the pairs (t, k) with idx[t, k] = i. A stable sort by rank
    gives each live rank one run of pairs, and one embedding bag over tokens sums every run: no
    atomics, the same bits each time, and no work for the pairs that chose a frozen rank.
    """

    @staticmethod
    def forward(ctx, y: Tensor, v: Tensor, idx: Tensor, live: Tensor, first: int) -> Tensor:
        ctx.save_for_backward(v, idx)
        ctx.ranks = (first, first + len(live))
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        v, idx = ctx.saved_tensors
        first, end = ctx.ranks
        pairs = (idx.flatten() >= first).nonzero().squeeze(1)  # pair p is token p // K, slot p % K
        rank, order = idx.flatten()[pairs].sort(stable=True)
        pairs = pairs[order]
        runs = torch.searchsorted(rank, torch.arange(first, end, device=rank.device))
        dB = F.embedding_bag(
            pairs // idx.shape[1],
            dy.contiguous(),
            offsets=runs,
            per_sample_weights=v.flatten()[pairs],
            mode="sum",
        )  # (r, O)
        return dy, None, None, dB, None
