"""One linear layer as a model, and what linear maps reach by least squares, without training.

    one map for all tasks    Ŵ = argmin over W (D, O) of Σ_t Σ‖y - x W‖²,  ŷ = x Ŵ
    a map of each task's     Ŵ_t = argmin over W of task t's Σ‖y - x W‖²,  ŷ = x Ŵ_t of the task
                             that a gate names, or that is told

All is fitted to what tasks train on, and scored on what they test on, in float64.

Axes: N inputs, D in, O out, m directions kept.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .stream import Stream, score

ROUNDED = 1e-5  # inputs come in float32: what is smaller, relative to the largest, is rounding


class Linear(nn.Module):
    """One linear layer; its input is all that it knows of one."""

    targets = "fc1"

    def __init__(self, D: int, O: int):
        super().__init__()
        self.inputs = D
        self.fc1 = nn.Linear(D, O, bias=False)

    def features(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x)


def linear(stream: Stream) -> Linear:
    """A Linear of the stream's widths."""
    task = stream.tasks[0]
    return Linear(task.x_train.shape[1], task.y_train.shape[1])


def zero(stream: Stream) -> Linear:
    """The same with W0 = 0: it answers 0 before it learns."""
    model = linear(stream)
    nn.init.zeros_(model.fc1.weight)
    return model


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    """The W (D, O) with the least Σ‖y - x W‖² over x (N, D) and y (N, O); of several, the
    smallest, so that it is 0 where no x lies."""
    return torch.linalg.lstsq(x, y, rcond=ROUNDED, driver="gelsd").solution


def reduced_rank(x: Tensor, e: Tensor, rank: int) -> Tensor:
    """The Δ (O, D) of that rank at most with the least Σ‖e - Δ x‖² over x (N, D) and e (N, O):
    least squares, projected on the leading right singular vectors of its answers (reduced-rank
    regression; Izenman 1975, J. Multivariate Anal. 5; by Eckart and Young's theorem)."""
    fit = least_squares(x, e)  # (D, O)
    leading = torch.linalg.svd(x @ fit, full_matrices=False).Vh[:rank]
    return (fit @ leading.T @ leading).T


# nearness(x, seen) (N,): how near inputs x (N, D) are to a task whose inputs were `seen`
Nearness = Callable[[Tensor, Tensor], Tensor]


def to_mean(x: Tensor, seen: Tensor) -> Tensor:
    """-‖x - mean of seen‖."""
    return -(x - seen.mean(0)).norm(dim=1)


def in_subspace(x: Tensor, seen: Tensor, m: int) -> Tensor:
    """‖Uᵀ x‖², U (D, m) the leading m principal directions of `seen`, about 0."""
    U = torch.linalg.eigh(seen.T @ seen).eigenvectors[:, -m:]
    return (x @ U).square().sum(1)


def one_map(stream: Stream) -> float:
    """ACC of one map for all tasks."""
    data = [(task.x_train.double(), task.y_train.double()) for task in stream.tasks]
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    W = least_squares(x, y)
    return _acc(stream, lambda x, j: x @ W)


def own_maps(stream: Stream, nearness: Nearness | None = None) -> float:
    """ACC of a map of each task's own. An input is answered by the map of the task that it is
    nearest to; without a nearness, by that of its own task."""
    data = [(task.x_train.double(), task.y_train.double()) for task in stream.tasks]
    maps = [least_squares(x, y) for x, y in data]

    def answer(x: Tensor, j: int) -> Tensor:
        if nearness is None:
            return x @ maps[j]
        nearest = torch.stack([nearness(x, seen) for seen, _ in data]).argmax(0)  # (N,)
        return torch.stack([x @ W for W in maps])[nearest, torch.arange(len(x))]

    return _acc(stream, answer)


def _acc(stream: Stream, answer: Callable[[Tensor, int], Tensor]) -> float:
    """The mean over tasks of the score of answer(x, j) to inputs x of task j."""
    test = [(task.x_test.double(), task.y_test.double()) for task in stream.tasks]
    return sum(score(answer(x, j), y) for j, (x, y) in enumerate(test)) / len(test)
