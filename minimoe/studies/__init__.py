"""What MoRA's paper claims, put to the test: one file per study, run side by side (study.py).

routing: who should choose the ranks. knobs: what each setting does. growth: what happens as tasks
come. silence: what happens on inputs of no task. grain: how fine experts should be cut. atlas:
every scheme on four streams.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ..tools.files import write_atomic
from ..tools.results import StudyResult, to_json
from ..tools.tables import findings
from . import atlas, grain, growth, knobs, routing, silence
from .study import Study, report, run

__all__ = ["STUDIES", "run_study"]

STUDIES: dict[str, Study] = {
    "routing": routing.STUDY,
    "knobs": knobs.STUDY,
    "growth": growth.STUDY,
    "silence": silence.STUDY,
    "grain": grain.STUDY,
    "atlas": atlas.STUDY,
}


def run_study(
    name: str,
    out: Path,
    seeds: Sequence[int] | None = None,
    quick: bool = False,
    jobs: int | None = None,
    done: Callable[[str, int, int], None] = lambda label, cells, total: None,
) -> StudyResult:
    """Run a study of STUDIES, and write to the folder out: NAME.json, NAME.png, and findings.md,
    the page of all studies whose JSON is there. Returns what NAME.json holds.

    Args:
        seeds: default 0 to 4.
        quick: fewer tasks and less training: to see that it runs, not to conclude from.
        jobs: joblib's n_jobs, None for what joblib.parallel_config says.
        done: called with a label, how many cells are newly finished, and of how many.

    Raises ValueError on an unknown name, or a file in the way (study.run).
    """
    from ..tools.plots import plot_study  # here, so that what draws nothing needs no matplotlib

    if name not in STUDIES:
        raise ValueError(f"study is {name!r}, allowed: {', '.join(STUDIES)}")
    seeds = list(range(5)) if seeds is None else list(seeds)
    asked = STUDIES[name]
    cells = asked.cells(seeds, quick)
    results = run(cells, asked.measure, out, jobs, lambda label, n: done(label, n, len(cells)))
    result = report(name, asked, seeds, quick, cells, results)
    write_atomic(out / f"{name}.json", (json.dumps(to_json(result), indent=1) + "\n").encode())
    plot_study(result, out / f"{name}.png")
    there = [path for path in (out / f"{other}.json" for other in STUDIES) if path.exists()]
    entries = [json.loads(path.read_text(encoding="utf-8")) for path in there]
    page = findings([StudyResult.from_json(entry) for entry in entries])
    write_atomic(out / "findings.md", page.encode())
    return result
