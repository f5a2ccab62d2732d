"""All schemes and baselines through one stream, side by side."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .continual import streams
from .continual.learn import (
    BATCH,
    LEARNING_RATE,
    PRETRAIN,
    PROBES,
    Run,
    make_backbone,
    pretrain,
    run_stream,
)
from .continual.metrics import METRICS
from .continual.planted import reachable
from .continual.probe import PROBLEMS
from .continual.streams import Stream
from .roster import EPOCHS, ROSTER, Entry, lookup, names
from .tools.results import CompareResult, Reachable, SchemeResult, Spread


def compare(
    out: Path,
    stream: str = "permuted-digits",
    schemes: Sequence[str] | Mapping[str, Entry] | None = None,
    seeds: Sequence[int] = (0,),
    tasks: int = 5,
    device: str = "cpu",
    epochs: int = EPOCHS,
    changes: Mapping[str, Any] | None = None,
    done: Callable[[str, int], None] = lambda label, tasks: None,
) -> CompareResult:
    """Carry every scheme, with every seed, through a stream.

    After every task a checkpoint is written to out/checkpoints; those that are there already
    are gone on from.

    Args:
        schemes: as `choose` takes them, or what it returns.
        changes: settings other than the roster's, for all schemes that have them.
        done: is told of progress: a label, and how many tasks are newly finished.

    Raises ValueError on unknown names and settings out of range, before anything is learned.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}, allowed: 1 or more")
    changes = dict(changes or {})
    trial = streams.make(stream, tasks, seeds[0])
    entries = schemes if isinstance(schemes, Mapping) else choose(schemes, trial)
    for name, entry in entries.items():
        _try(name, entry, trial, changes)
    common = {"tasks": tasks, "epochs": epochs}
    how = {"batch": BATCH, "lr": LEARNING_RATE, "pretrain": PRETRAIN, "probes": PROBES}
    cells: dict[str, list[Run]] = {name: [] for name in entries}
    known: dict[str, list[Reachable]] = {}
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out / "checkpoints").close()  # so is a folder one cannot write to
    for seed in seeds:
        made = streams.make(stream, tasks, seed)
        backbone = pretrain(made, seed, device)
        if stream == "planted":
            for name, reach in reachable(backbone, made, _settings(changes)).items():
                known.setdefault(name, []).append(reach)
        for name, entry in entries.items():
            label = f"{name}, seed {seed}"
            done(label, 0)
            own = entry.changed(changes) | ({"source": entry.source} if entry.source else {})
            facts = {"stream": stream, "device": device, "seed": seed, "scheme": name}
            cells[name].append(
                run_stream(
                    partial(entry.make, **changes),
                    backbone,
                    made,
                    seed,
                    epochs,
                    device,
                    name=label,
                    checkpoint=out / "checkpoints" / f"{name}-seed{seed}.safetensors",
                    facts=facts | common | own | how,
                    done=partial(done, label),
                )
            )
    return CompareResult(
        stream=stream,
        device=device,
        torch=torch.__version__,
        seeds=list(seeds),
        settings=common | shown_settings(ROSTER | dict(entries), changes) | how,
        schemes={name: _over_seeds(runs, known.get(name)) for name, runs in cells.items()},
    )


def choose(schemes: Sequence[str] | None, stream: Stream) -> dict[str, Entry]:
    """The entries of these names, or files with a class, file.py:Class, by short names. None: all
    but the atlas; "all": with it. Raises ValueError on a name that this stream does not have."""
    allowed = names(stream.real)
    if schemes is None:
        schemes = names(stream.real, "scheme", "baseline", "bound")
    entries: dict[str, Entry] = {}
    for given in dict.fromkeys(schemes):
        for each in allowed if given == "all" else [given]:
            name, entry = lookup(each)
            if name in ROSTER and name not in allowed:
                raise ValueError(
                    f"scheme is {name!r}, allowed on {stream.name}: {', '.join(allowed)}"
                )
            if (name in entries and entries[name] != entry) or (entry.source and name in ROSTER):
                raise ValueError(f"scheme {each!r}: there is another of the name {name}")
            entries[name] = entry
    return entries


def _try(name: str, entry: Entry, stream: Stream, changes: Mapping[str, Any]) -> None:
    """Raise ValueError if the learner cannot be made, or one of one's own cannot answer."""
    model = make_backbone(stream)
    if not entry.source:
        entry.make(model, stream, **changes)  # raises on a bad setting
        return
    try:
        learner = entry.make(model, stream, **changes)
        answers = learner.predict(stream.tasks[0].x_test[:2], 0)
    except (Exception, SystemExit) as error:  # whatever somebody's file does
        raise ValueError(f"{name} fails: {type(error).__name__}: {error}") from error
    if answers.shape[0] != 2:
        raise ValueError(f"{name} gives answers of shape {tuple(answers.shape)} to two inputs")


def shown_settings(entries: Mapping[str, Entry], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of all entries: a value, or, where entries differ in it, a value for each."""
    by_name: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        for key, value in entry.changed(changes).items():
            by_name.setdefault(key, {})[name] = value
    same = {key: next(iter(v.values())) for key, v in by_name.items() if len(set(v.values())) == 1}
    return {key: same.get(key, values) for key, values in by_name.items()}


def _settings(changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: entry.changed(changes) for name, entry in ROSTER.items()}


def _over_seeds(runs: Sequence[Run], known: list[Reachable] | None) -> SchemeResult:
    first = runs[0]
    records = {name: np.mean([run.records[name] for run in runs], 0) for name in first.records}
    limit = None
    if known:
        means = [one.mean for one in known if one.mean is not None]
        limit = Reachable.of(means, limit=known[0].limit)
    spreads = {name: Spread.of([f(run.matrix) for run in runs]) for name, f in METRICS.items()}
    spreads |= {name: Spread.of([f(run.records) for run in runs]) for name, f in PROBLEMS.items()}
    return SchemeResult(
        **spreads,
        trainable=first.trainable,
        stored=first.stored,
        active=first.active,
        seconds=Spread.of([run.seconds for run in runs]),
        step=Spread.of([run.step for run in runs]),
        matrix=[run.matrix for run in runs],
        found={name: array.round(4).tolist() for name, array in records.items()},
        reachable=limit,
    )
