"""What a bench times: each function gives contenders by name, the reference first."""

import contextlib
import itertools
import os
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapt import adapt, grow
from ..context import context
from ..continual.backbones import Backbone
from ..frozen import with_room
from ..lora import LoRA
from ..lora_moe import LoRAMoE
from ..many import Many
from ..mora import MoRA
from ..sparse import rank_sparse, sddmm, spmm_t
from .clock import Contenders

LIVE = 16  # ranks in training, of any number
ADAPTERS, SEQUENCES = 8, 64  # in one batch


def up_projections(idx: Tensor, R: int, width: int, kind: dict[str, Any]) -> dict[str, Contenders]:
    """y = H B by each path, without gradients and with those of v and the live ranks."""
    v, B = torch.randn(*idx.shape, **kind), torch.randn(R, width, **kind)
    frozen, live = B[:-LIVE].clone(), B[-LIVE:].clone()
    dy = torch.randn(len(idx), width, **kind)
    paths = ["dense", "plain", "gather", "compact", *triton(idx.device), "auto"]

    def step(path: str) -> None:
        given = v.detach().requires_grad_(), live.detach().requires_grad_()
        y = rank_sparse(given[0], idx, frozen, given[1], path)
        torch.autograd.grad(y, given, dy)

    return {
        "forward": {path: call(rank_sparse, v, idx, frozen, live, path) for path in paths},
        "training": {path: partial(step, path) for path in paths},
    }


def products(name: str, idx: Tensor, R: int, width: int, kind: dict[str, Any]) -> Contenders:
    """sddmm, or spmm_t of all R ranks, by each path."""
    v, g = torch.randn(*idx.shape, **kind), torch.randn(len(idx), width, **kind)
    B = torch.randn(R, width, **kind)
    args: tuple[Any, ...] = (idx, g, B[:0], B) if name == "sddmm" else (idx, v, g, 0, R)
    product = sddmm if name == "sddmm" else spmm_t
    return {path: call(product, *args, path) for path in ("dense", "gather", *triton(idx.device))}


def triton(device: torch.device | str) -> list[str]:
    """The path of that name, where it can run: on a GPU, or in Triton's interpreter."""
    runs = torch.device(device).type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return ["triton"] if runs and version("triton") else []


def passes_over_scores(
    R: int, T: int, D: int, K: int, kind: dict[str, Any], variants: bool = False
) -> Contenders:
    """What a self-scoring gate needs of z = x Aᵀ: the GEMM that makes it, the norm, the top k; and
    where Triton runs our one pass for both, if asked for in several shapes."""
    x, A = torch.randn(T, D, **kind), torch.randn(R, D, **kind)
    z = x @ A.T
    found: Contenders = {
        "GEMM": call(torch.matmul, x, A.T),
        "norm": call(torch.linalg.vector_norm, z, dim=1, dtype=widest(z)),
        "topk": call(torch.topk, z, K),
        "topk unsorted": call(torch.topk, z, K, sorted=False),
    }
    if triton(z.device):
        from .. import kernels

        if kernels.row_top(z[:1], K):
            found["row pass"] = call(kernels.row_top, z, K)
        if variants and "row pass" in found:
            for warps, G in itertools.product((1, 2, 4, 8), (4, 8, 16, 32)):
                if warps * 256 <= R <= warps * 8192 and R / 4 <= G * G * K <= R * 4:
                    name = f"row pass, {warps} warps, groups of {G}"
                    found[name] = call(kernels.row_top, z, K, warps, G)
    return found


def widest(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)


def mora_layers(
    idx: Tensor, R: int, width: int, kind: dict[str, Any]
) -> tuple[Tensor, dict[str, nn.Module]]:
    """x planted for the ranks idx, and MoRA layers of the same weights that choose them."""
    base = nn.Linear(width, width, **kind)
    A = F.normalize(torch.randn(R, width, **kind), dim=1)
    B = torch.randn(R, width, **kind)
    layers: dict[str, nn.Module] = {}
    for name, detach in (("mora", False), ("mora detached", True)):
        layer = MoRA(base, rank=LIVE, top_k=idx.shape[1], tau=0.1, detach_gate=detach)
        layer.frozen_A, layer.frozen_B = (with_room(rows[:-LIVE], LIVE) for rows in (A, B))
        layer.A.data, layer.B.data = A[-LIVE:].clone(), B[-LIVE:].clone()
        layers[name] = layer
    # unequal shares, so that no two of a token's ranks tie
    share = 0.8 + 0.4 * torch.rand(*idx.shape, **kind)
    x = rank_sparse(share, idx, A[:0], A, "gather")
    return x, {"dense-masked": DenseMasked(layers["mora"]), **layers}


