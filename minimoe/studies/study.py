"""What a study is: many runs side by side, a table, a picture, and one sentence that the numbers
write.

A study is a list of cells, and functions that read what the cells measured. A cell is one seed of
one row of the table: a dictionary that says all of what is run, and so names its file,
cells/<hash>.json. A cell that has its file is not run again, so a study that was killed goes on
where it was. Unless the file is of other code or another torch: then its number would be of today's
code only by luck, and the cell is run again.

Cells run through joblib, in processes here, or wherever its backend takes them:

    with joblib.parallel_config(backend="dask"):       # after distributed.Client(address)
        run_study("routing", Path("findings"), jobs=-1)

Only the process that asks writes files, so a cluster needs no shared folder.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import torch

from ..tools.console import quiet_children
from ..tools.files import write_json
from ..tools.fingerprint import fingerprint
from ..tools.results import (
    EXACT,
    Panel,
    Sample,
    Spread,
    StudyResult,
    parse,
    read,
    to_json,
    with_nan,
)
from .verdicts import Claim, Values
from .verdicts import results as verdicts

Cell = dict[str, Any]  # {"study", "row": a label, "seed", and what its study's `measure` reads}


class Rows(Mapping[str, dict[str, list[Any]]]):
    """What the cells measured: rows[label][measure], one value per seed, in the order of the seeds.

    A cell with a "repeat" is the run of the cell without, its sums in another order: rows do not
    show it, `runs` does.

    Args:
        cells: seeds in order; a repeat after the run that it repeats.
        results: what each of them measured.
    """

    def __init__(self, cells: Sequence[Cell], results: Sequence[Mapping[str, Any]]):
        self._rows: dict[str, dict[int, dict[str, list[Any]]]] = {}
        for cell, result in zip(cells, results, strict=True):
            runs = self._rows.setdefault(cell["row"], {})
            row = runs.setdefault(cell.get("repeat", 0), {})
            for measure, value in result.items():
                row.setdefault(measure, []).append(value)

    def __getitem__(self, label: str) -> dict[str, list[Any]]:
        return self._rows[label][0]

    def runs(self, label: str, measure: str) -> list[Values]:
        """The values of rows[label][measure], and then those of each repeat; nan where one did not
        measure it."""
        return [row[measure] for row in self._rows[label].values()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


@dataclass(frozen=True)
class Study:
    """What the file of a study ends in.

    asks: the question, in a line. cells(seeds, quick): what to run. measure(cell): runs one, in any
    process, and returns numbers or lists of numbers by name. columns: those numbers that the table
    shows, by their heads. panels(rows): what the picture shows (plots.plot_study). finding(rows):
    the sentence. claims(rows): claims of the paper on which it bears. seeds: where none are given.
    """

    asks: str
    cells: Callable[[Sequence[int], bool], list[Cell]]
    measure: Callable[[Cell], dict[str, Any]]
    columns: dict[str, str]
    panels: Callable[[Rows], list[Panel]]
    finding: Callable[[Rows], str]
    claims: Callable[[Rows], list[Claim]]
    seeds: Sequence[int] = range(5)


def file_of(cell: Cell, folder: Path) -> Path:
    """Where a cell's result is. Its name is a hash of all that the cell says."""
    text = json.dumps(cell, sort_keys=True)
    return folder / "cells" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


@dataclass(frozen=True)
class Kept:
    """What a cell's file holds: the cell, what it measured, and by which code and torch."""

    cell: Cell
    code: str
    torch: str
    measured: dict[str, Any]
    __pydantic_config__ = EXACT


def run(
    cells: Sequence[Cell],
    measure: Callable[[Cell], dict[str, Any]],
    folder: Path,
    jobs: int | None = None,
    done: Callable[[str, int], None] = lambda label, cells: None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """measure(cell) of every cell, in order, each with its "seconds" of a core.

    Cells whose file is in folder/cells, by this code and torch, are read. All others run, `jobs` at
    a time (joblib's n_jobs), and are written there as they finish. `done` is called with a label,
    and how many cells are newly finished; `say` with a line on cells that are run again.

    Raises ValueError on a file there that is damaged or is not that cell's, and on a cell that was
    run by other code, edited meanwhile or on another machine.
    """
    made = {"code": fingerprint(), "torch": torch.__version__}
    todo, others = [], set()
    for cell in cells:
        kept = _read(cell, folder) if file_of(cell, folder).exists() else None
        there = {key: getattr(kept, key) for key in made} if kept else {}
        if there != made:
            todo.append(cell)
        others |= {(key, there[key]) for key in there if there[key] != made[key]}
    for key, other in sorted(others):
        say(f"cells of {key} {other} are run again: here it is {made[key]}")
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    done("", len(cells) - len(todo))
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    with quiet_children():
        results = parallel(joblib.delayed(_timed)(measure, cell) for cell in todo)
    for cell, code, result in results:
        if code != made["code"]:
            raise ValueError(f"a cell was run by other code: {code} there, {made['code']} here")
        entry = {"cell": cell, **made, "measured": to_json(result)}
        write_json(file_of(cell, folder), "cell", entry)
        done(f"{cell['row']}, seed {cell['seed']}", 1)
    return [_read(cell, folder).measured for cell in cells]


def _timed(
    measure: Callable[[Cell], dict[str, Any]], cell: Cell
) -> tuple[Cell, str, dict[str, Any]]:
    """What a cell measured, on one thread, and by which code: perhaps in another process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.process_time()  # of a core, and not of a clock: others may use the machine
    try:
        result = measure(cell)
    finally:
        torch.set_num_threads(threads)
    return cell, fingerprint(), {"seconds": time.process_time() - start, **result}


def _read(cell: Cell, folder: Path) -> Kept:
    path, mend = file_of(cell, folder), "delete it to run its cell again"
    kept = read(path, "cell", lambda entry: parse(Kept, entry), mend)
    if kept.cell != json.loads(json.dumps(cell)):
        raise ValueError(f"{path}: the result of another cell; {mend}")
    return Kept(cell, kept.code, kept.torch, with_nan(kept.measured))


def report(
    name: str,
    study: Study,
    seeds: Sequence[int],
    quick: bool,
    cells: Sequence[Cell],
    results: Sequence[Mapping[str, Any]],
) -> StudyResult:
    """What NAME.json holds, given what each of the cells measured, with its "seconds"."""
    rows = Rows(cells, results)
    return StudyResult(
        study=name,
        asks=study.asks,
        command=command(name, seeds, quick),
        seeds=list(seeds),
        quick=quick,
        torch=torch.__version__,
        code=fingerprint(),
        core_minutes=sum(result["seconds"] for result in results) / 60,
        columns=study.columns,
        rows={
            label: {measure: _sample(rows.runs(label, measure)) for measure in study.columns}
            for label in rows
        },
        panels=study.panels(rows),
        finding=study.finding(rows),
        claims=verdicts(study.claims(rows)),
    )


def _sample(runs: Sequence[Values]) -> Sample:
    spread = Spread.of(runs[0])
    repeats = [run for run in runs[1:] if all(map(math.isfinite, run))]
    return Sample(spread.mean, spread.std, to_json(runs[0]), to_json(repeats) or None)


def command(name: str, seeds: Sequence[int], quick: bool) -> str:
    """What a user types to have this study."""
    given = " --quick" if quick else ""
    return f"minimoe study {name}{given} --seeds {' '.join(map(str, seeds))}"
