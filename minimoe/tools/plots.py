"""The pictures."""

import io
import math
import textwrap
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from .files import write_atomic
from .results import CompareResult, StudyResult
from .tables import title

# Okabe and Ito's colours, made to be told apart with any colour vision, but for two of ours at the
# end (grey, olive); every line has a marker of its own besides.
COLOURS = ["#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#8C8C8C"]
COLOURS += ["#B8A900"]
MARKERS = "osD^v<>XP"


def plot_compare(
    result: CompareResult,
    path: Path,
    thick: Collection[str] = (),
    dashed: Collection[str] = (),
) -> None:
    """A comparison as one figure: on the left, accuracy on the tasks seen so far after each task,
    mean over seeds and ± one standard deviation; on the right, every scheme's accuracy matrix.
    (Or the score of the stream, if it has another.)

    thick, dashed: the names whose lines are drawn so.
    """
    what = str(result.settings.get("score", "accuracy"))
    what = "share explained" if what == "explained" or result.stream == "planted" else what
    names = list(result.schemes)
    matrices = {
        name: np.array(scheme.matrix, dtype=float) for name, scheme in result.schemes.items()
    }  # (seeds, J + 1, J)
    across = math.ceil(math.sqrt(len(names)))
    down = math.ceil(len(names) / across)
    figure = Figure(figsize=(5 + 2.1 * across, max(4.6, 0.9 + 2.1 * down)), layout="constrained")
    panels: Any = figure.subfigures(1, 2, width_ratios=[5, 2.1 * across])
    left, right = panels
    curves(left.subplots(), matrices, thick, what, dashed)
    every = np.concatenate([matrix.flatten() for matrix in matrices.values()])
    shares = what in ("accuracy", "share explained")
    limits = (0.0, 1.0) if shares else (float(np.nanmin(every)), float(np.nanmax(every)))
    grid = np.atleast_1d(right.subplots(down, across, sharex=True, sharey=True)).flatten()
    for axes, name in zip(grid, names, strict=False):
        shade = heat_map(axes, matrices[name].mean(0), name, limits)
    for axes in grid[len(names) :]:
        axes.axis("off")
    right.colorbar(shade, ax=list(grid), label=what, shrink=0.7)
    right.supxlabel(f"{what} on task", fontsize=10)
    right.supylabel("after learning task (0: none)", fontsize=10)
    figure.suptitle(title(result))
    _write(figure, path)


