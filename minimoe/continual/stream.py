"""A stream of tasks: their data, a model to adapt, what it is trained on, and what counts as right.

One's own is what a function of a file gives (streams.py), or what `compare` is given:

    def make(tasks, seed):
        data = [...]  # of each task: to train on and to test on
        return Stream("mine", [Task(f"task {t}", *data[t]) for t in range(tasks)], model=my_model)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import data
from .data import Data, Inputs

EVALUATED = 512  # examples at once
IGNORED = -100  # torch's mark of a label that does not count
Ratio = tuple[Any, Any]  # a score in parts: a sum, and what to divide it by


# A label that is -100 does not count. All four raise ValueError if answers and y do not fit.


def loss(answers: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits (..., C) for classes y (...), or mean squared error of answers for
    real y of the same shape. Of no samples 0."""
    y = _fit(answers, y)
    if not y.numel():
        return answers.sum()
    if y.is_floating_point():
        return F.mse_loss(answers, y)
    return F.cross_entropy(answers.flatten(0, -2), y.flatten(), ignore_index=IGNORED)


def share_right(answers: Tensor, y: Tensor) -> Ratio:
    """How often the largest of the logits (..., C) is that of the class y (...)."""
    y = _fit(answers, y)
    return (answers.argmax(-1) == y).sum(), (y != IGNORED).sum()


def explained(answers: Tensor, y: Tensor) -> Ratio:
    """The share of y explained by answers ŷ of its shape, 1 - Σ‖ŷ - y‖² / Σ‖y‖²: 1 at best, 0 for
    answering 0, no lower limit."""
    y = _fit(answers, y).double()
    total = y.square().sum()
    return total - (answers - y).square().sum(), total


def minus_bits(answers: Tensor, y: Tensor) -> Ratio:
    """Minus the bits that a class y (...) costs under logits (..., C): 0 at best."""
    y = _fit(answers, y)
    counts = y != IGNORED
    classes = y.where(counts, 0).unsqueeze(-1)
    log_p = answers.double().log_softmax(-1).gather(-1, classes).squeeze(-1)
    return (log_p * counts).sum() / math.log(2), counts.sum()


def _fit(answers: Tensor, y: Tensor) -> Tensor:
    """y, classes as int64. Raises ValueError: no shape is stretched to another."""
    if y.is_floating_point():
        if answers.shape != y.shape:
            raise ValueError(
                f"answers are {tuple(answers.shape)}, allowed for real y: {tuple(y.shape)}"
            )
        return y
    if answers.shape[:-1] != y.shape or answers.shape[-1] < 2:
        allowed = f"({', '.join(map(str, (*y.shape, 'C')))}), C 2 or more"
        raise ValueError(f"answers are {tuple(answers.shape)}, allowed for classes y: {allowed}")
    return y.long()


def usual_score(answers: Tensor, y: Tensor) -> Ratio:
    """`explained` of real answers, else `share_right`."""
    return explained(answers, y) if y.is_floating_point() else share_right(answers, y)


def score(answers: Tensor, y: Tensor) -> float:
    """`usual_score` as a number."""
    total, of = usual_score(answers, y)
    return (total / of).item()


def evaluate(
    answer: Callable[[Inputs], Any], test: Data, score: Callable[..., Any], device: Any = None
) -> float:
    """The score of what is answered to all test data, in batches of EVALUATED. A score that is one
    number counts as the mean over a batch's examples."""
    total = of = 0.0
    for x, y in data.batches(test, EVALUATED, device=device):
        value = score(answer(x), y)
        n = data.count(x)
        part, weight = value if isinstance(value, tuple) else (value * n, n)
        total, of = total + float(part), of + float(weight)
    return total / of if of else math.nan


@dataclass(frozen=True, eq=False)
class Task:
    """One task: data to train on, and to test on (data.py says what these may be).

    Raises ValueError on other data, and where there are none.
    """

    name: str
    train: Data
    test: Data

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"a task's name is {self.name!r}, allowed: a string")
        data.require(self.train, f"{self.name}'s train")
        data.require(self.test, f"{self.name}'s test")

    # of data in memory

    @property
    def x_train(self) -> Inputs:
        return self._in_memory(self.train)[0]

    @property
    def y_train(self) -> Inputs:
        return self._in_memory(self.train)[1]

    @property
    def x_test(self) -> Inputs:
        return self._in_memory(self.test)[0]

    @property
    def y_test(self) -> Inputs:
        return self._in_memory(self.test)[1]

    def _in_memory(self, part: Data) -> tuple[Inputs, Inputs]:
        if (xy := data.pair(part)) is None:
            raise ValueError(f"{self.name}: its data come in batches")
        return xy

    def to(self, device: Any) -> "Task":
        """The same with what is in memory on a device."""
        both = (self.train, self.test)
        moved = [tuple(data.to(x, device) for x in data.pair(d) or ()) or d for d in both]
        return Task(self.name, *moved)

    @property
    def labels(self) -> list[int]:
        """The classes that occur in it."""
        every = data.batches(self.train, EVALUATED)
        return sorted({c for _, y in every for c in y.unique().tolist()})


@dataclass(frozen=True, eq=False)
class Stream:
    """Tasks in order, and all that a learner's life in them needs.

    tasks: none of them is named at test.
    base: a domain on which the model is trained before the first task, with all its weights;
        without one it is taken as it is made.
    model: makes the model of the stream (it may read `classes`, or look at the data); by default
        a Backbone (backbones.py) for what is in a row.
    classes: the size of the label space in which every answer is given, in training and at test;
        by default what the labels show.
    loss: loss(answers, y), a mean over examples, to be trained on.
    score: score(answers, y), the higher the better: a mean over examples, or (sum, weight).
    pretraining: arguments of learn.train for the base domain, where they differ from PRETRAIN.
    reachable: reachable(model, stream, settings), what is known by algebra, by name: of a scheme a
        Reachable, what it can reach at best; of a closed form a number, what it scores.

    Raises ValueError if there are no tasks, or two have one name.
    """

    name: str
    tasks: Sequence[Task]
    base: Task | None = None
    model: Callable[["Stream"], nn.Module] | None = None
    classes: int | None = None
    loss: Callable[..., Tensor] = loss
    score: Callable[..., Any] = usual_score
    pretraining: Mapping[str, Any] = field(default_factory=dict)
    reachable: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        names = [task.name for task in self.tasks]
        if not names:
            raise ValueError(f"{self.name} has no tasks")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{self.name} has two tasks of the name {name}")

    @property
    def real(self) -> bool:
        """Whether answers are real numbers, not classes."""
        _, y = next(data.batches(self.tasks[0].train, 1))
        return isinstance(y, Tensor) and y.is_floating_point()

    def label_space(self) -> int:
        """`classes`, or one more than the largest label."""
        if self.classes is not None:
            return self.classes
        return 1 + max(max(task.labels) for task in (*self.tasks, *filter(None, [self.base])))

    @property
    def measure(self) -> str:
        """What `score` is called."""
        usual = "explained" if self.real else "accuracy"
        given = getattr(self.score, "__name__", type(self.score).__name__)
        return usual if self.score is usual_score else given.replace("_", " ")
