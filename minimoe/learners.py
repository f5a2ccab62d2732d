"""How schemes live through a stream that need more of their learner than to grow between tasks.

What they are told of an input (adapt.told) is a label, a cluster or an embedding. The embedding is
the frozen backbone's features, as a sentence encoder's would be in a language model: of each input
alone, and the same at all times. Nobody is told the task at test.
"""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapt import adapters, parameters
from .learn import Adapted
from .lora import Adapter
from .schemes import EWC, SEMA, MoCLE, MoR1E
from .streams import Stream, Task


class Labelled(Adapted):
    """Told in training which task a sample is of."""

    label = 0

    def say(self, x: Tensor) -> dict[str, Tensor]:
        return {"label": torch.full(x.shape[:1], self.label, device=x.device)}

    def learn(self, stream: Stream, t: int, fit: Callable[..., Any]) -> None:
        self.label = t
        super().learn(stream, t, fit)


class Embedded(Adapted):
    """Knows every input's embedding, and clusters each new task's."""

    clusters = 0  # per task

    def __init__(self, model: nn.Module, scheme: type[Adapter], **settings: Any):
        self.frozen = copy.deepcopy(model)
        super().__init__(model, scheme, **settings)

    @torch.no_grad()
    def embed(self, x: Tensor) -> Tensor:
        """(N, F), of length 1: the backbone's features; of a model that has none, x."""
        features = getattr(self.frozen, "features", nn.Identity())
        return F.normalize(features(x), dim=-1)

    def centres(self, task: Task) -> Tensor:
        """k-means centres (clusters, F) of a task's embeddings. (scikit-learn's, with its own
        random state from torch's, so that a run repeats.)"""
        from sklearn.cluster import KMeans  # not at the top: it takes as long to import as torch

        e = self.embed(task.x_train)
        state = int(torch.randint(2**31, ()))
        found = KMeans(self.clusters, n_init=3, random_state=state).fit(e.double().cpu().numpy())
        return torch.as_tensor(found.cluster_centers_, dtype=e.dtype, device=e.device)


class Intuitive(Embedded):
    """MoR1E's: every layer's new ranks get the centres of the new task's clusters."""

    def __init__(self, model: nn.Module, **settings: Any):
        super().__init__(model, MoR1E, **settings)

    def say(self, x: Tensor) -> dict[str, Tensor]:
        return {"embedding": self.embed(x)}

    def learn(self, stream: Stream, t: int, fit: Callable[..., Any]) -> None:
        def fit_with_centres(model: nn.Module, weights: Any, task: Task) -> None:
            layers = [cast(MoR1E, layer) for _, layer in adapters(model)]
            self.clusters = layers[0].rank
            centres = F.normalize(self.centres(task), dim=-1)
            for layer in layers:
                layer.centres = centres.clone()
            fit(model, weights, task)

        super().learn(stream, t, fit_with_centres)


class Clustered(Embedded):
    """MoCLE's: says which cluster an input is in, of all that the tasks so far have brought."""

    def __init__(self, model: nn.Module, clusters: int, **settings: Any):
        super().__init__(model, MoCLE, clusters=clusters, **settings)
        self.clusters = clusters
        first = next(p for p in self.frozen.parameters())  # (out, in), on the model's device
        self.known = self.embed(first.new_zeros(0, first.shape[1]))  # (0, F)

    def say(self, x: Tensor) -> dict[str, Tensor]:
        if not len(self.known):  # before any task
            return {"cluster": torch.zeros(len(x), dtype=torch.int64, device=x.device)}
        return {"cluster": torch.cdist(self.embed(x), self.known.to(x)).argmin(-1)}

    def learn(self, stream: Stream, t: int, fit: Callable[..., Any]) -> None:
        self.known = torch.cat([self.known, self.centres(stream.tasks[t]).to(self.known)])
        super().learn(stream, t, fit)

    def count(self) -> dict[str, int]:
        """With the centres, all of which an input is held against."""
        counts = super().count()
        return counts | {k: counts[k] + self.known.numel() for k in ("stored", "active")}

    def state(self) -> dict[str, Tensor]:
        return {"known": self.known, **super().state()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.known = tensors["known"].to(self.known.device)
        super().load_state({name: t for name, t in tensors.items() if name != "known"})


class Expanding(Adapted):
    """SEMA's: layer by layer, from the input on, a layer that is surprised by a new task gets one
    expert more, which is trained before the next layer is looked at."""

    def __init__(self, model: nn.Module, **settings: Any):
        super().__init__(model, SEMA, **settings)

    def learn(self, stream: Stream, t: int, fit: Callable[..., Any]) -> None:
        layers = [cast(SEMA, layer) for _, layer in adapters(self.model)]
        task = stream.tasks[t]
        if t == 0:  # no expert knows anything yet: all learn at once
            self._train(layers, task, fit)
            return
        for layer in layers:
            if layer.surprised(self._seen(layer, task.x_train)):
                layer.grow()
                self._train([layer], task, fit)

    def _train(self, layers: list[SEMA], task: Task, fit: Callable[..., Any]) -> None:
        """The live experts of these layers, then their descriptors."""
        fit(self.telling, [w for n in layers for w in (n.A, n.B, n.router)], task)
        fit(self.telling, [w for n in layers for w in (n.P, n.Q)], task)
        for layer in layers:
            layer.settle(self._seen(layer, task.x_train))

    @torch.no_grad()
    def _seen(self, layer: SEMA, x: Tensor) -> Tensor:
        """The layer's inputs when the model is called on x."""
        seen: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
        try:
            self.model(x)
        finally:
            hook.remove()
        return torch.cat(seen)


class Consolidating(Adapted):
    """EWC's: one LoRA, and after each task its Fisher information, from some of the inputs."""

    samples = 256

    def __init__(self, model: nn.Module, **settings: Any):
        super().__init__(model, EWC, grows=False, **settings)

    def learn(self, stream: Stream, t: int, fit: Callable[..., Any]) -> None:
        super().learn(stream, t, fit)
        x = stream.tasks[t].x_train
        fisher = fisher_information(
            self.model, x[torch.randperm(len(x))[: self.samples].to(x.device)]
        )
        for name, layer in adapters(self.model):
            cast(EWC, layer).consolidate(fisher[name])


def fisher_information(model: nn.Module, x: Tensor) -> dict[str, dict[str, Tensor]]:
    """The diagonal of the Fisher information of the adapters' weights, by adapter and weight:

        F_i = mean over inputs x of (d ln p(y | x) / d theta_i)²,  y drawn from the model's own p

    p is the softmax of the model's logits (N, C) for x (N, D); for a model whose answers are
    vectors (one without class embeddings) a normal distribution around them, of deviation 1. One
    backward pass per input: the square of a batch's gradient is a noisier guess at the same.
    """
    weights = parameters(model)
    sums = [torch.zeros_like(w) for w in weights]
    for one in x.split(1):
        answer = model(one)
        if hasattr(model, "classes"):
            with torch.no_grad():
                y = torch.multinomial(answer.softmax(-1), 1)
            log_p = answer.log_softmax(-1).gather(-1, y).sum()
        else:
            y = answer.detach() + torch.randn_like(answer)
            log_p = -(y - answer).square().sum() / 2
        for total, grad in zip(sums, torch.autograd.grad(log_p, weights), strict=True):
            total += grad.square() / len(x)
    by_weight = {id(w): total for w, total in zip(weights, sums, strict=True)}
    return {
        name: {
            key: by_weight[id(w)]
            for key, w in layer.named_parameters(recurse=False)
            if w.requires_grad
        }
        for name, layer in adapters(model)
    }
