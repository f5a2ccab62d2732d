"""All that can be carried through a stream: the one place that lists schemes.

`minimoe list`, `compare` and `check`, the studies, the tests and README's tables read it. To add a
scheme is to add its entry.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from . import schemes
from .adapter import Adapter
from .continual.baselines import ClassMean, HeadOnly, Joint, Oracle, ToldLoRA, Trigram
from .continual.closed import LDA, OwnRidge, OwnSubspace, Ridge
from .continual.learn import LEARNING_RATE, AdapterLearner, Learner
from .continual.learners import SampleLearner, TaskLabelLearner
from .continual.replay import Replay
from .continual.stream import Stream
from .lora import LoRA
from .lora_moe import LoRAMoE
from .mora import MoRA
from .tools.files import read_json
from .tools.fingerprint import of_own
from .tools.load import load_class

Kind = Literal["scheme", "atlas", "baseline", "privileged"]

# The toy streams' own settings. The schemes' defaults are their papers', for transformers of
# width 768 with 16 ranks a task; a layer here is at most 128 wide and learns 5 tasks of 8 ranks.
# - rank 8, epochs 20: enough for one LoRA a task to learn its task (see the oracle's row).
# - tau .1: among 40 ranks a score is about 1/sqrt(40) = .16 large; the softmax then weighs several
#   ranks, where at the paper's .01 it all but picks one, and learns less.
# - top_k: of mora 8, one task's worth of ranks; of schemes of whole LoRAs 3, of mocle 8 clusters.
#   smora and flylora are what they are by the share that speaks, which is their papers': 8 of 64
#   ranks, here 5 of the 40 after five tasks (on subspaces, of 64 after eight, they are fewer than
#   its paper's); and 8 of a task's 32, here 2 of its 8.
# They are the first of a learner's trials (studies/tuning.py). On a stream of TUNED it has those
# that did best there.
EPOCHS = 20
TOY = {"rank": 8, "scale": 1.0}
# What a learner may choose from: the same number of trials for all.
RATES: Mapping[str, Sequence[float]] = {"lr": (3e-3, 1e-3, 1e-2, 3e-2), "scale": (1.0, 4.0)}
PENALTIES = (1.0, 1e-3, 1e-2, 0.1, 10.0, 100.0, 1e3, 1e4)
SHRINKS = (1e-4, 1e-6, 1e-5, 1e-3, 1e-2, 0.1, 1.0, 10.0)
GATES: Mapping[str, Sequence[float]] = {
    **RATES,
    "tau": (0.1, 0.3),
    "top_k": (8, 16),
    "delta": (0.2, -1.0),  # no score is below -1
}


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
    lr: learning rate.
    tunes: values that its settings and its lr may take, by name; its own first.
    needs: what a model must have for it, of what backbones.py names.
    path, source: the file that it comes from, and its fingerprint, if it is none of this package's.
    """

    kind: Kind
    summary: str
    scheme: type[Adapter] | None = None
    learner: Callable[..., Learner] = AdapterLearner
    settings: Mapping[str, Any] = field(default_factory=dict)
    tunes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    lr: float = LEARNING_RATE
    needs: tuple[str, ...] = ()
    path: Path | None = None
    source: str | None = None

    @property
    def privileged(self) -> bool:
        """Whether it knows what others do not: by its kind, or one of the atlas that is told at
        test which task it is."""
        return self.kind == "privileged" or self.learner is Oracle

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

    def with_trial(self, trial: Mapping[str, Any]) -> "Entry":
        """Itself, with these for its own settings and lr."""
        return replace(self, settings=self.changed(trial), lr=trial.get("lr", self.lr))


_grows_not = partial(AdapterLearner, grows=False)

