"""Speed and memory of the sparse path, side by side with what it must beat.

Everything is timed in one process, interleaved (clock.py). Reported are the median over rounds and
half the distance between the quartiles, of milliseconds and of ratios. First every path is held
against float64 (errors.py). Then, in an order in which the first parts decide most, and with what
is known so far given away after each:

    top-k            what a self-scoring gate needs of z = x Aᵀ, against the GEMM that makes z: the
                     norm, torch.topk, and for a GPU our one pass over z (kernels.row_top)
    up-projection    y = H B alone, each path against dense                             (sparse.py)
    sddmm, spmm_t    the other two products
    layer            a whole MoRA layer against its GEMMs: forward the base's and the scoring one;
                     in a step the base's two, two of scoring's size, and the live ranks' two. They
                     are a reference, no bound: a step does with less where R is beyond about D
                     (sparse.top_scores). Beside it, the same with torch.topk. dense-masked is the
                     same layer in plain autograd: a mask, and every rank in every product
    small layers     a step of a MoRA layer with 64 tokens, plainly and by the other paths
    toy backbone     a step of the network that `compare` trains, with each scheme, against plain
    growth           a step's parts, as tasks of 16 ranks add up
    beside           per token as many active ranks: peft's LoRA, our LoRA-MoE of 8 experts of 16
                     ranks, 2 kept, and the same by torch's grouped_mm; against the plain nn.Linear
    weight gradient  spmm_t for 16 live ranks among ever more, against the fewest
    8 adapters       64 sequences of T tokens, each answered by one of 8 LoRAs of 8 ranks, in one
                     batch (many.py); against a loop, which has each adapter's sequences already
                     apart, and leaves the outputs so. sorted, shuffled: as they stand in the batch

A training step is forward and backward to the input and the 16 live ranks. Which ranks a token
chooses: routes.py. The layer chooses for itself, so its inputs are planted: x is the sum of the
keys it is to choose.
"""

import datetime
import functools
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..roster import SCHEMES
from ..sparse import spmm_t
from ..tools.fingerprint import fingerprint
from . import contenders as c
from .clock import Clock, Contenders, keep_freed_memory, rounds, spread
from .errors import SIZES, errors
from .routes import ROUTINGS, make_routes

MOST = 2**24  # of any size
EACH = (1, 16, 64)  # tokens of a sequence
TASKS = (1, 2, 5, 10, 20, 50, 100)  # of 16 ranks
VARIANTS = (512, 4096, 16384)  # ranks, where the row pass is timed in several shapes
SMALL_LAYERS = (64, 256, 1024, 4096)  # ranks, of 64 tokens


class Group(NamedTuple):
    """What is timed together."""

    part: str
    which: str  # "forward" or "training"
    R: int
    D: int
    routing: str
    make: Callable[[], Contenders]
    peaks: bool = False  # whether memory is measured too, but for the references'
    moved: Callable[[], int] | None = None  # bytes that must be read or written


def bench(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokens: int = 4096,
    width: int | tuple[int, ...] = 768,
    top_k: int = 16,
    ranks: tuple[int, ...] = (64, 256, 512, 1024, 4096),
    routings: tuple[str, ...] = ROUTINGS,
    repeats: int = 9,
    done: Callable[[str, int], None] = lambda label, total: None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """All parts; the result is what bench.json holds.

    width: D = O, or several. ranks: R, each at least top_k and 16. A routing is left out at an R
    that it is not made for (pool up to R = 64, recorded at no multiple of 64 or beyond 4096).
    done(label, total) is called after each of all groups of contenders, save(result so far) after
    each part. Raises ValueError if a setting is out of its range.
    """
    widths = (width,) if isinstance(width, int) else width
    _require(tokens, widths, top_k, ranks, routings, repeats)
    keep_freed_memory()
    torch.manual_seed(0)
    clock = Clock(device)
    routes = make_routes(ranks, routings, top_k, tokens)
    checked = [
        (min(T, tokens), min(K, top_k), min(R, max(ranks)), min(O, widths[0]))
        for T, K, R, O in SIZES
    ]
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": c.device_name(device),
        "threads": torch.get_num_threads() if clock.cpu else None,
        "torch": torch.__version__,
        "code": fingerprint(),
        "triton": c.version("triton"),
        "peft": c.version("peft"),
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "width": widths[0],
        "top_k": top_k,
        "repeats": repeats,
        "copy_bytes_per_s": clock.bandwidth,
        "ranks_used": {f"{R} {routing}": len(idx.unique()) for (R, routing), idx in routes.items()},
        "planted_and_chosen": {},
        "complete": False,
        "errors": errors(device, checked),
        "suggested": {},
        "rows": [],
    }
    save(result)
    kind: dict[str, Any] = {"device": device, "dtype": dtype}
    planted = result["planted_and_chosen"]
    groups = deque(_groups(routes, tokens, widths, top_k, ranks, kind, planted))
    total = len(groups)
    while groups:
        group = groups.popleft()  # with the last of a layer's groups goes the layer
        result["rows"] += _timed(group, repeats, clock)
        done(f"{group.part}, {group.which}, R {group.R}, {group.routing}", total)
        if not groups or groups[0].part != group.part:
            result["suggested"] = suggested(result["rows"], top_k)
            save(result)
    result["complete"] = True
    save(result)
    return result


