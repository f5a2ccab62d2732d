"""Carry a model through a stream: pretrain, learn task after task, test on all, never lose it."""

import copy
import dataclasses
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapt import (
    WithContext,
    adapt,
    after_step,
    context,
    count,
    grow,
    load_state,
    parameters,
    state,
)
from ..adapter import Adapter
from ..tools import parallel
from .checkpoints import Checkpoints, Header
from .probe import Recorder
from .streams import CLASSES, Stream, Task

BATCH = 64
LEARNING_RATE = 3e-3
PRETRAIN: dict[str, Any] = {"epochs": 40, "lr": 1e-3}
PROBES = 64  # test images of each task at which the recorder looks


class Backbone(nn.Module):
    """A small network to adapt: three linear layers (64-128-128-64), and frozen class embeddings
    as the head, as CLIP's text side is.

        logits = features(x) Cᵀ             C (classes, 64), one embedding per class

    Every linear layer reads LayerNorm's output, as in a transformer. That matters to a signed
    score: inputs with a common mean (plain ReLU's) excite the same ranks whatever the task.
    """

    def __init__(self, classes: int = CLASSES, widths: tuple[int, ...] = (64, 128, 128, 64)):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = map(nn.Linear, widths, widths[1:])
        self.classes = nn.Parameter(torch.randn(classes, widths[-1]) / math.sqrt(widths[-1]))

    def features(self, x: Tensor) -> Tensor:
        h = self.fc1(F.layer_norm(x, x.shape[-1:]))
        h = self.fc2(F.layer_norm(F.relu(h), h.shape[-1:]))
        return self.fc3(F.layer_norm(F.relu(h), h.shape[-1:]))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) @ self.classes.T


def make_backbone(stream: Stream) -> nn.Module:
    """The network to pretrain for a stream: where answers are vectors, one linear layer, fc1."""
    if not stream.real:
        return Backbone(stream.classes)
    D, O = stream.base.x_train.shape[1], stream.base.y_train.shape[1]
    return nn.Sequential(OrderedDict(fc1=nn.Linear(D, O, bias=False)))


