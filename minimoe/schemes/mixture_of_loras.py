"""Mixture-of-LoRAs: LoRAs trained alone, then a router that learns from labels which is meant.

Mixture-of-LoRAs: An Efficient Multitask Tuning for Large Language Models. Feng et al., arXiv
2403.03432. (Reconstructed from summaries.)

The one equation, with one whole LoRA for a sample:

    z = x Aᵀ
    m = mean over the sample's tokens of x, padding left out
    l = m Wᵀ                                router logits, one per expert
    e = the last, in training               the one that the task trains
    e = the label, while the router trains
    e = argmax l                            in evaluation: the label is not given
    g = 1 for each rank of e, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

The router's loss is the mean over samples of the cross-entropy of l with the label.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, W (E, D) router; one expert per task: R = E·r
and K = r. An x of three axes or more is (samples, tokens, D); of two or one, each row is a sample.

Life (`MixtureOfLoRAsLearner`): one task trains one new expert; all older ones are frozen. Then the
router trains, the rows of all tasks, on examples of all tasks: `keep` of each are stored.

Departures: the paper has the data of all domains, and no stream, when its router trains; the stored
examples are ours. It trains the LoRAs on in its second stage, by the task's loss, beside which the
router's has a coefficient; here they are frozen, so that the router has its own loss alone.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapt import context
from ..adapter import Adapter, Gate
from ..continual import data
from ..continual.data import Inputs
from ..continual.learners import SecondStage
from ..continual.replay import Example
from .alone import TrainedAlone
from .meteora import label_loss
from .sema import sample_mean

LABEL = "its label"  # in an example, beside what the model is given: no argument has a space


class MixtureOfLoRAs(TrainedAlone):
    """Whole LoRAs, one for a sample. Parameters: R (D + O) + E D; active, r (D + O), and in
    evaluation E D more. Args and errors: Adapter's.

    Needs, while the router trains, the context label (...), the expert of each sample, from 0 on.
    """

    claims = replace(TrainedAlone.claims, granularity="sample")
    buffer_rows = ("router",)
    routing = False  # whether the router is what trains

    def gate(self, x: Tensor) -> Gate:
        if not self.routing:
            return super().gate(x)
        l, weight = self.logits(x)
        label = self.given("label", x)
        e = label.expand(x.shape[:-1]).unsqueeze(-1)
        return self.gate_blocks(x, e, torch.ones_like(x[..., :1]), label_loss(l, label, weight))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        e = self.logits(x)[0].argmax(-1, keepdim=True)
        return e.expand(*x.shape[:-1], 1), torch.ones_like(x[..., :1])

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """l, and the weight of each sample in the loss."""
        m, weight = sample_mean(x, self.mask(x))
        return F.linear(m, self.rows("router")), weight

    def active(self) -> int:
        return self.speaking() + (0 if self.training else self.n_experts * self.in_features)

    def speaking(self) -> int:
        return self.block * (self.in_features + self.out_features)

    def fresh(self) -> dict[str, Tensor]:
        return super().fresh() | {"router": self.fresh_router()}

    def needs(self) -> dict[str, range | int]:
        return {"label": range(self.n_experts)} if self.routing else {}


class MixtureOfLoRAsLearner(SecondStage):
    """Life in a stream: each example is stored with its task as its label."""

    def __init__(self, model: nn.Module, scheme: type[Adapter] = MixtureOfLoRAs, **settings: Any):
        super().__init__(model, scheme, **settings)

    def remembered(self, x: Inputs, y: Inputs, t: int) -> Example:
        named = x if isinstance(x, dict) else {"": x}
        return {**named, LABEL: torch.tensor([t], device=data.device_of(x))}, y

    def router_model(self) -> nn.Module:
        return Labelled(self.with_context)


class Labelled(nn.Module):
    """A model whose examples bring their labels."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **x: Tensor) -> Any:
        with context(self.model, label=x.pop(LABEL)):
            return data.call(self.model, x.get("", x))
