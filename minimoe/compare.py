"""All schemes and baselines through one stream, side by side."""

import copy
import dataclasses
import math
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from joblib.parallel import get_active_backend
from torch import Tensor, nn

from .adapt import adapters
from .claims import Claims
from .continual import data, streams
from .continual.backbones import BACKBONES
from .continual.checkpoints import Checkpoints
from .continual.learn import (
    BATCH,
    PRETRAIN,
    PROBES,
    Learner,
    Run,
    require_training,
    run_stream,
    take_up,
    task_seed,
)
from .continual.metrics import METRICS
from .continual.probe import PROBLEMS
from .continual.stream import Stream
from .options import RUN, Options, short_name
from .roster import EPOCHS, ROSTER, Entry, entry_on, lookup, names
from .setting import Setting, name_of, pretrained, stream_of
from .tools import parallel
from .tools.console import quiet_children
from .tools.files import write_atomic, write_json
from .tools.fingerprint import fingerprint
from .tools.results import CompareResult, Reachable, SchemeResult, Spread, to_json
from .tools.seeds import seeded
from .tools.tables import compare_page


def compare(
    out: str | Path,
    stream: str | Stream | Callable[[int, int], Stream] = streams.USUAL,
    schemes: Sequence[str] | Mapping[str, Entry] | None = None,
    seeds: Sequence[int] = (0,),
    tasks: int | None = None,
    device: str = "cpu",
    epochs: int = EPOCHS,
    changes: Mapping[str, Any] | None = None,
    done: Callable[[str, int], None] = lambda label, tasks: None,
    *,
    backbone: str | Callable[[Stream], nn.Module] | None = None,
    targets: str | None = None,
    lr: float | None = None,
    batch: int = BATCH,
    optimiser: str = "AdamW",
    jobs: int = 1,
) -> CompareResult:
    """Carry every scheme, with every seed, through a stream.

    The options are written to out/run.json, and after every task a checkpoint to out/checkpoints.
    A checkpoint that is there already is not learned again. `report` writes the rest.

    Args:
        stream, backbone, targets: as Setting says.
        schemes: as `choose` takes them, or what it returns.
        tasks: how many; by default as streams.usual_tasks says, or all that a Stream has.
        changes: settings other than the roster's, for all schemes that have them.
        done: is told of progress: a label, and how many tasks are newly finished.
        lr, batch, optimiser: of a task's training; lr None: each learner's own (roster.py).
        jobs: runs side by side, in processes, or as joblib.parallel_config says; -1: one per core.
            Each has one thread. The numbers are those of one after the other with one thread, if
            what a function reads from its module is as it was imported.

    Raises ValueError on unknown names, settings out of range, a stream and a model that do not fit,
    and checkpoints that are damaged or of another run, before anything is written or learned.
    """
    out, seeds = Path(out), [int(seed) for seed in seeds]
    require_training(epochs, 0.0 if lr is None else lr, batch, optimiser)
    streams.require_seeds(seeds)
    changes = dict(changes or {})
    for name, value in changes.items():
        if not math.isfinite(value):  # JSON holds no other
            raise ValueError(f"{name} is {value}, allowed: a finite number")
    if jobs != -1 and jobs < 1:
        raise ValueError(f"jobs is {jobs}, allowed: 1 or more, or -1")
    if jobs != 1 and parallel.processes() > 1:
        raise ValueError(f"jobs is {jobs}, allowed where processes train together: 1")
    if jobs != 1 and (backend := type(get_active_backend()[0]).__name__) == "ThreadingBackend":
        raise ValueError(f"jobs run in {backend}, allowed: processes (torch has one seed in each)")
    if tasks is None:
        tasks = len(stream.tasks) if isinstance(stream, Stream) else streams.usual_tasks(stream)
    setting = Setting(stream, backbone, targets, tasks, device)
    trial, model = stream_of(setting, seeds[0]), setting.new_model(seeds[0])
    if isinstance(schemes, Mapping):
        entries = dict(schemes)
    else:
        entries = choose(schemes, trial, model, setting.tuned_as)
    known = {name for entry in (ROSTER | entries).values() for name in entry.settings}
    for name in changes.keys() - known:
        raise ValueError(f"changes have {name!r}, allowed: {', '.join(sorted(known))}")
    with torch.random.fork_rng():
        learners = {
            name: _try(name, entry, trial, copy.deepcopy(model), changes)
            for name, entry in entries.items()
        }
    options = Options(
        stream=setting.stream_name(seeds[0]),
        schemes=[name if not e.path else f"{e.path}:{name}" for name, e in entries.items()],
        seeds=list(seeds),
        tasks=tasks,
        epochs=epochs,
        lr=lr,
        batch=batch,
        optimiser=optimiser,
        backbone=name_of(backbone),
        targets=targets,
        device=device,
        changes=changes,
    )
    kept = {}
    for seed in seeds:
        for name, entry in entries.items():
            files = kept[seed, name] = _kept(out, options, setting, name, entry, seed)
            whole = learners[name].whole_stream
            (files.of_all(tasks) if whole else files).learned(stream_of(setting, seed))
    if parallel.process() == 0:
        out.mkdir(parents=True, exist_ok=True)
        # first: it makes the folder a run's
        write_json(out / RUN, "run", dataclasses.asdict(options))
        (out / "checkpoints").mkdir(exist_ok=True)
    if jobs == 1:
        cells = {
            (seed, name): _run(entries[name], setting, options, name, seed, files, done)
            for (seed, name), files in kept.items()
        }
    else:
        calls = (
            # of somebody's file a process is told the name: no pickle holds its classes
            joblib.delayed(_run_alone)(
                f"{entries[name].path}:{name}" if entries[name].path else entries[name],
                *(setting, options, name, seed, files),
            )
            for (seed, name), files in kept.items()
        )
        with quiet_children():
            results = joblib.Parallel(n_jobs=jobs, return_as="generator")(calls)
        cells = {}
        for key, run in zip(kept, results, strict=True):
            cells[key] = run
            done(f"{key[1]}, seed {key[0]}", tasks)
    limits: dict[str, list[Reachable]] = {}
    closed: dict[str, list[float]] = {}
    if trial.reachable is not None and backbone is None:
        for seed in seeds:
            model, made = pretrained(setting, seed), stream_of(setting, seed)
            known_settings = {n: entry_on(n, setting.tuned_as).changed(changes) for n in ROSTER}
            for name, reach in trial.reachable(model, made, known_settings).items():
                by_name: dict[str, list[Any]] = limits if isinstance(reach, Reachable) else closed
                by_name.setdefault(name, []).append(reach)
    settings: dict[str, Any] = {"tasks": tasks, "epochs": epochs}
    settings |= shown_settings(entries, changes, lr)
    settings |= {"batch": batch, "optimiser": optimiser}
    settings |= {"backbone": name_of(backbone), "targets": targets}
    settings |= {"pretrain": {**PRETRAIN, **trial.pretraining} if trial.base else None}
    settings |= {"probes": PROBES, "score": trial.measure}
    return CompareResult(
        stream=trial.name,
        device=device,
        torch=torch.__version__,
        code=fingerprint(),
        seeds=list(seeds),
        settings=settings,
        schemes={
            name: _over_seeds([cells[seed, name] for seed in seeds], limits.get(name))
            for name in entries
        },
        closed_forms={name: Spread.of(values) for name, values in closed.items()} or None,
    )


