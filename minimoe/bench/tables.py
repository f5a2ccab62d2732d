"""A bench result as text: the full table for a terminal, and a page in Markdown."""

from collections.abc import Mapping
from pathlib import Path
from typing import (
    Any,
    NotRequired,  # pydantic reads no other before Python 3.12
)

from typing_extensions import TypedDict

from ..tools.results import EXACT, parse
from ..tools.results import read as read_file
from ..tools.tables import aligned, filled


class Timing(TypedDict):
    median: float
    iqr: float


Row = TypedDict(
    "Row",
    {
        "part": str,
        "pass": str,
        "R": int,
        "D": int,
        "routing": str,
        "name": str,
        "ms": Timing,
        "ratio": Timing,
        "peak": NotRequired[float],
    },
)


class Error(TypedDict):
    product: str
    path: str
    dtype: str
    error: float
    allowed: float


class BenchResult(TypedDict):
    """What bench.json holds."""

    __pydantic_config__ = EXACT  # type: ignore[misc]

    date: str
    device: str
    threads: int | None
    torch: str
    code: str | None
    triton: str | None
    peft: str | None
    dtype: str
    tokens: int
    width: int
    top_k: int
    repeats: int
    copy_bytes_per_s: float | None
    ranks_used: dict[str, int]
    planted_and_chosen: dict[str, float]
    complete: bool
    errors: list[Error]
    suggested: dict[str, int]
    rows: list[Row]


def read(path: str | Path) -> dict[str, Any]:
    """What a bench.json holds. Raises FileNotFoundError; ValueError on a damaged file."""
    return read_file(path, "bench", from_json)


def from_json(entry: Any) -> dict[str, Any]:
    """Raises ValueError, naming the place, if the entry is not what `bench` returned."""
    return dict(parse(BenchResult, entry))


# The columns of the page's table: their head, and which times they show.
COLUMNS = {
    "up forward": ("up-projection", "forward", "auto"),
    "up step": ("up-projection", "training", "auto"),
    "forward": ("layer", "forward", "mora"),
    "GEMMs and top-k": ("layer", "forward", "GEMMs and top-k"),
    "dense-masked": ("layer", "forward", "dense-masked"),
    "step": ("layer", "training", "mora"),
    "its GEMMs and top-k": ("layer", "training", "GEMMs and top-k"),
    "detached step": ("layer", "training", "mora detached"),
    "dense-masked step": ("layer", "training", "dense-masked"),
}

PAGE = """\
# How fast the sparse path is

`{command}`

{device}.

Times of the sparse path beside what it must beat, measured in one process, interleaved; {routing}
routing, {K} of R ranks kept per token. Ratios of times, each to its reference:

- up forward, up step: the up-projection y = H B, each product by the path that `auto` picks, to the
  masked dense product.
- forward, step: a whole MoRA layer, to its GEMMs: the base's, and one over all R keys to score; in
  a training step two of each, and the live ranks' own. They are a reference, no bound: the gradient
  through the norm is x (AᵀA), a product of the width's size however many ranks there are, so where
  R is beyond about the width a step does with less.
- GEMMs and top-k: the same GEMMs, and torch.topk of all scores, which a forward pass cannot do
  without.
- detached step: the step with no gradient through the gate (`detach_gate`).
- dense-masked: the same layer in plain autograd, a mask, and all ranks in every product; frozen
  rows get no gradient.

{ranks}
{toy}{growth}{many}
All parts, routings and contenders. used: the ranks that some token chose; MiB: the memory that one
call holds at most.

```text
{table}
```

![Time of each contender against the ranks in all]({picture})
"""


TOY = """
A training step of the network that `compare` trains, batch 64, after five tasks of 8 ranks, over a
step of the plain one, all of whose weights learn:

| {names} |
|{rule}
| {ratios} |
"""

GROWTH = """
What a step of a MoRA layer costs as tasks of 16 ranks add up, by part, over the base's forward
(gradients: the whole backward pass, the base's too):

![The parts of a step against the tasks so far]({picture})
"""

MANY = """
Many adapters in one batch, forward: 64 sequences of T tokens, each answered by its own of 8 LoRAs
of 8 ranks. Time of the batch over that of a loop, which runs each adapter's sequences on their own,
already apart. sorted, shuffled: how they stand in the batch.
"""


def table(result: dict[str, Any], width: int | None = None) -> str:
    """bench.json as text: for each part and pass the reference in milliseconds, and all others as
    ratios to it."""
    lines = [filled(device_line(result), width)]
    for part in dict.fromkeys(row["part"] for row in result["rows"]):
        for which in ("forward", "training"):
            rows = [r for r in result["rows"] if (r["part"], r["pass"]) == (part, which)]
            for D in dict.fromkeys(row["D"] for row in rows):
                mine = [row for row in rows if row["D"] == D]
                label = part if result["width"] == D else f"{part}, D = O = {D}"
                lines += ["", *_grid(label, which, mine, result["ranks_used"], width)]
    lines += ["", *_errors(result["errors"])]
    if result["suggested"]:
        each = ", ".join(f"{name} {value}" for name, value in result["suggested"].items())
        lines += ["", f"`auto` by these times: {each}"]
    return "\n".join(lines)


