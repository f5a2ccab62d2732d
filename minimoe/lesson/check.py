"""A student's function held to the package, in seconds.

    check("mora_gate", mora_gate)

First the cases of questions.py, of which the first wrong one is shown; then a few laws, then
`laws.same`, as an adapter in layers that grow and learn. `minimoe check` holds a scheme to all the
laws.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapter import Adapter
from ..laws import (
    equation,
    granularity,
    grow_keeps,
    says,
    simplex,
    support,
    zero_at_birth,
    zero_is_finite,
)
from ..laws.case import Broken, Case, cases
from ..laws.check import Row, claimed, drawn, unchanged
from ..laws.laws import LAWS, Law
from ..laws.same import same
from ..tools.exercise import Wrong
from .questions import QUESTIONS, Inputs, Question
from .wrap import adapter_of, package_of

FEW = 5  # cases of each law, and of each step of the comparison
FEW_LAWS = (zero_at_birth, equation, granularity, support, simplex, zero_is_finite, grow_keeps)
WITHIN = 1e-6  # of what is expected
LONGEST = 300  # letters of what was got


def check(name: str, function: Callable[..., Any]) -> None:
    """Returns if the function is right, and prints what it was held to.

    Raises Wrong with the first case that is not: the inputs, what was expected, what was got, and
    which slip explains it in all cases; or with the law, or the step, that does not hold.
    Raises ValueError as `adapter_of` does.
    """
    for line in held_to(name, function):
        print(line)


@lru_cache
def held_to(name: str, function: Callable[..., Any]) -> list[str]:
    """What it was held to, in lines. Raises as `check` does."""
    scheme, question = adapter_of(name, function), QUESTIONS[name]
    at_first_case(question, function)
    held = []
    for law in FEW_LAWS:
        claims = claimed(scheme, {})
        if LAWS[law](claims):
            row = drawn(law.__name__, law, cases(scheme, {}, claims), FEW)
            why = " ".join((law.__doc__ or "").partition("\n")[2].split())
            what = f"law       {law.__name__}: {says(law)}\nwhy       {why}"
            require_held(row, what, raised_by(law, row.case) if row.case else None)
            held.append(row.law)
    package = package_of(name)
    rows = same(scheme, package, examples=FEW)
    for row in rows:
        require_held(row, f"step      {row.law}, beside minimoe.{package.__name__}")
    return [
        f"{name} agrees with minimoe.{package.__name__} in {len(question.cases)} cases,",
        f"as a layer that grows and learns ({len(rows)} steps of comparison),",
        f"and keeps {len(held)} laws: {', '.join(held)}.",
    ]


def require_held(row: Row, what: str, error: BaseException | None = None) -> None:
    if row.verdict == "broken":
        raise Wrong(f"{what}\nbroken    {row.evidence}") from error


def raised_by(law: Law, case: Case) -> BaseException | None:
    """The error of one's own code with which a law ends in this case, if it is not the law's."""
    try:
        law(case)
    except Exception as raised:  # whatever an answer raises
        error: BaseException | None = raised
        while isinstance(error, Broken):
            error = error.__cause__
        return error
    return None


def scheme_of(name: str, function: Callable[..., Any]) -> type[Adapter]:
    """The function as an adapter if it is right, else the package's scheme, and says which: so that
    a lesson can go on. Raises ValueError as `adapter_of` does."""
    scheme = adapter_of(name, function)
    if is_right(name, function):
        print(f"Your {name} runs here.")
        return scheme
    print(f"{name} is not right yet: minimoe.{package_of(name).__name__} runs in its place.")
    return package_of(name)


def is_right(name: str, function: Callable[..., Any]) -> bool:
    """Whether `check` finds nothing."""
    try:
        held_to(name, function)
    except Wrong:
        return False
    return True


def at_first_case(question: Question, function: Callable[..., Any]) -> None:
    """Raise Wrong with the first case, if there is one, in which the function is wrong."""
    answers = [answer(function, case) for case in question.cases]
    expected = [answer(question.expected, case) for case in question.cases]
    for case, got, want in zip(question.cases, answers, expected, strict=True):
        if alike(got, want):
            continue
        lines = [f"case      {', '.join(f'{n} = {shown(v)}' for n, v in case.items())}"]
        lines += [f"expected  {shown(want)}", f"got       {shown(got)}"]
        if not isinstance(got, Tensor | Exception):
            missing = "`return` is missing" if got is None else "return a tensor"
            lines.append(f"slip      {missing}.")
        for sentence, slip in question.slips:
            others = [answer(slip, case) for case in question.cases]
            if all(map(alike, answers, others)):
                lines.append(f"slip      {sentence}")
                break
        raise Wrong("\n".join(lines)) from (got if isinstance(got, Exception) else None)


def expect(
    case: str, got: Any, want: Any, within: float = 1e-3, slips: Mapping[str, Any] | None = None
) -> None:
    """Raise Wrong, with the case, unless what was got is what is expected: tensors, numbers, or
    lists of them, up to `within`; anything else the same.

        with exercise("2"):
            expect("D = 4, O = 6", count(4, 6), 24, slips={"added, not multiplied": 10})

    slips: {sentence: what a known mistake gives}; the first that is got is said.
    """
    if same_value(got, want, within):
        return
    lines = [f"case      {case}", f"expected  {shown(want)}", f"got       {shown(got)}"]
    if got is None:
        lines.append("slip      `return` is missing.")
    for sentence, slip in (slips or {}).items():
        if same_value(got, slip, within):
            lines.append(f"slip      {sentence}")
            break
    else:
        if isinstance(want, Tensor) and same_numbers(got, want, within):
            form = f"a tensor of shape {tuple(want.shape)}"
            lines.append(f"slip      The numbers are right: return {form}.")
    raise Wrong("\n".join(lines))


def same_numbers(got: Any, want: Tensor, within: float) -> bool:
    """The same numbers in another form."""
    try:
        flat = torch.as_tensor(got, dtype=torch.float64).flatten()
    except (TypeError, ValueError, RuntimeError):
        return False
    return same_value(flat, want.flatten(), within)


def same_value(got: Any, want: Any, within: float) -> bool:
    if isinstance(want, Tensor):
        if not isinstance(got, Tensor) or got.shape != want.shape or got.is_complex():
            return False
        got, want = got.detach().cpu().double(), want.detach().cpu().double()
        return torch.allclose(got, want, rtol=0, atol=within)
    if isinstance(want, list | tuple):
        got = got.tolist() if isinstance(got, Tensor | np.ndarray) else got
        return (
            isinstance(got, list | tuple)
            and len(got) == len(want)
            and all(same_value(g, w, within) for g, w in zip(got, want, strict=True))
        )
    if isinstance(want, Real) and not isinstance(want, bool):
        number = got.item() if isinstance(got, Tensor) and got.numel() == 1 else got
        return isinstance(number, Real) and abs(float(number) - float(want)) <= within
    return bool(got == want)


def answer(function: Callable[..., Any], case: Inputs) -> Any:
    """What it gives, or the exception that it raises, of copies of the inputs."""
    inputs = [v.clone() if isinstance(v, Tensor) else v for v in case.values()]
    try:
        with torch.no_grad(), unchanged():
            got = function(*inputs)
    except Exception as error:  # whatever an unfinished answer raises
        return error
    for (name, value), after in zip(case.items(), inputs, strict=True):
        if isinstance(value, Tensor) and not torch.equal(value, after):
            return ValueError(f"the function changes its input {name}: make a new tensor instead")
    return got


def alike(got: Any, want: Any) -> bool:
    """The same numbers in the same shape; or both the same kind of exception."""
    if not isinstance(got, Tensor) or not isinstance(want, Tensor):
        return isinstance(got, Exception) and type(got) is type(want)
    if got.layout is not torch.strided or got.is_meta or got.is_complex():
        return False
    return got.shape == want.shape and torch.allclose(
        got.double(), want.double(), rtol=WITHIN, atol=WITHIN, equal_nan=True
    )


def shown(value: Any) -> str:
    """A value as a line: all numbers of a small tensor, of a large one the shape and some."""
    if isinstance(value, Exception):
        return " ".join(f"{type(value).__name__}: {value}".split())[:LONGEST]
    if isinstance(value, Real) and not isinstance(value, int):
        return f"{float(value):.3g}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(shown, value))})"[:LONGEST]
    if not isinstance(value, Tensor):
        return repr(value)[:LONGEST]
    if value.layout is not torch.strided or value.is_meta or value.is_complex():
        return f"a tensor of {value.dtype}, {value.layout}, on {value.device}"
    if value.numel() > 9:
        some = ", ".join(f"{v:.3g}" for v in value.flatten()[:4].tolist())
        return f"({some}, ...) of shape {tuple(value.shape)}"
    return nested(value.tolist())


def nested(value: Any) -> str:
    """Numbers in brackets, as deep as they are."""
    if isinstance(value, list):
        return f"({', '.join(map(nested, value))})"
    return f"{value:.3g}"