def _require(
    tokens: int,
    widths: tuple[int, ...],
    top_k: int,
    ranks: tuple[int, ...],
    routings: tuple[str, ...],
    repeats: int,
) -> None:
    least = max(top_k, c.LIVE)
    for name, values, low in (
        ("tokens", (tokens,), 1),
        ("width", widths, c.LIVE),
        ("top-k", (top_k,), 1),
        ("repeats", (repeats,), 1),
        ("ranks", ranks, least),
    ):
        for value in values:
            if value < low:
                raise ValueError(f"{name} is {value}, allowed: {low} or more")
            if value > MOST:
                raise ValueError(f"{name} is {value}, allowed: up to {MOST}")
    if unknown := set(routings) - set(ROUTINGS):
        raise ValueError(f"routing is {unknown.pop()!r}, allowed: {', '.join(ROUTINGS)}")


def _timed(group: Group, repeats: int, clock: Clock) -> list[dict[str, Any]]:
    """The rows of one group, the reference's first."""
    contenders = group.make()
    peak = {}
    if group.peaks:
        peak = {n: clock.peak(f) for n, f in contenders.items() if not n.startswith("GEMMs")}
    floor = clock.floor(group.moved()) if group.moved else {}
    times = rounds(contenders | floor, repeats, clock)
    reference = times[next(iter(times))]
    place = {"part": group.part, "pass": group.which, "R": group.R, "D": group.D}
    return [
        place
        | {"routing": group.routing, "name": name, "ms": spread(ms)}
        | {"ratio": spread([a / b for a, b in zip(ms, reference, strict=True)])}
        | ({"peak": peak[name]} if name in peak else {})
        for name, ms in times.items()
    ]


def _groups(
    routes: dict[tuple[int, str], Tensor],
    T: int,
    widths: tuple[int, ...],
    K: int,
    ranks: tuple[int, ...],
    kind: dict[str, Any],
    planted: dict[str, float],
) -> Iterator[Group]:
    """All that is timed, in its order. planted is filled in as layers are made."""
    device, dtype = kind["device"], kind["dtype"]
    ordered = sorted(set(ranks))
    either = "forward", "training"
    for D in widths:
        for R in ordered:
            variants = R in VARIANTS and widths[0] == D
            scores = partial(c.passes_over_scores, R, T, D, K, kind, variants)
            yield Group("top-k", "forward", R, D, "random", scores)
    for D in widths:
        for (R, routing), idx in routes.items():
            up = _once(c.up_projections, idx.to(device), R, D, kind)
            size = c.up_bytes(idx, R, D, dtype)
            for which in either:
                made, moved = partial(_one, up, which), partial(size.__getitem__, which)
                yield Group("up-projection", which, R, D, routing, made, moved=moved)
    for name in ("sddmm", "spmm_t"):
        for R in ordered:
            idx = torch.rand(T, R, device=device).topk(K)[1]
            made = partial(c.products, name, idx, R, widths[0], kind)
            yield Group(name, "forward", R, widths[0], "random", made)
    for D in widths:
        for (R, routing), idx in routes.items():
            yield from _layers(idx.to(device), R, D, routing, kind, planted)
    for R in SMALL_LAYERS:
        if max(ranks) >= R:
            made = partial(c.small_layers, R, 128, kind)
            yield Group("small layers", "training", R, 128, "random", made)
    toy = partial(c.toy_backbone, SCHEMES, device)
    yield Group("toy backbone", "training", 40, 128, "random", toy)
    for n in TASKS:
        if max(K, c.LIVE) <= n * c.LIVE <= max(ranks):
            made = partial(c.parts_of_a_step, n * c.LIVE, T, widths[0], K, kind)
            yield Group("growth", "training", n * c.LIVE, widths[0], "random", made)
    for which in either:
        made = partial(_beside, T, widths[0], K, kind, which)
        yield Group("beside", which, 8 * c.LIVE, widths[0], "random", made)
    gradients = partial(_weight_gradients, ordered, T, widths[0], K, kind)
    yield Group("weight gradient", "training", c.LIVE, widths[0], "random", gradients)
    for each in EACH:
        for order in ("sorted", "shuffled"):
            made = partial(_many, each, order, widths[0], kind)
            part = f"{c.ADAPTERS} adapters, T {each}"
            yield Group(part, "forward", 8 * c.ADAPTERS, widths[0], order, made)


