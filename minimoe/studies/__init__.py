"""What MoRA's paper claims, put to the test: one file per study, run side by side (study.py).

memory: what is scored by all that is stored. why: what carries MoRA's gain. routing: who should
choose the ranks. growth: what happens as tasks come. silence: what happens on inputs of no task.
grain: how fine experts should be cut. atlas: every learner in every place. tuning: which settings
it has there. And what three others claim of mixtures, each learned all at once: recovery: whether a
gate finds clusters. capacity: what more ranks remember, and what they work out. many_tasks: who
gains from being tuned on many.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from ..continual.streams import require_seeds
from ..tools.files import write_atomic, write_json
from ..tools.results import StudyResult, to_json
from ..tools.tables import findings
from . import (
    atlas,
    capacity,
    grain,
    growth,
    many_tasks,
    memory,
    recovery,
    routing,
    silence,
    tuning,
    why,
)
from .study import Study, report, run

__all__ = ["STUDIES", "run_study", "stored"]

STUDIES: dict[str, Study] = {
    "memory": memory.STUDY,
    "why": why.STUDY,
    "routing": routing.STUDY,
    "growth": growth.STUDY,
    "silence": silence.STUDY,
    "grain": grain.STUDY,
    "recovery": recovery.STUDY,
    "capacity": capacity.STUDY,
    "many_tasks": many_tasks.STUDY,
    "atlas": atlas.STUDY,
    "tuning": tuning.STUDY,
}


def run_study(
    name: str,
    out: Path,
    seeds: Sequence[int] | None = None,
    quick: bool = False,
    jobs: int | None = None,
    done: Callable[[str, int, int], None] = lambda label, cells, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> StudyResult:
    """Run a study of STUDIES, and write to the folder out: NAME.json, NAME.png, and findings.md,
    the page of all studies whose JSON is there. Returns what NAME.json holds.

    Args:
        seeds: default the study's own.
        quick: fewer tasks and less training: to see that it runs, not to conclude from.
        jobs: joblib's n_jobs, None for what joblib.parallel_config says.
        done: called with a label, how many cells are newly finished, and of how many.
        say: called with a line on cells of other code, which are run again.

    Raises ValueError on an unknown name, on seeds that cannot be, and on files in the folder that
    are damaged or another's, before anything is run.
    """
    from ..tools.plots import plot_study  # here, so that what draws nothing needs no matplotlib

    if name not in STUDIES:
        raise ValueError(f"study is {name!r}, allowed: {', '.join(STUDIES)}")
    asked = STUDIES[name]
    seeds = list(asked.seeds if seeds is None else seeds)
    require_seeds(seeds)
    cells = asked.cells(seeds, quick)
    others = {other: stored(out, other) for other in STUDIES if other != name}
    results = run(cells, asked.measure, out, jobs, lambda label, n: done(label, n, len(cells)), say)
    try:
        result = report(name, asked, seeds, quick, cells, results)
    except (KeyError, IndexError, TypeError, ValueError) as error:  # of what files held
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{out / 'cells'}: not what this study measures ({reason})") from error
    write_json(out / f"{name}.json", "study", to_json(result))
    plot_study(result, out / f"{name}.png")
    every = [result if other == name else others[other] for other in STUDIES]
    page = findings([one for one in every if one is not None])
    write_atomic(out / "findings.md", page.encode())
    return result


def stored(folder: Path, name: str) -> StudyResult | None:
    """What folder/NAME.json holds, if it is there. Raises ValueError, naming the file, on one that
    is damaged or another's."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    result = StudyResult.read(path)
    if result.study != name:
        raise ValueError(f"{path}: holds the study {result.study}; minimoe study {name} writes it")
    return result
