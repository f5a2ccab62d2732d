"""All schemes and baselines through one stream, side by side: the numbers and the table."""

import math
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import streams
from .baselines import ClassMean, HeadOnly, Joint, Oracle
from .learn import (
    BATCH,
    LEARNING_RATE,
    PRETRAIN,
    PROBES,
    Adapted,
    Learner,
    blank,
    carry,
    pretrain,
)
from .learners import Clustered, Consolidating, Expanding, Intuitive, Labelled
from .lora import Adapter, LoRA
from .lora_moe import LoRAMoE
from .metrics import METRICS, summary
from .mora import MoRA
from .planted import reachable
from .probe import PROBLEMS
from .schemes import FlyLoRA, LoRAMoEPlugin, MeteoRA, MoSLD, OLoRA, SMoRA

# The toy streams' own settings. The schemes' defaults are their papers', for transformers of
# width 768 with 16 ranks a task; a layer here is at most 128 wide and learns 5 tasks of 8 ranks.
# - rank 8, epochs 20: enough for one LoRA a task to learn its task (see the oracle's row).
# - tau .1: among 40 ranks a score is about 1/sqrt(40) = .16 large; the softmax then weighs several
#   ranks, where at the paper's .01 it all but picks one, and learns less.
# - top_k 8: one task's worth of ranks. For lora_moe, whose experts are whole LoRAs, 3: the best
#   of 1, 2, 3 and all on permuted-digits, with 2 and all within the spread.
# - delta .2: the paper's.
TOY: dict[str, Any] = {
    "epochs": 20,
    "rank": 8,
    "top_k": {"lora_moe": 3, "mora": 8, "smora": 8, "flylora": 8, "mosld": 3, "meteora": 3},
    "tau": 0.1,
    "delta": 0.2,
    "clusters": 8,
}

Settings = dict[str, Any]  # TOY's keys

Make = Callable[..., Learner]  # of (model, stream, settings)


def _scheme(make: Callable[..., Learner], name: str, *knobs: str) -> Make:
    """A learner of r ranks a task at scale 1, and of the settings `knobs`; those that each scheme
    has its own of are under its name."""

    def made(model: Any, stream: Any, settings: Settings) -> Learner:
        own = {knob: settings[knob] for knob in knobs}
        own = {k: v[name] if isinstance(v, dict) else v for k, v in own.items()}
        return make(model, rank=settings["rank"], scale=1.0, **own)

    return made


def _adapted(scheme: type[Adapter], name: str, *knobs: str, learner: Any = Adapted) -> Make:
    return _scheme(partial(learner, scheme=scheme), name, *knobs)


# name: (what it is, how to make a learner of it)
LEARNERS: dict[str, tuple[str, Make]] = {
    "lora": (
        "scheme: one dense LoRA that every task trains on",
        _scheme(partial(Adapted, scheme=LoRA, grows=False), "lora"),
    ),
    "lora_moe": (
        "scheme: a learned router over whole LoRAs, one more per task",
        _adapted(LoRAMoE, "lora_moe", "top_k"),
    ),
    "mora": (
        "scheme: rank-1 experts that score themselves, r more per task",
        _adapted(MoRA, "mora", "top_k", "tau", "delta"),
    ),
    "smora": (
        "atlas: single ranks under a sigmoid router, with biases that balance it",
        _adapted(SMoRA, "smora", "top_k"),
    ),
    "flylora": (
        "atlas: random sparse keys that are never trained; the largest answers speak",
        _adapted(FlyLoRA, "flylora", "top_k"),
    ),
    "mor1e": (
        "atlas: single ranks, weighted by a router and by what the sample is like",
        _scheme(Intuitive, "mor1e"),
    ),
    "loramoe": (
        "atlas: whole LoRAs under a dense router, balanced by what they are for",
        _adapted(LoRAMoEPlugin, "loramoe", learner=Labelled),
    ),
    "mosld": (
        "atlas: whole LoRAs that share their keys, under a router",
        _adapted(MoSLD, "mosld", "top_k"),
    ),
    "mocle": (
        "atlas: whole LoRAs, chosen by the sample's cluster, and a universal one",
        _scheme(Clustered, "mocle", "clusters"),
    ),
    "meteora": (
        "atlas: whole LoRAs under a router that is told in training which is meant",
        _adapted(MeteoRA, "meteora", "top_k", learner=Labelled),
    ),
    "sema": (
        "atlas: whole LoRAs under a soft router, one more where a layer is surprised",
        _scheme(Expanding, "sema"),
    ),
    "olora": (
        "atlas: ranks added per task, all always on, with keys orthogonal to the older",
        _adapted(OLoRA, "olora"),
    ),
    "ewc": (
        "atlas: one dense LoRA, held back where older tasks would feel it",
        _scheme(Consolidating, "ewc"),
    ),
    "zero_shot": (
        "baseline: no adaptation, the backbone as it is",
        lambda model, stream, settings: Learner(model),
    ),
    "class_mean": (
        "baseline: nearest class mean of frozen features",
        lambda model, stream, settings: ClassMean(model, stream),
    ),
    "head_only": (
        "baseline: the class embeddings alone learn, task after task",
        lambda model, stream, settings: HeadOnly(model),
    ),
    "lora_grown": (
        "baseline: ranks added per task, all of them always on",
        _adapted(LoRA, "lora_grown"),
    ),
    "joint": (
        "bound: one LoRA with all tasks' ranks, trained on all tasks at once",
        lambda model, stream, settings: Joint(
            model, rank=min(settings["rank"] * len(stream.tasks), *model.fc1.weight.shape)
        ),
    ),
    "oracle": (
        "bound: one LoRA per task, told at test which task it is",
        lambda model, stream, settings: Oracle(model, rank=settings["rank"]),
    ),
}


