"""Speed and memory of the sparse path, side by side with what it must beat.

Everything is timed in one process, interleaved (clock.py). Reported are the median over rounds and
half the distance between the quartiles, of milliseconds and of ratios.

Five parts:

    up-projection    y = H B alone, each path against dense                             (sparse.py)
    layer            a whole MoRA layer against `limit`, the products that an exact one seems to
                     need: forward the base's and the scoring GEMM; in a training step the base's
                     two, two of scoring's size, and the live ranks' two. (A step can do with less
                     where R is beyond about D: sparse.top_scores.) dense-masked is the same layer
                     as plain autograd writes it, all ranks in every GEMM.
    beside           per token as many active ranks: peft's LoRA, our LoRA-MoE of 8 experts of 16
                     ranks, 2 kept, and the same by torch's grouped_mm; against the plain nn.Linear
    weight gradient  spmm_t for 16 live ranks among ever more, against the fewest
    8 adapters       64 sequences of T tokens, each answered by one of 8 LoRAs of 8 ranks, in one
                     batch (many.py); against a loop, which has each adapter's sequences already
                     apart, and leaves the outputs so. sorted, shuffled: as they stand in the batch

A training step is forward and backward to the input and the 16 live ranks. Which ranks a token
chooses, R of them in all and K each:

    random     K at random, as of an untrained router: the worst for memory
    pool       K at random of the same 64: a batch of one task
    recorded   as MoRA chose them on permuted-digits, 64 ranks a task, R/64 tasks, test images

The layer chooses for itself, so its inputs are planted: x is the sum of the keys it is to choose.
"""

import datetime
from collections.abc import Callable, Iterable
from functools import partial
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..context import context
from ..continual.learn import AdapterLearner, pretrain, task_seed, train
from ..continual.streams import Task, make
from ..frozen import with_room
from ..lora import LoRA
from ..lora_moe import LoRAMoE
from ..many import Many
from ..mora import MoRA
from ..sparse import rank_sparse, spmm_t
from ..tools.fingerprint import fingerprint
from .clock import Clock, Contenders, keep_freed_memory, rounds, spread

LIVE = 16  # ranks in training, of any number
POOL = 64  # ranks of one task, of which `pool` chooses and by which `recorded` grows
MOST = 2**24  # of any size
ADAPTERS, SEQUENCES = 8, 64  # in one batch
EACH = (1, 16, 64)  # tokens of a sequence
ROUTINGS = ("random", "pool", "recorded")