def device_line(result: dict[str, Any]) -> str:
    """What was run, where, and how often, in a line."""
    threads = f", {result['threads']} threads" if result["threads"] else ""
    return (
        f"{result['device']}{threads}, {result['dtype']}, T {result['tokens']}, "
        f"D = O = {result['width']}, K {result['top_k']}; medians of {result['repeats']} rounds "
        "± half the interquartile range"
        + ("" if result["complete"] else "; the run stopped before its end")
    )


def _grid(
    part: str, which: str, rows: list[dict[str, Any]], used: dict[str, int], width: int | None
) -> list[str]:
    names = list(dict.fromkeys(row["name"] for row in rows))
    cells = {(row["R"], row["routing"], row["name"]): row for row in rows}
    peaks = [name for name in names if any(cells[at].get("peak") for at in cells if at[2] == name)]
    places = list(dict.fromkeys((row["R"], row["routing"]) for row in rows))
    head = ["R", "routing", "used", f"{names[0]} ms", *names[1:]]
    grid = [head + [f"{name} MiB" for name in peaks]]
    for R, routing in places:
        first = cells[R, routing, names[0]]["ms"]
        line = [str(R), routing, str(used.get(f"{R} {routing}", ""))]
        line += [f"{first['median']:.{1 if first['median'] >= 1 else 4}f}"]
        for name in names[1:]:
            if (R, routing, name) not in cells:
                line.append("–")
                continue
            ratio = cells[R, routing, name]["ratio"]
            digits = _digits(ratio["median"])
            line.append(f"{ratio['median']:.{digits}f}±{ratio['iqr'] / 2:.{digits}f}")
        line += [f"{cells[R, routing, n]['peak'] / 2**20:.0f}" for n in peaks]
        grid.append(line)
    if len(places) == 1:
        grid = [line[3:] for line in grid]
    title = f"{part}, {which}; ratios to {names[0]}"
    repeated = 3 if len(places) > 1 else 0
    return [title, *aligned(grid, width, repeated, align=(str.rjust, str.rjust))]


def _errors(errors: list[dict[str, Any]]) -> list[str]:
    """What is worst in each dtype; and every path that is further off than allowed."""
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in errors):
        mine = [row for row in errors if row["dtype"] == dtype]
        wrong = [f"{r['product']} {r['path']}" for r in mine if not r["error"] <= r["allowed"]]
        worst = max(row["error"] for row in mine)
        lines.append(
            f"{dtype}: {len(mine)} products against float64, largest error {worst:.1e} of "
            f"{mine[0]['allowed']:.1e} allowed" + (f"; WRONG: {', '.join(wrong)}" if wrong else "")
        )
    return lines


def _digits(ratio: float) -> int:
    return 2 if ratio >= 0.1 else 3


def page(result: dict[str, Any], command: str, picture: str, growth: str = "") -> str:
    """A bench result as a page in Markdown: the command, tables for reading, the full one, and the
    pictures, files beside the page. Raises ValueError if no row times a layer."""
    return PAGE.format(
        command=command,
        device=device_line(result),
        routing=first_routing(result),
        K=result["top_k"],
        ranks="\n".join(ratios(result)),
        toy=_toy(result),
        growth=GROWTH.format(picture=growth) if growth else "",
        many=_many(result),
        table=table(result),
        picture=picture,
    )


def ratios(result: dict[str, Any]) -> list[str]:
    """The table for reading, as lines of Markdown: a row for each R, of one routing."""
    routing = first_routing(result)
    cells = {
        (row["part"], row["pass"], row["name"], row["R"]): row["ratio"]["median"]
        for row in result["rows"]
        if (row["routing"], row["D"]) == (routing, result["width"])
    }
    lines = [f"| R | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for R in sorted({R for part, _, _, R in cells if part == "layer"}):
        numbers = [_short(cells[*column, R]) for column in COLUMNS.values()]
        lines.append(f"| {R} | {' | '.join(numbers)} |")
    return lines


def _toy(result: dict[str, Any]) -> str:
    """The paragraph and the table of steps of the toy backbone."""
    rows = [row for row in result["rows"] if row["part"] == "toy backbone"][1:]
    names, numbers = (
        " | ".join(each(row) for row in rows)
        for each in (lambda row: row["name"], lambda row: _short(row["ratio"]["median"]))
    )
    return TOY.format(names=names, rule="---|" * len(rows), ratios=numbers) if rows else ""


def _many(result: dict[str, Any]) -> str:
    """The paragraph and the table of many adapters; nothing for a run that stopped before."""
    rows = [row for row in result["rows"] if row["name"] == "one batch"]
    if not rows:
        return ""
    orders = list(dict.fromkeys(row["routing"] for row in rows))
    lines = [f"| one batch / loop | {' | '.join(orders)} |", "|---" * (1 + len(orders)) + "|"]
    for part in dict.fromkeys(row["part"] for row in rows):
        numbers = [_short(row["ratio"]["median"]) for row in rows if row["part"] == part]
        lines.append(f"| {part} | {' | '.join(numbers)} |")
    return "\n".join([MANY, *lines, ""])


def _short(ratio: float) -> str:
    return f"{ratio:.{_digits(ratio)}f}".removeprefix("0")


def first_routing(result: Mapping[str, Any]) -> str:
    """The one that the table for reading and the picture show. Raises ValueError if no row times a
    layer."""
    for row in result["rows"]:
        if row["part"] == "layer":
            return str(row["routing"])
    end = "" if result["complete"] else ": the run stopped before its end"
    raise ValueError(f"no row times a layer{end}")
