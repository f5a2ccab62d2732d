"""What several studies share: schemes at the roster's settings, one run through a stream, and the
words and lines that numbers become.

Schemes have the roster's own settings (roster.py), but for what a row's label says; in the studies
atlas and memory those that were tuned on the stream (tuning.py).
"""

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..adapter import Adapter
from ..continual import streams
from ..continual.backbones import Backbone, find
from ..continual.learn import AdapterLearner, pretrain, run_stream
from ..continual.metrics import acc, bwt, plasticity
from ..continual.probe import PROBLEMS
from ..roster import EPOCHS, ROSTER, SCHEMES, names, under
from ..tools.results import Line, half_interval
from ..tools.tables import PROBLEMS as HEADS
from ..tools.tables import short
from .study import Cell, Rows
from .verdicts import Comparison, Values

PERMUTED = "permuted-digits"
TWO_STREAMS = (PERMUTED, "rotated-digits")


IMAGES = ("inputs", "features", "classes")
# what a gate, or training at all, has to be better than
SIMPLE = ("alone", "ridge_features", "own_ridge_features", "lda_features")


@dataclasses.dataclass(frozen=True)
class Place:
    """A stream of the main table, under its own model or the backbone of that name. all: whether
    the atlas lives there too, or of it only SIMPLE. trials: as many as each learner has there
    (tuning.py). has: what its model has, of what backbones.py names: to know who can live there,
    nothing need be loaded."""

    stream: str
    tasks: int = 5
    epochs: int = EPOCHS
    backbone: str | None = None
    all: bool = True
    trials: int = 8
    has: tuple[str, ...] = IMAGES

    def setting(self, quick: bool = False) -> Cell:
        """What a cell says of it."""
        tasks, epochs = (2, 2) if quick else (self.tasks, self.epochs)
        backbone = {"backbone": self.backbone} if self.backbone else {}
        return {"stream": self.stream, "tasks": tasks, **backbone, "epochs": epochs}

    def names(self) -> list[str]:
        """Who lives there, of the roster."""
        known = [name for name in names() if set(ROSTER[name].needs) <= {*self.has}]
        return [
            name for name in known if self.all or ROSTER[name].kind != "atlas" or name in SIMPLE
        ]


# Where a gate sees an input; and, below, where it sees a patch, a letter, a word: there a run takes
# minutes, and fewer tasks, epochs, learners and trials have to do.
REAL = ("inputs", "features")  # no classes: answers are numbers
PLACES = {
    "subspaces": Place("subspaces", streams.usual_tasks("subspaces"), has=REAL),
    "clusters": Place("clusters", has=REAL),
    **{name: Place(name) for name in (*TWO_STREAMS, "split-digits")},
    "digit-worlds": Place("digit-worlds", trials=4),
    under(PERMUTED, "attention"): Place(PERMUTED, 3, 10, "attention", all=False, trials=4),
    "sequences": Place("sequences", 3, all=False, trials=4, has=("classes", "vocabulary")),
    "docstrings": Place("docstrings", epochs=5, all=False, trials=4, has=("features", "classes")),
}

# The smallest effects that matter (verdicts.py). For all measures but accuracy one number, so that
# none can be chosen to suit: most figures of tutorials/findings were known when these two were set.
ACC = 0.02  # 9 of a task's 450 test images: about what another split of the images moves
SHARE = 0.05  # a twentieth: of the gate's weight, of the ranks chosen, of an output's length
COLUMNS = {"acc": "ACC", "bwt": "BWT", "plasticity": "plasticity", **HEADS}


def settings_of(name: str) -> dict[str, Any]:
    """The roster's settings of a name, without a scale of 1, which every scheme has by default."""
    return {k: v for k, v in ROSTER[name].settings.items() if (k, v) != ("scale", 1)}


# A scheme in a cell: its name, whether it grows between tasks, its settings.
LORA: Cell = {"scheme": "lora", "grows": False, "settings": settings_of("lora")}
GROWN: Cell = {"scheme": "lora", "grows": True, "settings": settings_of("lora_grown")}
MOE: Cell = {"scheme": "lora_moe", "grows": True, "settings": settings_of("lora_moe")}
MORA: Cell = {"scheme": "mora", "grows": True, "settings": settings_of("mora")}


def with_settings(cell: Cell, **changes: Any) -> Cell:
    """The same cell with other settings, or more."""
    return cell | {"settings": cell["settings"] | changes}


def cells_of(
    study: str, rows: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], epochs: int = EPOCHS
) -> list[Cell]:
    """Every row with every seed, of so many epochs if the row does not say; seeds in order, so that
    a study cut short has whole rows."""
    return [
        {"study": study, "row": row, "seed": seed, "epochs": epochs, **rest}
        for seed in seeds
        for row, rest in rows.items()
    ]


