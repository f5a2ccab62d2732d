"""Holding a scheme to the laws, and showing what came of it.

Hypothesis draws the cases, the same ones in every run. When one breaks a law, it searches for the
smallest case that does.
"""

import textwrap
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..adapter import Adapter
from ..claims import Claims
from ..tools.tables import aligned
from .case import Broken, Case, LeftOut, cases
from .laws import EXAMPLES, LAWS, Law


@dataclass(frozen=True)
class Row:
    """What came of one law.

    evidence: how many cases it held for; or what broke it, and the smallest such case. `case` is
    that case: the law, called with it, raises again, and case.layer() and case.x() are the layer
    and the input that broke it.
    """

    law: str
    verdict: Literal["held", "broken", "not claimed"]
    evidence: str
    case: Case | None = None

    def __str__(self) -> str:
        return f"{self.law}: {self.verdict}" + f" ({self.evidence})" * bool(self.evidence)


def check(scheme: type[Adapter], /, **settings: Any) -> list[Row]:
    """Hold a scheme to all laws, one Row each, in the order of LAWS.

    settings are the scheme's; rank, and top_k if the scheme claims it, are drawn where they are
    not given. Leaves torch's random state as it was. Raises as `claimed` does.
    """
    return [hold(law, scheme, **settings) for law in LAWS]


def hold(law: Law, scheme: type[Adapter], /, **settings: Any) -> Row:
    """Hold a scheme to one law. Raises as `claimed` does."""
    import hypothesis  # slow to import, and nothing but a check needs it

    claims = claimed(scheme, settings)
    if not LAWS[law](claims):
        return Row(law.__name__, "not claimed", "")
    last: Case | None = None
    kept = 0

    @hypothesis.settings(
        max_examples=EXAMPLES.get(law, 30),
        deadline=None,
        database=None,
        derandomize=True,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    @hypothesis.given(cases(scheme, settings, claims))
    def held(case: Case) -> None:
        nonlocal last, kept
        last = case
        try:
            law(case)
        except LeftOut:
            hypothesis.reject()
        kept += 1

    with torch.random.fork_rng(devices=[]):
        try:
            held()
        except hypothesis.errors.Unsatisfiable:
            return Row(law.__name__, "broken", "no case at which it could be looked at")
        except (Exception, SystemExit) as error:  # whatever a scheme raises is evidence
            what = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
            return Row(law.__name__, "broken", f"{' '.join(what.split())}; {last}", last)
    return Row(law.__name__, "held", f"{kept} cases")


def claimed(scheme: type[Adapter], settings: dict[str, Any]) -> Claims:
    """What an ordinary layer of the scheme claims at these settings.

    Raises TypeError if scheme is no class of adapters; ValueError if its constructor raises, or if
    a claim has a value that is not allowed.
    """
    if not (isinstance(scheme, type) and issubclass(scheme, Adapter)):
        raise TypeError(f"scheme is {scheme!r}, allowed: a subclass of minimoe.Adapter")
    given = {"rank": 2} | settings
    size = max(8, given["rank"])
    try:
        with torch.random.fork_rng(devices=[]):
            claims = scheme(nn.Linear(size, size), **given).claims
    except (Exception, SystemExit) as error:
        arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(
            f"{scheme.__name__}(nn.Linear({size}, {size}), {arguments}) raises "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(claims, Claims):
        raise ValueError(f"{scheme.__name__}.claims is {claims!r}, allowed: a minimoe.Claims")
    for name, allowed in (
        ("granularity", ("token", "sample", "batch")),
        ("expert", ("rank", "block")),
        ("simplex", (True, False, "kept")),
    ):
        if getattr(claims, name) not in allowed:
            raise ValueError(
                f"{scheme.__name__} claims {name} {getattr(claims, name)!r}, "
                f"allowed: {', '.join(map(str, allowed))}"
            )
    return claims


def says(law: Law) -> str:
    """The law itself: the first line of its docstring."""
    return (law.__doc__ or "").splitlines()[0]


def table(results: dict[str, list[Row]], width: int | None = None) -> str:
    """Laws down, schemes across, and below it the evidence for every broken one."""
    marks = {"held": "held", "broken": "BROKEN", "not claimed": "–"}
    rows = [["law", *results, "what it says"]]
    for i, law in enumerate(LAWS):
        verdicts = [marks[each[i].verdict].ljust(len("BROKEN")) for each in results.values()]
        rows.append([law.__name__, *verdicts, says(law)])
    lines = [
        *aligned(rows, width, align=(str.ljust, str.ljust)),
        "",
        "–: not claimed by the scheme.",
    ]
    for name, each in results.items():
        for row in each:
            if row.verdict == "broken":
                lines += [
                    "",
                    *textwrap.wrap(f"{name} breaks {row.law}: {row.evidence}", width or 100),
                ]
    return "\n".join(lines)
