"""The rank-sparse product: what the chosen ranks say, without the ranks that were not chosen.

    y[t] = sum_k  v[t, k] · B[idx[t, k]]          (T, O)

Row t of the (T, R) matrix H has K non-zeros, v[t, k] at rank idx[t, k]; then y = H B. Two paths
compute the same sum, and every gate that keeps K of R ranks goes through one of them:

    dense    scatter v into H, then one GEMM: T·R·O multiply-adds, whatever K is. The reference.
    gather   read the K chosen rows of B for each token: T·K·O multiply-adds, but no GEMM.

Axes: T tokens (any leading shape), O out, R ranks in all, K kept; F frozen ranks come first in
B, r live ones last. Frozen values are constants: neither path computes a gradient for them, so
a task's weight gradients cost the same after 100 tasks as after 1.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

PATHS = ("auto", "dense", "gather")

# `auto` gathers once there are this many ranks per kept one, R/K. CPU: measured at T 4096, O 768,
# K 8 to 32, fp32, 2 threads, 16 live ranks. CUDA: arithmetic for an H100, nobody has measured it.
CROSSOVER = {"cpu": {"forward": 1, "training": 4}, "cuda": {"forward": 128, "training": 128}}


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
    F, R, K = len(frozen), len(frozen) + len(live), v.shape[-1]
    if path not in PATHS:
        raise ValueError(f"path is {path!r}, allowed: {', '.join(PATHS)}")
    if idx is None and K != R:
        raise ValueError(f"v has {K} ranks and no idx, but there are {R} values")
    if idx is not None and idx.shape != v.shape:
        raise ValueError(f"idx {tuple(idx.shape)} and v {tuple(v.shape)} differ in shape")
    if path == "auto":
        training = torch.is_grad_enabled() and (v.requires_grad or live.requires_grad)
        least = CROSSOVER["cuda" if v.is_cuda else "cpu"]["training" if training else "forward"]
        path = "gather" if idx is not None and least * K <= R else "dense"
    if idx is None:
        return v[..., F:] @ live + v[..., :F] @ frozen if F else v @ live
    B = torch.cat([frozen, live.detach()])  # constant here: _LiveGradient sees to live
    flat_v, flat_idx = v.reshape(-1, K), idx.reshape(-1, K)
    if path == "gather":
        y = embedding_bag(flat_idx, B, per_sample_weights=flat_v.to(B.dtype), mode="sum")
    else:
        y = flat_v.new_zeros(len(flat_v), R).scatter_add(1, flat_idx, flat_v) @ B
    y = _LiveGradient.apply(y, flat_v.detach(), flat_idx, live, F, path)
    return y.reshape(*v.shape[:-1], live.shape[1])


class _LiveGradient(torch.autograd.Function):
    """Forward, the identity on y; backward, y's gradient to the live values and to no others.

    dB[i] = sum of v[t, k] · dy[t] over the pairs (t, k) with idx[t, k] = i. Dense: the live columns
    of H, then one GEMM. Gather: a stable sort by rank gives each live rank one run of pairs, and
    one embedding bag over tokens sums every run: no atomics, the same bits each time, and no work
    for the pairs that chose a frozen rank.
    """

    @staticmethod
    def forward(ctx, y: Tensor, v: Tensor, idx: Tensor, live: Tensor, first: int, path: str):
        ctx.save_for_backward(v, idx)
        ctx.ranks, ctx.path = (first, first + len(live)), path
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        v, idx = ctx.saved_tensors
        v, (first, end) = v.to(dy.dtype), ctx.ranks
        if ctx.path == "dense":
            column = (idx - first).clamp_min(-1) + 1  # 0 for every frozen rank, and then dropped
            h = v.new_zeros(len(v), end - first + 1).scatter_add(1, column, v)[:, 1:]
            return dy, None, None, h.T @ dy, None, None
        pairs = (idx.flatten() >= first).nonzero().squeeze(1)  # pair p is token p // K, slot p % K
        rank, order = idx.flatten()[pairs].sort(stable=True)
        pairs = pairs[order]
        runs = torch.searchsorted(rank, torch.arange(first, end, device=rank.device))
        tokens, weights = pairs // idx.shape[1], v.flatten()[pairs]
        dB = embedding_bag(tokens, dy.contiguous(), runs, per_sample_weights=weights, mode="sum")
        return dy, None, None, dB, None, None
