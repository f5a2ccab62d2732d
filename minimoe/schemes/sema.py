"""SEMA: whole LoRAs under a soft router; a layer adds one only if none knows what it sees.

Self-Expansion of Pre-trained Models with Mixture of Adapters for Continual Learning. Wang et al.,
arXiv 2403.18886.

The one equation, with one weight per block of ranks, the same for all tokens of a sample:

    m = mean over the sample's tokens of x, padding left out
    z = x Aᵀ
    w = softmax(m Wᵀ)                       one weight per expert; they sum to 1
    g = w_e for each rank of expert e
    y = x W0ᵀ + scale · (g ⊙ z) B

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept, h width
of a descriptor. x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, W (E, D) router; an expert
is r ranks. An x of three axes or more is (samples, tokens, D); of two or one, each row is a sample.

Each expert has a descriptor, a linear autoencoder of what the layer saw while it was trained:

    eps_e = mean over D of (m - m P_eᵀ Q_e)²                P (E·h, D) encoders, Q (E·h, D) decoders
    s_e = |eps_e - mu_e| / sigma_e          mu_e, sigma_e: mean and deviation of eps_e in training;
                                            0 with two samples or fewer
    expand iff  min over e of (mean over samples of s_e) > threshold

Life (`SEMALearner`): for a new task, layer by layer from the input on, if `surprised`, then `grow`,
train the new expert and router row, then the live descriptor (its loss is the mean of eps_e over
samples), then `settle`. A layer that is not surprised stays as it is. If none is, nothing trains.

Where a model calls its layers on one token at a time, as in generation with a cache, that token is
all that a sample's mean is of.

Departures: the paper's experts are adapters beside a transformer's MLP; these are LoRAs of any
linear layer. Its head goes on training; the class embeddings here are frozen. The authors' code
has descriptors of width 128 (here h = 8), and mu and sigma of the last 500 records alone.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapt import adapters
from ..adapter import Adapter, Gate, require
from ..balance import mean_over_tokens
from ..claims import Claims
from ..continual.learn import AdapterLearner, Fit
from ..continual.learners import show
from ..continual.stream import Stream, Task
from ..sparse import widened


class SEMA(Adapter):
    """A soft router over LoRAs, one per surprise. Parameters: R (D + O) + E (D + 2 h D + 2);
    active, R (D + O) + E D.

    Args beyond Adapter's:
        threshold: on s, in standard deviations; the paper's is 1 to 2.
        width: h, of a descriptor's code.

    Raises ValueError if width < 1, or threshold is no number.
    """

    claims = Claims(
        zero_at_birth=True,
        granularity="sample",
        expert="block",
        simplex=True,
        as_lora={"router": 0.0},
    )
    buffer_rows = ("mu", "sigma")
    router: Tensor
    P: Tensor
    Q: Tensor
    mu: Tensor
    sigma: Tensor

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 16,
        scale: float = 1.0,
        threshold: float = 1.0,
        width: int = 8,
    ):
        require(threshold == threshold, "threshold", threshold, "any number")
        require(width >= 1, "width", width, "1 or more")
        self.threshold, self.width = threshold, width
        super().__init__(base, rank, scale)

    def gate(self, x: Tensor) -> Gate:
        m, weight = sample_mean(x, self.mask(x))
        w = self.project(m, "router").softmax(-1)  # (..., E), 1 for each token axis
        loss = None
        if self.training:
            loss = mean_over_tokens(self.errors(m.detach())[..., -1], weight)  # the live one's
        g = self.of_ranks(w).expand(*x.shape[:-1], self.ranks)
        return Gate(None, g, self.project(x, "A"), loss)

    def errors(self, m: Tensor) -> Tensor:
        """eps (..., E) of every expert's descriptor, for m (..., D)."""
        code = self.project(m, "P").unflatten(-1, (-1, self.width))  # (..., E, h)
        decoders = self.rows("Q").unflatten(0, (-1, self.width))  # (E, h, D)
        again = torch.einsum("...eh,ehd->...ed", code, decoders)
        return widened(m.unsqueeze(-2) - again).square().mean(-1)

    @torch.no_grad()
    def surprised(self, x: Tensor) -> bool:
        """Whether no descriptor knows x (..., D), the layer's inputs from a new task."""
        eps = self.errors(sample_mean(x, self.mask(x))[0]).reshape(-1, self.n_experts)
        sigma = self.rows("sigma").clamp_min(torch.finfo(eps.dtype).tiny)
        s = (eps - self.rows("mu")).abs() / sigma  # (samples, E)
        return bool(s.mean(0).min() > self.threshold)

    @torch.no_grad()
    def settle(self, x: Tensor) -> None:
        """Set mu and sigma of the live descriptor by x (..., D), what it was trained on."""
        eps = self.errors(sample_mean(x, self.mask(x))[0])[..., -1].flatten()
        if len(eps) > 2:
            self.mu, self.sigma = eps.mean().view(1), eps.std().view(1)

    def active(self) -> int:
        D, O = self.in_features, self.out_features
        return self.ranks * (D + O) + self.n_experts * D

    def fresh(self) -> dict[str, Tensor]:
        rows = super().fresh()
        D, router = self.in_features, self.fresh_router()
        P, Q = (nn.init.xavier_uniform_(rows["A"].new_empty(self.width, D)) for _ in range(2))
        # not settled yet: an infinite deviation, so that s = 0
        mu, sigma = router.new_zeros(1), router.new_full((1,), torch.inf)
        return rows | {"router": router, "P": P, "Q": Q, "mu": mu, "sigma": sigma}


def sample_mean(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """m (samples, 1, D): the mean of x (samples, tokens, D) over the tokens where mask is 1; and
    (samples, 1) 1 for a sample that has such tokens, else 0."""
    if x.ndim < 3:
        return x, mask
    tokens, wide = tuple(range(1, x.ndim - 1)), widened(x)
    n = mask.sum(tokens, keepdim=True)
    wide = wide.where(mask.unsqueeze(-1) > 0, 0)  # padding may be nan
    m = wide.sum(tokens, keepdim=True) / n.clamp_min(1).unsqueeze(-1)
    return m.to(x.dtype), n.clamp_max(1)


class SEMALearner(AdapterLearner):
    """Life in a stream: layer by layer, from the input on, a layer that is surprised by a new task
    gets one expert more, which is trained before the next layer is looked at."""

    def __init__(self, model: nn.Module, scheme: type[SEMA] = SEMA, **settings: Any):
        super().__init__(model, scheme, **settings)

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        layers = [cast(SEMA, layer) for _, layer in adapters(self.model)]
        task = stream.tasks[t]
        if t == 0:  # no expert knows anything yet: all learn at once
            self._train(layers, task, fit)
            return
        for layer in layers:
            if layer.surprised(self._seen(layer, task)):
                layer.grow()
                self._train([layer], task, fit)

    def _train(self, layers: list[SEMA], task: Task, fit: Fit) -> None:
        """The live experts of these layers, then their descriptors."""
        fit(self.with_context, [w for n in layers for w in (n.A, n.B, n.router)], task)
        fit(self.with_context, [w for n in layers for w in (n.P, n.Q)], task)
        for layer in layers:
            layer.settle(self._seen(layer, task))

    def _seen(self, layer: SEMA, task: Task) -> Tensor:
        """The means m of the layer's inputs from a task, padding left out: (samples, 1, D), or
        (samples, D) where there are no tokens."""
        seen: list[Tensor] = []
        show(self, task, {layer: lambda x, mask: seen.append(sample_mean(x, mask)[0])})
        return torch.cat(seen)
