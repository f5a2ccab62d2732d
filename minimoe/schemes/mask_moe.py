"""MaskMoE: a router over whole LoRAs that may choose among those alone that an input's class sees.

MaskMoE: Boosting Token-Level Learning via Routing Mask in Mixture-of-Experts. Su et al., arXiv
2407.09816. (Reconstructed from summaries.)

The one equation, as lora_moe.py has it, with a fixed table of who sees whom:

    z = x Aᵀ
    l = x Wᵀ, and -inf where M[c, e] = 0    c, the class of the token, is given
    keep the k largest l
    w = softmax over the kept of l          0 for what is kept and not seen
    g = w_e for each rank of a kept expert e, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

Of a task's n experts a rare class sees one, so that one learns all that there is of it, as with a
fixed table; any other class sees `view` of them, and the router chooses.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, k kept experts.
x (..., D), W0 (O, D), A (R, D) keys, B (R, O) values, W (E, D) router, M (E, classes); R = E·r / n.

Life: one task trains n new experts and their router rows; all older ones are frozen. Which of them
a class sees is drawn when they are made. Classes are k-means clusters of the first task's inputs,
rare ones first, and are found by `MaskMoELearner`: the layer is given which one a sample is in.

Departures: the paper's classes are the tokens of a vocabulary, rare or frequent, and its experts
are made once.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import require
from ..continual import data
from ..continual.data import Inputs
from ..continual.learn import Fit
from ..continual.learners import ClusterLearner
from ..continual.stream import EVALUATED, Stream
from ..lora_moe import LoRAMoE


class MaskMoE(LoRAMoE):
    """A router behind a mask. Parameters: R (D + O) + E D, and E · classes of M, none of which
    trains; active, E D + k (R / E) (D + O).

    Args beyond LoRAMoE's:
        classes: how many there are.
        rare: the first so many see one expert of each task.
        view: experts of each task that the others see, at most all.

    Needs the context token_class (...), that of each sample, from 0 on.
    Raises ValueError if classes < 1, rare < 0 or view < 1.
    """

    claims = replace(
        LoRAMoE.claims, as_lora={"router": 0.0, "rare": 0, "view": 1000}, active_at_most=True
    )
    buffer_rows = ("M",)
    M: Tensor

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 16,
        scale: float = 1.0,
        top_k: int = 2,
        balance: float = 0.0,
        experts: int = 1,
        classes: int = 8,
        rare: int = 4,
        view: int = 2,
    ):
        require(classes >= 1, "classes", classes, "1 or more")
        require(rare >= 0, "rare", rare, "0 or more")
        require(view >= 1, "view", view, "1 or more")
        self.classes, self.rare, self.view = classes, rare, view
        super().__init__(base, rank, scale, top_k, balance, experts)

    def logits(self, x: Tensor) -> Tensor:
        seen = self.rows("M").T[self.given("token_class", x)]  # (..., E)
        return super().logits(x).masked_fill(~seen, -torch.inf)

    def fresh(self) -> dict[str, Tensor]:
        place = torch.rand(self.experts, self.classes, device=self.base.weight.device).argsort(0)
        view = torch.full((self.classes,), self.view, device=place.device)
        view[: self.rare] = 1
        return super().fresh() | {"M": place < view}

    def needs(self) -> dict[str, range | int]:
        return {"token_class": range(self.classes)}


class MaskMoELearner(ClusterLearner):
    """Life in a stream: an input's class is the nearest cluster of the first task's inputs, of
    which the smallest are the rare classes."""

    def __init__(
        self, model: nn.Module, classes: int, scheme: type[MaskMoE] = MaskMoE, **settings: Any
    ):
        super().__init__(model, scheme, classes=classes, **settings)
        self.clusters = classes

    def context(self, x: Inputs) -> dict[str, Tensor]:
        return {"token_class": self.nearest(x)}

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        if t == 0:
            self.known = self.centres(stream.tasks[0])
            every = data.batches(stream.tasks[0].train, EVALUATED, device=self.known.device)
            nearest = torch.cat([self.nearest(x) for x, _ in every])
            sizes = nearest.bincount(minlength=self.clusters)
            self.known = self.known[sizes.argsort()]
        super().learn(stream, t, fit)