def _layers(
    idx: Tensor, R: int, D: int, routing: str, kind: dict[str, Any], planted: dict[str, float]
) -> Iterator[Group]:
    layers = _once(c.mora_layers, idx, R, D, kind)

    def make(which: str) -> Contenders:
        x, made = layers()
        place = f"{R} {routing}"  # of several widths the worst
        planted[place] = min(c.agreement(made["mora"], x, idx), planted.get(place, 1.0))
        return c.reference(made["mora"], x, which) | c.passes(made, x, which)

    def moved(which: str) -> int:
        x, made = layers()
        return c.layer_bytes(made["mora"], x, idx)[which]

    for which in ("forward", "training"):
        made, size = partial(make, which), partial(moved, which)
        yield Group("layer", which, R, D, routing, made, peaks=True, moved=size)


def _once(make: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """make(*args), made when it is first asked for. What it made goes when its groups do."""
    return functools.cache(partial(make, *args))


def _one(made: Callable[[], dict[str, Contenders]], which: str) -> Contenders:
    return made()[which]


def _beside(T: int, D: int, K: int, kind: dict[str, Any], which: str) -> Contenders:
    return c.passes(c.beside(D, K, kind), torch.randn(T, D, **kind), which)


def _weight_gradients(ranks: list[int], T: int, D: int, K: int, kind: dict[str, Any]) -> Contenders:
    found = {}
    for R in ranks:
        idx = torch.rand(T, R, device=kind["device"]).topk(K)[1]
        v, dy = torch.randn(T, K, **kind), torch.randn(T, D, **kind)
        found[f"R {R}"] = c.call(spmm_t, idx, v, dy, R - c.LIVE, R, "auto")
    return found


def _many(T: int, order: str, D: int, kind: dict[str, Any]) -> Contenders:
    return {name: c.call(f) for name, f in c.many_adapters(T, order, D, kind).items()}


# What `auto` should do here


def suggested(rows: list[dict[str, Any]], K: int) -> dict[str, int]:
    """sparse.SMALL and sparse.CROSSOVER as these rows would have them: `small`, the largest T·R up
    to which plain is the fastest; and for each product the least R/K from which on its sparse path
    is faster than dense, or, where it never was, twice the largest that was timed."""
    found = {}
    parts = {"spmm": "up-projection", "sddmm": "sddmm", "spmm_t": "spmm_t"}
    for product, part in parts.items():
        at: dict[int, bool] = {}
        for row in rows:
            here = (row["part"], row["pass"], row["routing"]) == (part, "forward", "random")
            if here and row["D"] == rows[0]["D"] and row["name"] in ("gather", "triton"):
                at[row["R"]] = row["ratio"]["median"] < 1  # triton's, where there is one: the last
        if at:
            slow = [R for R in at if not at[R]]
            faster = [R for R in at if max(slow, default=0) < R]
            found[product] = min(faster, default=2 * max(at)) // K
    times = {
        (row["R"], row["name"]): row["ms"]["median"]
        for row in rows
        if row["part"] == "small layers"
    }
    if times:
        fastest = {R: min((t, n) for (r, n), t in times.items() if r == R)[1] for R, _ in times}
        other = min((R for R, name in fastest.items() if name != "plain"), default=2**24)
        found["small"] = 64 * max((R for R in fastest if other > R), default=0)
    return found
