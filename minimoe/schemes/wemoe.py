"""WEMoE: LoRAs trained alone, then added up, each by as much as a network makes of the sample.

Merging Multi-Task Models via Weight-Ensembling Mixture of Experts. Tang et al., arXiv 2402.00433.

The one equation, with one weight per block of ranks, the same for all tokens of a sample:

    z = x Aᵀ
    u_e = relu(x P_eᵀ + c_e) q_eᵀ + d_e     for each token, as the network of expert e says
    λ_e = mean over the sample's tokens of u_e, padding left out; not normalised
    g = 1 for each rank of the last expert, 0 elsewhere     in training
    g = λ_e for each rank of expert e                       in evaluation, and while λ trains
    y = x W0ᵀ + scale · (g ⊙ z) B

At first every λ is near .3, as in task_arithmetic.py. The networks train without
labels, by the entropy of the model's answers, mean over samples of -Σ p ln p.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept, h width
of a network. x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, P (E·h, D), c (E·h,), q (E, h),
d (E,); one expert per task: R = E·r. An x of three axes or more is (samples, tokens, D); of two or
one, each row is a sample.

Life (`WEMoELearner`): one task trains one new expert; all older ones are frozen. Then the networks
train, those of all tasks, on examples of all tasks: `keep` of each are stored. The model must
answer with logits.

Departures: the paper trains on the inputs of the test, of all tasks at once; the stored examples
are ours. They keep their labels, which move nothing. One network of the paper's, as wide as x, says
all λ; here each expert brings a small one. Experts are LoRAs, not whole fine-tuned models.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Gate, require
from ..balance import mean_over_tokens
from ..context import WithContext
from ..contextual import Contextual
from ..continual.learners import SecondStage, counting
from ..sparse import widened
from .alone import TrainedAlone
from .sema import sample_mean


class WEMoE(TrainedAlone):
    """LoRAs that are added up. Parameters: R (D + O) + E (h (D + 2) + 1); active, all of them in
    evaluation, r (D + O) in training.

    Args beyond Adapter's:
        width: h.

    Raises ValueError if width < 1.
    """

    claims = replace(TrainedAlone.claims, granularity="sample", simplex=False)
    buffer_rows = ("P", "c", "q", "d")
    routing = False  # whether the networks are what trains
    start = 0.3  # d at first

    def __init__(self, base: nn.Linear, rank: int = 16, scale: float = 1.0, width: int = 16):
        require(width >= 1, "width", width, "1 or more")
        self.width = width
        super().__init__(base, rank, scale)

    def gate(self, x: Tensor) -> Gate:
        return self.gate_blocks(x, *self.route(x)) if self.routing else super().gate(x)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.all_at(x, sample_mean(self.networks(x), self.mask(x))[0])

    def networks(self, x: Tensor) -> Tensor:
        """What each expert's network makes of x (..., D): (..., E)."""
        hidden = (nn.functional.linear(x, self.rows("P")) + self.rows("c")).relu()
        each = hidden.unflatten(-1, (-1, self.width)) * self.rows("q")  # (..., E, h)
        return widened(each).sum(-1) + self.rows("d")

    def all_at(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """All experts, and a sample's weights w for each of its tokens."""
        w = w.to(x.dtype).expand(*x.shape[:-1], self.n_experts)
        return torch.arange(self.n_experts, device=x.device).expand_as(w), w

    def active(self) -> int:
        networks = self.n_experts * (self.width * (self.in_features + 2) + 1)
        return self.speaking() + (0 if self.training else networks)

    def fresh(self) -> dict[str, Tensor]:
        P, q = self.empty(self.width, self.in_features), self.empty(1, self.width)
        c, d = self.empty(self.width).zero_(), self.empty(1).fill_(self.start)
        return super().fresh() | {
            "P": P.normal_(std=0.01),
            "c": c,
            "q": q.normal_(std=0.01),
            "d": d,
        }


class WEMoELearner(SecondStage):
    """Life in a stream: the networks learn to be sure."""

    def __init__(self, model: nn.Module, scheme: type[Adapter] = WEMoE, **settings: Any):
        super().__init__(model, scheme, **settings)

    def router_model(self) -> nn.Module:
        return WithContext(Entropy(self.model), self._context)


class Entropy(Contextual):
    """A model that leaves as a loss how unsure its answers are, -Σ p ln p of logits (..., C), the
    mean over all but padding. The answers are detached, so that no other loss teaches."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        answers = self.model(*args, **kwargs)
        logits: Tensor = getattr(answers, "logits", answers)
        l = widened(logits).log_softmax(-1)
        each = -(l.exp() * l).sum(-1)
        self.leave(mean_over_tokens(each, counting(self, each)))
        return logits.detach()
