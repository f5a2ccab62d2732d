"""PHATGOOSE: LoRAs trained alone, then a gate for each, alone too; those compete at the end.

Learning to Route Among Specialized Experts for Zero-Shot Generalization. Muqeeth et al., arXiv
2402.05859.

The one equation, with one weight per block of ranks:

    z = x Aᵀ
    e = the last, at weight 1, while it trains
    e = the last, at weight sigmoid(x · v_e), while v_e trains, and nothing else
    in evaluation, x̂ and v̂ being x and v less their means, over their deviations:
    l = x̂ · v̂_e / √D
    keep the k largest l
    w = softmax over the kept of l          one weight per kept expert; they sum to 1
    g = w_e for each rank of a kept expert e, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

Does routing have to be trained in competition? Here no gate has seen another's task.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, k kept experts.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, v (E, D) gates; one expert per task: R = E·r
and K = k·r.

Life (`PHATGOOSELearner`): one task trains one new expert, then its v, from 0 on, in as many steps
again; all older ones are frozen.

Departures: the authors' gate has 100 steps at its own learning rate.
"""

import math
from dataclasses import replace
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..adapt import adapters
from ..adapter import require
from ..continual.learn import AdapterLearner, Fit
from ..continual.stream import Stream
from ..sparse import widened
from .alone import TrainedAlone


class PHATGOOSE(TrainedAlone):
    """Whole LoRAs, each with a gate of its own. Parameters: R (D + O) + E D; active, E D + k r (D +
    O) in evaluation, r (D + O) in training.

    Args beyond Adapter's:
        top_k: k, experts kept per token, at most all.

    Raises ValueError if top_k < 1.
    """

    claims = replace(TrainedAlone.claims, top_k=True)
    buffer_rows = ("v",)
    gating = False  # whether v is what trains
    v: Tensor

    def __init__(self, base: nn.Linear, rank: int = 16, scale: float = 1.0, top_k: int = 2):
        require(top_k >= 1, "top_k", top_k, "1 or more")
        self.top_k = top_k
        super().__init__(base, rank, scale)

    def while_it_trains(self, x: Tensor) -> Tensor:
        if not self.gating:
            return super().while_it_trains(x)
        return F.linear(x, self.v).sigmoid()

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        D = self.in_features
        x, v = (F.layer_norm(widened(t), (D,)) for t in (x, self.rows("v")))
        top, expert = (F.linear(x, v) / math.sqrt(D)).topk(self.kept)
        return expert, top.softmax(-1)

    def active(self) -> int:
        return self.speaking() + (0 if self.training else self.n_experts * self.in_features)

    def fresh(self) -> dict[str, Tensor]:
        return super().fresh() | {"v": self.empty(1, self.in_features).zero_()}


class PHATGOOSELearner(AdapterLearner):
    """Life in a stream: after each task's experts, their gates."""

    def __init__(self, model: nn.Module, scheme: type[PHATGOOSE] = PHATGOOSE, **settings: Any):
        super().__init__(model, scheme, **settings)

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        super().learn(stream, t, fit)
        layers = [cast(PHATGOOSE, layer) for _, layer in adapters(self.model)]
        for layer in layers:
            layer.gating = layer.v.requires_grad_().requires_grad
        fit(self.with_context, [layer.v for layer in layers], stream.tasks[t])
        for layer in layers:
            layer.gating = layer.v.requires_grad_(False).requires_grad
