"""Experience replay: one LoRA, and a few examples of each task that is over.

On Tiny Episodic Memories in Continual Learning. Chaudhry et al., arXiv 1902.10486, algorithm 1.

A task's step is on a batch of it, and beside it as many examples of the memory, drawn anew:

    loss = mean of the loss over both       (the memory gives at most all that it holds)

At a task's end the memory takes in `keep` of its examples, each as likely, found in one pass
(`reservoir`; algorithm R of Vitter 1985, ACM Trans. Math. Softw. 11).

Departures: the paper's memory is of one size, which all tasks share; here it has a part for each
task, so that it need not be known how many will come. The paper sees an example once.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt import parameters
from ..adapter import Adapter, require
from ..lora import LoRA
from . import data
from .data import Data, Inputs
from .learn import AdapterLearner, Fit
from .stream import EVALUATED, Stream, Task

Example = tuple[Inputs, Inputs]  # x (1, ...) and y (1, ...)


def reservoir(train: Data, keep: int) -> list[Example]:
    """`keep` examples, each as likely, or all if there are no more: the n-th takes the place of one
    of those kept with probability keep / n. Draws from torch's random state."""
    kept: list[Example] = []
    n = 0
    for x, y in data.batches(train, EVALUATED):
        for i in range(data.count(x)):
            n += 1
            place = n - 1 if n <= keep else int(torch.randint(n, ()))
            if place < keep:
                one = slice(i, i + 1)
                kept[place : place + 1] = [(data.take(x, one), data.take(y, one))]
    return kept


class Beside(data.Mixed):
    """A task's batches, and in each also as many examples of a memory, none of them twice. (Those
    of another shape, which cannot stand in one tensor with a batch, are left out of it.)"""

    def __init__(self, train: Data, memory: Sequence[Example]):
        self.train, self.memory = train, memory

    def batches(
        self, size: int, order: torch.Generator | None, device: torch.device | str | None
    ) -> Iterator[Example]:
        for new in data.batches(self.train, size, order, device):
            drawn = torch.randperm(len(self.memory), generator=order)[: data.count(new[0])]
            whole = [new]
            for i in drawn.tolist():
                old = [data.to(part, data.device_of(new[0])) for part in self.memory[i]]
                if [data.layout(part) for part in old] == [data.layout(part) for part in new]:
                    whole.append((old[0], old[1]))
            x, y = zip(*whole, strict=True)
            yield data.stacked(x), data.stacked(y)


class Replay(AdapterLearner):
    """One LoRA that every task trains on, beside examples of those before. `stored` counts the
    memory's numbers too.

    Args:
        keep: how many examples of a task are kept.

    Raises ValueError if keep < 1.
    """

    def __init__(
        self, model: nn.Module, scheme: type[Adapter] = LoRA, keep: int = 20, **settings: Any
    ):
        require(keep >= 1, "keep", keep, "1 or more")
        super().__init__(model, scheme, grows=False, **settings)
        self.keep = keep
        self.memory: list[Example] = []

    def learn(self, stream: Stream, t: int, fit: Fit) -> None:
        task = stream.tasks[t]
        kept = reservoir(task.train, self.keep)  # first: all processes draw the same
        train = Beside(task.train, self.memory) if self.memory else task.train
        fit(self.with_context, parameters(self.model), Task(task.name, train, task.test))
        self.memory = self.memory + kept

    def count(self) -> dict[str, int]:
        tensors = [t for example in self.memory for part in example for t in data.tensors(part)]
        counts = super().count()
        return counts | {"stored": counts["stored"] + sum(t.numel() for t in tensors)}

    def state(self) -> dict[str, Tensor]:
        """The memory's tensors beside the adapters': "memory.3.x", or "memory.3.x.NAME"."""
        memory = {
            ".".join(["memory", str(i), part, *name]): tensor.clone()
            for i, example in enumerate(self.memory)
            for part, held in zip("xy", example, strict=True)
            for name, tensor in _named(held)
        }
        return super().state() | memory

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        found: dict[int, dict[str, Inputs]] = {}
        for key, tensor in tensors.items():
            if key.startswith("memory."):
                _, i, part, *name = key.split(".", 3)
                example = found.setdefault(int(i), {})
                if name:
                    example.setdefault(part, {})[name[0]] = tensor
                else:
                    example[part] = tensor
        self.memory = [(found[i]["x"], found[i]["y"]) for i in range(len(found))]
        super().load_state({k: t for k, t in tensors.items() if not k.startswith("memory.")})


def _named(x: Inputs) -> list[tuple[list[str], Tensor]]:
    """Its tensors, each with its name in a dictionary, if it is one."""
    return [([name], t) for name, t in x.items()] if isinstance(x, dict) else [([], x)]
