"""AdaMix: one LoRA whose keys are drawn anew for each batch, among several; then their mean.

AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning. Wang et al., arXiv 2205.12410.
Its LoRA variant, as the authors' code has it (microsoft/AdaMix, NLG).

Dense LoRA's equation, g = 1 (lora.py), with E keys for each rank's one value:

    z = x A_eᵀ                              in training: e is drawn, one for a layer and a pass
    z = x (1/E Σ over e of A_e)ᵀ            in evaluation
    y = x W0ᵀ + scale · z B

As values are shared, the mean of the keys answers as the mean of the experts does. That they agree
is asked for by a second pass of each batch, with other draws, and a loss between the answers p and
q of both. The stream's own loss is of the first pass alone.

    loss = consistency · mean over answers of ½ [KL(p ‖ q) + KL(q ‖ p)]

where no gradient goes through the first of each KL. p and q are the softmax of logits. Of an answer
that is a real number they are normal distributions around it, of deviation 1: ½ (p - q)² for each.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts.
x (..., D), W0 (O, D), A (R, E, D) keys, of which A_e (R, D) are one expert's, B (R, O) values.

Life (`AdaMixLearner`): every task trains the same experts, without growth, as in lora.py. A layer
that grows freezes a task's experts, whose mean is added from then on.

Departures: the paper trains one task. Its weight of the loss is 1 for classifiers, 100 for texts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Adapter, Gate, require
from ..balance import mean_over_tokens
from ..claims import Claims
from ..context import WithContext
from ..contextual import Contextual
from ..continual.learn import AdapterLearner, Fit
from ..continual.learners import counting
from ..continual.stream import Stream
from ..sparse import widened


class AdaMix(Adapter):
    """A LoRA whose keys are drawn in training. Parameters: R (E D + O), all of them active; in
    training, of the live keys one expert's alone.

    Args beyond Adapter's (the default scale is the authors' alpha / r = 32 / 4):
        copies: E. All experts start with the same keys.

    Raises ValueError if copies < 1.
    """

    claims = Claims(zero_at_birth=True, granularity="token", as_lora={"copies": 1})

    def __init__(self, base: nn.Linear, rank: int = 4, scale: float = 8.0, copies: int = 8):
        require(copies >= 1, "copies", copies, "1 or more")
        self.copies = copies
        super().__init__(base, rank, scale)

    @property
    def keys(self) -> Tensor:
        """(R, D), as they are in evaluation."""
        return self.rows("A").mean(1)

    def gate(self, x: Tensor) -> Gate:
        A = self.keys
        if self.training:
            e = torch.randint(self.copies, (1,), device=x.device)
            A = torch.cat([self.frozen_A.mean(1), self.A.index_select(1, e).squeeze(1)])
        return Gate(None, 1.0, F.linear(x, A))

    def active(self) -> int:
        return self.ranks * (self.copies * self.in_features + self.out_features)

    def fresh(self) -> dict[str, Tensor]:
        rows = super().fresh()
        return rows | {"A": rows["A"].unsqueeze(1).repeat(1, self.copies, 1)}


class TwoPasses(Contextual):
    """A model that is called twice in training, answers as the first time, and leaves the loss."""

    def __init__(self, model: nn.Module, weight: float):
        super().__init__()
        self.model, self.weight, self.real = model, weight, False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        answers = self.model(*args, **kwargs)
        if self.model.training and self.weight:
            again = self.model(*args, **kwargs)
            p, q = (getattr(a, "logits", a) for a in (answers, again))
            each = disagreement(p, q, self.real)
            self.leave(self.weight * mean_over_tokens(each, counting(self, each, self.real)))
        return answers


def disagreement(p: Tensor, q: Tensor, real: bool = False) -> Tensor:
    """½ [KL(p ‖ q) + KL(q ‖ p)] of each answer: logits (..., C), or real numbers (...)."""
    p, q = (widened(t) if real else widened(t).log_softmax(-1) for t in (p, q))
    ways = ((p.detach(), q), (q.detach(), p))
    each = [(a - b).square() / 2 if real else (a.exp() * (a - b)).sum(-1) for a, b in ways]
    return (each[0] + each[1]) / 2


class AdaMixLearner(AdapterLearner):
    """Life in a stream: experts that every task trains on, in two passes of each batch; in one, if
    the consistency is 0. Raises ValueError if it is less."""

    def __init__(
        self,
        model: nn.Module,
        scheme: type[AdaMix] = AdaMix,
        consistency: float = 1.0,
        **settings: Any,
    ):
        require(consistency >= 0, "consistency", consistency, "0 or more")
        super().__init__(model, scheme, grows=False, **settings)
        self.twice = TwoPasses(model, consistency)
        self.with_context = WithContext(self.twice, self._context)

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        self.twice.real = stream.real
        super().learn(stream, t, fit)
