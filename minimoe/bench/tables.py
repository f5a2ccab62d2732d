"""A bench result as text: the full table for a terminal, and a page in Markdown."""

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
        "routing": str,
        "name": str,
        "ms": Timing,
        "ratio": Timing,
        "peak": NotRequired[float],
    },
)


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
    rows: list[Row]


def read(path: str | Path) -> dict[str, Any]:
    """What a bench.json holds. Raises FileNotFoundError; ValueError on a damaged file."""
    return read_file(path, "bench", from_json)


def from_json(entry: Any) -> dict[str, Any]:
    """Raises ValueError, naming the place, if the entry is not what `bench` returned."""
    result = dict(parse(BenchResult, entry))
    if not any(row["part"] == "layer" for row in entry["rows"]):
        raise ValueError("no row times a layer")
    return result


# The columns of the page's table: their head, and which times they show.
COLUMNS = {
    "up forward": ("up-projection", "forward", "auto"),
    "up step": ("up-projection", "training", "auto"),
    "layer forward": ("layer", "forward", "mora"),
    "layer step": ("layer", "training", "mora"),
    "detached step": ("layer", "training", "mora detached"),
    "dense-masked forward": ("layer", "forward", "dense-masked"),
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
- layer forward, layer step: a whole MoRA layer, to `limit`, the products that an exact layer seems
  to need: the base's, and one over all R keys to score; in a training step two of each, and the
  live ranks' own. A step can do with less: the gradient through the norm is x (AᵀA), a product of
  the width's size however many ranks there are. That pays where R is beyond about the width.
- detached step: the same step with no gradient through the gate (`detach_gate`), to `limit`.
- dense-masked forward, dense-masked step: the same layer written plainly, a mask and all ranks in
  every product, to `limit`.

{ranks}
{many}
All parts, routings and contenders. used: the ranks that some token chose; MiB: the memory that one
call holds at most.

```text
{table}
```

![Time of each contender against the ranks in all]({picture})
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
            if rows:
                lines += ["", *_grid(part, which, rows, result["ranks_used"], width)]
    return "\n".join(lines)


def device_line(result: dict[str, Any]) -> str:
    """What was run, where, and how often, in a line."""
    threads = f", {result['threads']} threads" if result["threads"] else ""
    return (
        f"{result['device']}{threads}, {result['dtype']}, T {result['tokens']}, "
        f"D = O = {result['width']}, K {result['top_k']}; medians of {result['repeats']} rounds "
        "± half the interquartile range"
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


def _digits(ratio: float) -> int:
    return 2 if ratio >= 0.1 else 3


def page(result: dict[str, Any], command: str, picture: str) -> str:
    """A bench result as a page in Markdown: the command, a table for reading, the full one, and
    the picture, a file beside the page."""
    return PAGE.format(
        command=command,
        device=device_line(result),
        routing=_first_routing(result),
        K=result["top_k"],
        ranks="\n".join(ratios(result)),
        many=_many(result),
        table=table(result),
        picture=picture,
    )


def ratios(result: dict[str, Any]) -> list[str]:
    """The table for reading, as lines of Markdown: a row for each R, of one routing."""
    routing = _first_routing(result)
    cells = {
        (row["part"], row["pass"], row["name"], row["R"]): row["ratio"]["median"]
        for row in result["rows"]
        if row["routing"] == routing
    }
    lines = [f"| R | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for R in sorted({R for part, _, _, R in cells if part == "layer"}):
        numbers = [_short(cells[*column, R]) for column in COLUMNS.values()]
        lines.append(f"| {R} | {' | '.join(numbers)} |")
    return lines


def _many(result: dict[str, Any]) -> str:
    """The paragraph and the table of many adapters; nothing for a result from before them."""
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


def _first_routing(result: dict[str, Any]) -> str:
    """The one that the table for reading and the picture show."""
    routing: str = result["rows"][0]["routing"]
    return routing
