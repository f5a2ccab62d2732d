"""EWC on LoRA: one update that every task trains on, held back where older tasks would feel it.

Overcoming catastrophic forgetting in neural networks. Kirkpatrick et al., arXiv 1612.00796, eq. 3.

Dense LoRA's equation, g = 1 (lora.py), without growth, and in training a penalty on leaving the
weights theta*_t at which a task t ended, by the diagonal F_t of its Fisher information:

    penalty = importance / 2 · Σ over tasks t and weights i of F_t,i (theta_i - theta*_t,i)²

Kept are ΣF = Σ_t F_t and the mean of the theta*_t weighted by F_t, theta*: up to a constant,
ΣF (theta - theta*)² is the sum of them all.

    F_i = mean over inputs x of (d ln p(y | x) / d theta_i)²        y drawn from the model's own p

Axes: r ranks, D in, O out. A (r, D) keys, B (r, O) values: theta.

Life (`EWCLearner`): at a task's end, `consolidate` with its F. A rank that is new has F = 0.

Departures: the paper has all weights of a network, and this the adapter's; where a LoRA's scale can
pass between A and B, a diagonal F cannot tell. Its importance is chosen per problem.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

from ..adapt import adapters, parameters
from ..adapter import require
from ..continual import data
from ..continual.data import Inputs
from ..continual.learn import AdapterLearner, Fit
from ..continual.stream import Stream
from ..lora import LoRA
from ..sparse import widened

WEIGHTS = ("A", "B")


class EWC(LoRA):
    """LoRA under elastic weight consolidation. Parameters: 3 R (D + O), a third of them active (the
    others are ΣF and theta*).

    Args beyond LoRA's:
        importance: coefficient of the penalty.

    Raises ValueError if importance < 0.
    """

    buffer_rows = ("fisher_A", "fisher_B", "anchor_A", "anchor_B")

    def __init__(
        self, base: nn.Linear, rank: int = 8, scale: float = 1.0, importance: float = 10.0
    ):
        require(importance >= 0, "importance", importance, "0 or more")
        super().__init__(base, rank, scale)
        self.importance = importance

    def penalty(self) -> Tensor:
        left = {w: widened(getattr(self, w) - getattr(self, f"anchor_{w}")) for w in WEIGHTS}
        each = [(getattr(self, f"fisher_{w}") * left[w].square()).sum() for w in WEIGHTS]
        return self.importance / 2 * (each[0] + each[1])

    @torch.no_grad()
    def consolidate(self, fisher: dict[str, Tensor]) -> None:
        """A task ends here: keep its Fisher information, {"A": (r, D), "B": (r, O)}, and where it
        was."""
        for w in WEIGHTS:
            old, anchor = getattr(self, f"fisher_{w}"), getattr(self, f"anchor_{w}")
            total = old + fisher[w]
            share = fisher[w] / total.clamp_min(torch.finfo(total.dtype).tiny)
            anchor += share * (getattr(self, w) - anchor)
            old += fisher[w]

    def fresh(self) -> dict[str, Tensor]:
        rows = super().fresh()
        zeros = {name: torch.zeros_like(rows[name[-1]]) for name in self.buffer_rows}
        return rows | zeros


class EWCLearner(AdapterLearner):
    """Life in a stream: after each task, its Fisher information, from some of the inputs."""

    samples = 256

    def __init__(self, model: nn.Module, scheme: type[EWC] = EWC, **settings: Any):
        super().__init__(model, scheme, grows=False, **settings)

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        super().learn(stream, t, fit)
        device = next(self.model.parameters()).device
        x = data.to(data.some(stream.tasks[t].train, self.samples), device)
        fisher = fisher_information(self.with_context, x, stream.real)
        for name, layer in adapters(self.with_context):
            cast(EWC, layer).consolidate(fisher[name])


def fisher_information(
    model: nn.Module, x: Inputs, real: bool = False
) -> dict[str, dict[str, Tensor]]:
    """The diagonal of the Fisher information of the adapters' weights, by adapter and weight:

        F_i = mean over inputs x of (d ln p(y | x) / d theta_i)²,  y drawn from the model's own p

    p is the softmax of the model's logits (N, ..., C) for x (N, ...); where answers are real, a
    normal distribution around them, of deviation 1. (A loss of the stream's own does not change
    it.) One backward pass per input: the square of a batch's gradient is a noisier guess at the
    same.
    """
    weights = parameters(model)
    sums = [torch.zeros_like(w) for w in weights]
    N = data.count(x)
    for n in range(N):
        answer = data.call(model, data.take(x, slice(n, n + 1)))
        p = Normal(answer, 1.0) if real else Categorical(logits=answer)
        log_p = p.log_prob(p.sample()).sum()
        for total, grad in zip(sums, torch.autograd.grad(log_p, weights), strict=True):
            total += grad.square() / N
    by_weight = {id(w): total for w, total in zip(weights, sums, strict=True)}
    return {
        name: {
            key: by_weight[id(w)]
            for key, w in layer.named_parameters(recurse=False)
            if w.requires_grad
        }
        for name, layer in adapters(model)
    }
