"""Results as text: tables for a terminal or a paper, and pages in Markdown."""

import csv
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .results import CompareResult, Reachable, Sample, Spread, StudyResult

COLUMNS = {
    "acc": "ACC",
    "bwt": "BWT",
    "forgetting": "forgetting",
    "fwt": "FWT",
    "transfer": "Transfer",
    "average": "Average",
}
PROBLEMS = {
    "interference": "interference",
    "intrusion": "intrusion",
    "redundancy": "redundancy",
    "redundancy_chance": "(chance)",
    "ambiguity": "ambiguity",
    "instability": "instability",
}
COUNTS = ("trainable", "stored", "read", "speaking")

LEGEND = """\
ACC: mean accuracy on all tasks after the last. BWT: change on old tasks since they were learned.
forgetting: loss from a task's best. FWT: gain on a task before it is learned. Transfer: accuracy
on tasks not yet learned. Average: over all tasks and times. Parameters: trained per task, stored
at the end, read for one token's output (also to choose), and speaking in it at most: of ranks that
have weight."""
TIMES_LEGEND = """\
seconds: learning, per seed; ms/step: a step of training."""
REAL_LEGEND = """\
Here accuracy is the share of the answer explained, 1 - Σ‖ŷ - y‖² / Σ‖y‖²."""
PLANTED_LEGEND = """\
reachable: the ACC that no training can pass, by algebra; with ≥, one that the scheme is shown to be
able to express."""
CLOSED_LEGEND = """\
Closed forms: ACC by algebra, not by training steps, from the training data of all tasks at once."""
PROBLEMS_LEGEND = """\
In the adapted layers, on 64 test examples of each task. plasticity: accuracy just after a task is
learned. interference: how far outputs for old tasks have moved since, in units of how far learning
them had moved them; – where nothing was learned. intrusion: share of what is said to old inputs
that later experts say. redundancy: largest |cosine| of a new expert's update with an older one's;
(chance): of random updates. ambiguity: 0 if one expert has all the gate's weight, 1 if all that may
be kept weigh the same. instability: share of what is said to an old input that others say now."""


def short(value: float) -> str:
    """.947, -.014, 1.000"""
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def signed(value: float) -> str:
    """+.947, -.014"""
    return "+" * (value >= 0) + short(value + 0.0)  # + 0.0: a zero has no sign


def probability(p: float) -> str:
    """.014; < .001"""
    return short(p) if p >= 0.001 else "< .001"


def cell(spread: Spread) -> str:
    """.947±.011, the standard deviation, or of a Sample half its interval; a dash where there is
    nothing to say."""
    if spread.mean is None:
        return "–"
    beside = spread.half if isinstance(spread, Sample) else spread.std
    return short(spread.mean) + ("" if beside is None else f"±{short(beside)}")


