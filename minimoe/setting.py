"""A stream and a model, by name or as somebody brings them, for every seed."""

import functools
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .continual import backbones, data, streams
from .continual.learn import make_backbone, pretrain
from .continual.stream import IGNORED, Stream, evaluate
from .continual.stream import loss as usual_loss
from .roster import under
from .tools.fingerprint import of_own
from .tools.seeds import seeded


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

    @property
    def tuned_as(self) -> str | None:
        """The place whose tuned settings are for this (roster.under): a stream of this package,
        under a model of this package."""
        if not isinstance(self.stream, str) or self.targets is not None:
            return None
        backbone = self.backbone if isinstance(self.backbone, str) else None
        return under(self.stream, backbone) if backbone == self.backbone else None

    def maker(self) -> Callable[[Stream], nn.Module] | None:
        return backbones.find(self.backbone) if isinstance(self.backbone, str) else self.backbone

    def new_model(self, seed: int) -> Any:
        """The model, not trained yet. Raises ValueError if it, the stream's data, its loss and its
        score do not fit together."""
        stream = stream_of(self, seed)
        with seeded(seed):
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
        try:
            re.compile(getattr(model, "targets", ""))
        except (re.error, TypeError) as error:
            raise ValueError(f"targets is {model.targets!r}, no pattern: {error}") from None
        return model

    def facts(self, seed: int) -> dict[str, Any]:
        """What a checkpoint holds of it, beside digests of the data: names, and fingerprints of
        somebody's files. (Of a function that is in no file the name alone.)"""
        told = {"stream": self.stream_name(seed), "backbone": name_of(self.backbone)}
        for name in ("stream", "backbone"):
            path, colon, _ = str(told[name]).rpartition(":")
            if colon and isinstance(getattr(self, name), str):
                told[f"{name}_source"] = of_own(Path(path).resolve())
        return told | {"targets": self.targets}

    def stream_name(self, seed: int) -> str:
        """What the stream is called in a file that is written: <name> if it is no name or file."""
        if isinstance(self.stream, str):
            return self.stream
        return f"<{stream_of(self, seed).name}>"


@functools.lru_cache(maxsize=8)
def stream_of(setting: Setting, seed: int) -> Stream:
    """The stream of a seed. Raises ValueError as streams.make does."""
    stream, tasks = setting.stream, setting.tasks
    if isinstance(stream, str):
        return streams.make(stream, tasks, seed)
    if isinstance(stream, Stream):
        made = stream
    else:
        made = streams.called(stream, str(name_of(stream)), tasks, seed)
    if len(made.tasks) != tasks:
        raise ValueError(f"tasks is {tasks}, allowed for {made.name}: {len(made.tasks)}")
    return made


@functools.lru_cache(maxsize=8)
def pretrained(setting: Setting, seed: int) -> Any:
    """The model of a seed, pretrained; not to be changed."""
    made = stream_of(setting, seed)
    return pretrain(made, seed, setting.device, setting.maker(), setting.targets)


def name_of(given: Any) -> str | None:
    """What something is called in a file that is written: a function <by its name>."""
    if given is None or isinstance(given, str):
        return given
    return f"<{getattr(given, '__name__', type(given).__name__)}>"


def _try(stream: Stream, name: str, model: nn.Module, part: data.Data) -> None:
    """Raise ValueError unless the model can answer two examples of a task, and they be scored."""
    x, y = next(data.batches(part, 2))
    try:
        answers = data.call(model.eval(), x)
        loss = stream.loss(answers, y)
        evaluate(lambda _: answers.detach(), [(x, y)], stream.score)
    except Exception as error:  # whatever somebody's model does
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{stream.name}, {name}: the model fails: {reason}") from error
    if stream.loss is usual_loss and not y.is_floating_point() and (whole := data.pair(part)):
        labels = whole[1][whole[1] != IGNORED].long()
        for label in labels.aminmax() if labels.numel() else ():
            if not 0 <= label < answers.shape[-1]:
                most = answers.shape[-1] - 1
                raise ValueError(f"{stream.name}, {name}: label is {label}, allowed: 0 to {most}")
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ValueError(f"{stream.name}: the loss is {loss!r}, allowed: a tensor of one number")
    if not loss.requires_grad and any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"{stream.name}: the loss has no gradient, allowed: one of the answers")
