"""Studies: many runs side by side, a table, a picture, and one sentence that the numbers write.

A study (studies.py) is a list of cells. A cell is one seed of one row of its table: a dictionary
that says all of what is run, and so names its file, cells/<hash>.json. A cell that has its file is
not run again, so a study that was killed goes on where it was.

Cells run through joblib, in processes here, or wherever its backend takes them:

    with joblib.parallel_config(backend="dask"):       # after distributed.Client(address)
        study("routing", Path("findings"), jobs=-1)

Only the process that asks writes files, so a cluster needs no shared folder.
"""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import scipy.stats
import torch

from .compare import _aligned, _cell, _without_nan
from .files import write_atomic

Cell = dict[str, Any]  # {"study", "row": a label, "seed", and what its study's `measure` reads}
Values = list[float]  # one per seed


class Rows:
    """What the cells found: rows[label][measure], one value per seed, in the order of the seeds."""

    def __init__(self, cells: list[Cell], found: list[dict[str, Any]]):
        self.found: dict[str, dict[str, list[Any]]] = {}
        for cell, result in zip(cells, found, strict=True):
            row = self.found.setdefault(cell["row"], {})
            for measure, value in result.items():
                row.setdefault(measure, []).append(value)

    def __getitem__(self, label: str) -> dict[str, list[Any]]:
        return self.found[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)


@dataclass(frozen=True)
class Comparison:
    """Over the same seeds, `more` is said to be above `less`: values, or one number."""

    says: str
    more: Values
    less: Values | float

    @property
    def difference(self) -> tuple[float, float]:
        """Mean and standard error of more - less, seed by seed."""
        less = self.less if isinstance(self.less, list) else [self.less] * len(self.more)
        each = [a - b for a, b in zip(self.more, less, strict=True)]
        error = np.std(each, ddof=1) / math.sqrt(len(each)) if len(each) > 1 else math.nan
        return float(np.mean(each)), float(error)

    @property
    def verdict(self) -> str:
        """One of "holds" and "does not hold" if the mean difference is told from 0 on that side, by
        a paired t-test at 5 %; "mixed" if it is not (nor can be, with a single seed)."""
        mean, error = self.difference
        if not abs(mean) > scipy.stats.t.ppf(0.975, len(self.more) - 1) * error:
            return "mixed"
        return "holds" if mean > 0 else "does not hold"

    def __str__(self) -> str:
        mean, error = self.difference
        spread = "" if math.isnan(error) else f" ± {error:.3f}"
        return f"{self.says}: {mean:+.3f}{spread} ({self.verdict})"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper (its number in the list that findings.md prints), put as comparisons."""

    number: int
    says: str
    comparisons: list[Comparison]

    @property
    def verdict(self) -> str:
        """That of all comparisons if they agree, or else "mixed"."""
        verdicts = {comparison.verdict for comparison in self.comparisons}
        return verdicts.pop() if len(verdicts) == 1 else "mixed"


@dataclass(frozen=True)
class Study:
    """What studies.py states of each.

    asks: the question, in a line. cells(seeds, quick): what to run. measure(cell): runs one, in any
    process, and returns numbers or lists of numbers by name. columns: those numbers that the table
    shows, by their heads. panels(rows): what the picture shows (plots.plot_study). finding(rows):
    the sentence. claims(rows): claims of the paper on which it bears.
    """

    asks: str
    cells: Callable[[list[int], bool], list[Cell]]
    measure: Callable[[Cell], dict[str, Any]]
    columns: dict[str, str]
    panels: Callable[[Rows], list[dict[str, Any]]]
    finding: Callable[[Rows], str]
    claims: Callable[[Rows], list[Claim]]


def file_of(cell: Cell, folder: Path) -> Path:
    """Where a cell's result is. Its name is a hash of all that the cell says."""
    said = json.dumps(cell, sort_keys=True).encode()
    return folder / "cells" / f"{hashlib.sha256(said).hexdigest()[:16]}.json"


def run(
    cells: list[Cell],
    measure: Callable[[Cell], dict[str, Any]],
    folder: Path,
    jobs: int | None = None,
    done: Callable[[str, int], None] = lambda label, cells: None,
) -> list[dict[str, Any]]:
    """measure(cell) of every cell, in order; {"seconds"} and what it found. Cells whose file is in
    folder/cells are read, all others run, `jobs` at a time (joblib's n_jobs), and written there as
    they finish. `done` hears of progress: a label, and how many cells are newly finished.

    Raises ValueError on a file there that is not that cell's.
    """
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    todo = [cell for cell in cells if not file_of(cell, folder).exists()]
    done("", len(cells) - len(todo))
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    for cell, found in parallel(joblib.delayed(_timed)(measure, cell) for cell in todo):
        text = json.dumps({"cell": cell, "found": _without_nan(found)}) + "\n"
        write_atomic(file_of(cell, folder), text.encode())
        done(f"{cell['row']}, seed {cell['seed']}", 1)
    return [_read(file_of(cell, folder), cell) for cell in cells]


def _timed(measure: Callable[[Cell], dict[str, Any]], cell: Cell) -> tuple[Cell, dict[str, Any]]:
    torch.set_num_threads(1)
    start = time.perf_counter()
    found = measure(cell)
    return cell, {"seconds": time.perf_counter() - start, **found}


def _read(path: Path, cell: Cell) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        same = kept["cell"] == cell
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ValueError(f"{path}: not the result of its cell; delete it to run the cell again")
    return _nan(kept["found"])


def _nan(entry: Any) -> Any:
    """nan for the None that JSON holds in its place."""
    if isinstance(entry, dict):
        return {key: _nan(value) for key, value in entry.items()}
    if isinstance(entry, list):
        return [_nan(value) for value in entry]
    return math.nan if entry is None else entry


