"""What is done with a scheme's file, each in a process of its own (isolated.py), and what it hands
over: what JSON holds, and an array.

Axes: T tokens, D in, O out, R ranks in all, r ranks per task, J tasks.
"""

import ast
import builtins
import inspect
import math
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from isolated import Handed
from torch import nn

import minimoe
from minimoe import Adapter
from minimoe.adapt import adapters
from minimoe.continual import streams
from minimoe.continual.learn import AdapterLearner, pretrain, task_seed, train
from minimoe.continual.stream import Stream, Task
from minimoe.laws.case import cases, large
from minimoe.laws.check import beyond, claimed, drawn
from minimoe.laws.laws import EXAMPLES, LAWS
from minimoe.tools.load import load_class
from minimoe.tools.seeds import seed_all, seeded

NOT_PLAIN = {"eval", "exec", "compile", "open", "input", "breakpoint", "globals"}


def reads(path: Path) -> Handed:
    """The files, of some that every law may need, that it cannot read."""
    needed = [str(file) for file in (os.__file__, torch.__file__, minimoe.__file__, __file__)]
    return [file for file in needed if not os.access(file, os.R_OK)], np.zeros(0)


def scheme_of(path: Path) -> type[Adapter]:
    return load_class(path, "Scheme", Adapter)


def takes(path: Path) -> Handed:
    """Its claims, and what arguments it takes."""
    scheme = scheme_of(path)
    claims = asdict(claimed(scheme, {}))
    claims["as_lora"] = None if claims["as_lora"] is None else {}
    claims["simplex"] = bool(claims["simplex"])
    return [claims, arguments(scheme)], np.zeros(0)


def arguments(scheme: type[Adapter]) -> list[str]:
    return list(inspect.signature(scheme).parameters)


def law_row(path: Path, name: str, more: dict[str, Any], quick: bool) -> Handed:
    """[verdict, evidence] of one law, of what it claims and more."""
    scheme = scheme_of(path)
    claims = replace(claimed(scheme, {}), **more)
    law = next(law for law in LAWS if law.__name__ == name)
    if not LAWS[law](claims):
        return ["not claimed", ""], np.zeros(0)
    usual = EXAMPLES.get(law, 30)
    row = drawn(name, law, cases(scheme, {}, claims), min(usual, 6) if quick else usual)
    if row.verdict == "held":
        row = beyond(row, law, large(scheme, {}, claims), {"top_k"} if claims.top_k else set())
    return [row.verdict, row.evidence], np.zeros(0)


def layer_answers(
    path: Path, situation: tuple[int, ...], seed: int, given: dict[str, Any]
) -> Handed:
    """The rows' shapes and the settings of a layer, of those given where it takes them; y (T, O),
    and beside it dx (T, D)."""
    T, D, O, r, J, training = situation
    scheme = scheme_of(path)
    base = nn.Linear(D, O, dtype=torch.float64)
    layer = scheme(base, rank=r, **{n: given[n] for n in arguments(scheme) if n in given})
    for _ in range(J - 1):
        layer.grow()
    layer.train(bool(training))
    shapes = {name: list(layer.rows(name).shape) for name in layer.fresh()}
    shapes |= {name: list(getattr(layer, name).shape) for name in layer.task_agnostic()}
    shapes |= {"W0": [O, D], "b": [O], "x": [T, D], "dy": [T, O]}
    values = {n: torch.from_numpy(v) for n, v in draws(shapes, seed).items()}
    with torch.no_grad():
        base.weight.copy_(values["W0"])
        base.bias.copy_(values["b"])
        for name in layer.fresh():
            old = getattr(layer, f"frozen_{name}")
            old.copy_(values[name][: len(old)])
            getattr(layer, name).copy_(values[name][len(old) :])
        for name in layer.task_agnostic():
            getattr(layer, name).copy_(values[name])
    x = values["x"].requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad((y * values["dy"]).sum(), x)
    return [shapes, layer.settings()], torch.cat([y.detach(), dx], -1).numpy()


def stated_gates(
    path: Path, xs: np.ndarray, rows: dict[str, Any], settings: dict[str, Any], training: bool
) -> Handed:
    """g (n, T, R) of xs (n, T, D). Of the file `stated` alone is run, with np and math."""
    tree = ast.parse(path.read_bytes())
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "stated"]
    if not found:
        raise ValueError("no function stated(x, rows, settings, training)")
    if any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(found[-1])):
        raise ValueError("stated imports something, allowed: np and math, which are there")

    def imported(name: str, *rest: Any) -> Any:  # NumPy imports as it computes
        if name.partition(".")[0] in (path.stem, "importlib", "minimoe", "torch"):
            raise ImportError(f"stated imports {name}, allowed: np and math, which are there")
        return __import__(name, *rest)

    plain = {n: v for n, v in vars(builtins).items() if n not in NOT_PLAIN}
    plain["__import__"] = imported
    names: dict[str, Any] = {"np": np, "math": math, "__builtins__": plain}
    exec(compile(ast.Module([found[-1]], []), path, "exec"), names)
    each = [names["stated"](x.copy(), dict(rows), settings, training) for x in xs]
    return None, np.asarray(each, dtype=np.float64)


def life(
    path: Path,
    scheme: type[Adapter] | None,
    settings: dict[str, Any],
    tasks: list[tuple[np.ndarray, ...]],
    seed: int,
    epochs: int,
) -> Handed:
    """The answers (J + 1, J, n, O) to all tests, before any task and after each. It is given no
    answers to what it is tested on. scheme: a baseline; None: that of the file."""
    made = []
    for t, arrays in enumerate(tasks):
        x, y, x_test = map(torch.from_numpy, arrays)
        made.append(Task(str(t), (x, y), (x_test, y.new_zeros(len(x_test), y.shape[1]))))
    stream = Stream("hidden", made, model=streams.make("subspaces", 1).model)
    scheme = scheme or scheme_of(path)
    answers = []
    with seeded(task_seed(seed, 0)):
        learner = AdapterLearner(pretrain(stream, seed), scheme, **settings)
        for t in range(len(made) + 1):
            if t:
                seed_all(task_seed(seed, t - 1))
                fit: Any = partial(train, epochs=epochs, seed=task_seed(seed, t - 1))
                learner.learn(stream, t - 1, fit)
            for _, layer in adapters(learner.model):
                if layer.ranks != settings.get("rank", layer.rank) * max(1, t):
                    raise ValueError(f"a layer has {layer.ranks} ranks after {t} tasks")
            with torch.no_grad():
                learner.model.eval()
                answers.append([learner.predict(task.x_test, 0).numpy() for task in made])
    return None, np.asarray(answers)


def draws(shapes: dict[str, list[int]], seed: int) -> dict[str, np.ndarray]:
    """Normal numbers of these shapes, each by its name."""
    return {
        name: np.random.default_rng([seed, *name.encode()]).standard_normal(shape)
        for name, shape in shapes.items()
    }
