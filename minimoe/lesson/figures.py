"""The pictures of a lesson, each one call.

Letters are of 11 points at 100 dots per inch. What a colour tells, a marker, a line style, a hatch
or a label tells too. None says in its title what comes out: titles are given by the caller.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from ..continual.stream import Stream
from ..tools.plots import COLOURS, MARKERS

STYLES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "xx")
STEPS = {
    "x": "input",
    "z = x Aᵀ": "one number\nper rank",
    "s": "score",
    "g": "gate: weight\nof each rank",
    "y = x W0ᵀ + (g ⊙ z) B": "output",
}


@contextlib.contextmanager
def drawn(width: float, height: float, columns: int = 1) -> Iterator[Any]:
    """Axes to draw on, (columns,) if there are more than one."""
    # outside of rc_context, which would take back what a notebook's backend sets with its first
    figure = plt.figure(figsize=(width, height), dpi=100, layout="constrained")
    with plt.rc_context({"font.size": 11, "axes.titlesize": 11}):
        yield figure.subplots(1, columns)


def equation(today: str) -> None:
    """The steps from x to y; those whose first letters are in `today` have a thick frame."""
    at, boxes = (0.0, 1.5, 3.0, 4.4, 7.0), []
    with drawn(9, 1.7) as axes:
        for (step, words), where in zip(STEPS.items(), at, strict=True):
            mine = step[0] in today
            frame: Any = {"boxstyle": "round,pad=0.5", "fc": "white", "lw": 3 if mine else 0.8}
            frame["ec"] = COLOURS[0] if mine else "black"
            box = axes.text(where, 0.6, step, ha="center", va="center", bbox=frame)
            axes.text(where, 0, words + "\n(today)" * mine, ha="center", va="top")
            boxes.append(box.get_bbox_patch())
        for i in range(1, len(at)):
            arrow = {"arrowstyle": "->", "patchA": boxes[i - 1], "patchB": boxes[i]}
            axes.annotate("", (at[i], 0.6), (at[i - 1], 0.6), arrowprops=arrow)
        axes.set(xlim=(-0.6, 8.6), ylim=(-1.3, 1.1))
        axes.axis("off")


def digits(stream: Stream) -> None:
    """Two images of the base domain, and of each task."""
    tasks = [task for task in (stream.base, *stream.tasks) if task is not None]
    with drawn(1.5 * 2 * len(tasks), 1.9, 2 * len(tasks)) as axes:
        for i, ax in enumerate(axes):
            task: Any = tasks[i // 2]
            ax.imshow(task.x_test[i % 2].view(8, 8).numpy(), cmap="gray")
            ax.set_title(f"{task.name}\n{task.y_test[i % 2]}")
            ax.axis("off")


def matrix(values: Any, title: str, down: Sequence[str], across: Sequence[str]) -> None:
    """Numbers from 0 to 1 as shades, each written in its place; down and across name the rows and
    the columns."""
    values = np.array(values)
    with drawn(2.4 + 1.3 * len(across), 1.0 + 0.5 * len(down)) as axes:
        axes.imshow(values, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for (i, j), entry in np.ndenumerate(values):
            colour = "black" if entry > 0.55 else "white"
            axes.text(j, i, f"{entry:.2f}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(across)), across)
        axes.set_yticks(range(len(down)), down)
        axes.set_title(title)


def accuracies(values: Any, title: str = "accuracy") -> None:
    """An accuracy matrix (J + 1, J)."""
    J = len(values[0])
    down = ["before any task", *(f"after task {t + 1}" for t in range(J))]
    matrix(values, title, down, [f"on task {t + 1}" for t in range(J)])


def shares(mass: Any, title: str = "share of the gate's weight") -> None:
    """Of inputs of each task (J, J): the shares that the ranks of each task get."""
    J = len(mass)
    down = [f"inputs of task {t + 1}" for t in range(J)]
    matrix(mass, title, down, [f"ranks of {t + 1}" for t in range(J)])


def bars(groups: Mapping[str, Sequence[float]], names: Sequence[str], title: str) -> None:
    """Groups of bars, each bar with its number: of each name one, in every group."""
    wide = 0.8 / len(names)
    with drawn(max(5.0, max(1.6, 0.53 * len(names)) * len(groups) + 2), 3.2) as axes:
        for i, name in enumerate(names):
            at = np.arange(len(groups)) + wide * (i - (len(names) - 1) / 2)
            style: Any = {"color": COLOURS[i], "hatch": HATCHES[i % 4], "ec": "white"}
            drawn_bars = axes.bar(at, [g[i] for g in groups.values()], wide, label=name, **style)
            axes.bar_label(drawn_bars, fmt="{:.2f}", padding=2)
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xticks(range(len(groups)), list(groups))
        axes.margins(y=0.15)
        axes.set_title(title)
        if len(names) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def curves(matrices: Mapping[str, Any], title: str = "") -> None:
    """Mean accuracy on the tasks learned so far, after each task, of accuracy matrices (J + 1, J)
    by name; the name stands at the end of its line."""
    means = {
        name: [np.array(a)[t, :t].mean() for t in range(1, len(a))] for name, a in matrices.items()
    }
    tasks = range(1, len(next(iter(means.values()))) + 1)
    lines(tasks, means, "tasks learned", "mean accuracy so far", title)


def lines(
    at: Sequence[float],
    values: Mapping[str, Sequence[float]],
    xlabel: str,
    ylabel: str,
    title: str,
    limits: tuple[float, float] = (0, 1.1),
) -> None:
    """Values by name, each a line over `at`, at equal distances; the name, and the last value,
    stand at the end of the line. limits: of the values' axis."""
    ends: list[list[Any]] = []
    places, apart = range(len(at)), 0.073 * (limits[1] - limits[0])
    with drawn(6.5, 3.4) as axes:
        for i, (name, line) in enumerate(values.items()):
            style: Any = {"color": COLOURS[i], "marker": MARKERS[i], "ls": STYLES[i % 4]}
            axes.plot(places, line, lw=2, ms=7, **style)
            ends.append([line[-1], f"  {name} {line[-1]:.2f}", COLOURS[i]])
        ends.sort(key=lambda end: end[0])
        for lower, upper in itertools.pairwise(ends):
            upper[0] = max(upper[0], lower[0] + apart)  # names that do not cover each other
        top = limits[1] - apart / 2
        for end in reversed(ends):  # nor leave the picture
            end[0] = min(end[0], top)
            top = end[0] - apart
        for height, text, colour in ends:
            axes.text(places[-1], height, text, va="center", color=colour)
        axes.set(xlabel=xlabel, ylabel=ylabel, ylim=limits, title=title)
        axes.set_xlim(-0.1 * len(at), 1.35 * len(at) - 1)
        axes.set_xticks(places, [f"{x:g}" for x in at])
        axes.grid(alpha=0.3)


def spread(
    values: Mapping[str, Sequence[float]], xlabel: str, title: str, limits: tuple[float, float]
) -> None:
    """Of each name a row: a tick for each of its values, a mark for their mean, and its number."""
    with drawn(8, 1.2 + 0.36 * len(values)) as axes:
        for y, row in enumerate(values.values()):
            mean = float(np.mean(row))
            axes.plot(row, [y] * len(row), "|", color=COLOURS[0], ms=12)
            axes.plot(mean, y, "D", color=COLOURS[2], ms=7, mfc="none", mew=1.5)
            axes.text(limits[1], y, f"  {mean:.2f}", va="center")
        axes.set_yticks(range(len(values)), list(values))
        axes.set(xlabel=xlabel, title=title, xlim=limits, ylim=(len(values) - 0.5, -0.5))
        axes.grid(alpha=0.3)
