"""The question that the studies are for, answered from their numbers: where, at which memory, does
self-activation help, against what, and why?"""

import math
import statistics
from collections.abc import Mapping

from ..tools.results import ComparisonResult, StudyResult
from ..tools.tables import short, signed
from . import memory, why
from .common import ACC
from .verdicts import Comparison, Values, judged

HEAD = """\
# Does self-activation help?

Written by `python tutorials/pages.py` from the numbers of [memory and why](findings.md).

## Where, at which memory, against what

At each size of MoRA: of all learners whose ranks score themselves (mora, by the size of its scores,
of whole LoRAs, with a detached gate) the best of those that store no more, against the best of all
others that store no more, of all sizes tried, the backbone counted where it is needed; and who
passes it with the fewest numbers, at any memory. None is told the task, or sees all tasks at once.
Where both are the same at two sizes, that is one line and one comparison. Verdicts are those of
[findings](findings.md), the smallest effect that matters {matters}, and all lines one family. Both
sides are the best of several by these same numbers, so small differences say little.
"""
WHY = """\
## Why

Of MoRA's gate one part at a time is changed (`minimoe study why`), at equal numbers of ranks that
are used: 16, but for the last line. Three changes bring another with them: a cosine router's scores
are normalised in its own way, raw scores have a tau of their own (.3 and 3 were tried too, on
another processor, which moved the means at 1 by up to .010), and a whole LoRA scores ‖z‖, which has
no sign, and its 8 ranks share a weight. Positive: as MoRA has it is better. Settings are the
roster's, not those that were tuned.
"""
MEASURES = ("acc", "whole")
PARTS = {  # what MoRA has, and what it is changed to
    "ranks score themselves, not a linear router": "linear router",
    "ranks score themselves, not a cosine router": "cosine router",
    "single ranks choose, not whole LoRAs": "blocks",
    "a score's sign counts, not its size": "score by size",
    "scores are normalised, tau .1; not raw, tau 1": "no norm, tau 1",
    "the gate has a gradient": "detached gate",
    "few ranks speak, not all": "all speak",
}


def values(result: StudyResult, row: str, measure: str) -> Values:
    return [float("nan") if v is None else v for v in result.rows[row][measure].values]


def page(by_memory: StudyResult, by_part: StudyResult) -> str:
    """Markdown, of the studies memory and why."""
    duels = _duels(by_memory)
    verdicts = judged([comparison for *_, comparison in duels])
    head = (
        "| stream, at mora's | mora | best self-activated | best other, no larger | difference | "
        "verdict | passed by |"
    )
    lines = [HEAD.format(matters=short(ACC)), head, "|---" * 7 + "|"]
    for (stream, ranks, ours, theirs, _), verdict in zip(duels, verdicts, strict=True):
        rows = _rows(by_memory, stream)
        passing = _smallest_above(rows, ours)
        both = [_said(rows, row) for row in (ours, theirs)]
        own = [short(statistics.fmean(rows[f"mora, rank {rank}"]["acc"])) for rank in ranks]
        start = [f"{stream}, rank {', '.join(ranks)}", ", ".join(own)]
        cells = [*start, *both, _interval(verdict), verdict.verdict]
        lines.append(f"| {' | '.join([*cells, _said(rows, passing) if passing else '–'])} |")
    lines += ["", f"**{_sentence(duels, verdicts)}**", "", WHY]
    streams = [stream for stream in why.TASKS if f"{stream}, {why.USUAL}" in by_part.rows]
    lines += [f"| what MoRA has | {' | '.join(streams)} |", "|---" * (len(streams) + 1) + "|"]
    for part, arm in PARTS.items():
        effects = [
            Comparison(
                part,
                values(by_part, f"{stream}, {why.USUAL}", "acc"),
                values(by_part, f"{stream}, {arm}", "acc"),
                ACC,
            )
            for stream in streams
        ]
        lines.append(f"| {part} | {' | '.join(map(_interval, effects))} |")
    return "\n".join(lines) + "\n"


def _rows(result: StudyResult, stream: str) -> dict[str, dict[str, Values]]:
    """acc and whole of each row of a stream, by method and size."""
    start = f"{stream}, "
    return {
        row.removeprefix(start): {measure: values(result, row, measure) for measure in MEASURES}
        for row in result.rows
        if row.startswith(start)
    }


def _said(rows: Mapping[str, Mapping[str, Values]], row: str) -> str:
    acc, whole = (statistics.fmean(rows[row][measure]) for measure in MEASURES)
    return f"{row}: {short(acc)} ({whole:,.0f} numbers)"


def _smallest_above(rows: Mapping[str, Mapping[str, Values]], ours: str) -> str | None:
    """Of the others whose mean is above ours, the one that stores least."""
    means = {row: [statistics.fmean(rows[row][measure]) for measure in MEASURES] for row in rows}
    others = [row for row in rows if row.split(",")[0] not in (*memory.SELF, *memory.PRIVILEGED)]
    above = [row for row in others if means[row][0] > means[ours][0]]
    return min(above, key=lambda row: means[row][1], default=None)


Duel = tuple[str, list[str], str, str, Comparison]


def _duels(result: StudyResult) -> list[Duel]:
    """(stream, MoRA's ranks, best self-activated, best other, their comparison), one for all sizes
    at which both are the same."""
    found: dict[tuple[str, str, str], Duel] = {}
    for stream in memory.TASKS:
        rows = _rows(result, stream)
        for size in [row for row in rows if row.startswith("mora, ")]:
            budget = statistics.fmean(rows[size]["whole"])
            ours = _best(rows, budget, among=memory.SELF)
            theirs = _best(rows, budget, without=(*memory.SELF, *memory.PRIVILEGED))
            if ours and theirs:
                pair = Comparison(stream, rows[ours]["acc"], rows[theirs]["acc"], ACC)
                same = found.setdefault((stream, ours, theirs), (stream, [], ours, theirs, pair))
                same[1].append(size.removeprefix("mora, rank "))
    return list(found.values())


def _best(
    rows: Mapping[str, Mapping[str, Values]],
    budget: float,
    among: tuple[str, ...] | None = None,
    without: tuple[str, ...] = (),
) -> str | None:
    """Of the methods that store no more than the budget, the row of the largest mean."""
    able = [
        row
        for row in rows
        if statistics.fmean(rows[row]["whole"]) <= budget
        and (name := row.split(",")[0]) not in without
        and (among is None or name in among)
    ]
    return max(able, key=lambda row: statistics.fmean(rows[row]["acc"]), default=None)


def _interval(effect: Comparison | ComparisonResult) -> str:
    low, high = (
        (effect.low, effect.high) if isinstance(effect, ComparisonResult) else effect.interval
    )
    around = "" if math.isnan(low) else f" [{signed(low)}, {signed(high)}]"
    return f"{signed(effect.effect)}{around}"


def _sentence(duels: list[Duel], verdicts: list[ComparisonResult]) -> str:
    """Where it is supported, and where refuted."""
    said = {}
    for word in ("supported", "refuted", "inconclusive"):
        places: dict[str, list[str]] = {}
        for (stream, ranks, *_), verdict in zip(duels, verdicts, strict=True):
            if verdict.verdict == word:
                places.setdefault(stream, []).extend(ranks)
        said[word] = "; ".join(f"{s} at rank {', '.join(ranks)}" for s, ranks in places.items())
    return (
        f"That it helps at equal memory is supported on: {said['supported'] or 'nothing'}. "
        f"Refuted on: {said['refuted'] or 'nothing'}. "
        f"Inconclusive on: {said['inconclusive'] or 'nothing'}."
    )