def aligned(
    rows: Sequence[Sequence[str]],
    width: int | None = None,
    repeated: int = 1,
    align: tuple[Callable[[str, int], str], ...] = (str.ljust, str.rjust),
) -> list[str]:
    """Names to the left, cells to the right, or as `align` says of the first column and of the
    others; a rule below the head.

    What is wider than `width` goes on in a further table below, which repeats the first columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    names, blocks = list(range(repeated)), [list(range(repeated))]
    for column in range(repeated, len(widths)):
        wide = sum(widths[c] + 2 for c in [*blocks[-1], column]) - 2
        if width is not None and wide > width and len(blocks[-1]) > repeated:
            blocks.append([*names])
        blocks[-1].append(column)
    lines = []
    for columns in blocks:
        block = [
            "  ".join(align[c > 0](row[c], widths[c]) for c in columns).rstrip() for row in rows
        ]
        lines += ["", block[0], "-" * max(map(len, block)), *block[1:]]
    return lines[1:]


def filled(text: str, width: int | None) -> str:
    """A paragraph, broken anew where lines are to be short."""
    return text if width is None else textwrap.fill(" ".join(text.split()), min(width, 100))


# compare


def title(result: CompareResult) -> str:
    """What was run, in a line."""
    seeds = ", ".join(map(str, result.seeds))
    tasks = result.settings["tasks"]
    return f"{result.stream}, {tasks} task{'s'[: tasks > 1]}, seed{'s'[: ',' in seeds]} {seeds}"


def table(result: CompareResult, width: int | None = None) -> str:
    """A comparison as text for a terminal, means ± sample standard deviations over seeds."""
    planted = any(scheme.reachable for scheme in result.schemes.values())
    head = ["", *["reachable"] * planted, *COLUMNS.values()]
    rows = [[*head, *COUNTS, "seconds", "ms/step"]]
    problems = [["", "plasticity", *PROBLEMS.values()]]
    for name, scheme in result.schemes.items():
        reach = [_reachable(scheme.reachable)] * planted
        scores = [cell(scheme[measure]) for measure in COLUMNS]
        counts = [f"{getattr(scheme, count):,}" for count in COUNTS]
        step = scheme.step.mean
        times = [f"{scheme.seconds.mean or 0:.1f}", "–" if step is None else f"{1000 * step:.2f}"]
        rows.append([name, *reach, *scores, *counts, *times])
        cells = [cell(scheme[problem]) for problem in PROBLEMS]
        if set(cells) != {"–"}:
            problems.append([name, cell(scheme.plasticity), *cells])
    legends = [
        filled(text, width) for text in (LEGEND, TIMES_LEGEND, *_score_legend(result, planted))
    ]
    lines = [filled(title(result), width), "", *aligned(rows, width), "", *legends]
    if result.closed_forms:
        closed = [["", COLUMNS["acc"]], *([n, cell(acc)] for n, acc in result.closed_forms.items())]
        lines += ["", *aligned(closed, width), "", filled(CLOSED_LEGEND, width)]
    if len(problems) > 1:
        lines += ["", *aligned(problems, width), "", filled(PROBLEMS_LEGEND, width)]
    return "\n".join(lines)


def _score_legend(result: CompareResult, planted: bool) -> list[str]:
    """What accuracy is, where it is none."""
    score = result.settings.get("score", "accuracy")
    if score in ("accuracy", "explained"):
        real = [REAL_LEGEND] * (score == "explained" or planted)
        return real + [PLANTED_LEGEND] * planted
    return [f"Here accuracy is the stream's own score, {score}."]


def _reachable(known: Reachable | None) -> str:
    if known is None:
        return "–"
    return cell(known) if known.limit else f"≥ {cell(known)}"


PICTURES = {  # that `compare` draws, and what each shows
    "compare.png": "Accuracy on the tasks seen so far, and every accuracy matrix",
    "gates.png": "Which task's ranks serve which task's inputs",
}


def compare_page(result: CompareResult, command: str, pictures: Sequence[str] = ()) -> str:
    """A comparison as a page in Markdown: the command, the table, and those of PICTURES."""
    lines = [f"# {title(result)}", "", f"`{command}`", "", "```text", table(result), "```"]
    for file in pictures:
        lines += ["", f"![{PICTURES[file]}]({file})", "", f"{PICTURES[file]}."]
    return "\n".join(lines) + "\n"


# studies

FINDINGS_HEAD = """\
# Findings

What MoRA's paper (arXiv 2506.21035) claims (1 to 9), SMoRA's (2501.15103; 10), and three on
mixtures of experts (2506.01656, 11; 2410.19034, 12; 2305.14705, 13), put to the test on toys:
linear maps, digits, letters, pages, in tasks one after another; 11 to 13 all at once. Every
sentence and number here is written by `minimoe study`, from the JSON files beside it.

A claim is put as comparisons over the same seeds, what should be larger minus what should be
smaller. Of each there is the effect, which is the mean difference, its interval of 95 % by paired
t, and the smallest effect that matters, which the study's source states. All comparisons of a study
are one family, so each p is printed as it is, and after Holm's correction over the family.

