"""All that can be carried through a stream: the one place that lists schemes.

`minimoe list`, `compare` and `check`, the studies, the tests and README's tables read it. To add a
scheme is to add its entry.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from . import schemes
from .adapter import Adapter
from .continual.baselines import ClassMean, HeadOnly, Joint, Oracle, ToldLoRA, Trigram
from .continual.closed import LDA, OwnRidge, OwnSubspace, Ridge
from .continual.learn import AdapterLearner, Learner
from .continual.learners import TaskLabelLearner
from .continual.replay import Replay
from .continual.stream import Stream
from .lora import LoRA
from .lora_moe import LoRAMoE
from .mora import MoRA
from .tools.fingerprint import of_own
from .tools.load import load_class

Kind = Literal["scheme", "atlas", "baseline", "privileged"]

# The toy streams' own settings. The schemes' defaults are their papers', for transformers of
# width 768 with 16 ranks a task; a layer here is at most 128 wide and learns 5 tasks of 8 ranks.
# - rank 8, epochs 20: enough for one LoRA a task to learn its task (see the oracle's row).
# - tau .1: among 40 ranks a score is about 1/sqrt(40) = .16 large; the softmax then weighs several
#   ranks, where at the paper's .01 it all but picks one, and learns less.
# - top_k 8: one task's worth of ranks. For lora_moe, whose experts are whole LoRAs, 3: the best
#   of 1, 2, 3 and all on permuted-digits, with 2 and all within the spread.
# - delta .2: the paper's.
# - ewc's importance stays at its default, 10: the best of 1, 10, ... 10,000 by test accuracy on
#   permuted-digits, seeds 0 and 1.
EPOCHS = 20
TOY = {"rank": 8, "scale": 1.0}


@dataclass(frozen=True)
class Entry:
    """What the roster says of one name.

    kind: a "scheme" of this package's title, one of the "atlas", a "baseline" that a scheme should
        beat, or "privileged": it sees all tasks at once, or is told at test which one it is.
    summary: what `minimoe list` says.
    scheme: its class, if it has adapters.
    learner: learner(model, scheme=scheme, **settings) is what lives through a stream; without a
        scheme, learner(model, stream, **settings).
    settings: for the toy streams, as constructor arguments.
    needs: what a model must have for it, of what backbones.py names.
    path, source: the file that it comes from, and its fingerprint, if it is none of this package's.
    """

    kind: Kind
    summary: str
    scheme: type[Adapter] | None = None
    learner: Callable[..., Learner] = AdapterLearner
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    path: Path | None = None
    source: str | None = None

    def make(self, model: Any, stream: Stream, **changes: Any) -> Learner:
        """A learner on that model, for that stream, with those of the changes that it has as
        settings."""
        settings = self.changed(changes)
        if self.scheme is None:
            return self.learner(model, stream, **settings)
        return self.learner(model, scheme=self.scheme, **settings)

    def changed(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Its settings, with those of the changes that are of its settings."""
        return {name: changes.get(name, value) for name, value in self.settings.items()}


_grows_not = partial(AdapterLearner, grows=False)

