"""Closed forms: baselines that solve for their weights, and learn the same in any order of tasks.

    u = LN(x), all numbers of an input in a row; or LN of the frozen backbone's features of x
    h = relu(P [u, 1])                      P (M, D + 1) random, N(0, 1 / D), never trained

Where answers are real, a size counts: u is then x itself, and h has [u, 1] beside. With M 0, h is
[u, 1]. A class is answered as its row of the unit matrix.

    Ridge       W = (Σ h hᵀ + λ I)⁻¹ Σ h yᵀ     answer hᵀ W      sums over all examples of all tasks
    OwnRidge    W_t, the same over task t alone; answered by the task whose mean of u is nearest
    OwnSubspace W_t as least squares on v = U_tᵀ u, U_t (D, m) the leading directions of task t's u;
                answered by the task with the most energy, ‖U_tᵀ u‖²
    LDA         the nearest of the means of u, by task and class, under one covariance

Ridge is that of RanPAC (McDonnell et al., arXiv 2307.02251) and RAIL (Xu et al., 2406.18868), LDA
that of Hayes and Kanan (1909.01520). Departures: λ is given, and is 1 by default (RanPAC tries some
on a part of each task, so that its weights depend on their order); LDA's shrinkage is a share of
the mean variance, and a class has a mean in each task.

No step is taken, and no sum is ever forgotten. All is in float64 on the CPU. `stored` counts what
must be kept to go on learning, of symmetric sums a triangle; P comes from a seed and is not.

Axes: N examples, D numbers of u, M of h, O of an answer, J tasks.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapter import require
from . import data
from .data import Inputs
from .learn import Fit, Learner
from .stream import EVALUATED, Stream, Task


class ClosedForm(Learner):
    """What they share: what is read of an input, and how a task is gone through.

    Args:
        M: the number of random features.
        frozen: read the frozen features, not the inputs.

    Raises ValueError on inputs that are no real numbers, on answers that are neither real nor one
    class for each example, and on a penalty or a shrinkage that is not above 0.
    """

    def __init__(self, model: Any, stream: Stream, M: int, frozen: bool):
        super().__init__(model)
        self.frozen, self.M, self.real = frozen, M, stream.real
        self.linear = self.real or M == 0  # whether h has [u, 1]
        self.device = next(model.parameters()).device
        x, y = next(data.batches(stream.tasks[0].train, 1, device=self.device))
        if not frozen and not (isinstance(x, Tensor) and x.is_floating_point()):
            kind = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"inputs are {kind}, allowed: a tensor of real numbers")
        if not self.real and y.ndim != 1:
            raise ValueError(f"y is {tuple(y.shape)} for an example, allowed: one class, or reals")
        self.shape = y.shape[1:] if self.real else torch.Size([stream.label_space()])
        self.D, self.O = self.read(x).shape[1], self.shape.numel()
        self.draw(int(torch.randint(2**31, ())))

    def draw(self, seed: int) -> None:
        """The random features of a seed."""
        self.seed, source = seed, torch.Generator().manual_seed(seed)
        P = torch.randn(self.M, self.D + 1, generator=source, dtype=torch.float64)
        self.P = P / self.D**0.5

    @torch.no_grad()
    def read(self, x: Inputs) -> Tensor:
        """u (N, D)."""
        u: Tensor = data.call(self.model.features, x) if self.frozen else x
        u = u.flatten(1).cpu().double()
        return u if self.real else F.layer_norm(u, u.shape[-1:])

    def lift(self, u: Tensor) -> Tensor:
        """h (N, M), or (N, M + D + 1)."""
        u = F.pad(u, (0, 1), value=1.0)
        h = F.relu(u @ self.P.T)
        return torch.cat([u, h], 1) if self.linear else h

    @property
    def width(self) -> int:
        """The size of h."""
        return self.M + (self.D + 1) * self.linear

    def seen(self, task: Task) -> Iterator[tuple[Tensor, Tensor]]:
        """u (N, D) and answers (N, O) of a task's examples, in batches."""
        for x, y in data.batches(task.train, EVALUATED, device=self.device):
            y, u = y.cpu(), self.read(x)
            if self.real:
                yield u, y.double().flatten(1)
            else:
                yield u[y >= 0], F.one_hot(y[y >= 0].long(), self.O).double()

    def answer(self, y: Tensor) -> Tensor:
        """Answers y (N, O) in the stream's own shape."""
        return y.unflatten(1, self.shape).float().to(self.device)