- **supported**: the effect is at least what matters, and is told from 0 (Holm's p(0) < .05).
- **refuted**: it is less than what matters, and is told from that (Holm's p(matters) < .05). What
  was claimed is excluded: the difference is the other way round, or none, or too small to matter.
- **inconclusive**: neither. These seeds do not tell.

A claim is supported if every comparison of it is; refuted if none is supported and more than half
are refuted; **conflicting** if some are supported and others refuted; else inconclusive.

Sentences say above, below or level with by the same rule, of that one comparison alone. Tables give
means ± half of their 95 % intervals over seeds. A seed draws what a task is, first weights and the
order of training. Images, passages and pages that test are the same in all seeds, so no interval
says what others would give: of digits, ten other sets of 450 moved the ACC of closed forms by .004
to .016, their standard deviation.
"""
STUDY_LEGEND = """\
own: share of the gate's weight that a task's inputs give to the ranks of that task; in growth just
after it is learned, in the atlas in the end. back, anew: of what is said to inputs of the last
task, the shares that the first task's ranks say, and the last one's. again: accuracy on the last
task before it is learned. upright, unseen, noise, tasks: how far features are from the base
model's, as a share of their length, on upright digits, digits of no task, noise, and the tasks.
base ACC: accuracy that is left on upright digits. ACC at 20: after 20 tasks. step, memory: time and
memory of a step of training, the plain backbone's = 1. with the backbone: numbers stored, and the
frozen ones of the backbone where the method needs it. explained: the share of the answer. NMI: the
normalised mutual information of an input's cluster and its heaviest expert. score: of memory
accuracy on what was shown, of reasoning the share explained. before, tuned: accuracy before the few
images of the rotation that is left, and on the rotations tuned on. What the rows are, the docstring
of a study's source says, minimoe/studies/*.py, and `minimoe list` of the learners' names."""
SEEDS_ALONE = """\
The spread between machines is in no interval here: nothing was run again, its sums in another
order."""
REPEATED = """\
Of {}, runs were made again, their sums in another order, as another machine may choose it: the
spread between them is in the intervals of comparisons, and in no ±."""


LONG = 400  # rows of a table on a page
TOO_LONG = """\
{} rows, of which these are the first {}. All of them: `minimoe table {}.json`."""


def study_table(result: StudyResult, width: int | None = None, most: int | None = None) -> str:
    """A study as text for a terminal, means ± half of their 95 % intervals over seeds; without ±
    where every seed gives the same. most: rows of the table, by default all."""
    lines = [["", *result.columns.values()]]
    shown = dict(list(result.rows.items())[:most])
    for label, row in shown.items():
        lines.append([label, *(_number(row[measure]) for measure in result.columns)])
    seeds = ", ".join(map(str, result.seeds))
    head = f"{result.study}: {result.asks} Seeds {seeds}."
    parts = [filled(head, width), "", *aligned(lines, width), ""]
    if len(shown) < len(result.rows):
        parts += [filled(TOO_LONG.format(len(result.rows), len(shown), result.study), width), ""]
    parts.append(filled(result.finding, width))
    if result.claims:
        parts += ["", *aligned(_comparisons(result), width)]
    return "\n".join([*parts, "", filled(_machines(result), width)])


def _comparisons(result: StudyResult) -> list[list[str]]:
    """Every claim with its verdict, and below it its comparisons."""
    head = ["effect", "from", "to", "p(0)", "Holm", "matters", "p(matters)", "Holm", "verdict"]
    lines = [["", *head]]
    for claim in result.claims:
        lines.append([f"{claim.number}. {claim.claim}", *[""] * 8, claim.verdict])
        for c in claim.comparisons:
            effect = ["–" if math.isnan(v) else signed(v) for v in (c.effect, c.low, c.high)]
            tests = [probability(c.p), probability(c.holm), short(c.matters)]
            tests += [probability(c.p_matters), probability(c.holm_matters)]
            lines.append([f"  {c.label}", *effect, *tests, c.verdict])
    return lines


def _machines(result: StudyResult) -> str:
    repeated = [
        label
        for label, row in result.rows.items()
        if any(row[measure].repeats for measure in result.columns)
    ]
    return REPEATED.format("; ".join(repeated)) if repeated else SEEDS_ALONE


def _number(value: Spread) -> str:
    """Shares to three places as in compare's table; counts whole."""
    whole = value.mean is not None and value.mean == int(value.mean) and not value.std
    if whole and value.mean is not None and abs(value.mean) > 1:
        return f"{value.mean:,.0f}"
    return cell(value)


def findings(results: Sequence[StudyResult]) -> str:
    """The page: the paper's claims with their verdicts, then each study. Markdown."""
    page = [FINDINGS_HEAD, "| claim | verdict | comparisons | command |", "|---|---|---|---|"]
    claims = [(claim, result) for result in results for claim in result.claims]
    for claim, result in sorted(claims, key=lambda pair: pair[0].number):
        verdicts = [comparison.verdict for comparison in claim.comparisons]
        counts = [f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)]
        cells = (f"{claim.number}. {claim.claim}", f"**{claim.verdict}**", ", ".join(counts))
        page.append(f"| {' | '.join(cells)} | `{result.command}` |")
    page += ["\n## columns", *(f"\n{text}" for text in (LEGEND, PROBLEMS_LEGEND, STUDY_LEGEND))]
    for result in results:
        name, quick = result.study, " A quick run: fewer cells." if result.quick else ""
        most = 20 if len(result.rows) > LONG else None
        page += [
            f"\n## {name}\n",
            f"{result.asks}\n",
            f"**{result.finding}**\n",
            f"![{result.asks}]({name}.png)\n",
            f"```text\n{study_table(result, most=most)}\n```\n",
            f"`{result.command}`: {result.core_minutes:.1f} minutes of one core.{quick} "
            f"Made by {_code(result.code)} with torch {result.torch}. "
            f"All numbers: [{name}.json]({name}.json).",
        ]
    return "\n".join(page) + "\n"


def _code(fingerprint: str | None) -> str:
    return (
        f"code {fingerprint}"
        if fingerprint
        else "several versions of the code, or one that is not known,"
    )


# any result, for a paper or a spreadsheet

FORMATS = ("text", "csv", "latex", "markdown")


def grid(kind: str, result: Any) -> tuple[list[str], list[list[Any]]]:
    """Head and rows of a result of `compare`, `study` or `bench`: names, numbers and spreads."""
    if kind == "compare":
        measures = [*COLUMNS, "plasticity", *PROBLEMS]
        reach = ["reachable"] * any(s.reachable for s in result.schemes.values())
        keys = [*reach, *measures, *COUNTS, "seconds", "step"]
        rows = [[name, *(getattr(s, k) for k in keys)] for name, s in result.schemes.items()]
        for name, acc in (result.closed_forms or {}).items():
            rows.append([name, *(acc if key == "acc" else None for key in keys)])
        return ["scheme", *keys[:-1], "seconds per step"], rows
    if kind == "study":
        rows = [[label, *(row[m] for m in result.columns)] for label, row in result.rows.items()]
        return ["row", *result.columns.values()], rows
    keys = ["part", "pass", "name", "R", "routing"]
    timed = [
        [*(row[key] for key in keys), _timing(row["ms"]), _timing(row["ratio"])]
        for row in result["rows"]
    ]
    return [*keys, "ms", "ratio"], timed


def _timing(median: Mapping[str, float]) -> Spread:
    return Spread(median["median"], median["iqr"] / 2)


def formatted(kind: str, result: Any, form: str) -> str:
    """`grid` as CSV (numbers whole, a spread in two columns), a LaTeX tabular (booktabs) or a table
    in Markdown."""
    head, rows = grid(kind, result)
    if form == "csv":
        spreads = {i for row in rows for i, entry in enumerate(row) if isinstance(entry, Spread)}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for row in [head, *rows]:
            line: list[Any] = []
            for i, entry in enumerate(row):
                if i not in spreads:
                    line.append(entry)
                elif entry is None:
                    line += [None, None]
                elif isinstance(entry, Spread):
                    line += [entry.mean, entry.std]
                else:
                    line += [entry, f"{entry} std"]
            writer.writerow(line)
        return text.getvalue().rstrip("\n")
    cells = [[_shown(entry) for entry in row] for row in rows]
    if form == "markdown":
        lines = [[part.replace("|", "\\|") for part in row] for row in [head, *cells]]
        lines.insert(1, ["---", *["---:"] * (len(head) - 1)])
        return "\n".join(f"| {' | '.join(row)} |" for row in lines)
    lines = [[_latex(part) for part in row] for row in [head, *cells]]
    body = [" & ".join(row) + r" \\" for row in lines]
    start = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
    return "\n".join(
        [start, r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}"]
    )


def _shown(entry: Any) -> str:
    if entry is None:
        return "–"
    if isinstance(entry, Reachable):
        return _reachable(entry)
    if isinstance(entry, Spread):
        return _number(entry)
    return f"{entry:,}" if isinstance(entry, int) else str(entry)


_TEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}", "–": "--"}
)
_TEX_NUMBER = str.maketrans({"±": r" \pm ", "≥": r"\geq ", ",": "{,}"})


def _latex(text: str) -> str:
    if re.fullmatch(r"[-≥ ±.,\d]+", text):
        return f"${text.translate(_TEX_NUMBER)}$"
    return text.translate(_TEX)