class DenseMasked(nn.Module):
    """MoRA in training as plain autograd writes it: a mask, and every rank in every product. The
    frozen rows are constants, in products of their own, so no gradient of theirs is computed."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer: Any = layer

    def forward(self, x: Tensor) -> Tensor:
        m, one = self.layer, not torch.is_grad_enabled()
        z = x @ m.keys.T if one else torch.cat([x @ m.frozen_A.T, x @ m.A.T], dim=-1)
        top, idx = z.topk(m.kept)
        s = top / torch.linalg.vector_norm(z, dim=-1, keepdim=True)
        h = z * torch.zeros_like(z).scatter(-1, idx, (s / m.tau).softmax(-1))
        F = len(m.frozen_B)
        y = h @ m.rows("B") if one else h[:, :F] @ m.frozen_B + h[:, F:] @ m.B
        return m.base(x) + m.scale * y


def small_layers(R: int, width: int, kind: dict[str, Any]) -> Contenders:
    """A step of one MoRA layer with 64 tokens: plainly, and by the other paths."""
    x = torch.randn(64, width, **kind)
    base, layers = nn.Linear(width, width, **kind), dict[str, nn.Module]()
    for path in ("plain", "dense", "gather", *triton(x.device)):
        layer = MoRA(base, rank=LIVE, tau=0.1)
        rows = torch.randn(R - LIVE, width, **kind) / width**0.5
        layer.frozen_A, layer.frozen_B = (with_room(rows, LIVE) for _ in range(2))
        layer.to(**kind).path = path
        layers[path] = layer
    return passes(layers, x, "training")


def toy_backbone(schemes: dict[str, type], device: str) -> Contenders:
    """A step, forward and backward, of the network that `compare` trains: plain, all of its weights
    learning, and with each scheme in its three layers after five tasks of 8 ranks. Batch 64."""
    x, y = torch.randn(64, 64, device=device), torch.randint(10, (64,), device=device)

    def step(model: nn.Module, weights: list[nn.Parameter], said: dict[str, Tensor]) -> None:
        with context(model, **said) as batch:
            loss = F.cross_entropy(model(x), y) + batch.aux_loss
        torch.autograd.grad(loss, weights, allow_unused=True)

    plain = Backbone().to(device)
    found: Contenders = {
        "plain": lambda: torch.autograd.grad(F.cross_entropy(plain(x), y), [*plain.parameters()])
    }
    for name, scheme in schemes.items():
        model = Backbone().to(device)
        adapt(model, scheme, Backbone.targets, rank=8)
        for _ in range(4):
            grow(model)
        layer = model.train().fc1
        said = {
            what: torch.randint(len(size), (64,), device=device)
            if isinstance(size, range)
            else torch.randn(64, size, device=device)
            for what, size in cast(Any, layer).needs().items()
        }
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        found[name] = partial(step, model, weights, said)
    return found


def parts_of_a_step(R: int, T: int, D: int, K: int, kind: dict[str, Any]) -> Contenders:
    """What a step of a MoRA layer is made of: the base's forward, the scoring of R ranks, the top
    k, the up-projection, and the backward pass of all; and the whole."""
    idx = torch.rand(T, R, device=kind["device"]).topk(K)[1]
    x, layers = mora_layers(idx, R, D, kind)
    layer: Any = layers["mora"]
    v, dy, A = torch.randn(T, K, **kind), torch.randn(T, D, **kind), layer.keys.detach()
    z, W, b = x @ A.T, layer.base.weight, layer.base.bias
    given = x.detach().requires_grad_()
    y = layer(given)

    def scoring() -> None:
        torch.linalg.vector_norm(x @ A.T, dim=1, dtype=widest(z))

    def backward() -> None:
        torch.autograd.grad(y, [given, layer.A, layer.B], dy, retain_graph=True)

    return {
        "base": call(F.linear, x, W, b),
        "scoring": call(scoring),
        "top-k": call(torch.topk, z, K),
        "up": call(rank_sparse, v, idx, layer.frozen_B, layer.B.detach()),
        "gradients": backward,
    } | passes({"step": layer, "dense-masked": layers["dense-masked"]}, x, "training")


def beside(width: int, top_k: int, kind: dict[str, Any]) -> dict[str, nn.Module]:
    """The plain linear layer, and adapters of it that cost the same at any R."""
    base = nn.Linear(width, width, **kind).requires_grad_(False)
    layers: dict[str, nn.Module] = {"linear": base}
    if version("peft"):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=top_k, lora_alpha=top_k, target_modules=["0"])
        wrapped: Any = nn.Sequential(nn.Linear(width, width, **kind))
        wrapped = get_peft_model(wrapped, config, autocast_adapter_dtype=False)
        layers["peft lora"] = wrapped.base_model.model[0]
    moe = LoRAMoE(base, rank=LIVE, top_k=2)
    for _ in range(7):
        moe.grow()
    moe.to(**kind).frozen_B.normal_()
    moe.B.data.normal_()
    layers["lora_moe"] = moe
    if hasattr(F, "grouped_mm"):
        grouped, x = GroupedMoE(moe), torch.zeros(16, width, **kind).requires_grad_()
        with contextlib.suppress(RuntimeError, ValueError):  # float64; widths of odd strides
            torch.autograd.grad(grouped(x).sum(), x)
            layers["grouped_mm"] = grouped
    return layers


class GroupedMoE(nn.Module):
    """LoRA-MoE's equation with the tokens sorted by expert and one grouped GEMM per side."""

    def __init__(self, moe: LoRAMoE):
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        moe, (T, D) = self.moe, x.shape
        top, expert = moe.project(x, "router").topk(moe.top_k)
        order = expert.flatten().argsort(stable=True)
        ends = expert.flatten().bincount(minlength=moe.n_experts).cumsum(0).int()
        A = moe.keys.view(-1, moe.rank, D)
        B = moe.rows("B").view(len(A), moe.rank, -1)
        h = F.grouped_mm(x[order // moe.top_k], A.transpose(1, 2), offs=ends)
        h = h * top.softmax(-1).flatten()[order].unsqueeze(1).to(h.dtype)
        out = F.grouped_mm(h, B, offs=ends)
        back = torch.empty_like(out).index_copy(0, order, out).view(T, moe.top_k, -1)
        return moe.base(x) + moe.scale * back.sum(1)


def many_adapters(T: int, order: str, width: int, kind: dict[str, Any]) -> Contenders:
    """x (64, T, D) by 8 LoRAs: one after another, 8 outputs (8, T, O); or in one batch."""
    base = nn.Linear(width, width, **kind)
    layer = Many(base).eval()
    ids = torch.arange(ADAPTERS).repeat_interleave(SEQUENCES // ADAPTERS)
    if order == "shuffled":
        ids = ids[torch.randperm(SEQUENCES)]
    x = torch.randn(SEQUENCES, T, width, **kind)
    apart: list[tuple[nn.Module, Tensor]] = []
    for i in range(ADAPTERS):
        lora = LoRA(base, rank=8).to(**kind).eval()
        lora.B.data.normal_()
        layer.many[str(i)] = lora
        apart.append((lora, x[(ids == i).to(x.device)]))

    def loop() -> list[Tensor]:
        return [lora(own) for lora, own in apart]

    def one_batch() -> Tensor:
        with context(layer, adapter=ids):
            y: Tensor = layer(x)
        return y

    return {"loop": loop, "one batch": one_batch}


def reference(layer: Any, x: Tensor, which: str) -> Contenders:
    """The GEMMs of an exact MoRA layer as one would count them: forward the base's and the scoring
    one; in a step two of each, and the live ranks' two. And the same with torch.topk of z."""
    A, W, b = layer.keys.detach(), layer.base.weight.detach(), layer.base.bias.detach()
    z, h = x @ A.T, x @ layer.A.detach().T

    def forward() -> None:
        F.linear(x, W, b), x @ A.T

    def training() -> None:
        y = F.linear(x, W, b)
        x @ A.T
        y @ W
        z @ A
        h.T @ x
        h.T @ y

    gemms = forward if which == "forward" else training
    return {"GEMMs": gemms, "GEMMs and top-k": lambda: (gemms(), z.topk(layer.kept))}


def passes(layers: dict[str, nn.Module], x: Tensor, which: str) -> Contenders:
    dy = torch.randn_like(x)  # O is D

    def forward(layer: nn.Module) -> None:
        with torch.no_grad():
            layer(x)

    def training(layer: nn.Module) -> None:
        given = x.detach().requires_grad_()
        live = [p for p in layer.parameters() if p.requires_grad]
        torch.autograd.grad(layer(given), [given, *live], dy)

    run = forward if which == "forward" else training
    return {name: partial(run, layer) for name, layer in layers.items()}


def agreement(layer: Any, x: Tensor, idx: Tensor) -> float:
    """The share of chosen ranks that were planted."""
    with torch.no_grad():
        chosen = layer.gate(x).idx
    return (chosen.unsqueeze(2) == idx.unsqueeze(1)).any(2).double().mean().item()


# What must move, and what else is needed


def up_bytes(idx: Tensor, R: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that an up-projection must read and write, by pass."""
    T, K = idx.shape
    read = len(idx.unique()) * width * dtype.itemsize
    forward = T * K * (8 + dtype.itemsize) + read + T * width * dtype.itemsize
    # again, with dy for y and dv written, and the live ranks' gradients
    return {
        "forward": forward,
        "training": 2 * forward + (T * K + LIVE * width) * dtype.itemsize,
    }


def layer_bytes(layer: Any, x: Tensor, idx: Tensor) -> dict[str, int]:
    """Bytes that a MoRA layer must read and write for x (T, D), by pass."""
    T, D = x.shape
    weights = D * D + layer.ranks * D + len(idx.unique()) * D
    forward = (2 * T * D + weights) * x.itemsize  # x and y, W0, A, and the rows of B that were used
    return {"forward": forward, "training": 2 * forward + (T * D + 2 * LIVE * D) * x.itemsize}


def call(f: Callable[..., Any], *args: Any, **more: Any) -> Callable[[], Any]:
    """f(*args, **more), without gradients."""

    def run() -> None:
        with torch.no_grad():
            f(*args, **more)

    return run


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    return "cpu" if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device)
