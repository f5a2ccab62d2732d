"""All schemes and baselines through one stream, side by side."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .adapt import adapters
from .claims import Claims
from .continual import streams
from .continual.checkpoints import Checkpoints
from .continual.learn import (
    BATCH,
    LEARNING_RATE,
    PRETRAIN,
    PROBES,
    Learner,
    Run,
    make_backbone,
    pretrain,
    run_stream,
    take_up,
    task_seed,
)
from .continual.metrics import METRICS
from .continual.planted import reachable
from .continual.probe import PROBLEMS
from .continual.streams import Stream
from .options import RUN, Options, short_name, usual_schemes
from .roster import EPOCHS, ROSTER, Entry, lookup, names
from .tools import parallel
from .tools.files import write_json
from .tools.fingerprint import fingerprint
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

    The options are written to out/run.json, and after every task a checkpoint to out/checkpoints.
    A checkpoint that is there already is not learned again. (The command writes compare.json.)

    Args:
        schemes: as `choose` takes them, or what it returns.
        changes: settings other than the roster's, for all schemes that have them.
        done: is told of progress: a label, and how many tasks are newly finished.

    Raises ValueError on unknown names, settings out of range and checkpoints that are damaged or of
    another run, before anything is written or learned.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}, allowed: 1 or more")
    streams.require_seeds(seeds)
    changes = dict(changes or {})
    for name, value in changes.items():
        if not math.isfinite(value):  # JSON holds no other
            raise ValueError(f"{name} is {value}, allowed: a finite number")
    trial = streams.make(stream, tasks, seeds[0])
    entries = schemes if isinstance(schemes, Mapping) else choose(schemes, trial)
    learners = {name: _try(name, entry, trial, changes) for name, entry in entries.items()}
    common = {"tasks": tasks, "epochs": epochs}
    how = {"batch": BATCH, "lr": LEARNING_RATE, "pretrain": PRETRAIN, "probes": PROBES}
    made = {seed: streams.make(stream, tasks, seed) for seed in seeds}
    options = Options(
        stream,
        [name if not e.path else f"{e.path}:{name}" for name, e in entries.items()],
        list(seeds),
        tasks,
        epochs,
        device,
        changes,
    )
    kept = {
        (name, seed): _kept(out, options, name, entry, seed)
        for name, entry in entries.items()
        for seed in seeds
    }
    for (name, seed), files in kept.items():
        whole = learners[name].whole_stream
        (files.of_all(tasks) if whole else files).learned(made[seed])
    if parallel.process() == 0:
        out.mkdir(parents=True, exist_ok=True)
        # first: it makes the folder a run's
        write_json(out / RUN, "run", dataclasses.asdict(options))
        (out / "checkpoints").mkdir(exist_ok=True)
    cells: dict[str, list[Run]] = {name: [] for name in entries}
    known: dict[str, list[Reachable]] = {}
    for seed in seeds:
        backbone = pretrain(made[seed], seed, device)
        if stream == "planted":
            for name, reach in reachable(backbone, made[seed], _settings(changes)).items():
                known.setdefault(name, []).append(reach)
        for name, entry in entries.items():
            label = f"{name}, seed {seed}"
            done(label, 0)
            cells[name].append(
                run_stream(
                    partial(entry.make, **changes),
                    backbone,
                    made[seed],
                    seed,
                    epochs,
                    device,
                    name=label,
                    checkpoints=kept[name, seed],
                    done=partial(done, label),
                )
            )
    return CompareResult(
        stream=stream,
        device=device,
        torch=torch.__version__,
        code=fingerprint(),
        seeds=list(seeds),
        settings=common | shown_settings(ROSTER | dict(entries), changes) | how,
        schemes={name: _over_seeds(runs, known.get(name)) for name, runs in cells.items()},
    )


def _kept(out: Path, options: Options, name: str, entry: Entry, seed: int) -> Checkpoints:
    """The checkpoints of a scheme's run, and what decides their numbers."""
    run = {
        "scheme": name,
        "seed": seed,
        "stream": options.stream,
        "epochs": options.epochs,
        "device": options.device,
        **entry.changed(options.changes),
        "batch": BATCH,
        "lr": LEARNING_RATE,
        "pretrain": PRETRAIN,
        "torch": torch.__version__,
        "code": fingerprint(),
    }
    own = {"source": entry.source} if entry.source else {}
    return Checkpoints(out / "checkpoints" / f"{name}-seed{seed}", run | own)


