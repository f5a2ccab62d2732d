"""Holding a scheme to the laws, and showing what came of it.

Hypothesis draws the cases, the same ones in every run. When one breaks a law, it searches for the
smallest case that does.
"""

import contextlib
import sysconfig
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ..adapter import Adapter
from ..claims import Claims
from ..tools.fingerprint import PACKAGE
from ..tools.results import EXACT, parse, read
from ..tools.tables import aligned
from .case import Broken, Case, LeftOut, cases, large, smallest
from .laws import EXAMPLES, LAWS, Law

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Verdict = Literal["held", "broken", "not claimed"]


@dataclass(frozen=True)
class Row:
    """What came of one law.

    evidence: how many cases it held for; or what broke it, and the smallest such case. `case` is
    that case: the law, called with it, raises again, and case.layer() and case.x() are the layer
    and the input that broke it.
    """

    law: str
    verdict: Verdict
    evidence: str
    case: Case | None = None

    def __str__(self) -> str:
        return f"{self.law}: {self.verdict}" + f" ({self.evidence})" * bool(self.evidence)


# Who is told, by the name of a law or step, of each case before it is looked at, and of what came
# of it: so that it is known of a process that does not come back (apart.py).
Tell = Callable[[str, str | Row], None]
TELL: ContextVar[Tell] = ContextVar("TELL", default=lambda name, what: None)


def check(scheme: type[Adapter], /, **settings: Any) -> list[Row]:
    """Hold a scheme to all laws, one Row each, in the order of LAWS.

    settings are the scheme's; rank, and top_k if the scheme claims it, are drawn where they are
    not given. Leaves torch's random state as it was. Raises as `claimed` does.
    """
    return [hold(law, scheme, **settings) for law in LAWS]


def hold(law: Law, scheme: type[Adapter], /, **settings: Any) -> Row:
    """Hold a scheme to one law. Raises as `claimed` does."""
    claims = claimed(scheme, settings)
    if not LAWS[law](claims):
        return Row(law.__name__, "not claimed", "")
    row = drawn(law.__name__, law, cases(scheme, settings, claims), EXAMPLES.get(law, 30))
    if row.verdict == "broken":
        return row
    free = {"top_k"} - settings.keys() if claims.top_k else set()
    return beyond(row, law, large(scheme, settings, claims), free)


def beyond(row: Row, law: Law, cases: list[Case], free: set[str]) -> Row:
    """The row, if the law holds for these cases too; else the first that breaks it, made small
    (`smallest`) unless the law is a slow one. Leaves torch's random state as it was."""
    seen = 0

    def found(case: Case) -> Row | None:
        """The row of a broken law; None if it is not, or nobody can tell."""
        nonlocal seen
        try:
            look(row.law, law, case)
        except KeyboardInterrupt:
            raise
        except LeftOut:
            return None
        except BaseException as error:
            return broken(row.law, error, case)
        seen += 1
        return None

    with torch.random.fork_rng(devices=[]):
        for case in cases:
            if worst := found(case):
                if EXAMPLES.get(law, 30) >= 10:
                    worst = found(smallest(lambda c: found(c) is not None, case, free)) or worst
                return worst
    return replace(row, evidence=f"{row.evidence}, {seen} large ones")


def look(name: str, test: Law, case: Case) -> None:
    """One case of the law or step of that name; who listens is told of it. Raises as it does."""
    tell = TELL.get()
    tell(name, str(case))
    try:
        with unchanged():
            test(case)
    except LeftOut:
        raise
    except (Exception, SystemExit) as error:
        tell(name, broken(name, error, case))
        raise


def drawn(name: str, test: Law, strategy: "SearchStrategy[Case]", examples: int) -> Row:
    """The row of that name: the test held for all cases drawn, or the smallest that breaks it.
    Leaves torch's random state as it was."""
    import hypothesis  # slow to import, and nothing but a check needs it

    last: Case | None = None
    kept = 0

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    @hypothesis.given(strategy)
    def held(case: Case) -> None:
        nonlocal last, kept
        last = case
        try:
            look(name, test, case)
        except LeftOut:
            hypothesis.reject()
        kept += 1

    with torch.random.fork_rng(devices=[]):
        try:
            held()
            row = Row(name, "held", f"{kept} cases")
        except KeyboardInterrupt:
            raise
        except hypothesis.errors.Unsatisfiable:
            row = Row(name, "broken", "no case at which it could be looked at")
        except hypothesis.errors.Flaky:
            row = Row(name, "broken", f"it differs from call to call; {last}", last)
        except BaseException as error:  # whatever a scheme raises is evidence
            row = broken(name, error, last)
    TELL.get()(name, row)
    return row


