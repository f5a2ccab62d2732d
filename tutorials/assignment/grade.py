"""Grade a scheme that was handed in: laws, equation and stream, 80 points; 20 are for a human.

    python grade.py scheme.py --report report.md --secret-file secret --out grade.json

README.md beside this file has the rubric, and what a hostile file can still do. The scheme is
imported in processes of their own alone (isolated.py). What is compared is compared here.

Axes: T tokens, D in, O out, R ranks in all, r ranks per task, J tasks, K ranks that speak.
"""

import hashlib
import hmac
import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inside import draws, law_row, layer_answers, life, reads, stated_gates, takes
from isolated import Handed, Lost, alone

from minimoe import LoRA, LoRAMoE
from minimoe.cli import Parser
from minimoe.continual import streams
from minimoe.continual.metrics import acc, bwt, plasticity
from minimoe.continual.stream import Stream, score
from minimoe.laws import LAWS
from minimoe.studies.verdicts import Comparison
from minimoe.tools.files import write_json
from minimoe.tools.fingerprint import fingerprint

# The rubric's numbers, as README.md states them.
REQUIRED = ("zero_at_birth", "granularity", "any_shape", "zero_is_finite", "grow_keeps")
LAW = 4  # points of a required law; and off the other 20, for a law broken or a true claim dropped
SAME_Y, SAME_DX = 3, 2  # points of each of SITUATIONS
SITUATIONS = [  # T, D, O, r, J, training
    (*sizes, training)
    for sizes in ((5, 7, 9, 3, 1), (7, 11, 5, 3, 3))
    for training in (True, False)
]
WITHIN_Y, WITHIN_DX, STEP = 1e-9, 1e-5, 1e-6  # of the largest number; of a central difference
LEARNS, NOT_WORSE = 4, 4  # points; half of them for a step less
GAIN, WORSE = 0.2, 0.1  # of explained share: that is to be learned, that is little worse
RANK = SPEAK = 8  # ranks that a task adds; ranks that speak, where a scheme keeps some
SECRET = 8  # bytes, at least
LARGEST = 10**6  # numbers of a small layer's rows
QUESTIONS = (
    "Did the prediction, made before the runs, say what would happen and why? (0-8)",
    "Does it say where the scheme loses, and show it? (0-6)",
    "Does it name a baseline that beats it, and say what that means? (0-6)",
)
STRONGER: dict[str, list[dict[str, Any]]] = {  # a law, and claims by which it would ask more
    "zero_at_birth": [{"zero_at_birth": True}],
    "granularity": [{"granularity": "token"}, {"granularity": "sample"}],
    "equation": [{"equation": True}],
    "exact_gradient": [{"exact_gradient": True}],
    "support": [{"top_k": True}],
    "simplex": [{"simplex": True}],
    "degenerates_to_lora": [{"as_lora": {}}],
    "merge_is_equal": [{"mergeable": True}],
    "active_is_read": [{"active_at_most": False}],
}


@dataclass(frozen=True)
class Grading:
    """One file's: how long it may take, and how much is looked at."""

    file: Path
    secret: bytes
    user: int | None
    quick: bool
    seconds: float
    end: float

    def alone(self, call: Callable[..., Handed], *args: Any) -> Handed:
        """As isolated.alone, in a 20th of all seconds at most. Raises Lost."""
        left = min(self.seconds / 20, self.end - time.monotonic())
        return alone(call, self.file, *args, seconds=left, user=self.user)

    def number(self, what: str) -> int:
        """What the secret says of it: HMAC-SHA256, the first four bytes."""
        digest = hmac.digest(self.secret, what.encode(), "sha256")
        return int.from_bytes(digest[:4], "big")


