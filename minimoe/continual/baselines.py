"""What tells a reader whether a number is good: learners to hold a scheme against.

Beside these, `Learner` (zero-shot: no adaptation at all) and `AdapterLearner` with a LoRA that
grows (ranks added per task, all of them always on) serve as baselines as they are.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapt import adapters, parameters, survey
from ..adapter import Adapter, Gate
from ..claims import Claims
from ..lora import LoRA
from ..sparse import rank_scores
from . import data
from .data import Inputs
from .learn import AdapterLearner, Fit, Learner
from .learners import TaskLabelLearner
from .stream import EVALUATED, IGNORED, Stream, Task


class ClassMean(Learner):
    """Nearest class mean: no training; a digit's prototype is the mean of its frozen features.

    The mean is over all that the stream has shown of the digit so far, and over the base domain
    until then. A digit that neither has shown is never answered. No weight is overwritten, but
    tasks that look different share one mean, and blur it.
    """

    def __init__(self, model: Any, stream: Stream):
        super().__init__(model)
        C, F = model.classes.shape
        self.total, self.seen = torch.zeros(2, C, F, dtype=torch.float64), torch.zeros(2, C)
        if stream.base is not None:
            self._add(0, stream.base)

    @torch.no_grad()
    def _add(self, source: int, task: Task) -> None:
        """Count a task's features in: source 0 is the base domain, 1 the stream."""
        for x, y in data.batches(task.train, EVALUATED, device=self.model.classes.device):
            features, y = data.call(self.model.features, x).double().cpu(), y.long().cpu()
            features, y = features[y >= 0], y[y >= 0]
            self.total[source].index_add_(0, y, features)
            self.seen[source] += y.bincount(minlength=self.seen.shape[1])

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        self._add(1, stream.tasks[t])

    def predict(self, x: Inputs, j: int) -> Tensor:
        source = (self.seen[1] > 0).long()  # (C,)
        classes = torch.arange(len(source))
        seen = self.seen[source, classes]  # (C,)
        mean = self.total[source, classes] / seen.clamp_min(1).unsqueeze(1)  # (C, F)
        features = data.call(self.model.features, x)
        logits = -torch.cdist(features, mean.to(features))
        return logits.masked_fill(seen.to(features.device) == 0, -torch.inf)

    def count(self) -> dict[str, int]:
        """Stored are both sums, and how many they are of."""
        means, stored = self.total[0].numel(), self.total.numel() + self.seen.numel()
        return {"trainable": 0, "stored": stored, "read": means, "speaking": means}

    def state(self) -> dict[str, Tensor]:
        return {"total": self.total.clone(), "seen": self.seen.clone()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.total.copy_(tensors["total"])
        self.seen.copy_(tensors["seen"])


class Trigram(Learner):
    """Counts of three tokens in a row, of all that the stream has shown so far: no network at all.

        p₀(c) = 1 / C
        pₙ(c | h) = (n(h, c) + κ pₙ₋₁(c | h')) / (n(h) + κ)

    of h, the n - 1 tokens before, and h', the same without the first; n = 1, 2, 3; κ = 4, which was
    not tuned (MacKay and Peto 1995, Natural Language Engineering 1, with one κ for all). No count
    is overwritten, and the order of tasks does not matter; but texts that go on differently share
    their counts.
    """

    KAPPA = 4.0
    MOST = 256  # of which all counts of three are 67 MB

    def __init__(self, model: Any, stream: Stream):
        super().__init__(model)
        C, x = model.vocabulary, data.leading(stream.tasks[0].test, 1)
        if not isinstance(x, Tensor) or x.ndim != 2 or x.is_floating_point():
            raise ValueError("trigram is for a tensor of tokens (N, T), not for other inputs")
        if C > self.MOST:
            raise ValueError(f"trigram: vocabulary is {C}, allowed: up to {self.MOST}")
        self.counts = torch.zeros(C + 1, C, C)  # of a, b, c; a is C where b is the first
        if stream.base is not None:
            self._add(stream.base)

    def _add(self, task: Task) -> None:
        for x, y in data.batches(task.train, EVALUATED, device=self.counts.device):
            known = y != IGNORED
            rows = (self._before(x)[known], x[known], y[known])
            self.counts.index_put_(rows, torch.ones(len(rows[0])), accumulate=True)

    def _before(self, x: Tensor) -> Tensor:
        """The token before each of x (N, T)."""
        return F.pad(x[:, :-1], (1, 0), value=len(self.counts) - 1)

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        self._add(stream.tasks[t])

    def predict(self, x: Inputs, j: int) -> Tensor:
        n3 = self.counts.to(x.device)
        n2, p = n3.sum(0), torch.tensor(1 / n3.shape[-1])
        for n in (n2.sum(0), n2[x], n3[self._before(x), x]):  # (C,), then (N, T, C)
            p = (n + self.KAPPA * p) / (n.sum(-1, keepdim=True) + self.KAPPA)
        return p.log()

    def count(self) -> dict[str, int]:
        return {
            "trainable": 0,
            "stored": int((self.counts > 0).sum()),
            "read": 3 * len(self.counts[0]),
            "speaking": 3 * len(self.counts[0]),
        }

    def state(self) -> dict[str, Tensor]:
        return {"counts": self.counts.clone()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.counts.copy_(tensors["counts"])


class HeadOnly(Learner):
    """A linear probe carried through the stream: the class embeddings alone learn."""

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        self.model.classes.requires_grad_(True)
        fit(self.model, [self.model.classes], stream.tasks[t])

    def count(self) -> dict[str, int]:
        counted = ("trainable", "stored", "read", "speaking")
        return dict.fromkeys(counted, self.model.classes.numel())

    def state(self) -> dict[str, Tensor]:
        return {"classes": self.model.classes.detach().clone()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.model.classes.copy_(tensors["classes"])


class Joint(AdapterLearner):
    """One LoRA trained on all tasks at once: what could be learned if nothing came in sequence.

    It learns when the stream is complete; the rows of its matrix before that are nan.

    Args:
        rank: r, ranks per task; the LoRA has r for each of the stream's tasks, or as many as the
            narrowest layer allows.
    """

    whole_stream = True

    def __init__(self, model: Any, stream: Stream, rank: int = 8, **settings: Any):
        layers, _ = survey(model, getattr(model, "targets", ".*"))
        narrowest = min(min(n.in_features, n.out_features) for n in layers.values())
        rank = min(rank * len(stream.tasks), narrowest)
        super().__init__(model, LoRA, grows=False, rank=rank, **settings)

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        if t == len(stream.tasks) - 1:
            every = data.together([task.train for task in stream.tasks])
            fit(self.with_context, parameters(self.model), Task("all tasks", every, every))

    def row(self, stream: Stream, learned: int) -> list[float]:
        J = len(stream.tasks)
        return super().row(stream, learned) if learned in (0, J) else [float("nan")] * J


class ToldLoRA(Adapter):
    """LoRA whose gate is given the task: g = 1 on the ranks of the task `label`, 0 elsewhere.

    A task not learned yet has no ranks; the layer is then W0 alone.
    """

    claims = Claims(zero_at_birth=True, granularity="token", expert="block")

    def gate(self, x: Tensor) -> Gate:
        label = self.given("label", x).expand(x.shape[:-1])
        tasks = self.ranks // self.rank
        idx = label.clamp(max=tasks - 1).unsqueeze(-1) * self.rank
        idx = idx + torch.arange(self.rank, device=x.device)  # (..., r)
        z = rank_scores(x, idx, self.frozen_A, self.A, self.path)
        return Gate(idx, (label < tasks).unsqueeze(-1).to(z.dtype), z)

    def active(self) -> int:
        return self.rank * (self.base.in_features + self.base.out_features)

    def speaking(self) -> int:
        return self.active()

    def needs(self) -> dict[str, range | int]:
        return {"label": range(self.ranks // self.rank + 1)}


class Oracle(TaskLabelLearner):
    """One LoRA per task, told at test which task it is: no wrong routing, no interference."""

    def __init__(self, model: nn.Module, scheme: type[Adapter] | None = None, **settings: Any):
        super().__init__(model, scheme or ToldLoRA, **settings)

    def predict(self, x: Inputs, j: int) -> Any:
        _, layer = next(adapters(self.model))
        self.label = min(j, layer.ranks // layer.rank)  # beyond those learned all are alike
        return super().predict(x, j)