def _run(
    entry: Entry,
    setting: Setting,
    options: Options,
    name: str,
    seed: int,
    files: Checkpoints,
    done: Callable[[str, int], None] = lambda label, tasks: None,
) -> Run:
    """One scheme's life with one seed."""
    label = f"{name}, seed {seed}"
    done(label, 0)
    try:
        return run_stream(
            lambda model, stream: entry.make(model, stream, **options.changes),
            pretrained(setting, seed),
            stream_of(setting, seed),
            seed,
            options.epochs,
            setting.device,
            name=label,
            checkpoints=files,
            done=lambda tasks: done(label, tasks),
            how={
                "lr": _rate(entry, options.lr),
                "batch": options.batch,
                "optimiser": options.optimiser,
            },
        )
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        if options.stream in streams.STREAMS and options.backbone in (None, *BACKBONES):
            raise  # none of somebody's data or model
        raise ValueError(f"{label}: {type(error).__name__}: {error}") from error


def _run_alone(entry: Entry | str, setting: Setting, *args: Any) -> Run:
    """`_run` in a process of its own, on one thread."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # joblib's is not for a DataLoader's workers
    entry = lookup(entry, setting.tuned_as)[1] if isinstance(entry, str) else entry
    return _run(entry, setting, *args)


def _kept(
    out: Path, options: Options, setting: Setting, name: str, entry: Entry, seed: int
) -> Checkpoints:
    """The checkpoints of a scheme's run, and what decides their numbers."""
    run = {
        "scheme": name,
        "seed": seed,
        **setting.facts(seed),
        "epochs": options.epochs,
        "device": options.device,
        **entry.changed(options.changes),
        "batch": options.batch,
        "lr": _rate(entry, options.lr),
        "optimiser": options.optimiser,
        "pretrain": {**PRETRAIN, **stream_of(setting, seed).pretraining},
        "torch": torch.__version__,
        "code": fingerprint(),
    }
    own = {"source": entry.source} if entry.source else {}
    return Checkpoints(out / "checkpoints" / f"{name}-seed{seed}", run | own)