# One run


@functools.lru_cache(maxsize=4)
def stream_and_backbone(
    stream: str, tasks: int, seed: int, backbone: str | None = None, repeat: int = 0
) -> tuple[streams.Stream, Any]:
    """A stream, and its backbone or the one of that name, pretrained. Kept for the next cell, so
    not to be changed."""
    made = streams.make(stream, tasks, seed)
    made = dataclasses.replace(made, pretraining={**made.pretraining, **sums(repeat)})
    return made, pretrain(made, seed, make=find(backbone) if backbone else None)


def sums(repeat: int) -> dict[str, int]:
    """What `train` is told so that a repeat is the run itself but for the order of its sums, which
    another machine may choose too; 0 for the run itself."""
    return {"rows": repeat} if repeat else {}


def carried(cell: Cell, classes: Mapping[str, type[Adapter]] = SCHEMES) -> dict[str, Any]:
    """Carry the cell's scheme through its stream, and measure.

    acc, bwt, plasticity, the problems of probe.py, stored, read and speaking as `compare` has them,
    and:

    seen: after each task, mean accuracy on the tasks so far.
    drift: after each task but the first, interference so far (probe.py).
    own: the share of the gate's weight that a task's inputs give to the ranks it has just added,
        mean over tasks after the first. chance: what it would be if all ranks weighed the same.
    back, anew: of what is said to inputs of the last task, the shares that the first task's ranks
        say, and the last one's. (On repeat, the last task is the first.)
    again: accuracy on the last task before it is learned.
    """
    return run_cell(cell, classes)[0]


def run_cell(
    cell: Cell, classes: Mapping[str, type[Adapter]] = SCHEMES
) -> tuple[dict[str, Any], Backbone, Backbone]:
    """What `carried` measures, the model at the end, and the backbone that it started from.

    classes: where the cell's "scheme" is a name.
    """
    stream, backbone = stream_and_backbone(cell["stream"], cell["tasks"], cell["seed"])
    learners: list[AdapterLearner] = []

    def make(model: Backbone, stream: streams.Stream) -> AdapterLearner:
        scheme = classes[cell["scheme"]]
        learners.append(AdapterLearner(model, scheme, grows=cell["grows"], **cell["settings"]))
        return learners[0]

    label = f"{cell['row']}, seed {cell['seed']}"
    run = run_stream(make, backbone, stream, cell["seed"], cell["epochs"], name=label)
    J, a = cell["tasks"], np.array(run.matrix)  # (J + 1, J)
    mass, said = (np.array(run.records[name]) for name in ("mass", "said"))
    known = {name: np.array(run.records[name]) for name in ("drift", "learned")}
    measured = {
        "acc": acc(a),
        "bwt": bwt(a),
        "plasticity": plasticity(a),
        **{name: problem(run.records) for name, problem in PROBLEMS.items()},
        "stored": run.stored,
        "read": run.read,
        "speaking": run.speaking,
        "own": float(np.mean([mass[t, t - 1, t - 1] for t in range(2, J + 1)])),
        "chance": statistics.fmean(1 / t for t in range(2, J + 1)),
        "back": float(said[J, J - 1, 0]),
        "anew": float(said[J, J - 1, J - 1]),
        "again": float(a[J - 1, J - 1]),
        "seen": [float(a[t, :t].mean()) for t in range(1, J + 1)],
        "drift": [
            PROBLEMS["interference"]({name: array[: t + 1, :t] for name, array in known.items()})
            for t in range(2, J + 1)
        ],
    }
    return measured, learners[0].model, backbone


# Words and lines


def mean(values: Values) -> str:
    """As in a table: .913"""
    return short(statistics.fmean(values))


def beside(more: Values, less: Values) -> str:
    """Where an accuracy stands beside another, by the rule of verdicts.py for a single comparison:
    "above" or "below" by at least ACC, "level with" it if both are excluded, else "not told from"
    it."""
    up = Comparison("", more, less, ACC).verdict
    down = Comparison("", less, more, ACC).verdict
    if "supported" in (up, down):
        return "above" if up == "supported" else "below"
    return "level with" if up == down == "refuted" else "not told from"


def line(label: str, seeds: Sequence[Values]) -> Line:
    """One line of a panel, of values (seeds, x)."""
    half = [half_interval(at) for at in zip(*seeds, strict=True)]
    return Line(label, np.mean(seeds, 0).tolist(), half)


def across(rows: Rows, labels: Sequence[str], measure: str) -> list[Values]:
    """A measure over several rows, as (seeds, rows)."""
    return [list(seed) for seed in zip(*(rows[label][measure] for label in labels), strict=True)]