ROSTER: dict[str, Entry] = {
    "lora": Entry(
        "scheme", "one dense LoRA that every task trains on", LoRA, _grows_not, TOY, RATES
    ),
    "lora_moe": Entry(
        "scheme",
        "a learned router over whole LoRAs, one more per task",
        LoRAMoE,
        settings={**TOY, "top_k": 3},
        tunes={**RATES, "top_k": (3, 1, 2)},
    ),
    "mora": Entry(
        "scheme",
        "rank-1 experts that score themselves, r more per task",
        MoRA,
        settings={**TOY, "top_k": 8, "tau": 0.1, "delta": 0.2},
        tunes=GATES,
    ),
    "smora": Entry(
        "atlas",
        "single ranks under a sigmoid router, with biases that balance it",
        schemes.smora.SMoRA,
        settings={**TOY, "top_k": 5},
        tunes=RATES,
    ),
    "flylora": Entry(
        "atlas",
        "random sparse keys that are never trained; the largest products are used",
        schemes.flylora.FlyLoRA,
        settings={**TOY, "top_k": 2},
        tunes=RATES,
    ),
    "mor1e": Entry(
        "atlas",
        "single ranks, weighted by a router and by what the sample is like",
        schemes.mor1e.MoR1E,
        schemes.mor1e.MoR1ELearner,
        TOY,
        RATES,
        needs=("features",),
    ),
    "lora_moe_plugin": Entry(
        "atlas",
        "whole LoRAs under a dense router, balanced by what they are for",
        schemes.lora_moe_plugin.LoRAMoEPlugin,
        TaskLabelLearner,
        {**TOY, "balance": 0.1},
        {**RATES, "balance": (0.1, 0.01, 1.0)},
    ),
    "mosld": Entry(
        "atlas",
        "whole LoRAs that share their keys, under a router",
        schemes.mosld.MoSLD,
        settings={**TOY, "top_k": 3},
        tunes={**RATES, "top_k": (3, 1, 2)},
    ),
    "mocle": Entry(
        "atlas",
        "whole LoRAs, chosen by the sample's cluster, and a universal one",
        schemes.mocle.MoCLE,
        schemes.mocle.MoCLELearner,
        {**TOY, "clusters": 8},
        {**RATES, "clusters": (8, 16)},
        needs=("features",),
    ),
    "meteora": Entry(
        "atlas",
        "whole LoRAs under a router that learns from labels which is meant",
        schemes.meteora.MeteoRA,
        TaskLabelLearner,
        {**TOY, "top_k": 3},
        {**RATES, "top_k": (3, 1, 2)},
    ),
    "sema": Entry(
        "atlas",
        "whole LoRAs under a soft router, one more where a layer is surprised",
        schemes.sema.SEMA,
        schemes.sema.SEMALearner,
        {**TOY, "threshold": 1.0},
        {**RATES, "threshold": (1.0, 0.5, 2.0)},
    ),
    "olora": Entry(
        "atlas",
        "ranks added per task, all always on, with keys orthogonal to the older",
        schemes.olora.OLoRA,
        settings={**TOY, "orthogonality": 0.5},
        tunes={**RATES, "orthogonality": (0.5, 0.05, 5.0)},
    ),
    "ewc": Entry(
        "atlas",
        "one dense LoRA, held back where older tasks would feel it",
        schemes.ewc.EWC,
        schemes.ewc.EWCLearner,
        {**TOY, "importance": 10.0},
        {**RATES, "importance": (10.0, 1.0, 100.0, 1000.0)},
    ),
    "alone": Entry(
        "atlas",
        "whole LoRAs trained alone; the one whose mean input is nearest is used",
        schemes.alone.Alone,
        schemes.alone.AloneLearner,
        TOY,
        RATES,
    ),
    "adamole": Entry(
        "atlas",
        "whole LoRAs that are likelier than a threshold, which the token sets",
        schemes.adamole.AdaMoLE,
        settings=TOY,
        tunes=RATES,
    ),
    "ld_mole": Entry(
        "atlas",
        "whole LoRAs under a softmax with zeros, as many as the token sets",
        schemes.ld_mole.LDMoLE,
        settings={**TOY, "sparsity": 0.0},
        tunes={**RATES, "sparsity": (0.0, 0.1)},
    ),
    "dselect_k": Entry(
        "atlas",
        "whole LoRAs, whose numbers selectors spell in bits",
        schemes.dselect_k.DSelectK,
        settings={**TOY, "selectors": 3},
        tunes={**RATES, "selectors": (3, 1, 2)},
    ),
    "evomoe": Entry(
        "atlas",
        "whole LoRAs under a noisy router that is dense at first, then sparse",
        schemes.evomoe.EvoMoE,
        settings={**TOY, "steps": 100},
        tunes={**RATES, "steps": (100, 200)},
    ),
    "rexmoe": Entry(
        "atlas",
        "whole LoRAs under a router that is shown few at first, then all",
        schemes.rexmoe.ReXMoE,
        settings={**TOY, "top_k": 3, "end": 100},
        tunes={**RATES, "top_k": (3, 1, 2)},
    ),
    "mask_moe": Entry(
        "atlas",
        "LoRAs under a router that sees those alone that the input's class may have",
        schemes.mask_moe.MaskMoE,
        schemes.mask_moe.MaskMoELearner,
        {**TOY, "top_k": 6, "experts": 4, "classes": 8},
        {**RATES, "top_k": (6, 2, 4)},
        needs=("features",),
    ),
    "adamoe": Entry(
        "atlas",
        "whole LoRAs: one router chooses, a second one adds to the weights",
        schemes.adamoe.AdaMoE,
        settings={**TOY, "top_k": 3},
        tunes={**RATES, "top_k": (3, 1, 2)},
    ),
    "mixture_of_routers": Entry(
        "atlas",
        "whole LoRAs under several routers, and one that weighs the routers",
        schemes.mixture_of_routers.MixtureOfRouters,
        settings={**TOY, "top_k": 3},
        tunes={**RATES, "top_k": (3, 1, 2)},
    ),
    "speech_moe": Entry(
        "atlas",
        "whole LoRAs under a router that reads the sample's embedding beside the token",
        schemes.speech_moe.SpeechMoE2,
        SampleLearner,
        {**TOY, "top_k": 3},
        {**RATES, "top_k": (3, 1, 2)},
        needs=("features",),
    ),
    "input_domain_aware": Entry(
        "atlas",
        "whole LoRAs, each with a density of its task's inputs, which says who is meant",
        schemes.input_domain_aware.InputDomainAware,
        settings={**TOY, "top_k": 3, "code": 8},
        tunes={**RATES, "top_k": (3, 1, 2)},
    ),
    "mixture_of_loras": Entry(
        "atlas",
        "whole LoRAs trained alone, then a router, on stored examples of all tasks",
        schemes.mixture_of_loras.MixtureOfLoRAs,
        schemes.mixture_of_loras.MixtureOfLoRAsLearner,
        {**TOY, "keep": 20},
        {**RATES, "keep": (20, 80)},
    ),
    "wemoe": Entry(
        "atlas",
        "whole LoRAs trained alone, then added up by networks that learn to be sure",
        schemes.wemoe.WEMoE,
        schemes.wemoe.WEMoELearner,
        {**TOY, "keep": 20},
        {**RATES, "keep": (20, 80)},
        needs=("classes",),
    ),
    "mixda": Entry(
        "atlas",
        "whole LoRAs trained to add 0 on the base domain, then a gate, the base in it",
        schemes.mixda.MixDA,
        schemes.mixda.MixDALearner,
        {**TOY, "keep": 20},
        {**RATES, "keep": (20, 80)},
    ),
    "task_arithmetic": Entry(
        "atlas",
        "whole LoRAs trained alone, then all on at once, at one weight",
        schemes.task_arithmetic.TaskArithmetic,
        settings={**TOY, "coefficient": 1.0},
        tunes={**RATES, "coefficient": (1.0, 0.2, 0.3, 0.5)},
    ),
    "token_level": Entry(
        "atlas",
        "whole LoRAs trained alone, mixed by how like their mean input a token is",
        schemes.token_level.TokenLevel,
        schemes.alone.AloneLearner,
        TOY,
        RATES,
    ),
    "arrow": Entry(
        "atlas",
        "whole LoRAs trained alone; those whose strongest direction fits are used",
        schemes.arrow.Arrow,
        settings={**TOY, "top_k": 1},
        tunes={**RATES, "top_k": (1, 2, 3)},
    ),
    "phatgoose": Entry(
        "atlas",
        "whole LoRAs trained alone, and then a gate for each, which compete at test",
        schemes.phatgoose.PHATGOOSE,
        schemes.phatgoose.PHATGOOSELearner,
        {**TOY, "top_k": 1},
        {**RATES, "top_k": (1, 2)},
    ),
    "inflora": Entry(
        "atlas",
        "ranks added per task, all always on, with keys that old inputs do not reach",
        schemes.inflora.InfLoRA,
        schemes.inflora.InfLoRALearner,
        TOY,
        RATES,
    ),
    "codyra": Entry(
        "atlas",
        "ranks added per task, each with one learned weight, driven to 0 where it can be",
        schemes.codyra.CoDyRA,
        settings={**TOY, "kappa": 0.003, "begin": 100, "end": 200},
        tunes={**RATES, "kappa": (0.003, 0.0007, 0.01)},
    ),
    "aoe": Entry(
        "atlas",
        "whole LoRAs that score themselves, by how strongly they answer",
        schemes.aoe.AoE,
        settings={**TOY, "top_k": 3},
        tunes={**RATES, "top_k": (3, 1, 2)},
    ),
    "rank1_pool": Entry(
        "atlas",
        "ranks that a batch votes for; of each task the most voted for are used later",
        schemes.rank1_pool.Rank1Pool,
        settings={**TOY, "top_k": 6, "keep": 3},
        tunes={**RATES, "keep": (3, 6)},
    ),
    "steer_moe": Entry(
        "atlas",
        "vectors added to a layer's output, weighed by what the output is",
        schemes.steer_moe.SteerMoE,
        settings=TOY,
        tunes=RATES,
    ),
    "mov": Entry(
        "atlas",
        "vectors that scale a layer's output, weighed by what the output is",
        schemes.mov.MoV,
        settings=TOY,
        tunes=RATES,
    ),
    "mofme": Entry(
        "atlas",
        "one LoRA for all tasks, whose experts modulate what its keys see",
        schemes.mofme.MoFME,
        settings={**TOY, "top_k": 3},
        tunes={**RATES, "top_k": (3, 1, 2)},
    ),
    "moore": Entry(
        "atlas",
        "whole LoRAs made orthogonal in what they say; told at test which task it is",
        schemes.moore.MOORE,
        Oracle,
        TOY,
        RATES,
    ),
    "poly": Entry(
        "atlas",
        "tasks that mix a few LoRAs, keys and values apart; told at test which it is",
        schemes.poly.Poly,
        Oracle,
        TOY,
        RATES,
    ),
    "tensor_poly": Entry(
        "atlas",
        "Poly with keys of two small factors, mixed apart; told at test which task it is",
        schemes.tensor_poly.TensorPoly,
        Oracle,
        TOY,
        RATES,
    ),
    "task_level": Entry(
        "atlas",
        "whole LoRAs, mixed alike for all of a task; told at test which it is",
        schemes.task_level.TaskLevel,
        Oracle,
        TOY,
        RATES,
    ),
    "mmoe": Entry(
        "atlas",
        "whole LoRAs, some for one task alone, under its own router; told at test which it is",
        schemes.mmoe.MMoE,
        Oracle,
        {**TOY, "experts": 2, "exclusive": 0.5},
        {**RATES, "exclusive": (0.5, 0.0)},
    ),
    "adamix": Entry(
        "atlas",
        "one LoRA whose keys are drawn for each batch, among several made to agree",
        schemes.adamix.AdaMix,
        schemes.adamix.AdaMixLearner,
        {**TOY, "consistency": 1.0},
        {**RATES, "consistency": (1.0, 0.1, 10.0)},
    ),
    "cartesian": Entry(
        "atlas",
        "keys and values chosen apart, by a router each: E of both are E² experts",
        schemes.cartesian.Cartesian,
        settings={**TOY, "top_k": 3},
        tunes={**RATES, "top_k": (3, 1, 2)},
    ),
    "conditional_mixlora": Entry(
        "atlas",
        "a LoRA for each sample, of keys and of values that the keys help to choose",
        schemes.conditional_mixlora.ConditionalMixLoRA,
        settings={**TOY, "scale": 16.0, "top_k": 8},
        tunes={**RATES, "scale": (16.0, 4.0), "top_k": (8, 4)},
    ),
    "ridge_features": Entry(
        "atlas",
        "ridge, on the frozen features",
        learner=partial(Ridge, M=200, frozen=True),
        settings={"penalty": 1.0},
        tunes={"penalty": PENALTIES},
        needs=("features",),
    ),
    "own_ridge_features": Entry(
        "atlas",
        "own_ridge, on the frozen features",
        learner=partial(OwnRidge, frozen=True),
        settings={"penalty": 1.0},
        tunes={"penalty": PENALTIES},
        needs=("features",),
    ),
    "lda_features": Entry(
        "atlas",
        "lda, on the frozen features",
        learner=partial(LDA, frozen=True),
        settings={"shrink": 1e-4},
        tunes={"shrink": SHRINKS},
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
        settings={"penalty": 1.0},
        tunes={"penalty": PENALTIES},
        needs=("inputs",),
    ),
    "own_ridge": Entry(
        "baseline",
        "each task's own ridge regression; the one whose mean input is nearest answers",
        learner=OwnRidge,
        settings={"penalty": 1.0},
        tunes={"penalty": PENALTIES},
        needs=("inputs",),
    ),
    "own_subspace": Entry(
        "baseline",
        "each task's own linear map; the one with the most energy in its subspace answers",
        learner=OwnSubspace,
        settings={"penalty": 1.0},
        tunes={"penalty": PENALTIES},
        needs=("inputs",),
    ),
    "lda": Entry(
        "baseline",
        "nearest mean of the inputs, by task and class, under one covariance",
        learner=LDA,
        settings={"shrink": 1e-4},
        tunes={"shrink": SHRINKS},
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
        tunes={"lr": RATES["lr"]},
        needs=("classes",),
    ),
    "lora_grown": Entry(
        "baseline", "ranks added per task, all of them always on", LoRA, settings=TOY, tunes=RATES
    ),
    "mora_detached": Entry(
        "baseline",
        "mora, whose gate has no gradient: a key learns as a LoRA's does",
        MoRA,
        partial(AdapterLearner, detach_gate=True),
        {**TOY, "top_k": 8, "tau": 0.1, "delta": 0.2},
        GATES,
    ),
    "replay_20": Entry(
        "baseline",
        "lora, and 20 examples of each task that is over beside each batch",
        LoRA,
        partial(Replay, keep=20),
        TOY,
        RATES,
    ),
    "replay_80": Entry(
        "baseline",
        "lora, and 80 examples of each task that is over beside each batch",
        LoRA,
        partial(Replay, keep=80),
        TOY,
        RATES,
    ),
    "joint": Entry(
        "privileged",
        "one LoRA with all tasks' ranks, trained on all tasks at once",
        learner=Joint,
        settings=TOY,
        tunes=RATES,
    ),
    "oracle": Entry(
        "privileged",
        "one LoRA per task, told at test which task it is",
        ToldLoRA,
        Oracle,
        TOY,
        RATES,
    ),
}

