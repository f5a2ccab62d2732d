"""What several schemes' lives in a stream share, beyond growing between tasks (learn.py).

They give their adapters context (adapt.context): a label, a cluster or an embedding of each input.
The embedding is the frozen backbone's features, as a sentence encoder's would be in a language
model: of each input alone, and the same at all times. The task is never given at test.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapt import adapters
from ..adapter import Adapter
from ..contextual import Contextual
from . import data
from .data import Inputs
from .learn import AdapterLearner, Fit
from .replay import Example, Replay, reservoir
from .stream import EVALUATED, Stream, Task


class TaskLabelLearner(AdapterLearner):
    """Gives its adapters, in training, the task of each sample as its label."""

    label = 0

    def context(self, x: Inputs) -> dict[str, Tensor]:
        return {"label": torch.full((data.count(x),), self.label, device=data.device_of(x))}

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        self.label = t
        super().learn(stream, t, fit)


class EmbeddingLearner(AdapterLearner):
    """Has an embedding of every input, and clusters each new task's."""

    clusters = 0  # per task

    def __init__(self, model: nn.Module, scheme: type[Adapter], **settings: Any):
        self.frozen = copy.deepcopy(model)
        super().__init__(model, scheme, **settings)

    @torch.no_grad()
    def embed(self, x: Inputs) -> Tensor:
        """(N, F), of length 1: the backbone's features."""
        features: Any = self.frozen.features
        return F.normalize(data.call(features, x), dim=-1)

    def centres(self, task: Task) -> Tensor:
        """k-means centres (clusters, F) of a task's embeddings. (scikit-learn's, with its own
        random state from torch's, so that a run repeats.)"""
        from sklearn.cluster import KMeans  # not at the top: it takes as long to import as torch

        device = next(self.frozen.parameters()).device
        every = data.batches(task.train, EVALUATED, device=device)
        e = torch.cat([self.embed(x) for x, _ in every])
        state = int(torch.randint(2**31, ()))
        kmeans = KMeans(self.clusters, n_init=3, random_state=state).fit(e.double().cpu().numpy())
        return torch.as_tensor(kmeans.cluster_centers_, dtype=e.dtype, device=e.device)


class SampleLearner(EmbeddingLearner):
    """Gives its adapters an embedding of each input, as wide as the backbone's features."""

    def __init__(self, model: nn.Module, scheme: type[Adapter], **settings: Any):
        classes = getattr(model, "classes", None)
        if classes is not None:  # (C, F), as wide as the features
            settings = {"embedding": classes.shape[1], **settings}
        elif isinstance(D := getattr(model, "inputs", None), int):
            features = cast(Any, model).features(next(model.parameters()).new_zeros(1, D))
            settings = {"embedding": features.shape[1], **settings}
        super().__init__(model, scheme, **settings)

    def context(self, x: Inputs) -> dict[str, Tensor]:
        return {"embedding": self.embed(x)}


class ClusterLearner(EmbeddingLearner):
    """Knows clusters, and which of them an input is nearest to."""

    def __init__(self, model: nn.Module, scheme: type[Adapter], **settings: Any):
        super().__init__(model, scheme, **settings)
        self.known = torch.zeros(0)  # centres (clusters, F), none before any task

    def nearest(self, x: Inputs) -> Tensor:
        """The cluster of each input (N,); 0 while none is known."""
        if not len(self.known):
            return torch.zeros(data.count(x), dtype=torch.int64, device=data.device_of(x))
        e = self.embed(x)
        return torch.cdist(e, self.known.to(e)).argmin(-1)

    def count(self) -> dict[str, int]:
        """With the centres, all of which an input is held against."""
        counts = super().count()
        return counts | {k: counts[k] + self.known.numel() for k in ("stored", "read")}

    def state(self) -> dict[str, Tensor]:
        return {"known": self.known.clone(), **super().state()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.known = tensors["known"]
        super().load_state({name: t for name, t in tensors.items() if name != "known"})


See = Callable[[Tensor, Tensor], None]


@torch.no_grad()
def show(learner: AdapterLearner, task: Task, see: Mapping[Adapter, See]) -> None:
    """Run a task's training data through the model, and give each layer's `see` what the layer is
    given, batch by batch: x (N, ..., D), samples first, and the mask (N, ...) of what counts."""

    def pass_on(layer: Adapter, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = layer.samples_first(inputs[0])
        see[layer](x, layer.mask(x))

    hooks = [layer.register_forward_pre_hook(partial(pass_on, layer)) for layer in see]
    try:
        device = next(learner.model.parameters()).device
        for x, _ in data.batches(task.train, EVALUATED, device=device):
            data.call(learner.with_context, x)
    finally:
        for hook in hooks:
            hook.remove()


class SecondStage(Replay):
    """One LoRA after the other, and after each the routers: all their rows, which are the scheme's
    `buffer_rows`, old and new, on `keep` examples of each task so far. Its layers know the second
    stage by their `routing`. `stored` counts the examples too."""

    def __init__(self, model: nn.Module, scheme: type[Adapter], keep: int = 20, **settings: Any):
        super().__init__(model, scheme, keep, **settings)
        self.grows = True

    def remembered(self, x: Inputs, y: Inputs, t: int) -> Example:
        """What is kept of an example of task t."""
        return x, y

    def router_model(self) -> nn.Module:
        """What is given the examples."""
        return self.with_context

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        task = stream.tasks[t]
        kept = reservoir(task.train, self.keep)  # first: all processes draw the same
        AdapterLearner.learn(self, stream, t, fit)
        memory = self.memory + [self.remembered(x, y, t) for x, y in kept]
        layers = [cast(Any, layer) for _, layer in adapters(self.model)]
        routers = self.routers()

        def switch(on: bool) -> None:
            for layer in layers:
                layer.routing = on
            for rows in routers:
                rows.requires_grad_(on)

        device = layers[0].B.device
        examples = data.together([(data.to(x, device), data.to(y, device)) for x, y in memory])
        switch(True)
        try:
            fit(self.router_model(), routers, Task(task.name, examples, task.test))
        finally:
            switch(False)
        self.memory = memory

    def routers(self) -> list[Tensor]:
        """What the second stage trains."""
        layers = [layer for _, layer in adapters(self.model)]
        names = [key for name in layers[0].buffer_rows for key in (f"frozen_{name}", name)]
        return [rows for n in layers for key in names if len(rows := getattr(n, key))]

    def count(self) -> dict[str, int]:
        """The routers train too, though not beside the experts."""
        counts = super().count()
        routers = sum(rows.numel() for rows in self.routers())
        return counts | {"trainable": counts["trainable"] + routers}


def counting(model: Contextual, each: Tensor, real: bool = False) -> Tensor:
    """Which of a loss's values, of a model's answers, count: each (samples, ...), of real answers
    one for every number. Those of a padding token do not; where a sample has one answer, all do."""
    mask = model.context.get("mask")
    axes = each.ndim - real  # without that of the numbers
    if mask is None or axes < mask.ndim or each.shape[: mask.ndim] != mask.shape:
        return torch.ones_like(each)
    return model.mask(each.unsqueeze(-1))