NEED_CLASSES = ("class_mean", "head_only")  # and not a stream whose answers are vectors


def learners(stream: str, atlas: bool = True) -> list[str]:
    """Those of LEARNERS that can be carried through the stream of that name; or without the atlas,
    those of them that `compare` carries by default."""
    return [
        name
        for name, (what, _) in LEARNERS.items()
        if not (stream == "planted" and name in NEED_CLASSES)
        and (atlas or not what.startswith("atlas"))
    ]


def compare(
    out: Path,
    stream: str = "permuted-digits",
    schemes: list[str] | None = None,
    seeds: list[int] | None = None,
    tasks: int = 5,
    device: str = "cpu",
    settings: Settings = TOY,
    done: Callable[[str, int], None] = lambda label, tasks: None,
) -> dict[str, Any]:
    """Carry every scheme (of LEARNERS; by default the three and the baselines) with every seed
    (default 0) through a stream.

    After every task a checkpoint is written to out/checkpoints; those that are there already
    are gone on from. `done` hears of progress: a label, and how many tasks are newly finished.

    Returns what compare.json holds, nan as None: {"stream", "device", "torch", "seeds",
    "settings", "schemes": {name: {measure: {"mean", "std"}, ..., "trainable", "stored", "active",
    "seconds": {"mean", "std"}, "step": {"mean", "std"}, "matrix": one per seed, "found": what a
    probe.Recorder found, mean over seeds}}}; on the planted stream also "reachable": {"mean",
    "std", "limit"} of each scheme (planted.py). std is the sample's, None for one seed.

    Raises ValueError on unknown names and settings out of range, before anything is learned.
    """
    schemes, seeds = list(schemes or learners(stream, atlas=False)), list(seeds or [0])
    for name in schemes:
        if name not in learners(stream):
            here = f" on {stream}" if name in LEARNERS else ""
            raise ValueError(f"scheme is {name!r}, allowed{here}: {', '.join(learners(stream))}")
    if settings["epochs"] < 1:
        raise ValueError(f"epochs is {settings['epochs']}, allowed: 1 or more")
    trial = streams.make(stream, tasks, seeds[0])
    for name in schemes:
        LEARNERS[name][1](blank(trial), trial, settings)  # a bad setting is heard of here
    used = {"tasks": tasks, **settings, "batch": BATCH, "lr": LEARNING_RATE, "pretrain": PRETRAIN}
    used["probes"] = PROBES
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in schemes}
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out / "checkpoints").close()  # so is a folder one cannot write to
    for seed in seeds:
        made = streams.make(stream, tasks, seed)
        backbone = pretrain(made, seed, device)
        known = reachable(backbone, made, settings) if stream == "planted" else {}
        for name in schemes:
            label = f"{name}, seed {seed}"
            done(label, 0)
            run = carry(
                partial(LEARNERS[name][1], settings=settings),
                backbone,
                made,
                seed,
                settings["epochs"],
                device,
                name=label,
                checkpoint=out / "checkpoints" / f"{name}-seed{seed}.safetensors",
                run={"stream": stream, "device": device, "seed": seed, "scheme": name, **used},
                done=partial(done, label),
            )
            cells[name].append(run | {"reachable": known.get(name)})
    return {
        "stream": stream,
        "device": device,
        "torch": torch.__version__,
        "seeds": seeds,
        "settings": used,
        "schemes": {name: _over_seeds(runs) for name, runs in cells.items()},
    }


