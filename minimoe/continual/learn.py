"""Carry a model through a stream: pretrain, learn task after task, test on all, never lose it."""

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
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
from ..tools.seeds import seed_all, seeded
from . import data
from .backbones import mlp
from .checkpoints import Checkpoints, Header, trained_on
from .data import Inputs
from .probe import Recorder
from .stream import Stream, Task, evaluate, loss
from .stream import score as score

BATCH = 64
LEARNING_RATE = 3e-3
PRETRAIN: dict[str, Any] = {"epochs": 40, "lr": 1e-3}
PROBES = 64  # test examples of each task at which the recorder looks
OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": partial(torch.optim.AdamW, weight_decay=0.0),
    "Adam": torch.optim.Adam,
    "SGD": torch.optim.SGD,
}


def require_training(epochs: int, lr: float, batch: int, optimiser: str) -> None:
    """Raise ValueError unless `train` can take these."""
    for name, value in {"epochs": epochs, "batch": batch}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, allowed: 1 or more")
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr is {lr}, allowed: 0 or more")
    if optimiser not in OPTIMISERS:
        raise ValueError(f"optimiser is {optimiser!r}, allowed: {', '.join(OPTIMISERS)}")


def train(
    model: nn.Module,
    weights: Iterable[Tensor],
    task: Task,
    epochs: int,
    seed: int,
    lr: float = LEARNING_RATE,
    where: str = "training",
    *,
    batch: int = BATCH,
    optimiser: str = "AdamW",
    loss: Callable[..., Tensor] = loss,
    rows: int | None = None,
) -> int:
    """Fit weights to one task with a fresh optimiser (no decay): the loss, plus the adapters'
    auxiliary losses. The seed decides the order of the batches, of which each process takes its
    part (parallel.py). (A DataLoader has its own batches, in its own order.) Returns how many steps
    it took.

    rows: a seed that mixes the rows of each batch. That is the same training in exact arithmetic
    (unless the model draws noise for each row), and shows what the order of sums does.

    Raises FloatingPointError, before the step is taken, if the loss is no finite number; ValueError
    as `require_training` does.
    """
    require_training(epochs, lr, batch, optimiser)
    weights = list(weights)
    device = weights[0].device if weights else None
    steps = OPTIMISERS[optimiser](weights, lr=lr)
    order = torch.Generator().manual_seed(seed)
    within = None if rows is None else torch.Generator().manual_seed(rows)
    if isinstance(own := getattr(task.train, "generator", None), torch.Generator):
        own.manual_seed(seed)
    before = _train_mode(model, weights)
    step = 0
    for _ in range(epochs):
        for x, y in data.batches(task.train, batch, order, device):
            n = data.count(x)
            if within is not None:
                mixed = torch.randperm(n, generator=within)
                x, y = data.take(x, mixed), data.take(y, mixed)
            if parallel.processes() > 1:
                mine = slice(parallel.process(), None, parallel.processes())
                x, y = data.take(x, mine), data.take(y, mine)
            share = data.count(x) * parallel.processes() / n  # 1, but for a last batch
            with context(model) as passes:
                total = share * loss(data.call(model, x), y) + passes.aux_loss
            step += 1
            if not torch.isfinite(total):
                raise FloatingPointError(f"{where}, step {step}: the loss is {total.item()}")
            steps.zero_grad()
            total.backward()
            parallel.average(weights)
            steps.step()
            after_step(model)
    for buffer, value in before:
        buffer.copy_(value)
    model.eval()
    return step