def bench(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokens: int = 4096,
    width: int = 768,
    top_k: int = 16,
    ranks: tuple[int, ...] = (64, 256, 1024, 4096),
    routings: tuple[str, ...] = ROUTINGS,
    repeats: int = 9,
    done: Callable[[str, int], None] = lambda label, total: None,
) -> dict[str, Any]:
    """All five parts; the result is what bench.json holds.

    ranks: R, each at least top_k and LIVE. A routing is left out at an R that it is not made for
    (pool up to R = 64, recorded at no multiple of 64). done(label, total) is called after each of
    all groups of contenders. Raises ValueError if a setting is out of its range.
    """
    least = max(top_k, LIVE)
    for name, value, low in (
        ("tokens", tokens, 1),
        ("width", width, LIVE),
        ("top-k", top_k, 1),
        ("repeats", repeats, 1),
        ("ranks", min(ranks), least),
        ("ranks", max(ranks), least),
    ):
        if value < low:
            raise ValueError(f"{name} is {value}, allowed: {low} or more")
        if value > MOST:
            raise ValueError(f"{name} is {value}, allowed: up to {MOST}")
    if unknown := set(routings) - set(ROUTINGS):
        raise ValueError(f"routing is {unknown.pop()!r}, allowed: {', '.join(ROUTINGS)}")
    keep_freed_memory()
    torch.manual_seed(0)
    clock = Clock(device)
    kind: dict[str, Any] = {"device": device, "dtype": dtype}
    rows: list[dict[str, Any]] = []

    def measure(
        part: str, which: str, R: int, routing: str, contenders: Contenders, **more: Any
    ) -> None:
        times = rounds(contenders, repeats, clock)
        reference = times[next(iter(times))]
        for name, ms in times.items():
            ratio = [a / b for a, b in zip(ms, reference, strict=True)]
            rows.append(
                {"part": part, "pass": which, "R": R, "routing": routing, "name": name}
                | {"ms": spread(ms), "ratio": spread(ratio)}
                | {key: value[name] for key, value in more.items() if name in value}
            )
        done(f"{part}, {which}, R {R}, {routing}", 4 * len(routes) + 3 + 2 * len(EACH))

    routes = make_routes(ranks, routings, top_k, tokens)
    used: dict[str, int] = {}
    planted: dict[str, float] = {}
    for (R, routing), idx in routes.items():
        used[f"{R} {routing}"] = len(idx.unique())
        idx = idx.to(device)
        for which, contenders in up_projections(idx, R, width, kind).items():
            floor = clock.floor(up_bytes(idx, R, width, dtype)[which])
            measure("up-projection", which, R, routing, contenders | floor)
        x, layers = mora_layers(idx, R, width, kind)
        planted[f"{R} {routing}"] = agreement(layers["mora"], x, idx)
        for which in ("forward", "training"):
            limit: Contenders = {"limit": _limit(layers["mora"], x, which)}
            passes = _passes(layers, x, which)
            peak = {name: clock.peak(f) for name, f in passes.items()}
            floor = clock.floor(layer_bytes(layers["mora"], x, idx)[which])
            measure("layer", which, R, routing, limit | passes | floor, peak=peak)
    x = torch.randn(tokens, width, **kind)
    for which in ("forward", "training"):
        contenders = _passes(beside(width, top_k, kind), x, which)
        measure("beside", which, 8 * LIVE, "random", contenders)
    gradients = {}
    for R in sorted(ranks):
        idx = torch.rand(tokens, R, device=device).topk(top_k)[1]
        v, dy = torch.randn(tokens, top_k, **kind), torch.randn(tokens, width, **kind)
        gradients[f"R {R}"] = _call(spmm_t, idx, v, dy, R - LIVE, R, "auto")
    measure("weight gradient", "training", LIVE, "random", gradients)
    for T in EACH:
        for order in ("sorted", "shuffled"):
            both = {name: _call(f) for name, f in many_adapters(T, order, width, kind).items()}
            measure(f"{ADAPTERS} adapters, T {T}", "forward", 8 * ADAPTERS, order, both)
    return {
        "date": datetime.date.today().isoformat(),
        "device": _device_name(device),
        "threads": torch.get_num_threads() if clock.cpu else None,
        "torch": torch.__version__,
        "code": fingerprint(),
        "triton": _version("triton"),
        "peft": _version("peft"),
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "width": width,
        "top_k": top_k,
        "repeats": repeats,
        "copy_bytes_per_s": clock.bandwidth,
        "ranks_used": used,
        "planted_and_chosen": planted,
        "rows": rows,
    }


# What is timed: each function gives contenders, the reference first.


def up_projections(idx: Tensor, R: int, width: int, kind: dict[str, Any]) -> dict[str, Contenders]:
    """y = H B by each path, without gradients and with those of v and the live ranks."""
    v, B = torch.randn(*idx.shape, **kind), torch.randn(R, width, **kind)
    frozen, live = B[:-LIVE].clone(), B[-LIVE:].clone()
    dy = torch.randn(len(idx), width, **kind)
    paths = ["dense", "plain", "gather", "compact", "auto"]
    if idx.is_cuda and _version("triton"):
        paths.insert(-1, "triton")

    def step(path: str) -> None:
        given = v.detach().requires_grad_(), live.detach().requires_grad_()
        y = rank_sparse(given[0], idx, frozen, given[1], path)
        torch.autograd.grad(y, given, dy)

    return {
        "forward": {path: _call(rank_sparse, v, idx, frozen, live, path) for path in paths},
        "training": {path: partial(step, path) for path in paths},
    }


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
    x = torch.stack([s @ A[i] for s, i in zip(share, idx, strict=True)])
    return x, {"dense-masked": DenseMasked(layers["mora"]), **layers}