def restore(folder: str | Path, scheme: str, seed: int = 0) -> tuple[Learner, Stream]:
    """What a run's learner knew in the end, and the stream that it learned.

        learner, stream = restore("minimoe-compare", "mora")
        digits = learner.predict(stream.tasks[0].x_test, 0).argmax(-1)

    scheme: its short name. The backbone is not in the checkpoints; it is pretrained anew, to the
    same bits. Raises FileNotFoundError if no run is there; ValueError if the run does not have the
    scheme or the seed, or has not learned all tasks with them, and on damaged files.
    """
    folder = Path(folder)
    options = Options.of(folder)
    stream = streams.make(options.stream, options.tasks, options.seeds[0])
    entries = choose(options.schemes, stream)
    if scheme not in entries:
        raise ValueError(f"scheme is {scheme!r}, allowed in this run: {', '.join(entries)}")
    if seed not in options.seeds:
        allowed = ", ".join(map(str, options.seeds))
        raise ValueError(f"seed is {seed}, allowed in this run: {allowed}")
    stream = streams.make(options.stream, options.tasks, seed)
    backbone = pretrain(stream, seed, options.device)
    with torch.random.fork_rng():
        torch.manual_seed(task_seed(seed, 0))
        learner = entries[scheme].make(backbone, stream, **options.changes)
    files = _kept(folder, options, scheme, entries[scheme], seed)
    files = files.of_all(options.tasks) if learner.whole_stream else files
    if files.learned(stream) < options.tasks:
        raise ValueError(
            f"{folder}: {scheme}, seed {seed}, has not learned all tasks; --resume does"
        )
    take_up(learner, files, options.tasks, stream)
    learner.model.eval()
    return learner, stream


def choose(schemes: Sequence[str] | None, stream: Stream) -> dict[str, Entry]:
    """The entries of these names, or files with a class, file.py:Class, by short names. None: all
    but the atlas; "all": with it. Raises ValueError on a name that this stream does not have."""
    allowed = names(stream.real)
    if schemes is None:
        schemes = usual_schemes(stream)
    entries: dict[str, Entry] = {}
    for given in dict.fromkeys(schemes):
        for each in allowed if given == "all" else [given]:
            name, entry = lookup(each)
            if name in ROSTER and name not in allowed:
                raise ValueError(
                    f"scheme is {name!r}, allowed on {stream.name}: {', '.join(allowed)}"
                )
            if (name in entries and entries[name] != entry) or (entry.source and name in ROSTER):
                short = short_name(each)
                raise ValueError(f"scheme {short!r}: there is another of the name {name}")
            entries[name] = entry
    return entries


def _try(name: str, entry: Entry, stream: Stream, changes: Mapping[str, Any]) -> Learner:
    """A learner. Raises ValueError if it cannot be made, or one of one's own cannot answer."""
    model = make_backbone(stream)
    if not entry.source:
        return entry.make(model, stream, **changes)  # raises on a bad setting
    try:
        learner = entry.make(model, stream, **changes)
        for layer in (layer for _, layer in adapters(model) if type(layer) is entry.scheme):
            if not isinstance(layer.claims, Claims):
                raise TypeError(f"claims is {layer.claims!r}, allowed: a minimoe.Claims")
        answers = learner.predict(stream.tasks[0].x_test[:2], 0)
    except (Exception, SystemExit) as error:  # whatever somebody's file does
        raise ValueError(f"{name} fails: {type(error).__name__}: {error}") from error
    if answers.shape[0] != 2:
        raise ValueError(f"{name} gives answers of shape {tuple(answers.shape)} to two inputs")
    return learner


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