@torch.no_grad()
def _train_mode(model: nn.Module, weights: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """train(). Returns buffers to put back after, with what they hold.

    In a model that learns in part nothing else may move, as no checkpoint holds it: a BatchNorm
    that does not learn stays in eval(), and all buffers that are not the adapters' are put back.
    """
    model.train()
    learning = {id(w) for w in weights}
    if all(id(p) in learning for p in model.parameters()):
        return []
    for module in model.modules():
        own = {id(p) for p in module.parameters(recurse=False)}
        if hasattr(module, "running_mean") and not own & learning:
            module.eval()
    ours = {id(b) for m in model.modules() if isinstance(m, Adapter) for b in m._buffers.values()}
    return [(b, b.clone()) for b in model.buffers() if id(b) not in ours]


def make_backbone(stream: Stream, make: Callable[[Stream], nn.Module] | None = None) -> Any:
    """The model of a stream, not trained yet: by `make`, else by the stream's own, else a Backbone
    for what is in a row."""
    make = make or stream.model or mlp
    if isinstance(make, nn.Module):
        kind = type(make).__name__
        raise ValueError(f"the model is a {kind}, allowed: a function of the stream that makes it")
    model = copy.deepcopy(make(stream))  # it is frozen here, and may be somebody's only one
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model is a {type(model).__name__}, allowed: a torch.nn.Module")
    return model


def pretrain(
    stream: Stream,
    seed: int,
    device: torch.device | str = "cpu",
    make: Callable[[Stream], nn.Module] | None = None,
    targets: str | None = None,
) -> Any:
    """A backbone that knows the stream's base domain, if it has one, with every weight frozen.

    make: makes the model (as in `make_backbone`), the seed deciding what it draws. targets: the
    pattern for its adapted layers, if not the model's own.
    """
    with seeded(seed):
        model = make_backbone(stream, make).to(device)
        if stream.base is not None:
            where = f"pretraining on {stream.base.name}"
            how = {**PRETRAIN, **stream.pretraining, "loss": stream.loss}
            train(model, model.parameters(), stream.base.to(device), seed=seed, where=where, **how)
    if targets is not None:
        model.targets = targets
    return model.eval().requires_grad_(False)


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

    def predict(self, x: Inputs, j: int) -> Any:
        """The model's answers, such as logits (N, C), for inputs x (N, ...) of task j, which only
        an oracle may look at."""
        return data.call(self.model, x)

    @torch.no_grad()
    def row(self, stream: Stream, learned: int) -> list[float]:
        """The score on every task of the stream, now that the first `learned` are learned."""
        device = next(self.model.parameters()).device
        self.model.eval()
        return [
            evaluate(partial(self.predict, j=j), task.test, stream.score, device)
            for j, task in enumerate(stream.tasks)
        ]

    def count(self) -> dict[str, int]:
        """Numbers of parameters: "trainable" in a task, "stored", "read" for one token's output,
        and "speaking" in it (adapt.count)."""
        return {"trainable": 0, "stored": 0, "read": 0, "speaking": 0}

    def state(self) -> dict[str, Tensor]:
        """A copy of what it has learned, for a checkpoint."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `state` gave."""


class AdapterLearner(Learner):
    """The backbone's layers (`targets`, backbones.py) under one scheme; between tasks it grows, or
    does not.

    Schemes that need more of a learner than that have one of their own, in their own file.
    """

    def __init__(
        self, model: nn.Module, scheme: type[Adapter], grows: bool = True, **settings: Any
    ):
        super().__init__(model)
        adapt(model, scheme, targets=getattr(model, "targets", ".*"), **settings)
        self.grows = grows
        self.with_context = WithContext(model, self._context)

    def context(self, x: Inputs) -> dict[str, Tensor]:
        """The context that the adapters need of inputs x (N, ...), in training and at test."""
        return {}

    def _context(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Beside it, which tokens count."""
        x = args[0] if args else kwargs
        mask = data.token_mask(x)
        return self.context(x) if mask is None else {"mask": mask, **self.context(x)}

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        if t and self.grows:
            grow(self.model)
        fit(self.with_context, parameters(self.model), stream.tasks[t])

    def predict(self, x: Inputs, j: int) -> Any:
        return data.call(self.with_context, x)

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
    trainable, stored, read, speaking: numbers of parameters at the end.
    """

    matrix: list[list[float]]
    records: dict[str, list[Any]]
    seconds: float
    step: float
    trainable: int
    stored: int
    read: int
    speaking: int


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
    how: Mapping[str, Any] | None = None,
) -> Run:
    """Make a learner of (a copy of) a pretrained backbone, and carry it through the stream.

    Args:
        make: makes the learner of a backbone and the stream; `seed` decides what it draws.
        checkpoints: where to write what it knows after every task, and to go on from. A task that
            was cut off is learned again from its start, to the same bits.
        done: called with the number of tasks that are newly finished.
        how: arguments of `train`, where they are not its defaults: lr, batch, optimiser.

    Raises ValueError on a checkpoint that is damaged or of another run; FloatingPointError as
    `train` does, naming scheme, task and step, and on a score that is infinite.
    """
    stream = dataclasses.replace(stream, tasks=[task.to(device) for task in stream.tasks])
    how = {**(how or {}), "loss": stream.loss}
    J = len(stream.tasks)
    with seeded(task_seed(seed, 0)):
        learner = make(copy.deepcopy(backbone), stream)
        if checkpoints and learner.whole_stream:
            checkpoints = checkpoints.of_all(J)
        matrix = torch.full((J + 1, J), torch.nan, dtype=torch.float64)
        seconds, training, steps = 0.0, 0.0, 0
        recorder = Recorder(
            [data.to(data.leading(task.test, PROBES), device) for task in stream.tasks]
        )

        def measure(i: int) -> None:
            """Fill row i."""
            matrix[i] = torch.tensor(learner.row(stream, i), dtype=torch.float64)
            for task, value in zip(stream.tasks, matrix[i].tolist(), strict=True):
                if math.isinf(value):  # nan is a score of nothing
                    raise FloatingPointError(f"{name}: the score on {task.name} is {value}")
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
            seed_all(task_seed(seed, t))

            def fit(model: nn.Module, weights: Iterable[Tensor], task: Task, t: int = t) -> None:
                nonlocal training, steps
                where, start = f"{name}, task {t + 1} ({task.name})", time.perf_counter()
                steps += train(model, weights, task, epochs, task_seed(seed, t), where=where, **how)
                training += time.perf_counter() - start

            learner.learn(stream, t, fit)
            seconds += time.perf_counter() - start
            if checkpoints and parallel.process() == 0:
                header = Header(
                    checkpoints.run,
                    **trained_on(stream, t + 1),
                    learned=t + 1,
                    seconds=seconds,
                    training=training,
                    steps=steps,
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
