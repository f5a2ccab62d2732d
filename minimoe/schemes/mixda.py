"""MixDA: LoRAs trained alone, to add 0 to what the model knows; then a gate, the base in it.

Mixture-of-Domain-Adapters: Decoupling and Injecting Domain Knowledge to Pre-trained Language Models
Memories. Diao et al., arXiv 2306.05406.

The base layer is one of the paths:

    f_e = x W0ᵀ + scale · z_e B_e           the path of expert e; z_e = x A_eᵀ
    y = f_e                                 in training, e the last
    π = softmax over (0, l_1 ... l_E)       l_e: what the network of e makes of the last token
    y = π_0 x W0ᵀ + Σ over e of π_e f_e     in evaluation, and while the gate trains

and as π sums to 1, that is the one equation with g = π_e for each rank of expert e, and an expert 0
that says nothing. In training a path is held to the base layer where the base layer is right:

    loss = anchor · mean over tokens and O of (f_e - x W0ᵀ)²      on inputs of the base domain

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values; networks and samples as in wemoe.py; one
expert per task: R = E·r.

Life (`MixDALearner`): one task trains one new expert, beside 64 inputs of the stream's base domain,
drawn for each task, or alone where it has none; older ones are frozen. Then all networks train, by
the tasks' loss, on examples of all tasks: `keep` of each are stored.

Departures: the paper's f_e has no W0, in blocks whose residual carries x on; a bare layer has none:
r ranks would lose W0, and a stack of such paths, all 0, learns nothing. The paper's gate is one
network of 4 layers with dropout, and trains on the whole task. The stored examples are ours.
"""

from dataclasses import replace
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..adapt import adapters
from ..adapter import Adapter, Gate, require
from ..balance import mean_over_tokens
from ..continual import data
from ..continual.learn import Fit
from ..continual.learners import SecondStage
from ..continual.stream import Stream, Task
from ..sparse import widened
from .wemoe import WEMoE


class MixDA(WEMoE):
    """A gate over paths. Parameters as WEMoE's.

    Args beyond Adapter's:
        width: h, of a network.
        anchor: coefficient of the loss on the base domain.

    Raises ValueError if width < 1 or anchor < 0.
    """

    claims = replace(WEMoE.claims, simplex=True)
    start = 0.0
    anchoring = False  # whether x is of the base domain

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 16,
        scale: float = 1.0,
        width: int = 16,
        anchor: float = 1.0,
    ):
        require(anchor >= 0, "anchor", anchor, "0 or more")
        self.anchor = anchor
        super().__init__(base, rank, scale, width)

    def gate(self, x: Tensor) -> Gate:
        gate = super().gate(x)
        if not (self.training and self.anchoring):
            return gate
        off = widened(self.scale * F.linear(gate.z, self.B.T))  # f_e - x W0ᵀ
        loss = mean_over_tokens(off.square().mean(-1), self.mask(x))
        return gate._replace(loss=self.anchor * loss)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        l = self.networks(last_token(x, self.mask(x)))
        return self.all_at(x, F.pad(l, (1, 0)).softmax(-1)[..., 1:])


def last_token(x: Tensor, mask: Tensor) -> Tensor:
    """(samples, 1, D): of x (samples, tokens, D) the last where mask is 1, else 0."""
    if x.ndim < 3:
        return x
    m = mask.flatten(1)
    last = m * (m.flip(1).cumsum(1).flip(1) == 1)  # 1 there, and 0 elsewhere
    token = x.flatten(1, -2).where(last.unsqueeze(-1) > 0, 0).sum(1)  # padding may be nan
    return token.view(x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])


class MixDALearner(SecondStage):
    """Life in a stream: an expert trains beside inputs of the base domain."""

    def __init__(self, model: nn.Module, scheme: type[Adapter] = MixDA, **settings: Any):
        super().__init__(model, scheme, **settings)

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        inputs = None if stream.base is None else data.some(stream.base.train, 64)

        def fit_beside(model: nn.Module, weights: Any, task: Task) -> None:
            alone = inputs is None or any(cast(MixDA, n).routing for _, n in adapters(model))
            fit(model if alone else BesideBase(model, inputs), weights, task)

        super().learn(stream, t, fit_beside)


class BesideBase(nn.Module):
    """A model that is given inputs of the base domain first, for the loss there."""

    def __init__(self, model: nn.Module, inputs: data.Inputs):
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.switch(True)
        try:
            data.call(self.model, data.to(self.inputs, next(self.model.parameters()).device))
        finally:
            self.switch(False)
        return self.model(*args, **kwargs)

    def switch(self, on: bool) -> None:
        for _, layer in adapters(self.model):
            cast(MixDA, layer).anchoring = on