def broken(name: str, error: BaseException, case: Case | None) -> Row:
    """The row of a law that was broken by raising this, in this case."""
    what = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
    what = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(what.split()))
    short = what if len(what) <= LONGEST else f"{what[:LONGEST]} ..."
    return Row(name, "broken", f"{short}{place(error)}; {case}", case)


LONGEST = 500  # characters of a message


def place(error: BaseException) -> str:
    """Where in the scheme's own file it was raised, as " (own.py:12)"; "" if nowhere there."""
    while isinstance(error, Broken) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, Broken):
        return ""
    ours = (str(PACKAGE), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((*ours, "<"))
    ]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


# What torch's numbers depend on, and whoever changes it for itself changes for everyone.
STATE: Mapping[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "default device": (torch.get_default_device, torch.set_default_device),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "deterministic mode": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
}


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Raises Broken if what is done inside leaves STATE changed, also where it raises something
    else, which may be why. After it all is as before."""
    before = {name: get() for name, (get, _) in STATE.items()}
    error, changes = None, []
    try:
        yield
    except Exception as raised:
        error = raised
    finally:
        for name, (get, put) in STATE.items():
            if (now := get()) != before[name]:
                changes.append(f"changes torch's {name} from {before[name]} to {now}")
                put(before[name])
    if changes:
        raise Broken(changes[0]) from error
    if error is not None:
        raise error


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
        with torch.random.fork_rng(devices=[]), unchanged():
            claims = scheme(nn.Linear(size, size), **given).claims
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
        left = isinstance(error, Broken)
        raise ValueError(
            f"{scheme.__name__}(nn.Linear({size}, {size}), {arguments}) "
            + (str(error) if left else f"raises {type(error).__name__}: {error}")
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


def says(law: Callable[..., None]) -> str:
    """The law itself: the first line of its docstring."""
    return (law.__doc__ or "").splitlines()[0]


def table(
    results: dict[str, list[Row]],
    width: int | None = None,
    laws: Iterable[Callable[..., None]] = LAWS,
    head: str = "law",
    breaks: str = "breaks",
    dash: str = "not claimed by the scheme",
) -> str:
    """Laws down, schemes across, and below it the evidence for every broken one. Of another
    comparison: what its lines are, the head above them, what a scheme does to one that is broken,
    and what a dash means."""
    marks = {"held": "held", "broken": "BROKEN", "not claimed": "–"}
    rows = [[head, *results, "what it says"]]
    for i, law in enumerate(laws):
        verdicts = [marks[each[i].verdict].ljust(len("BROKEN")) for each in results.values()]
        rows.append([law.__name__, *verdicts, says(law)])
    lines = [*aligned(rows, width, align=(str.ljust, str.ljust)), "", f"–: {dash}."]
    for name, each in results.items():
        same: dict[str, list[Row]] = {}  # by what is wrong, whatever the case
        for row in (row for row in each if row.verdict == "broken"):
            same.setdefault(row.evidence.partition("; T ")[0], []).append(row)
        for alike in same.values():
            said = f"{name} {breaks} {', '.join(row.law for row in alike)}: {alike[0].evidence}"
            lines += ["", *textwrap.wrap(said, width or 100)]
    return "\n".join(lines)


@dataclass(frozen=True)
class RowResult:
    """A Row in JSON. name: of the law, or of the step of --as."""

    name: str
    verdict: Verdict
    evidence: str
    __pydantic_config__ = EXACT


@dataclass(frozen=True)
class CheckResult:
    """What `minimoe check --json` prints. held_to: "laws", or the scheme of --as. schemes: by the
    name that was asked for, a row for each of LAWS, or of STEPS, in their order."""

    held_to: str
    schemes: dict[str, list[RowResult]]
    __pydantic_config__ = EXACT

    @classmethod
    def of(cls, held_to: str, results: Mapping[str, Iterable[Row]]) -> "CheckResult":
        return cls(
            held_to,
            {
                name: [RowResult(row.law, row.verdict, row.evidence) for row in rows]
                for name, rows in results.items()
            },
        )

    @classmethod
    def read(cls, path: str | Path) -> "CheckResult":
        """What was printed, of a file. Raises FileNotFoundError; ValueError on a damaged file."""
        return read(path, "check", cls.from_json)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "CheckResult":
        """Raises ValueError, naming the place, if the entry is not what `to_json` gave."""
        return parse(cls, entry)