def _positive(name: str, value: float) -> float:
    require(value > 0, name, value, "above 0")
    return value


def ridge(G: Tensor, C: Tensor, penalty: float) -> Tensor:
    """W (M, O) = (G + λ I)⁻¹ C of the sums G = Σ h hᵀ (M, M) and C = Σ h yᵀ (M, O)."""
    return torch.linalg.solve(G + penalty * torch.eye(len(G), dtype=G.dtype), C)


class Ridge(ClosedForm):
    """One ridge regression for all tasks, on M random features. penalty: λ."""

    def __init__(
        self, model: Any, stream: Stream, M: int = 300, frozen: bool = False, penalty: float = 1.0
    ):
        super().__init__(model, stream, M, frozen)
        self.penalty = _positive("penalty", penalty)
        self.G = torch.zeros(self.width, self.width, dtype=torch.float64)
        self.C = torch.zeros(self.width, self.O, dtype=torch.float64)

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        for u, y in self.seen(stream.tasks[t]):
            h = self.lift(u)
            self.G += h.T @ h
            self.C += h.T @ y

    def predict(self, x: Inputs, j: int) -> Tensor:
        return self.answer(self.lift(self.read(x)) @ ridge(self.G, self.C, self.penalty))

    def count(self) -> dict[str, int]:
        triangle = self.width * (self.width + 1) // 2
        W = self.C.numel()
        return {
            "trainable": 0,
            "stored": triangle + W,
            "read": self.P.numel() + W,
            "speaking": W,
        }

    def state(self) -> dict[str, Tensor]:
        return {"G": self.G.clone(), "C": self.C.clone(), "seed": torch.tensor(self.seed)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.G.copy_(tensors["G"])
        self.C.copy_(tensors["C"])
        self.draw(int(tensors["seed"]))


class OwnRidge(ClosedForm):
    """A ridge regression for each task, on the same M random features, and the mean of its u: the
    task whose mean is nearest answers. Before the first task all answers are 0. penalty: λ."""

    def __init__(
        self, model: Any, stream: Stream, M: int = 200, frozen: bool = False, penalty: float = 1.0
    ):
        super().__init__(model, stream, M, frozen)
        self.penalty = _positive("penalty", penalty)
        self.means = torch.zeros(0, self.D, dtype=torch.float64)
        self.W = torch.zeros(0, self.width, self.O, dtype=torch.float64)

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        us, ys = (torch.cat(parts) for parts in zip(*self.seen(stream.tasks[t]), strict=True))
        h = self.lift(us)
        self.means = torch.cat([self.means, us.mean(0, keepdim=True)])
        self.W = torch.cat([self.W, ridge(h.T @ h, h.T @ ys, self.penalty).unsqueeze(0)])

    def predict(self, x: Inputs, j: int) -> Tensor:
        u = self.read(x)
        if not len(self.means):
            return self.answer(u.new_zeros(len(u), self.O))
        each = torch.einsum("nm,jmo->njo", self.lift(u), self.W)
        return self.answer(each[range(len(u)), torch.cdist(u, self.means).argmin(1)])

    def count(self) -> dict[str, int]:
        means, W = self.means.numel(), self.width * self.O  # of one task
        return {
            "trainable": 0,
            "stored": means + self.W.numel(),
            "read": self.P.numel() + means + W,
            "speaking": W,
        }

    def state(self) -> dict[str, Tensor]:
        return {"means": self.means, "W": self.W, "seed": torch.tensor(self.seed)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.means, self.W = tensors["means"], tensors["W"]
        self.draw(int(tensors["seed"]))


class OwnSubspace(ClosedForm):
    """For each task the m leading directions of its u (about 0), and a linear map from there: the
    task in whose directions u has the most energy answers. No mean is needed, so it names tasks
    that have none; and it is no better where all tasks lie in one subspace. Before the first task
    all answers are 0. penalty: λ."""

    def __init__(
        self, model: Any, stream: Stream, m: int = 16, frozen: bool = False, penalty: float = 1.0
    ):
        super().__init__(model, stream, 0, frozen)
        self.penalty = _positive("penalty", penalty)
        self.U = torch.zeros(0, self.D, min(m, self.D), dtype=torch.float64)
        self.W = torch.zeros(0, min(m, self.D), self.O, dtype=torch.float64)

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        us, ys = (torch.cat(parts) for parts in zip(*self.seen(stream.tasks[t]), strict=True))
        U = torch.linalg.eigh(us.T @ us).eigenvectors[:, -self.U.shape[2] :]  # (D, m)
        v = us @ U
        self.U = torch.cat([self.U, U.unsqueeze(0)])
        self.W = torch.cat([self.W, ridge(v.T @ v, v.T @ ys, self.penalty).unsqueeze(0)])

    def predict(self, x: Inputs, j: int) -> Tensor:
        u = self.read(x)
        if not len(self.U):
            return self.answer(u.new_zeros(len(u), self.O))
        v = torch.einsum("nd,jdm->njm", u, self.U)
        each = torch.einsum("njm,jmo->njo", v, self.W)
        return self.answer(each[range(len(u)), v.square().sum(-1).argmax(1)])

    def count(self) -> dict[str, int]:
        U, W = self.U.numel(), self.W[:1].numel()
        return {
            "trainable": 0,
            "stored": U + self.W.numel(),
            "read": U + W,
            "speaking": self.U[:1].numel() + W,
        }

    def state(self) -> dict[str, Tensor]:
        return {"U": self.U, "W": self.W}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.U, self.W = tensors["U"], tensors["W"]


class LDA(ClosedForm):
    """Linear discriminant analysis, a mean for each task and class:

        S = Σ (u - μ)(u - μ)ᵀ               over all examples, μ the mean of its task and class
        Λ = (S + ε tr(S) / D I)⁻¹
        score of a class: the largest, over its means, of μᵀ Λ u - μᵀ Λ μ / 2

    S is the covariance times the number of examples, a factor on all scores, which changes no
    choice. A class that was not seen is never answered. shrink: ε.
    """

    def __init__(self, model: Any, stream: Stream, frozen: bool = False, shrink: float = 1e-4):
        super().__init__(model, stream, 0, frozen)
        self.shrink = _positive("shrink", shrink)
        self.S = torch.zeros(self.D, self.D, dtype=torch.float64)
        self.means = torch.zeros(0, self.D, dtype=torch.float64)
        self.of = torch.zeros(0, dtype=torch.int64)  # the class of each mean

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        us, ys = (torch.cat(parts) for parts in zip(*self.seen(stream.tasks[t]), strict=True))
        n = ys.sum(0)  # (O,)
        means = (ys.T @ us) / n.clamp_min(1).unsqueeze(1)
        left = us - ys @ means
        self.S += left.T @ left
        self.means = torch.cat([self.means, means[n > 0]])
        self.of = torch.cat([self.of, n.nonzero().flatten()])

    def predict(self, x: Inputs, j: int) -> Tensor:
        u = self.read(x)
        best = u.new_full((len(u), self.O), -torch.inf)
        if len(self.of):
            shrink = self.shrink * self.S.trace() / self.D * torch.eye(self.D, dtype=u.dtype)
            W = torch.linalg.solve(self.S + shrink, self.means.T)  # (D, means)
            scores = u @ W - (self.means.T * W).sum(0) / 2
            best = best.scatter_reduce(1, self.of.expand_as(scores), scores, "amax")
        return self.answer(best)

    def count(self) -> dict[str, int]:
        triangle = self.D * (self.D + 1) // 2
        read = self.means.numel() + len(self.means)  # W, and what is taken off
        return {
            "trainable": 0,
            "stored": triangle + self.means.numel(),
            "read": read,
            "speaking": read,
        }

    def state(self) -> dict[str, Tensor]:
        return {"S": self.S.clone(), "means": self.means, "of": self.of}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.S.copy_(tensors["S"])
        self.means, self.of = tensors["means"], tensors["of"]