def loss(answers: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits (N, C) for digits (N,); mean squared error of vectors (N, O). Of no
    samples 0."""
    if not len(y):
        return answers.sum()
    return F.mse_loss(answers, y) if y.is_floating_point() else F.cross_entropy(answers, y)


def score(answers: Tensor, y: Tensor) -> float:
    """Accuracy of logits (N, C) for digits (N,). Of vectors ŷ (N, O) for y, the share explained,
    1 - Σ‖ŷ - y‖² / Σ‖y‖²: 1 at best, 0 for answering 0, no lower limit."""
    if y.is_floating_point():
        y = y.double()
        return 1 - ((answers - y).square().sum() / y.square().sum()).item()
    return (answers.argmax(-1) == y).double().mean().item()


def train(
    model: nn.Module,
    weights: Iterable[Tensor],
    task: Task,
    epochs: int,
    seed: int,
    lr: float = LEARNING_RATE,
    where: str = "training",
) -> int:
    """Fit weights to one task with a fresh AdamW (no decay): `loss`, among all classes, plus the
    adapters' auxiliary losses. The seed decides the order of the batches, of which each process
    takes its part (parallel.py). Returns how many steps it took.

    Raises FloatingPointError, before the step is taken, if the loss is no finite number.
    """
    weights = list(weights)
    optimiser = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    order = torch.Generator().manual_seed(seed)
    x, y = task.x_train, task.y_train
    mine = slice(parallel.process(), None, parallel.processes())
    model.train()
    step = 0
    for _ in range(epochs):
        for all_rows in torch.randperm(len(y), generator=order).to(y.device).split(BATCH):
            rows = all_rows[mine]
            share = len(rows) * parallel.processes() / len(all_rows)  # 1, but for a last batch
            with context(model) as batch:
                total = share * loss(model(x[rows]), y[rows]) + batch.aux_loss
            step += 1
            if not torch.isfinite(total):
                raise FloatingPointError(f"{where}, step {step}: the loss is {total.item()}")
            optimiser.zero_grad()
            total.backward()
            parallel.average(weights)
            optimiser.step()
            after_step(model)
    model.eval()
    return step


def pretrain(stream: Stream, seed: int, device: torch.device | str = "cpu") -> Any:
    """A backbone that knows the stream's base domain, with every weight frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make_backbone(stream).to(device)
    where = f"pretraining on {stream.base.name}"
    train(model, model.parameters(), stream.base.to(device), seed=seed, where=where, **PRETRAIN)
    return model.requires_grad_(False)


Fit = Callable[[nn.Module, Iterable[Tensor], Task], None]  # trains weights on a task


class Learner:
    """What is carried through a stream. This one never learns: the backbone as it is.

    whole_stream: whether what it does in a task depends on the tasks to come.
    """

    whole_stream = False

    def __init__(self, model: Any, stream: Stream | None = None):
        self.model = model  # a Backbone, or whatever `make_backbone` makes

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        """Learn task t, those before it having been learned; fit(model, weights, task) trains."""

    def predict(self, x: Tensor, j: int) -> Tensor:
        """Logits (N, C), or vectors (N, O), for inputs x (N, D) of task j, which only an oracle may
        look at."""
        return self.model(x)

    @torch.no_grad()
    def row(self, stream: Stream, learned: int) -> list[float]:
        """The score on every task of the stream, now that the first `learned` are learned."""
        self.model.eval()
        return [score(self.predict(k.x_test, j), k.y_test) for j, k in enumerate(stream.tasks)]

    def count(self) -> dict[str, int]:
        return {"trainable": 0, "stored": 0, "active": 0}

    def state(self) -> dict[str, Tensor]:
        """A copy of what it has learned, for a checkpoint."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `state` gave."""


class AdapterLearner(Learner):
    """Every linear layer of the backbone under one scheme; between tasks it grows, or does not.

    Schemes that need more of a learner than that have one of their own, in their own file.
    """

    def __init__(
        self, model: nn.Module, scheme: type[Adapter], grows: bool = True, **settings: Any
    ):
        super().__init__(model)
        adapt(model, scheme, targets=r"fc\d", **settings)
        self.grows = grows
        self.with_context = WithContext(model, self.context)

    def context(self, x: Tensor) -> dict[str, Tensor]:
        """The context that the adapters need of inputs x (N, D), in training and at test."""
        return {}

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        if t and self.grows:
            grow(self.model)
        fit(self.with_context, parameters(self.model), stream.tasks[t])

    def predict(self, x: Tensor, j: int) -> Tensor:
        return self.with_context(x)

    def count(self) -> dict[str, int]:
        return count(self.model)

    def state(self) -> dict[str, Tensor]:
        return state(self.model)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        load_state(self.model, tensors)


@dataclass(frozen=True)
class Run:
    """What came of a learner's life in a stream of J tasks.

    matrix: (J + 1, J), the accuracy matrix (metrics.py), the row before any task first.
    records: what a Recorder recorded, arrays by name (probe.py).
    seconds: spent learning; step: of a step of training.
    trainable, stored, active: numbers of parameters at the end.
    """

    matrix: list[list[float]]
    records: dict[str, list[Any]]
    seconds: float
    step: float
    trainable: int
    stored: int
    active: int


def run_stream(
    make: Callable[[Any, Stream], Learner],
    backbone: nn.Module,
    stream: Stream,
    seed: int,
    epochs: int,
    device: torch.device | str = "cpu",
    name: str = "learner",
    checkpoints: Checkpoints | None = None,
    done: Callable[[int], None] = lambda tasks: None,
) -> Run:
    """Make a learner of (a copy of) a pretrained backbone, and carry it through the stream.

    Args:
        make: makes the learner of a backbone and the stream; `seed` decides what it draws.
        checkpoints: where to write what it knows after every task, and to go on from. A task that
            was cut off is learned again from its start, to the same bits.
        done: called with the number of tasks that are newly finished.

    Raises ValueError on a checkpoint that is damaged or of another run; FloatingPointError as
    `train` does, naming scheme, task and step.
    """
    stream = dataclasses.replace(stream, tasks=tuple(task.to(device) for task in stream.tasks))
    J = len(stream.tasks)
    with torch.random.fork_rng():
        torch.manual_seed(task_seed(seed, 0))
        learner = make(copy.deepcopy(backbone), stream)
        if checkpoints and learner.whole_stream:
            checkpoints = checkpoints.of_all(J)
        matrix = torch.full((J + 1, J), torch.nan, dtype=torch.float64)
        seconds, training, steps = 0.0, 0.0, 0
        recorder = Recorder([task.x_test[:PROBES] for task in stream.tasks])

        def measure(i: int) -> None:
            """Fill row i."""
            matrix[i] = torch.tensor(learner.row(stream, i))
            if matrix[i].isnan().any():
                recorder.skip(learner.model)
            else:
                recorder.record(learner.model, learner.predict)

        measure(0)
        learned = parallel.agreed(checkpoints.learned(stream)) if checkpoints else 0
        for t in range(learned):
            assert checkpoints is not None
            header = take_up(learner, checkpoints, t + 1, stream)
            seconds, training, steps = header.seconds, header.training, header.steps
            measure(t + 1)
        if learned:
            done(learned)
        for t in range(learned, J):
            start = time.perf_counter()
            torch.manual_seed(task_seed(seed, t))

            def fit(model: nn.Module, weights: Iterable[Tensor], task: Task, t: int = t) -> None:
                nonlocal training, steps
                where, start = f"{name}, task {t + 1} ({task.name})", time.perf_counter()
                steps += train(model, weights, task, epochs, task_seed(seed, t), where=where)
                training += time.perf_counter() - start

            learner.learn(stream, t, fit)
            seconds += time.perf_counter() - start
            if checkpoints and parallel.process() == 0:
                header = Header(
                    checkpoints.run, stream.tasks[t].name, t + 1, seconds, training, steps
                )
                checkpoints.write(learner.state(), header)
            measure(t + 1)
            done(1)
    return Run(
        matrix=matrix.tolist(),
        records={name: array.tolist() for name, array in recorder.records.items()},
        seconds=seconds,
        step=training / steps if steps else math.nan,
        **learner.count(),
    )


def task_seed(seed: int, t: int) -> int:
    """The seed of all that task t draws, the same for every learner."""
    return 1000 * (seed + 1) + t


def take_up(learner: Learner, checkpoints: Checkpoints, learned: int, stream: Stream) -> Header:
    """Give a learner what the one of a checkpoint knew. Raises ValueError, naming the file, on
    tensors that are not this learner's."""
    tensors, header = checkpoints.read(learned, stream)
    try:
        learner.load_state(tensors)
    except Exception as error:  # whatever odd tensors do to somebody's learner
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{checkpoints.file(learned)}: not this learner's ({reason})") from error
    return header
