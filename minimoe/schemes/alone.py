"""LoRAs trained alone: each on its task as if there were no other, then chosen by the nearest mean.

The simplest mixture of LoRAs: no gate is trained, and none is in the way while a LoRA trains. The
choice is that of a nearest class mean (as in iCaRL, Rebuffi et al., arXiv 1611.07725), with a
layer's inputs for features and tasks for classes.

The one equation, with one whole LoRA for a token:

    z = x Aᵀ
    e = the last, in training               the one that the task trains
    e = argmin over e of ‖x - m_e‖²         in evaluation; m_e the mean of the layer's inputs
    g = 1 for each rank of e, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, m (E, D) means; one expert per task: R = E·r
and K = r.

Life: one task trains one new expert; all older ones are frozen. At its end `AloneLearner` sets m_e:
the mean of all that the layer is given of the task, padding left out, while this task's experts
speak in the layers before it. Until then m_e is 0.

Departures: none, as there is no one paper. PHATGOOSE (Muqeet et al., arXiv 2402.05859) trains
experts apart too, and then a gate for each, to choose by cosine; here nothing is trained twice.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapt import adapters
from ..adapter import Adapter, Gate
from ..claims import Claims
from ..continual.learn import AdapterLearner, Fit
from ..continual.learners import show
from ..continual.stream import Stream
from ..sparse import widened


class TrainedAlone(Adapter):
    """A LoRA trains as if it were the only one; in evaluation `route` says which is used.
    Parameters: R (D + O); active in training, r (D + O)."""

    claims = Claims(zero_at_birth=True, granularity="token", expert="block", simplex=True)

    def gate(self, x: Tensor) -> Gate:
        if self.training:
            e = torch.full((*x.shape[:-1], 1), self.n_experts - 1, device=x.device)
            return self.gate_blocks(x, e, self.while_it_trains(x))
        return self.gate_blocks(x, *self.route(x))

    def while_it_trains(self, x: Tensor) -> Tensor:
        """Its weight (..., 1)."""
        return x.new_ones(*x.shape[:-1], 1)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The kept experts (..., k) and their weights, for x (..., D)."""
        raise NotImplementedError

    def speaking(self) -> int:
        D, O = self.in_features, self.out_features
        return self.block * (D + O) if self.training else super().speaking()


class Alone(TrainedAlone):
    """Whole LoRAs, the one with the nearest mean is used. Parameters: R (D + O) + E D; active,
    r (D + O), and in evaluation E D more."""

    buffer_rows = ("mean",)
    mean: Tensor

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        m = widened(self.rows("mean"))
        # ‖x - m‖² less ‖x‖², halved and turned round
        near = widened(self.project(x, "mean")) - m.square().sum(-1) / 2
        return near.argmax(-1, keepdim=True), x.new_ones(*x.shape[:-1], 1)

    def active(self) -> int:
        return self.speaking() + (0 if self.training else self.n_experts * self.in_features)

    def speaking(self) -> int:
        return self.block * (self.in_features + self.out_features)

    def fresh(self) -> dict[str, Tensor]:
        return super().fresh() | {"mean": self.empty(1, self.in_features).zero_()}


class AloneLearner(AdapterLearner):
    """Life in a stream: after each task, the mean of what every layer was given of it."""

    def __init__(self, model: nn.Module, scheme: type[Alone] = Alone, **settings: Any):
        super().__init__(model, scheme, **settings)

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        super().learn(stream, t, fit)
        layers = [cast(Alone, layer) for _, layer in adapters(self.model)]
        sums = [torch.zeros(layer.in_features + 1, dtype=torch.float64) for layer in layers]

        def add(total: Tensor, x: Tensor, mask: Tensor) -> None:
            m = mask.unsqueeze(-1)
            both = torch.cat([widened(x).where(m > 0, 0), m], -1)  # and how many
            total += both.flatten(0, -2).sum(0).cpu()

        pairs = list(zip(layers, sums, strict=True))
        for layer in layers:
            layer.train()  # the live experts are used; the rest of the model is as at test
        show(self, stream.tasks[t], {layer: partial(add, total) for layer, total in pairs})
        for layer, total in pairs:
            layer.eval()
            layer.mean.copy_(total[:-1] / total[-1].clamp_min(1))