class DenseMasked(nn.Module):
    """MoRA in training as plain autograd writes it: a mask, and every rank in every GEMM."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer: Any = layer

    def forward(self, x: Tensor) -> Tensor:
        m = self.layer
        z = x @ m.keys.T
        top, idx = z.topk(m.kept)
        s = top / torch.linalg.vector_norm(z, dim=-1, keepdim=True)
        g = torch.zeros_like(z).scatter(-1, idx, (s / m.tau).softmax(-1))
        return m.base(x) + m.scale * (g * z) @ m.rows("B")


def beside(width: int, top_k: int, kind: dict[str, Any]) -> dict[str, nn.Module]:
    """The plain linear layer, and adapters of it that cost the same at any R."""
    base = nn.Linear(width, width, **kind).requires_grad_(False)
    layers: dict[str, nn.Module] = {"linear": base}
    if _version("peft"):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=top_k, lora_alpha=top_k, target_modules=["0"])
        wrapped: Any = nn.Sequential(nn.Linear(width, width, **kind))
        wrapped = get_peft_model(wrapped, config, autocast_adapter_dtype=False)
        layers["peft lora"] = wrapped.base_model.model[0]
    moe = LoRAMoE(base, rank=LIVE, top_k=2)
    for _ in range(7):
        moe.grow()
    moe.frozen_B.normal_()
    moe.B.data.normal_()
    layers["lora_moe"] = moe
    if hasattr(F, "grouped_mm"):
        layers["grouped_mm"] = GroupedMoE(moe)
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
        lora = LoRA(base, rank=8).eval()
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


def _limit(layer: Any, x: Tensor, which: str) -> Callable[[], None]:
    """The GEMMs that an exact MoRA layer seems to need."""
    A, W, b = layer.keys, layer.base.weight, layer.base.bias
    A, W, b = A.detach(), W.detach(), b.detach()
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

    return forward if which == "forward" else training


def _passes(layers: dict[str, nn.Module], x: Tensor, which: str) -> Contenders:
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


# Which ranks the tokens choose


def make_routes(
    ranks: tuple[int, ...], routings: tuple[str, ...], K: int, tokens: int
) -> dict[tuple[int, str], Tensor]:
    """{(R, routing): idx (tokens, K)}, for each R those routings that are made for it."""
    recorded = record(ranks, K, tokens) if "recorded" in routings else {}
    routes = {}
    for R in ranks:
        pool = torch.randperm(R)[:POOL]
        if "random" in routings:
            routes[R, "random"] = torch.rand(tokens, R).topk(K)[1]
        if "pool" in routings and K <= POOL < R:
            routes[R, "pool"] = pool[torch.rand(tokens, POOL).topk(K)[1]]
        if R in recorded:
            routes[R, "recorded"] = recorded[R]
    if not routes:
        raise ValueError(f"none of the routings {', '.join(routings)} is made for any R of {ranks}")
    return routes


def record(ranks: tuple[int, ...], top_k: int, tokens: int) -> dict[int, Tensor]:
    """{R: idx (tokens, top_k)}: what the second layer's MoRA chose of R ranks on test images of
    the R/64 tasks of permuted-digits that it had learned, two epochs each."""
    wanted = [R for R in ranks if R % POOL == 0 and top_k <= R]
    if not wanted:
        return {}
    stream = make("permuted-digits", max(wanted) // POOL, 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = pretrain(stream, 0)
        learner = AdapterLearner(model, MoRA, rank=POOL, top_k=top_k, tau=0.1)
        layer: Any = model.fc2

        def two_epochs(model: nn.Module, weights: Iterable[Tensor], task: Task, t: int) -> None:
            train(model, weights, task, 2, task_seed(0, t))

        idx_of = {}
        for t in range(len(stream.tasks)):
            learner.learn(stream, t, partial(two_epochs, t=t))
            if (R := POOL * (t + 1)) in wanted:
                images = torch.cat([task.x_test for task in stream.tasks[: t + 1]])
                rows = torch.randint(len(images), (tokens,))
                chosen: list[Tensor] = []
                hook = layer.register_forward_pre_hook(
                    lambda module, args, chosen=chosen: chosen.append(module.gate(args[0]).idx)
                )
                with torch.no_grad():
                    model(images[rows])
                hook.remove()
                idx_of[R] = chosen[0]
    torch.set_num_threads(threads)
    return idx_of


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


def _call(f: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad():
            f(*args)

    return run


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: str) -> str:
    return "cpu" if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device)
