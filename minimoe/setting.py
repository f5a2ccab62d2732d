"""A stream and a model, by name or as somebody brings them, for every seed."""

import functools
import hashlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .continual import backbones, data, streams
from .continual.learn import make_backbone, pretrain
from .continual.stream import IGNORED, Stream
from .continual.stream import loss as usual_loss
from .tools.fingerprint import of_own


@dataclass(frozen=True)
class Setting:
    """What the schemes of a comparison share.

    stream: a name, or a function in a file, file.py:make; or a Stream, which all seeds share; or a
        function, make(tasks, seed).
    backbone: what makes the model, if not the stream: a name, or a function in a file; or a
        function, make(stream).
    targets: the pattern for the model's adapted layers, if not its own.
    tasks: how many.

    What it makes for a seed is made once in a process. Another Setting, if only of the same names,
    makes all anew: files and functions may have changed.
    """

    stream: str | Stream | Callable[[int, int], Stream] = field(compare=False)
    backbone: str | Callable[[Stream], nn.Module] | None = field(compare=False)
    targets: str | None = field(compare=False)
    tasks: int = field(compare=False)
    device: str = field(compare=False)
    key: str = field(default_factory=lambda: uuid.uuid4().hex, repr=False)

    def maker(self) -> Callable[[Stream], nn.Module] | None:
        return backbones.find(self.backbone) if isinstance(self.backbone, str) else self.backbone

    def new_model(self, seed: int) -> Any:
        """The model, not trained yet. Raises ValueError if it, the stream's data, its loss and its
        score do not fit together."""
        stream = stream_of(self, seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                model = make_backbone(stream, self.maker())
            except ValueError:
                raise
            except (Exception, SystemExit) as error:  # whatever somebody's function does
                name = name_of(self.backbone) or f"{stream.name}'s model"
                raise ValueError(f"{name} fails: {type(error).__name__}: {error}") from error
            for task in (*stream.tasks, *filter(None, [stream.base])):
                for part in (task.train, task.test):
                    _try(stream, task.name, model, part)
        if self.targets is not None:
            model.targets = self.targets
        return model

    def facts(self, seed: int) -> dict[str, Any]:
        """What a checkpoint holds of it: names, and fingerprints of what is in somebody's files or
        in a Stream's data in memory. (Of functions and models the name alone.)"""
        stream = stream_of(self, seed)
        told = {
            "stream": self.stream if isinstance(self.stream, str) else stream.name,
            "backbone": name_of(self.backbone),
            "targets": self.targets,
        }
        for name in ("stream", "backbone"):
            path, colon, _ = str(told[name]).rpartition(":")
            if colon and isinstance(getattr(self, name), str):
                told[f"{name}_source"] = of_own(Path(path).resolve())
        if not isinstance(self.stream, str):
            told["data"] = _digest(stream)
        return told


@functools.lru_cache(maxsize=8)
def stream_of(setting: Setting, seed: int) -> Stream:
    """The stream of a seed. Raises ValueError as streams.make does."""
    stream, tasks = setting.stream, setting.tasks
    if isinstance(stream, str):
        return streams.make(stream, tasks, seed)
    made = stream if isinstance(stream, Stream) else stream(tasks, seed)
    if len(made.tasks) != tasks:
        raise ValueError(f"tasks is {tasks}, allowed for {made.name}: {len(made.tasks)}")
    return made


@functools.lru_cache(maxsize=8)
def pretrained(setting: Setting, seed: int) -> Any:
    """The model of a seed, pretrained; not to be changed."""
    made = stream_of(setting, seed)
    return pretrain(made, seed, setting.device, setting.maker(), setting.targets)


def name_of(given: Any) -> str | None:
    """What something is called in a file that is written."""
    if given is None or isinstance(given, str):
        return given
    return str(getattr(given, "__name__", type(given).__name__))


def _try(stream: Stream, name: str, model: nn.Module, part: data.Data) -> None:
    """Raise ValueError unless the model can answer two examples of a task, and they be scored."""
    x, y = next(data.batches(part, 2))
    try:
        with torch.no_grad():
            answers = data.call(model.eval(), x)
            loss, _ = stream.loss(answers, y), stream.score(answers, y)
    except Exception as error:  # whatever somebody's model does
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{stream.name}, {name}: the model fails: {reason}") from error
    if stream.loss is usual_loss and not y.is_floating_point() and (whole := data.pair(part)):
        for label in whole[1][whole[1] != IGNORED].aminmax():
            if not 0 <= label < answers.shape[-1]:
                most = answers.shape[-1] - 1
                raise ValueError(f"{stream.name}, {name}: label is {label}, allowed: 0 to {most}")
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ValueError(f"{stream.name}: the loss is {loss!r}, allowed: a tensor of one number")


def _digest(stream: Stream) -> str:
    """12 hexadecimal digits that change with the data that a stream has in memory."""
    total = hashlib.sha256()
    for task in (*stream.tasks, *filter(None, [stream.base])):
        for part in (task.train, task.test):
            for x in data.pair(part) or ():
                for tensor in data.tensors(x):
                    total.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:12]