def _over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    measures = [summary(run["matrix"]) for run in runs]
    found = {name: np.mean([run["found"][name] for run in runs], 0) for name in runs[0]["found"]}
    known = [run["reachable"] for run in runs if run["reachable"]]
    limit = {"limit": known[0]["limit"]} if known else {}
    return {
        **({"reachable": _spread([k["acc"] for k in known]) | limit} if known else {}),
        **{name: _spread([measure[name] for measure in measures]) for name in METRICS},
        **{
            name: _spread([measure(run["found"]) for run in runs])
            for name, measure in PROBLEMS.items()
        },
        **{name: runs[0][name] for name in ("trainable", "stored", "active")},
        **{name: _spread([run[name] for run in runs]) for name in ("seconds", "step")},
        "matrix": _without_nan([run["matrix"] for run in runs]),
        "found": {name: _without_nan(array.round(4).tolist()) for name, array in found.items()},
    }


def _spread(values: list[float]) -> dict[str, float | None]:
    if any(math.isnan(value) for value in values):
        return {"mean": None, "std": None}
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std}


def _without_nan(entry: Any) -> Any:
    """Nested lists and dictionaries with None for nan, as JSON has no nan."""
    if isinstance(entry, dict):
        return {key: _without_nan(part) for key, part in entry.items()}
    if isinstance(entry, list):
        return [_without_nan(part) for part in entry]
    return None if entry != entry else entry


COLUMNS = {"acc": "ACC", "bwt": "BWT", "forgetting": "forgetting", "fwt": "FWT"} | {
    "transfer": "Transfer",
    "average": "Average",
}


def table(result: dict[str, Any]) -> str:
    """compare.json as text for a terminal, means ± sample standard deviations over seeds."""
    schemes = result["schemes"]
    rows = [["", *COLUMNS.values(), "trainable", "stored", "active", "seconds", "ms/step"]]
    planted = result["stream"] == "planted"
    if planted:
        rows[0].insert(1, "reachable")
    for name, scheme in schemes.items():
        counts = [f"{scheme[kind]:,}" for kind in ("trainable", "stored", "active")]
        step = scheme["step"]["mean"]
        times = [f"{scheme['seconds']['mean']:.1f}", "–" if step is None else f"{1000 * step:.2f}"]
        reach = []
        if planted:
            known = scheme.get("reachable")
            reach = [("" if known["limit"] else "≥ ") + _cell(known) if known else "–"]
        scores = [_cell(scheme[measure]) for measure in COLUMNS]
        rows.append([name, *reach, *scores, *counts, *times])
    problems = [["", *PROBLEMS]]
    for name, scheme in schemes.items():
        cells = [_cell(scheme[problem]) for problem in PROBLEMS]
        if set(cells) != {"–"}:
            problems.append([name, *cells])
    lines = [title(result), "", *_aligned(rows), "", LEGEND]
    lines += [PLANTED_LEGEND] if planted else []
    if len(problems) > 1:
        lines += ["", *_aligned(problems), "", PROBLEMS_LEGEND]
    return "\n".join(lines)


def _aligned(rows: list[list[str]]) -> list[str]:
    """Names to the left, cells to the right, a rule below the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def title(result: dict[str, Any]) -> str:
    """What was run, in a line."""
    seeds = ", ".join(map(str, result["seeds"]))
    tasks = result["settings"]["tasks"]
    return f"{result['stream']}, {tasks} task{'s'[: tasks > 1]}, seed{'s'[: ',' in seeds]} {seeds}"


def _cell(value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return "–"
    return _short(value["mean"]) + ("" if value["std"] is None else f"±{_short(value['std'])}")


def _short(value: float) -> str:
    """.947, -.014, 1.000"""
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


LEGEND = """\
ACC: mean accuracy on all tasks after the last. BWT: change on old tasks since they were learned.
forgetting: loss from a task's best. FWT: gain on a task before it is learned. Transfer: accuracy
on tasks not yet learned. Average: over all tasks and times. Parameters: trained per task, stored
at the end, active (read for one token's output). seconds: learning, per seed; ms/step: a step of
training."""
PLANTED_LEGEND = """\
Here accuracy is the share of the answer explained, 1 - Σ‖ŷ - y‖² / Σ‖y‖². reachable: the ACC that
no training can pass, by algebra; with ≥, one that the scheme is shown to be able to express."""
PROBLEMS_LEGEND = """\
In the adapted layers, on 64 test images of each task. interference: how far outputs for old tasks
have moved since each was learned, relative. intrusion: share of their gate's weight that later
ranks take. redundancy: largest |cosine| of a new rank with an old one. ambiguity: the gate's
entropy, 1 where all experts weigh the same. instability: share of the ranks chosen for an old
input that changed."""