def report(result: CompareResult, folder: str | Path, command: str = "") -> list[Path]:
    """Write a comparison to compare.json, draw it, and show both in compare.md, under the command
    that made it. Returns the files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "compare.json", "compare", to_json(result))
    pictures = draw(result, folder)
    write_atomic(folder / "compare.md", compare_page(result, command, pictures).encode())
    return [folder / name for name in ("compare.json", "compare.md", *pictures)]


def draw(result: CompareResult, folder: Path) -> list[str]:
    """Draw a comparison: the accuracies, and where there are gates, those. Returns the names of the
    pictures."""
    from .tools import plots  # here, so that what draws nothing needs no matplotlib

    kinds = {n: ROSTER[n].kind if n in ROSTER else "scheme" for n in result.schemes}
    plots.plot_compare(
        result,
        folder / "compare.png",
        thick=[name for name, of in kinds.items() if of == "scheme"],
        dashed=[name for name, of in kinds.items() if of in ("baseline", "privileged")],
    )
    if all(scheme.intrusion.mean is None for scheme in result.schemes.values()):
        return ["compare.png"]
    plots.plot_gates(result, folder / "gates.png")
    return ["compare.png", "gates.png"]


def restore(
    folder: str | Path, scheme: str, seed: int = 0, stream: Any = None, backbone: Any = None
) -> tuple[Learner, Stream]:
    """What a run's learner knew in the end, and the stream that it learned.

        learner, stream = restore("minimoe-compare", "mora")
        digits = learner.predict(stream.tasks[0].x_test, 0).argmax(-1)

    scheme: its short name. stream, backbone: where the run had some that are no names, the same.
    The backbone is not in the checkpoints; it is made and pretrained anew, to the same bits. Raises
    FileNotFoundError if no run is there; ValueError if the run does not have the scheme or the
    seed, or has not learned all tasks with them, and on damaged files.
    """
    folder = Path(folder)
    options = Options.of(folder)
    if seed not in options.seeds:
        allowed = ", ".join(map(str, options.seeds))
        raise ValueError(f"seed is {seed}, allowed in this run: {allowed}")
    setting = Setting(
        options.stream if stream is None else stream,
        options.backbone if backbone is None else backbone,
        *(options.targets, options.tasks, options.device),
    )
    made, model = stream_of(setting, seed), copy.deepcopy(pretrained(setting, seed))
    entries = choose(options.schemes, made, model, setting.tuned_as)
    if scheme not in entries:
        raise ValueError(f"scheme is {scheme!r}, allowed in this run: {', '.join(entries)}")
    with seeded(task_seed(seed, 0)):
        learner = entries[scheme].make(model, made, **options.changes)
    files = _kept(folder, options, setting, scheme, entries[scheme], seed)
    files = files.of_all(options.tasks) if learner.whole_stream else files
    if files.learned(made) < options.tasks:
        raise ValueError(
            f"{folder}: {scheme}, seed {seed}, has not learned all tasks; --resume does"
        )
    take_up(learner, files, options.tasks, made)
    learner.model.eval()
    return learner, made


def choose(
    schemes: Sequence[str] | None, stream: Stream, model: Any, tuned_as: str | None = None
) -> dict[str, Entry]:
    """The entries of these names, or files with a class, file.py:Class, by short names. None: all
    but the atlas; "all": with it. tuned_as: where their settings were tuned (roster.under), if
    anywhere. Raises ValueError on a name that this model cannot have."""
    allowed = names(model)
    if schemes is None:
        schemes = usual_schemes(model)
    entries: dict[str, Entry] = {}
    for given in dict.fromkeys(schemes):
        for each in allowed if given == "all" else [given]:
            name, entry = lookup(each, tuned_as)
            if name in ROSTER and name not in allowed:
                raise ValueError(
                    f"scheme is {name!r}, allowed on {stream.name}: {', '.join(allowed)}"
                )
            if (name in entries and entries[name] != entry) or (entry.source and name in ROSTER):
                short = short_name(each)
                raise ValueError(f"scheme {short!r}: there is another of the name {name}")
            entries[name] = entry
    return entries


def usual_schemes(model: Any) -> list[str]:
    """The schemes of a run that does not name them: all but the atlas."""
    return names(model, "scheme", "baseline", "privileged")


def _try(
    name: str, entry: Entry, stream: Stream, model: nn.Module, changes: Mapping[str, Any]
) -> Learner:
    """A learner. Raises ValueError if it cannot be made, or one of one's own cannot answer."""
    x = data.leading(stream.tasks[0].test, 2)
    if not entry.source:
        learner = entry.make(model, stream, **changes)  # raises on a bad setting
        with torch.no_grad():
            learner.predict(x, 0)  # or on a mask that does not fit its layers
        return learner
    try:
        learner = entry.make(model, stream, **changes)
        for layer in (layer for _, layer in adapters(model) if type(layer) is entry.scheme):
            if not isinstance(layer.claims, Claims):
                raise TypeError(f"claims is {layer.claims!r}, allowed: a minimoe.Claims")
        answers = learner.predict(x, 0)
    except (Exception, SystemExit) as error:  # whatever somebody's file does
        raise ValueError(f"{name} fails: {type(error).__name__}: {error}") from error
    if isinstance(answers, Tensor) and len(answers) != data.count(x):
        shape = tuple(answers.shape)
        raise ValueError(f"{name} gives answers of shape {shape} to {data.count(x)} inputs")
    return learner


def shown_settings(
    entries: Mapping[str, Entry], changes: Mapping[str, Any], lr: float | None
) -> dict[str, Any]:
    """The settings and the lr of all entries: a value, or, where entries differ in it, a value for
    each."""
    by_name: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        for key, value in (entry.changed(changes) | {"lr": _rate(entry, lr)}).items():
            by_name.setdefault(key, {})[name] = value
    same = {key: next(iter(v.values())) for key, v in by_name.items() if len(set(v.values())) == 1}
    return {key: same.get(key, values) for key, values in by_name.items()}


def _rate(entry: Entry, lr: float | None) -> float:
    """The learning rate that is given, or else the learner's own."""
    return entry.lr if lr is None else lr


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
        read=first.read,
        speaking=first.speaking,
        seconds=Spread.of([run.seconds for run in runs]),
        step=Spread.of([run.step for run in runs]),
        matrix=[run.matrix for run in runs],
        found={name: array.round(4).tolist() for name, array in records.items()},
        reachable=limit,
    )
