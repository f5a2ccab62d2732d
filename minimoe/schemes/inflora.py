"""InfLoRA: ranks added per task, all always on, with keys that no older task's inputs answer to.

InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning. Liang and Li, arXiv
2404.00228.

Dense LoRA's equation, g = 1 (lora.py), with keys that are computed, not trained. M (D, m) is an
orthonormal basis of what older tasks' inputs of this layer span, P = I - M Mᵀ, and C = Σ xᵀ x over
a task's inputs, padding left out.

    before task t    A = the first r left singular vectors of P C, as rows, / √3
    after it         M takes in left singular vectors of P C, the first one first, until
                     ‖P C‖² <= (1 - share) ‖C‖²           share = .95 + .05 t / J, t from 0

So A M = 0, and A Aᵀ = I / 3 while the task has r directions outside M: an old input in the span of
M is given by this layer what it was given before, whatever the new values B are. What lies outside
moves (5 % of the squares at first), and what deeper layers are given has moved.

Axes: r ranks per task, D in, O out, J tasks. A (R, D) keys, B (R, O) values, P (D, D).

Life (`InfLoRALearner`): one task trains the values of r new ranks, with keys placed by `place`; all
older ones are frozen, and still added. At a task's end `remember`. Until a task is placed its keys
are LoRA's.

Departures: P is kept, where the authors keep M, or its complement where that is smaller. Of the
first task their code takes one direction less. A direction that no input of the task has outside M
becomes a key of 0. KeepLoRA (ICLR 2026) is this with the main directions of W0 in M from the start.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapt import adapters, grow, parameters
from ..continual.learn import AdapterLearner, Fit
from ..continual.learners import show
from ..continual.stream import Stream, Task
from ..lora import LoRA
from ..sparse import widened


class InfLoRA(LoRA):
    """LoRA beside what older tasks use. Parameters: R (D + O) + D², R O of which are trained in
    their time; active, R (D + O). Args and errors: Adapter's (the default rank is the paper's)."""

    buffer_rows = ("A",)
    P: Tensor

    def __init__(self, base: nn.Linear, rank: int = 10, scale: float = 1.0):
        super().__init__(base, rank, scale)
        self.register_buffer("P", nn.init.eye_(self.empty(self.in_features, self.in_features)))

    @torch.no_grad()
    def place(self, C: Tensor) -> None:
        """A task begins: its keys, by C (D, D) of its inputs."""
        P = self.P.to(C)
        U = torch.linalg.svd(P @ C).U[:, : self.rank]
        self.A.copy_((P @ U).T / math.sqrt(3))  # P: where P C is 0, U is any

    @torch.no_grad()
    def remember(self, C: Tensor, share: float) -> None:
        """A task ends: M takes in what it lacks of a share, below 1, of C (D, D) of its inputs."""
        P = self.P.to(C)
        U, s, _ = torch.linalg.svd(P @ C)
        left = s.square().flip(0).cumsum(0).flip(0)  # ‖P C‖², the first i taken in
        U = U[:, left > (1 - share) * C.square().sum()]
        self.P.copy_(P - U @ U.T)


class InfLoRALearner(AdapterLearner):
    """Life in a stream: what every layer is given of a task places its keys before it, and is
    remembered after it."""

    whole_stream = True  # the share

    def __init__(self, model: nn.Module, scheme: type[InfLoRA] = InfLoRA, **settings: Any):
        super().__init__(model, scheme, **settings)

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        task = stream.tasks[t]
        if t:
            grow(self.model)
        for layer, C in self.given(task):
            layer.place(C)
        fit(self.with_context, parameters(self.model), task)
        for layer, C in self.given(task):
            layer.remember(C, 0.95 + 0.05 * t / len(stream.tasks))

    def given(self, task: Task) -> Iterable[tuple[InfLoRA, Tensor]]:
        """Every layer, and C (D, D) of what it is given of a task: in float64, on the CPU."""
        layers = [cast(InfLoRA, layer) for _, layer in adapters(self.model)]
        sums = [torch.zeros(layer.in_features, layer.in_features).double() for layer in layers]

        def add(C: Tensor, x: Tensor, mask: Tensor) -> None:
            x = widened(x[mask > 0])
            C += (x.T @ x).cpu()

        pairs = list(zip(layers, sums, strict=True))
        show(self, task, {layer: partial(add, C) for layer, C in pairs})
        return pairs