def laws(grading: Grading, claims: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """40 points: 4 for each required law, and 20 less 4 for each other law that is broken, and for
    each claim that would be true and is not made."""
    rows = [row_of(grading, law.__name__, {}) for law in LAWS]
    found = {row["law"]: row["verdict"] for row in rows}
    lost = LAW * sum(found[law] == "broken" for law in found.keys() - {*REQUIRED})
    dropped = []
    for law, stronger in STRONGER.items():
        for more in stronger:
            ((claim, value),) = more.items()
            if claims[claim] == value or (claim == "top_k" and claim not in names):
                break
            if row_of(grading, law, more)["verdict"] == "held":
                dropped.append(f"{claim}={value!r}")
                lost += LAW * (law not in REQUIRED or found[law] == "held")
                break
    points = LAW * sum(found[law] == "held" for law in REQUIRED) + max(0, 20 - lost)
    return {"points": points, "of": 40, "true but not claimed": dropped, "laws": rows}


def row_of(grading: Grading, law: str, more: dict[str, Any]) -> dict[str, str]:
    try:
        (verdict, evidence), _ = grading.alone(law_row, law, more, grading.quick)
    except Lost as lost:
        verdict, evidence = "broken", str(lost)
    return {"law": law, "verdict": verdict, "evidence": evidence}


def equation(grading: Grading) -> dict[str, Any]:
    """20 points: in each of SITUATIONS 3 if y, and 2 if dy/dx, are those of the stated gate."""
    rows = []
    for situation in SITUATIONS:
        at = "T {}, D {}, O {}, ranks {}, tasks {}, training {}".format(*situation)
        row: dict[str, Any] = {"at": at, "points": 0}
        rows.append(row)
        try:
            row["y"], row["dx"] = errors(grading, situation)
        except Exception as error:  # also of what was handed over
            row["evidence"] = str(error)
            continue
        row["points"] = SAME_Y * (row["y"] <= WITHIN_Y) + SAME_DX * (row["dx"] <= WITHIN_DX)
    return {"points": sum(row["points"] for row in rows), "of": 20, "situations": rows}


def errors(grading: Grading, situation: tuple[int, ...]) -> tuple[float, float]:
    """How far y and dy/dx are from what is stated, as shares of the largest number. Raises Lost,
    and ValueError where shapes or numbers are not what they should be."""
    T, D, O, r, J, training = situation
    seed = grading.number(f"equation {situation}")
    given = {"scale": 0.3 + seed % 1009 / 1009, "top_k": 2}
    (shapes, settings), numbers = grading.alone(layer_answers, situation, seed, given)
    fixed = {"A": [J * r, D], "B": [J * r, O], "W0": [O, D], "b": [O], "x": [T, D], "dy": [T, O]}
    for name, shape in fixed.items():
        if shapes.get(name) != shape:
            raise ValueError(f"rows {name} are {shapes.get(name)}, allowed: {shape}")
    if sum(map(math.prod, shapes.values())) > LARGEST:
        raise ValueError(f"rows hold more than {LARGEST} numbers")
    if numbers.shape != (T, O + D):
        raise ValueError(f"y and dx are {numbers.shape}, allowed: {(T, O + D)}")
    values = draws(shapes, seed)
    W0, b, x, dy, A, B = (values.pop(name) for name in ("W0", "b", "x", "dy", "A", "B"))
    steps = STEP * np.eye(T * D).reshape(T * D, T, D)
    xs = np.concatenate([x[None], x + steps, x - steps])
    rows = values | {"A": A, "B": B}
    _, g = grading.alone(stated_gates, xs, rows, settings, bool(training))
    if g.shape != (len(xs), T, J * r) or not np.isfinite(g).all():
        raise ValueError(f"stated gives g {g.shape[1:]}, allowed: {(T, J * r)}, of finite numbers")
    ys = xs @ W0.T + b + settings.get("scale", 1.0) * (g * (xs @ A.T)) @ B
    losses = (ys[1:] * dy).sum((1, 2))
    dx = ((losses[: T * D] - losses[T * D :]) / (2 * STEP)).reshape(T, D)
    return off(numbers[:, :O], ys[0]), off(numbers[:, O:], dx)


def off(got: np.ndarray, want: np.ndarray) -> float:
    error = float(np.abs(got - want).max() / max(1.0, np.abs(want).max()))
    return error if math.isfinite(error) else 1e300  # JSON holds no other


def hidden(grading: Grading) -> tuple[str, int, list[tuple[Stream, int]]]:
    """The family, J, and for each seed a stream and what training draws from."""
    family = ("subspaces", "clusters")[grading.number("family") % 2]
    J = {"subspaces": 5, "clusters": 3}[family] + grading.number("tasks") % 3
    made = [
        (streams.make(family, J, grading.number(f"data {i}")), grading.number(f"training {i}"))
        for i in range(3 if grading.quick else 5)
    ]
    return family, J, made


def learned(grading: Grading, claims: dict[str, Any], names: list[str], sparse: bool) -> Any:
    """20 points: 4 for learning, and 4 each for ACC and BWT beside each of two baselines."""
    family, J, made = hidden(grading)
    own = {"rank": RANK, "top_k": 1 if claims["expert"] == "block" else SPEAK}
    few = math.ceil(SPEAK / J)  # ranks a task, of which in the end SPEAK are there
    who = {
        "scheme": (None, {name: own[name] for name in names if name in own}),
        "lora, grown": (LoRA, {"rank": few if sparse else RANK}),
        "router": (LoRAMoE, {"rank": RANK, "top_k": 1 if sparse else J}),
    }
    part = {"points": 0, "of": 20, "stream": family, "tasks": J, "seeds": len(made)}
    values: dict[str, dict[str, list[float]]] = {}
    for name, (scheme, settings) in who.items():
        matrices = []
        for stream, seed in made:
            arrays = [(*map(np.asarray, (*t.train, t.x_test)),) for t in stream.tasks]
            args = (scheme, settings, arrays, seed, 8 if grading.quick else 20)
            try:
                matrices.append(matrix(stream, grading.alone(life, *args)[1]))
            except Exception as error:  # also of what was handed over
                return part | {"evidence": f"{name}: {error}"}
        values[name] = {f.__name__: [f(m) for m in matrices] for f in (acc, bwt, plasticity)}
        values[name]["before"] = [float(np.mean(m[0])) for m in matrices]
    mine = values["scheme"]
    gain = Comparison("learned", mine["plasticity"], mine["before"])
    low = gain.effect if math.isnan(gain.interval[0]) else gain.interval[0]
    learns = 0 if low <= 0 else LEARNS if gain.effect >= GAIN else LEARNS // 2
    rows = [shown(gain, learns)]
    for other, measure in itertools.product(list(who)[1:], ("acc", "bwt")):
        pair = Comparison(f"{measure}, {other}", mine[measure], values[other][measure])
        high = pair.effect if math.isnan(pair.interval[1]) else pair.interval[1]
        near = pair.effect > -WORSE  # on average: noise earns nothing
        points = 0 if not near else NOT_WORSE if high >= 0 else NOT_WORSE // 2
        rows.append(shown(pair, points if learns == LEARNS else 0))
    return part | {"points": sum(r["points"] for r in rows), "differences": rows, "means": values}


def matrix(stream: Stream, answers: np.ndarray) -> list[list[float]]:
    """(J + 1, J): the score of answers (J + 1, J, n, O). Raises ValueError where they are none."""
    J, y = len(stream.tasks), [task.y_test for task in stream.tasks]
    if answers.shape != (J + 1, J, *y[0].shape) or not np.isfinite(answers).all():
        raise ValueError(f"answers of {answers.shape} are no finite numbers, or not as many")
    return [[score(torch.tensor(a), y[j]) for j, a in enumerate(row)] for row in answers]


def shown(pair: Comparison, points: int) -> dict[str, Any]:
    ends = [None if math.isnan(end) else end for end in pair.interval]
    return {"of": pair.label, "mean": pair.effect, "interval": ends, "points": points}


def graded(grading: Grading, words: int | None) -> dict[str, Any]:
    """All of grade.json. words: of the report."""
    began, handed_in = time.monotonic(), hashlib.sha256(grading.file.read_bytes()).hexdigest()
    parts: dict[str, Any] = {}
    try:
        (claims, names), _ = grading.alone(takes)
    except Lost as lost:
        of = {"laws": 40, "equation": 20, "stream": 20}
        parts = {n: {"points": 0, "of": most, "evidence": str(lost)} for n, most in of.items()}
    else:
        parts["laws"] = laws(grading, claims, names)
        verdicts = {row["law"]: row["verdict"] for row in parts["laws"]["laws"]}
        parts["equation"] = equation(grading)
        parts["stream"] = learned(grading, claims, names, verdicts["support"] == "held")
    written = {"points": None, "of": 20, "questions": QUESTIONS, "words": words}
    return {
        "scheme": grading.file.name,
        "sha256": handed_in,
        "code": fingerprint(),
        "torch": torch.__version__,
        "quick": grading.quick,
        "points": sum(part["points"] for part in parts.values()),
        "of": 80,
        **parts,
        "written": written,
        "seconds": round(time.monotonic() - began, 1),
    }


def main(words: list[str] | None = None) -> int:
    parser = Parser(prog="grade.py", description="Grade a scheme: 80 points, 20 for a human.")
    add = parser.add_argument
    add("scheme", type=Path, help="a file with a class Scheme and a function stated")
    add("--report", type=Path, help="report.md")
    secret = parser.add_mutually_exclusive_group(required=True)
    secret.add_argument("--secret", help="what hidden seeds and the stream come from")
    secret.add_argument("--secret-file", type=Path, help="a file that holds it")
    add("--out", type=Path, default=Path("grade.json"), help="default %(default)s")
    add("--seconds", type=float, default=600.0, help="for all of it, default %(default)g")
    add("--user", type=int, metavar="N", help="who the scheme is, where root grades; 65534: nobody")
    add("--quick", action="store_true", help="fewer cases, seeds and epochs: to try the grader")
    args = parser.parse_args(words)
    try:
        inputs = [p for p in (args.scheme, args.report, args.secret_file) if p]
        for path in inputs:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file")
        if not args.out.resolve().parent.is_dir() or args.out.is_dir():
            raise FileNotFoundError(f"{args.out}: a folder, or in no folder that is there")
        if args.out.resolve() in [p.resolve() for p in inputs]:
            raise ValueError(f"out is {args.out}, allowed: no file that is read")
        if not 0 < args.seconds < math.inf:
            raise ValueError(f"seconds is {args.seconds:g}, allowed: above 0")
        if args.user is not None and (args.user < 1 or os.geteuid() != 0):
            raise ValueError(f"user is {args.user}, allowed: 1 or more, where root grades")
        known = args.secret_file.read_bytes() if args.secret_file else args.secret.encode()
        if len(known := known.strip()) < SECRET:
            raise ValueError(f"secret is {len(known)} bytes, allowed: {SECRET} or more")
        report = args.report.read_text(errors="replace").split() if args.report else None
        end = time.monotonic() + args.seconds
        grading = Grading(args.scheme.resolve(), known, args.user, args.quick, args.seconds, end)
        if args.user is not None and (closed := grading.alone(reads)[0]):
            raise ValueError(f"user {args.user} cannot read {closed[0]}")
        result = graded(grading, None if report is None else len(report))
        write_json(args.out, "grade", result)
    except (OSError, ValueError, Lost) as error:
        print(f"grade.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{result['points']} of 80 points: {args.out}")
    for line in lost(result):
        print(f"  {line}")
    return 0


def lost(result: dict[str, Any]) -> list[str]:
    """A line for each thing that points were lost for."""
    parts = [result[part] for part in ("laws", "equation", "stream")]
    lines = [*dict.fromkeys(part["evidence"] for part in parts if "evidence" in part)]
    laws, equation, stream = parts
    for row in laws.get("laws", ()):
        if row["verdict"] == "broken":
            lines.append(f"law {row['law']} is broken: {row['evidence']}")
        elif row["verdict"] == "not claimed" and row["law"] in REQUIRED:
            lines.append(f"law {row['law']} is not claimed")
    lines += [f"{claim} is true, and not claimed" for claim in laws.get("true but not claimed", ())]
    for row in equation.get("situations", ()):
        if row["points"] < SAME_Y + SAME_DX:
            why = row.get("evidence") or (
                f"y is off by {row['y']:.1g} (allowed {WITHIN_Y:g}), "
                f"dy/dx by {row['dx']:.1g} ({WITHIN_DX:g})"
            )
            lines.append(f"equation, {row['at']}: {why}")
    for row in stream.get("differences", ()):
        if row["points"] < NOT_WORSE:
            low, high = row["interval"]
            ends = "" if low is None else f", interval {low:.2f} to {high:.2f}"
            lines.append(f"stream, {row['of']}: {row['mean']:.2f}{ends}: {row['points']} points")
    return lines


if __name__ == "__main__":
    sys.exit(main())