ROSTER: dict[str, Entry] = {
    "lora": Entry("scheme", "one dense LoRA that every task trains on", LoRA, _grows_not, TOY),
    "lora_moe": Entry(
        "scheme",
        "a learned router over whole LoRAs, one more per task",
        LoRAMoE,
        settings={**TOY, "top_k": 3},
    ),
    "mora": Entry(
        "scheme",
        "rank-1 experts that score themselves, r more per task",
        MoRA,
        settings={**TOY, "top_k": 8, "tau": 0.1, "delta": 0.2},
    ),
    "smora": Entry(
        "atlas",
        "single ranks under a sigmoid router, with biases that balance it",
        schemes.smora.SMoRA,
        settings={**TOY, "top_k": 8},
    ),
    "flylora": Entry(
        "atlas",
        "random sparse keys that are never trained; the largest answers speak",
        schemes.flylora.FlyLoRA,
        settings={**TOY, "top_k": 8},
    ),
    "mor1e": Entry(
        "atlas",
        "single ranks, weighted by a router and by what the sample is like",
        schemes.mor1e.MoR1E,
        schemes.mor1e.MoR1ELearner,
        TOY,
        needs=("features",),
    ),
    "lora_moe_plugin": Entry(
        "atlas",
        "whole LoRAs under a dense router, balanced by what they are for",
        schemes.lora_moe_plugin.LoRAMoEPlugin,
        TaskLabelLearner,
        TOY,
    ),
    "mosld": Entry(
        "atlas",
        "whole LoRAs that share their keys, under a router",
        schemes.mosld.MoSLD,
        settings={**TOY, "top_k": 3},
    ),
    "mocle": Entry(
        "atlas",
        "whole LoRAs, chosen by the sample's cluster, and a universal one",
        schemes.mocle.MoCLE,
        schemes.mocle.MoCLELearner,
        {**TOY, "clusters": 8},
        needs=("features",),
    ),
    "meteora": Entry(
        "atlas",
        "whole LoRAs under a router that learns from labels which is meant",
        schemes.meteora.MeteoRA,
        TaskLabelLearner,
        {**TOY, "top_k": 3},
    ),
    "sema": Entry(
        "atlas",
        "whole LoRAs under a soft router, one more where a layer is surprised",
        schemes.sema.SEMA,
        schemes.sema.SEMALearner,
        TOY,
    ),
    "olora": Entry(
        "atlas",
        "ranks added per task, all always on, with keys orthogonal to the older",
        schemes.olora.OLoRA,
        settings=TOY,
    ),
    "ewc": Entry(
        "atlas",
        "one dense LoRA, held back where older tasks would feel it",
        schemes.ewc.EWC,
        schemes.ewc.EWCLearner,
        TOY,
    ),
    "alone": Entry(
        "atlas",
        "whole LoRAs trained alone; the one whose mean input is nearest speaks",
        schemes.alone.Alone,
        schemes.alone.AloneLearner,
        TOY,
    ),
    "ridge_features": Entry(
        "atlas",
        "ridge, on the frozen features",
        learner=partial(Ridge, M=200, frozen=True),
        needs=("features",),
    ),
    "own_ridge_features": Entry(
        "atlas",
        "own_ridge, on the frozen features",
        learner=partial(OwnRidge, frozen=True),
        needs=("features",),
    ),
    "lda_features": Entry(
        "atlas",
        "lda, on the frozen features",
        learner=partial(LDA, frozen=True),
        needs=("features", "classes"),
    ),
    "zero_shot": Entry("baseline", "no adaptation, the backbone as it is", learner=Learner),
    "class_mean": Entry(
        "baseline",
        "nearest class mean of frozen features",
        learner=ClassMean,
        needs=("features", "classes"),
    ),
    "ridge": Entry(
        "baseline",
        "one ridge regression for all tasks, on random features of the inputs",
        learner=Ridge,
        needs=("inputs",),
    ),
    "own_ridge": Entry(
        "baseline",
        "each task's own ridge regression; the one whose mean input is nearest answers",
        learner=OwnRidge,
        needs=("inputs",),
    ),
    "own_subspace": Entry(
        "baseline",
        "each task's own linear map; the one with the most energy in its subspace answers",
        learner=OwnSubspace,
        needs=("inputs",),
    ),
    "lda": Entry(
        "baseline",
        "nearest mean of the inputs, by task and class, under one covariance",
        learner=LDA,
        needs=("inputs", "classes"),
    ),
    "trigram": Entry(
        "baseline",
        "counts of three tokens in a row, no network",
        learner=Trigram,
        needs=("vocabulary",),
    ),
    "head_only": Entry(
        "baseline",
        "the class embeddings alone learn, task after task",
        learner=HeadOnly,
        needs=("classes",),
    ),
    "lora_grown": Entry(
        "baseline", "ranks added per task, all of them always on", LoRA, settings=TOY
    ),
    "mora_detached": Entry(
        "baseline",
        "mora, whose gate has no gradient: a key learns as a LoRA's does",
        MoRA,
        partial(AdapterLearner, detach_gate=True),
        {**TOY, "top_k": 8, "tau": 0.1, "delta": 0.2},
    ),
    "replay_20": Entry(
        "baseline",
        "lora, and 20 examples of each task that is over beside each batch",
        LoRA,
        partial(Replay, keep=20),
        TOY,
    ),
    "replay_80": Entry(
        "baseline",
        "lora, and 80 examples of each task that is over beside each batch",
        LoRA,
        partial(Replay, keep=80),
        TOY,
    ),
    "joint": Entry(
        "privileged",
        "one LoRA with all tasks' ranks, trained on all tasks at once",
        learner=Joint,
        settings=TOY,
    ),
    "oracle": Entry(
        "privileged", "one LoRA per task, told at test which task it is", ToldLoRA, Oracle, TOY
    ),
}

# the classes that ship, by the names that the command gives them
SCHEMES: dict[str, type[Adapter]] = {
    name: entry.scheme
    for name, entry in ROSTER.items()
    if entry.scheme is not None and entry.kind in ("scheme", "atlas")
}


def names(model: Any = None, *kinds: Kind) -> list[str]:
    """The names of these kinds (by default all); given a model, those that can live in it."""
    return [
        name
        for name, entry in ROSTER.items()
        if (entry.kind in kinds or not kinds)
        and (model is None or all(_has(model, need) for need in entry.needs))
    ]


def _has(model: Any, need: str) -> bool:
    """Whether a model has what backbones.py names so, and not something else of that name."""
    found = getattr(model, need, None)
    if need in ("vocabulary", "inputs"):
        return isinstance(found, int)
    if need == "features":
        return callable(found) and not isinstance(found, nn.Module)
    return isinstance(found, nn.Parameter) and found.ndim == 2


def lookup(name: str) -> tuple[str, Entry]:
    """The short name and the entry of a name in the roster, or of a class in a file, file.py:Class.

    A class of one's own lives as MoRA does, with those of MoRA's toy settings that its constructor
    has, unless it names its own `learner` and `toy_settings`. Raises FileNotFoundError, and
    ValueError on an unknown name or a file without such a class.
    """
    if name in ROSTER:
        return name, ROSTER[name]
    path, colon, in_file = name.rpartition(":")
    if not colon:
        raise ValueError(f"scheme is {name!r}, allowed: {', '.join(ROSTER)}, file.py:Class")
    scheme = load_class(path, in_file, Adapter)
    try:
        arguments = inspect.signature(scheme).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} has no signature: {error}") from error
    takes_all = any(a.kind is a.VAR_KEYWORD for a in arguments.values())
    mora = ROSTER["mora"].settings
    usual = {name: value for name, value in mora.items() if takes_all or name in arguments}
    return in_file, Entry(
        "scheme",
        f"{in_file} of {path}",
        scheme,
        getattr(scheme, "learner", AdapterLearner),
        getattr(scheme, "toy_settings", usual),
        path=Path(path).resolve(),
        source=of_own(Path(path).resolve()),
    )