def study(
    name: str,
    out: Path,
    seeds: list[int] | None = None,
    quick: bool = False,
    jobs: int | None = None,
    done: Callable[[str, int, int], None] = lambda label, cells, total: None,
) -> dict[str, Any]:
    """Run a study of studies.STUDIES, and write to the folder out: NAME.json, NAME.png, and
    findings.md, the page of all studies whose JSON is there. Returns what NAME.json holds.

    Args:
        seeds: default 0 to 4.
        quick: fewer tasks and less training: to see that it runs, not to conclude from.
        jobs: joblib's n_jobs, None for what joblib.parallel_config says.
        done: hears of progress: a label, how many cells are newly finished, and of how many.

    Raises ValueError on an unknown name, or a file in the way (`run`).
    """
    from .plots import plot_study
    from .studies import STUDIES

    if name not in STUDIES:
        raise ValueError(f"study is {name!r}, allowed: {', '.join(STUDIES)}")
    seeds = list(range(5)) if seeds is None else list(seeds)
    cells = STUDIES[name].cells(seeds, quick)
    found = run(
        cells, STUDIES[name].measure, out, jobs, lambda label, n: done(label, n, len(cells))
    )
    result = report(name, STUDIES[name], seeds, quick, cells, found)
    write_atomic(out / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
    plot_study(result, out / f"{name}.png")
    there = [out / f"{other}.json" for other in STUDIES]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in there if path.exists()]
    write_atomic(out / "findings.md", findings(results).encode())
    return result


def report(
    name: str, made: Study, seeds: list[int], quick: bool, cells: list[Cell], found: list[Any]
) -> dict[str, Any]:
    """What the study's JSON holds, nan as None."""
    rows = Rows(cells, found)
    return {
        "study": name,
        "asks": made.asks,
        "command": command(name, seeds, quick),
        "seeds": seeds,
        "quick": quick,
        "torch": torch.__version__,
        "core_minutes": sum(result["seconds"] for result in found) / 60,
        "columns": made.columns,
        "rows": {
            label: {measure: _spread(rows[label][measure]) for measure in made.columns}
            for label in rows
        },
        "panels": _without_nan(made.panels(rows)),
        "finding": made.finding(rows),
        "claims": [
            {
                "number": claim.number,
                "claim": claim.says,
                "verdict": claim.verdict,
                "numbers": [str(comparison) for comparison in claim.comparisons],
            }
            for claim in made.claims(rows)
        ],
    }


def _spread(values: Iterable[float]) -> dict[str, Any]:
    values = list(values)
    if any(map(math.isnan, values)):
        return {"mean": None, "std": None, "values": _without_nan(values)}
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "values": values}


def command(name: str, seeds: list[int], quick: bool) -> str:
    """What a user types to have this study."""
    given = " --quick" if quick else ""
    return f"minimoe study {name}{given} --seeds {' '.join(map(str, seeds))}"


def table(result: dict[str, Any]) -> str:
    """A study's JSON as text for a terminal, means ± sample standard deviations over seeds."""
    lines = [["", *result["columns"].values()]]
    for label, row in result["rows"].items():
        lines.append([label, *(_number(row[measure]) for measure in result["columns"])])
    seeds = ", ".join(map(str, result["seeds"]))
    head = f"{result['study']}: {result['asks']} Seeds {seeds}."
    return "\n".join([head, "", *_aligned(lines), "", result["finding"]])


def _number(value: dict[str, Any]) -> str:
    """Shares to three places as in compare's table; counts whole."""
    whole = value["mean"] is not None and value["mean"] == int(value["mean"]) and not value["std"]
    if whole and abs(value["mean"]) > 1:
        return f"{value['mean']:,.0f}"
    return _cell(value)


def findings(results: list[dict[str, Any]]) -> str:
    """The page: the paper's claims with their verdicts, then each study. Markdown."""
    page = [HEAD, "| claim | verdict | numbers | command |", "|---|---|---|---|"]
    claims = [(claim, result) for result in results for claim in result["claims"]]
    for claim, result in sorted(claims, key=lambda pair: pair[0]["number"]):
        numbers = "; ".join(claim["numbers"])
        cells = (f"{claim['number']}. {claim['claim']}", f"**{claim['verdict']}**", numbers)
        page.append(f"| {' | '.join(cells)} | `{result['command']}` |")
    for result in results:
        name, quick = result["study"], " A quick run: fewer cells." if result["quick"] else ""
        page += [
            f"\n## {name}\n",
            f"{result['asks']}\n",
            f"**{result['finding']}**\n",
            f"![{result['asks']}]({name}.png)\n",
            f"```text\n{table(result)}\n```\n",
            f"`{result['command']}`: {result['core_minutes']:.1f} minutes of one core.{quick} "
            f"All numbers: [{name}.json]({name}.json).",
        ]
    return "\n".join(page) + "\n"


HEAD = """\
# Findings

What MoRA's paper (arXiv 2506.21035) claims, put to the test on toys: digits, a backbone of three
layers, tasks in sequence. Every sentence and number here is written by `minimoe study`, from the
JSON files beside it.

A claim is put as comparisons over the same seeds, what should be larger minus what should be
smaller, mean ± standard error. A comparison holds, or does not hold, if its mean is told from 0 by
a paired t-test at 5 %, and is mixed if it is not. A claim has the verdict of its comparisons if
they agree, and is mixed if they do not. These are many tests: where nothing is there, one in twenty
is told from 0 by chance. Tables give means ± standard deviations over seeds.
"""