# the classes that ship, by the names that the command gives them
SCHEMES: dict[str, type[Adapter]] = {
    name: entry.scheme
    for name, entry in ROSTER.items()
    if entry.scheme is not None and entry.kind in ("scheme", "atlas")
}


TUNED = Path(__file__).parent / "tuned.json"


@functools.cache
def tuned() -> dict[str, dict[str, dict[str, Any]]]:
    """By place (`under`) and learner, the settings that did best in their trials, as the study
    `tuning` has them (studies/tuning.py). Not to be changed."""
    _, entry = read_json(TUNED, "tuned", mend="minimoe must be installed anew")
    found: dict[str, dict[str, dict[str, Any]]] = entry["settings"]
    return found


def under(stream: str, backbone: str | None) -> str:
    """A stream, under its own model or the backbone of that name, as `tuned` has it."""
    return f"{stream} under {backbone}" if backbone else stream


def entry_on(name: str, place: str | None) -> Entry:
    """The roster's entry of that name, with the settings tuned in that place (`under`), if there
    are some."""
    return ROSTER[name].with_trial(tuned().get(place or "", {}).get(name, {}))


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


def lookup(name: str, place: str | None = None) -> tuple[str, Entry]:
    """The short name and the entry of a name in the roster, or of a class in a file, file.py:Class.
    place: where the settings were tuned (`under`), if anywhere.

    A class of one's own lives as MoRA does, with those of MoRA's toy settings that its constructor
    has, unless it names its own `learner` and `toy_settings`. Raises FileNotFoundError, and
    ValueError on an unknown name or a file without such a class.
    """
    if name in ROSTER:
        return name, entry_on(name, place)
    path, colon, in_file = name.rpartition(":")
    if not colon:
        raise ValueError(f"scheme is {name!r}, allowed: {', '.join(ROSTER)}, file.py:Class")
    scheme = load_class(path, in_file, Adapter)
    try:
        arguments = inspect.signature(scheme).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} has no signature: {error}") from error
    takes_all = any(a.kind is a.VAR_KEYWORD for a in arguments.values())
    mora = entry_on("mora", place)
    usual = {name: value for name, value in mora.settings.items() if takes_all or name in arguments}
    return in_file, Entry(
        "scheme",
        f"{in_file} of {path}",
        scheme,
        getattr(scheme, "learner", AdapterLearner),
        getattr(scheme, "toy_settings", usual),
        lr=mora.lr,
        path=Path(path).resolve(),
        source=of_own(Path(path).resolve()),
    )