def plot_gates(result: CompareResult, path: Path) -> None:
    """Whose ranks serve whom, by what was recorded, mean over seeds. Above, at the end: the
    share of gate weight that inputs of each task (down) give to the ranks of each task (across).
    Below, as tasks come: the shares that inputs of the first task give. Only schemes that grow."""
    masses = {
        name: np.array(scheme.found["mass"], dtype=float)  # (J + 1, J, J)
        for name, scheme in result.schemes.items()
        if scheme.intrusion.mean is not None
    }
    across, down = min(max(len(masses), 2), 5), max(math.ceil(len(masses) / 5), 1)
    figure = Figure(figsize=(1.2 + 2.6 * across, 0.6 + 5 * down), layout="constrained")
    grid: Any = figure.subplots(2 * down, across, squeeze=False, sharey="row")
    uppers, lowers = grid[::2].flatten(), grid[1::2].flatten()
    for above, below, (name, mass) in zip(uppers, lowers, masses.items(), strict=False):
        J = mass.shape[1]
        shade = heat_map(above, mass[-1], name)
        above.set_xlabel("ranks of task")
        above.set_yticks(range(J), [str(j + 1) for j in range(J)])
        tasks, colours = np.arange(1, J + 1), _shades(J)
        below.stackplot(tasks, np.nan_to_num(mass[1:, 0].T), colors=colours)
        below.set(xlabel="tasks learned", ylim=(0, 1), xlim=(1, J))
        below.set_xticks(tasks[:: max(1, J // 10)])
    for axes in (*uppers[len(masses) :], *lowers[len(masses) :]):
        axes.axis("off")
    if masses:
        for above, below in zip(grid[::2, 0], grid[1::2, 0], strict=True):
            above.set_ylabel("inputs of task")
            below.set_ylabel("share, inputs of task 1")
        figure.colorbar(shade, ax=list(grid[0]), label="share of gate weight")
        patches = [Patch(color=colours[t], label=f"task {t + 1}") for t in range(J)]
        shown = patches if J <= 10 else [patches[0], patches[-1]]
        figure.legend(
            handles=shown, title="ranks of", loc="outside lower center", ncols=5, frameon=False
        )
    figure.suptitle(title(result))
    _write(figure, path)


def _shades(J: int) -> list[Any]:
    """One colour per task, first to last, dark to light."""
    return [colormaps["cividis"](t / max(J - 1, 1)) for t in range(J)]


def plot_bench(result: Mapping[str, Any], routing: str, path: Path) -> None:
    """bench.json as one figure. Above, the up-projection against dense; below, the whole layer
    against its GEMMs; forward on the left, a training step on the right. One routing, median over
    rounds, bars from quartile to quartile where they are longer than the mark."""
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    grid: Any = figure.subplots(2, 2, sharex=True, sharey="row")
    for (part, reference), line in zip(BENCH_ROWS, grid, strict=True):
        for axes, (which, words) in zip(line, BENCH_COLUMNS, strict=True):
            rows = [
                row
                for row in result["rows"]
                if (row["part"], row["pass"], row["routing"]) == (part, which, routing)
                and row["D"] == result["width"]
            ]
            names = list(dict.fromkeys(row["name"] for row in rows))
            for i, name in enumerate(names):
                mine = sorted((r for r in rows if r["name"] == name), key=lambda row: row["R"])
                ratio = [row["ratio"] for row in mine]
                axes.errorbar(
                    [row["R"] for row in mine],
                    [r["median"] for r in ratio],
                    [r["iqr"] / 2 for r in ratio],
                    label=name,
                    color="black" if i == 0 else COLOURS[i - 1],
                    marker=None if i == 0 else MARKERS[i - 1],
                    ls="--" if i == 0 else "-",
                    capsize=2,
                )
            axes.set_xscale("log", base=2)
            if part == "up-projection":
                axes.set_yscale("log")
            axes.set_title(f"{part}, {words}")
            axes.grid(alpha=0.3)
        line[0].set_ylabel(f"time ÷ {reference}")
        line[1].legend(fontsize=9)
    for axes in grid.flatten():
        ticks = sorted({row["R"] for row in result["rows"] if row["part"] == "layer"})
        axes.set_xticks(ticks)
        axes.set_xticklabels(ticks)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    for axes in grid[1]:
        axes.set_xlabel("ranks in all, R")
        axes.set_ylim(bottom=0)
    figure.suptitle(
        f"{result['device']}, {result['dtype']}, T = {result['tokens']}, "
        f"D = O = {result['width']}, K = {result['top_k']}, {routing} routing"
    )
    _write(figure, path)


def plot_growth(result: Mapping[str, Any], path: Path) -> None:
    """bench.json's growth as a figure."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    draw_growth(axes, result)
    axes.legend(loc="upper left", fontsize=9)
    axes.set_title(
        f"A step of a MoRA layer: {result['device']}, {result['dtype']}, T = {result['tokens']}, "
        f"D = O = {result['width']}, K = {result['top_k']}",
        fontsize=10,
    )
    _write(figure, path)


def draw_growth(axes: Any, result: Mapping[str, Any]) -> None:
    """What a step of a MoRA layer costs as tasks add up, part over part, as multiples of the base's
    forward; and the whole step beside the parts' sum, and dense-masked."""
    rows = [row for row in result["rows"] if row["part"] == "growth"]
    ranks = sorted({row["R"] for row in rows})
    ratio = {(row["R"], row["name"]): row["ratio"]["median"] for row in rows}
    parts = ("base", "scoring", "top-k", "up", "gradients")
    tasks = [R / 16 for R in ranks]
    heights = [[ratio[R, part] for R in ranks] for part in parts]
    axes.stackplot(tasks, heights, labels=parts, colors=COLOURS, alpha=0.7)
    for name, style in (("step", "-"), ("dense-masked", "--")):
        line = [ratio[R, name] for R in ranks]
        axes.plot(tasks, line, style, color="black", marker=".", label=name)
    axes.set(xlabel="tasks so far, 16 ranks each", ylabel="time ÷ the base's forward")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


BENCH_ROWS = (("up-projection", "dense's"), ("layer", "its GEMMs'"))
BENCH_COLUMNS = (("forward", "forward"), ("training", "training step"))


def plot_study(result: StudyResult, path: Path) -> None:
    """A study's panels: lines of means over seeds, and their 95 % intervals, a label drawn alike in
    all of them; what is below 0 is a mark at the lower edge. Or, where a panel names its rows, a
    point for each."""
    panels = result.panels
    if panels[0].names:
        _plot_points(result, path)
        return
    across = len(panels) if len(panels) < 4 else 3 if len(panels) > 4 else 2
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(1 + 4.6 * across, 1.2 + 3.9 * down), layout="constrained")
    grid = np.atleast_1d(figure.subplots(down, across)).flatten()
    styles: dict[str, Any] = {}
    for label in dict.fromkeys(line.label for panel in panels for line in panel.lines):
        i, rest = len(styles) % len(COLOURS), {}
        if len(styles) >= len(COLOURS):  # a second round: dashed and hollow
            rest = {"ls": "--", "mfc": "white"}
        styles[label] = {"color": COLOURS[i], "marker": MARKERS[i], "label": label, **rest}
    for axes, panel in zip(grid, panels, strict=False):
        x = np.array(panel.x or [], dtype=float)  # none: each line has its own
        for line in panel.lines:
            mean, half = np.array(line.mean, dtype=float), np.array(line.half, dtype=float)
            style = {"markersize": 4, "lw": 1.6, **styles[line.label]}
            at = x if line.x is None else np.array(line.x)
            axes.plot(at, mean, **style)
            axes.fill_between(at, mean - half, mean + half, color=style["color"], alpha=0.15, lw=0)
            below = at[mean < 0]
            (marks,) = axes.plot(below, 0 * below, **style | {"ls": "", "label": None})
            marks.set(clip_on=False, in_layout=False)
        if panel.log:
            axes.set_xscale("log")
        if panel.x is not None and (panel.log or len(x) <= 7):
            axes.set_xticks(x, [f"{value:g}" for value in x])
            axes.set_xticks([], minor=True)
        elif panel.x is not None:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        low = any((mean or 0) < 0 for line in panel.lines for mean in line.mean)
        ylabel = (panel.ylabel or "") + " (below 0: at the edge)" * low
        axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=ylabel)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    known = _labelled(grid[: len(panels)])
    figure.legend(
        [known[label] for label in styles],
        [*styles],
        loc="outside lower center",
        ncols=3 if across < 3 else 5,
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(_question(result, figure))
    _write(figure, path)


def _labelled(grid: Iterable[Any]) -> dict[str, Any]:
    """{label: what is drawn so}, of several axes."""
    return {
        label: handle
        for axes in grid
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }


def _question(result: StudyResult, figure: Figure) -> str:
    """In as many lines as the figure's width makes it."""
    seeds = ", ".join(map(str, result.seeds))
    question = f"{result.study}: {result.asks} Seeds {seeds}"
    return textwrap.fill(question, round(11 * figure.get_figwidth()))


def _plot_points(result: StudyResult, path: Path) -> None:
    """Rows from the top down, means and 95 % intervals. What is beyond ±1 is an arrow there."""
    panels = result.panels
    most = max(len(panel.names or []) for panel in panels)
    same = all(panel.names == panels[0].names for panel in panels)
    across = len(panels) if len(panels) < 5 else 3
    down = math.ceil(len(panels) / across)
    size = 1.6 + (2.9 if same else 3.6) * across, 0.6 + down * (1.0 + 0.22 * most)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(down, across, sharey=same, squeeze=False).flatten()
    styles: dict[str, Any] = {}
    for kind in (kind for panel in panels for kind in panel.kinds or []):
        i = len(styles)
        styles.setdefault(kind, {"fmt": MARKERS[i], "color": COLOURS[i], "label": kind})
    for axes, panel in zip(grid, panels, strict=False):
        names, kinds = panel.names or [], panel.kinds or []
        means = [line.mean[0] for line in panel.lines]
        for y, (line, kind) in enumerate(zip(panel.lines, kinds, strict=True)):
            at, style = min(max(means[y], -1.0), 1.0), {**styles[kind]}
            if at != means[y]:
                style["fmt"] = "<" if at < 0 else ">"
            half = None if at != means[y] else line.half[0]
            axes.errorbar(at, y, xerr=half, ms=6, capsize=3, **style)
        axes.set(title=panel.title, xlabel=panel.xlabel)
        if min(mean or 0 for mean in means) < 0:
            axes.axvline(0, color="black", lw=0.8)
        else:
            axes.set_xlim(0, 1.02)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    known = _labelled(grid[: len(panels)])
    figure.legend(
        [known[kind] for kind in styles],
        [*styles],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    figure.suptitle(_question(result, figure))
    _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(path, buffer.getvalue())


def curves(
    axes: Any,
    matrices: Mapping[str, np.ndarray],
    thick: Collection[str] = (),
    what: str = "accuracy",
    dashed: Collection[str] = (),
) -> None:
    """Mean accuracy (or `what`) on the tasks seen so far, after each task, with ± one standard
    deviation over seeds.

    Args:
        axes: matplotlib's, to draw on.
        matrices: accuracy matrices (seeds, J + 1, J), by name.
        thick, dashed: the names whose lines are drawn so.
    """
    for i, (name, matrix) in enumerate(matrices.items()):
        J = matrix.shape[2]
        tasks = np.arange(1, J + 1)
        seen = np.stack([matrix[:, t, :t].mean(1) for t in tasks])  # (J, seeds)
        mean, std = seen.mean(1), seen.std(1, ddof=1) if matrix.shape[0] > 1 else 0 * tasks
        marker = MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]  # no pair of both comes twice
        style: Any = {"color": COLOURS[i % len(COLOURS)], "marker": marker, "markersize": 5}
        width, dash = 2.5 if name in thick else 1.2, "--" if name in dashed else "-"
        axes.plot(tasks, mean, label=name, lw=width, ls=dash, **style)
        axes.fill_between(tasks, mean - std, mean + std, color=style["color"], alpha=0.15, lw=0)
    axes.set(xlabel="tasks learned", ylabel=f"mean {what} on the tasks seen so far")
    if what in ("accuracy", "share explained"):
        axes.set_ylim(min(0, axes.get_ylim()[0]) if what != "accuracy" else 0, 1)
    axes.set_xticks(tasks)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, fontsize=8, frameon=False)


def heat_map(
    axes: Any, matrix: np.ndarray, name: str, limits: tuple[float, float] = (0.0, 1.0)
) -> Any:
    """One accuracy matrix (J + 1, J), its numbers in per cent; or one of other scores, which lie
    between the limits, as they are."""
    low, high = limits
    shade = axes.imshow(matrix, vmin=low, vmax=high, cmap="viridis", aspect="auto")
    for (i, j), entry in np.ndenumerate(matrix) if matrix.shape[1] <= 10 else ():
        if not np.isnan(entry):
            colour = "black" if entry > low + 0.55 * (high - low) else "white"
            said = f"{100 * entry:.0f}" if limits == (0, 1) else f"{entry:.1f}"
            said = "" if limits == (0, 1) and entry < -0.995 else said  # too wide, and dark enough
            axes.text(j, i, said, ha="center", va="center", color=colour, size=7)
    axes.set_title(name, fontsize=9)
    axes.set_xticks(range(matrix.shape[1]), [str(j + 1) for j in range(matrix.shape[1])])
    axes.set_yticks(range(matrix.shape[0]))
    axes.tick_params(labelsize=7, length=2)
    return shade
