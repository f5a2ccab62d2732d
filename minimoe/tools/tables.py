"""Results as text: tables for a terminal, and pages in Markdown."""

from collections.abc import Sequence

from .results import CompareResult, Reachable, Spread, StudyResult

COLUMNS = {
    "acc": "ACC",
    "bwt": "BWT",
    "forgetting": "forgetting",
    "fwt": "FWT",
    "transfer": "Transfer",
    "average": "Average",
}
PROBLEMS = ("interference", "intrusion", "redundancy", "ambiguity", "instability")

LEGEND = """\
ACC: mean accuracy on all tasks after the last. BWT: change on old tasks since they were learned.
forgetting: loss from a task's best. FWT: gain on a task before it is learned. Transfer: accuracy
on tasks not yet learned. Average: over all tasks and times. Parameters: trained per task, stored
at the end, active (read for one token's output). seconds: learning, per seed; ms/step: a step of
training."""
PLANTED_LEGEND = """\
Here accuracy is the share of the answer explained, 1 - Σ‖ŷ - y‖² / Σ‖y‖². reachable: the ACC that
no training can pass, by algebra; with ≥, one that the scheme is shown to be able to express."""
PROBLEMS_LEGEND = """\
In the adapted layers, on 64 test images of each task. interference: how far outputs for old tasks
have moved since each was learned, relative. intrusion: share of their gate's weight that later
ranks take. redundancy: largest |cosine| of a new rank with an old one. ambiguity: the gate's
entropy, 1 where all experts weigh the same. instability: share of the ranks chosen for an old
input that changed."""


def short(value: float) -> str:
    """.947, -.014, 1.000"""
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def cell(spread: Spread) -> str:
    """.947±.011; a dash where there is nothing to say."""
    if spread.mean is None:
        return "–"
    return short(spread.mean) + ("" if spread.std is None else f"±{short(spread.std)}")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Names to the left, cells to the right, a rule below the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


# compare


def title(result: CompareResult) -> str:
    """What was run, in a line."""
    seeds = ", ".join(map(str, result.seeds))
    tasks = result.settings["tasks"]
    return f"{result.stream}, {tasks} task{'s'[: tasks > 1]}, seed{'s'[: ',' in seeds]} {seeds}"


def table(result: CompareResult) -> str:
    """A comparison as text for a terminal, means ± sample standard deviations over seeds."""
    planted = any(scheme.reachable for scheme in result.schemes.values())
    head = ["", *["reachable"] * planted, *COLUMNS.values()]
    rows = [[*head, "trainable", "stored", "active", "seconds", "ms/step"]]
    problems = [["", *PROBLEMS]]
    for name, scheme in result.schemes.items():
        reach = [_reachable(scheme.reachable)] * planted
        scores = [cell(scheme[measure]) for measure in COLUMNS]
        counts = [f"{count:,}" for count in (scheme.trainable, scheme.stored, scheme.active)]
        step = scheme.step.mean
        times = [f"{scheme.seconds.mean or 0:.1f}", "–" if step is None else f"{1000 * step:.2f}"]
        rows.append([name, *reach, *scores, *counts, *times])
        cells = [cell(scheme[problem]) for problem in PROBLEMS]
        if set(cells) != {"–"}:
            problems.append([name, *cells])
    lines = [title(result), "", *aligned(rows), "", LEGEND, *[PLANTED_LEGEND] * planted]
    if len(problems) > 1:
        lines += ["", *aligned(problems), "", PROBLEMS_LEGEND]
    return "\n".join(lines)


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

What MoRA's paper (arXiv 2506.21035) claims, put to the test on toys: digits, a backbone of three
layers, tasks in sequence. Every sentence and number here is written by `minimoe study`, from the
JSON files beside it.

A claim is put as comparisons over the same seeds, what should be larger minus what should be
smaller, mean ± standard error. A comparison holds, or does not hold, if its mean is told from 0 by
a paired t-test at 5 %, and is mixed if it is not. A claim has the verdict of its comparisons if
they agree, and is mixed if they do not. These are many tests: where nothing is there, one in twenty
is told from 0 by chance. Tables give means ± standard deviations over seeds.
"""


def study_table(result: StudyResult) -> str:
    """A study as text for a terminal, means ± sample standard deviations over seeds."""
    lines = [["", *result.columns.values()]]
    for label, row in result.rows.items():
        lines.append([label, *(_number(row[measure]) for measure in result.columns)])
    seeds = ", ".join(map(str, result.seeds))
    head = f"{result.study}: {result.asks} Seeds {seeds}."
    return "\n".join([head, "", *aligned(lines), "", result.finding])


def _number(value: Spread) -> str:
    """Shares to three places as in compare's table; counts whole."""
    whole = value.mean is not None and value.mean == int(value.mean) and not value.std
    if whole and value.mean is not None and abs(value.mean) > 1:
        return f"{value.mean:,.0f}"
    return cell(value)


def findings(results: Sequence[StudyResult]) -> str:
    """The page: the paper's claims with their verdicts, then each study. Markdown."""
    page = [FINDINGS_HEAD, "| claim | verdict | numbers | command |", "|---|---|---|---|"]
    claims = [(claim, result) for result in results for claim in result.claims]
    for claim, result in sorted(claims, key=lambda pair: pair[0].number):
        numbers = "; ".join(claim.numbers)
        cells = (f"{claim.number}. {claim.claim}", f"**{claim.verdict}**", numbers)
        page.append(f"| {' | '.join(cells)} | `{result.command}` |")
    for result in results:
        name, quick = result.study, " A quick run: fewer cells." if result.quick else ""
        page += [
            f"\n## {name}\n",
            f"{result.asks}\n",
            f"**{result.finding}**\n",
            f"![{result.asks}]({name}.png)\n",
            f"```text\n{study_table(result)}\n```\n",
            f"`{result.command}`: {result.core_minutes:.1f} minutes of one core.{quick} "
            f"All numbers: [{name}.json]({name}.json).",
        ]
    return "\n".join(page) + "\n"
