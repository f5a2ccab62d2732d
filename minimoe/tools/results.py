"""What `compare` and `study` find, as types, and how they are read from JSON.

Numbers that say nothing are nan in Python, and null in JSON, which has no nan.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError
from scipy.special import stdtrit

from .files import read_json

if TYPE_CHECKING:
    Number = float
else:  # in JSON a number or null
    Number = Annotated[float | None, AfterValidator(lambda n: math.nan if n is None else n)]
Result = TypeVar("Result")
Verdict = Literal["supported", "refuted", "inconclusive", "conflicting"]
ROUNDING = 1e-12
EXACT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
MEND = "the command that wrote it writes it anew"


@dataclass(frozen=True)
class Spread:
    """Over seeds: mean, and the sample's standard deviation; None where there is none."""

    mean: float | None
    std: float | None
    __pydantic_config__ = EXACT

    @classmethod
    def of(cls, values: Iterable[float], **more: Any) -> Self:
        """Of one value per seed. One nan, or an infinite one, makes all of it None; one seed has no
        deviation."""
        values = list(values)
        if not all(map(math.isfinite, values)):
            return cls(None, None, **more)
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, **more)


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean of n values, t s / √n, t of n - 1 degrees.
    nan of one value, and where all are the same: nothing then says how far another would be off."""
    n = len(values)
    if n < 2 or max(values) - min(values) < ROUNDING:
        return math.nan
    return float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)


@dataclass(frozen=True)
class Sample(Spread):
    """A spread, and the values themselves, by seed. repeats: those of the same runs with their sums
    in another order."""

    values: list[float | None]
    repeats: list[list[float | None]] | None = None

    @property
    def half(self) -> float | None:
        """`half_interval`; None where there is none."""
        values = [value for value in self.values if value is not None]
        half = half_interval(values)
        return None if self.std is None or math.isnan(half) else half


@dataclass(frozen=True)
class Reachable(Spread):
    """What a scheme can reach on the planted stream: a limit, or else what it is shown to reach."""

    limit: bool


@dataclass(frozen=True)
class SchemeResult:
    """One row of `compare`.

    matrix: (seeds, J + 1, J), the accuracy matrix of each seed (metrics.py), J tasks. found: what a
    probe.Recorder recorded, mean over seeds. seconds: learning, per seed; step: of a step of
    training. trainable, stored, read, speaking: numbers of parameters (Learner.count).
    """

    acc: Spread
    bwt: Spread
    forgetting: Spread
    fwt: Spread
    transfer: Spread
    average: Spread
    last: Spread
    plasticity: Spread
    mammoth_forgetting: Spread
    avalanche_forgetting: Spread
    interference: Spread
    intrusion: Spread
    redundancy: Spread
    redundancy_chance: Spread
    ambiguity: Spread
    instability: Spread
    trainable: int
    stored: int
    read: int
    speaking: int
    seconds: Spread
    step: Spread
    matrix: list[list[list[Number]]]
    found: dict[str, list[Any]]
    reachable: Reachable | None = None
    __pydantic_config__ = EXACT

    def __getitem__(self, measure: str) -> Spread:
        """A measure by its name."""
        spread = getattr(self, measure)
        assert isinstance(spread, Spread)
        return spread


@dataclass(frozen=True)
class CompareResult:
    """What compare.json holds. code: the fingerprint of the code that made it (fingerprint.py),
    None where it is not known. closed_forms: what these score by algebra, where the stream says it;
    they are no schemes."""

    stream: str
    device: str
    torch: str
    code: str | None
    seeds: list[int]
    settings: dict[str, Any]
    schemes: dict[str, SchemeResult]
    closed_forms: dict[str, Spread] | None = None
    __pydantic_config__ = EXACT

    @classmethod
    def read(cls, path: str | Path) -> "CompareResult":
        """What a compare.json holds. Raises FileNotFoundError; ValueError on a damaged file."""
        return read(path, "compare", cls.from_json)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "CompareResult":
        """Raises ValueError, naming the place, if the entry is not what `to_json` gave."""
        result = parse(cls, entry)
        J = result.settings.get("tasks")
        if type(J) is not int or J < 1 or not result.seeds or not result.schemes:
            raise ValueError("no tasks, seeds or schemes")
        for name, scheme in result.schemes.items():
            scheme.found.update({key: with_nan(array) for key, array in scheme.found.items()})
            _require_shape(f"{name}'s matrix", scheme.matrix, (len(result.seeds), J + 1, J))
            for key, array in scheme.found.items():
                ends = {"mass": (J, J), "said": (J, J), "alike": (), "chance": ()}.get(key, (J,))
                _require_shape(f"{name}'s {key}", array, (J + 1, *ends))
        return result


def _require_shape(what: str, array: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless nested lists of numbers have this shape."""
    if not shape:
        if not isinstance(array, float | int):
            raise ValueError(f"{what} holds {array!r}, allowed: numbers")
    elif not isinstance(array, list) or len(array) != shape[0]:
        raise ValueError(f"{what} has not the shape that seeds and tasks say")
    else:
        for part in array:
            _require_shape(what, part, shape[1:])


@dataclass(frozen=True)
class Line:
    """One line of a panel: means over seeds, and half the widths of their 95 % intervals, at each
    of the panel's x, or of its own."""

    label: str
    mean: list[Number]
    half: list[Number]
    x: list[float] | None = None
    __pydantic_config__ = EXACT


@dataclass(frozen=True)
class Panel:
    """One picture of a study: lines over x; or, with `names`, a point for each of these rows.

    kinds: what each of the names is. log: a logarithmic x.
    """

    title: str
    xlabel: str
    lines: list[Line]
    ylabel: str | None = None
    x: list[float] | None = None
    log: bool | None = None
    names: list[str] | None = None
    kinds: list[str] | None = None
    __pydantic_config__ = EXACT


@dataclass(frozen=True)
class ComparisonResult:
    """One comparison of a study's family (studies/verdicts.py, which has the formulas).

    low, high: the interval of 95 %. p, holm: of a difference of 0, and corrected for the family.
    matters: the smallest effect that matters; p_matters, holm_matters: as p and holm, of a
    difference of just that.
    """

    label: str
    effect: Number
    low: Number
    high: Number
    p: float
    holm: float
    matters: float
    p_matters: float
    holm_matters: float
    verdict: Verdict
    __pydantic_config__ = EXACT


@dataclass(frozen=True)
class ClaimResult:
    """A claim of the paper, by its number, with what came of it."""

    number: int
    claim: str
    verdict: Verdict
    comparisons: list[ComparisonResult]
    __pydantic_config__ = EXACT


@dataclass(frozen=True)
class StudyResult:
    """What NAME.json of a study holds. columns: measures of the table, and their heads. code: as
    CompareResult's."""

    study: str
    asks: str
    command: str
    seeds: list[int]
    quick: bool
    torch: str
    code: str | None
    core_minutes: float
    columns: dict[str, str]
    rows: dict[str, dict[str, Sample]]
    panels: list[Panel]
    finding: str
    claims: list[ClaimResult] = field(default_factory=list)
    __pydantic_config__ = EXACT

    @classmethod
    def read(cls, path: str | Path) -> "StudyResult":
        """What a study's JSON holds. Raises FileNotFoundError; ValueError on a damaged file."""
        return read(path, "study", cls.from_json)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "StudyResult":
        """Raises ValueError, naming the place, if the entry is not what `to_json` gave."""
        result = parse(cls, entry)
        if not result.study.isidentifier() or not result.rows or not result.panels:
            raise ValueError("no study's name, rows or panels")
        for label, row in result.rows.items():
            if missing := result.columns.keys() - row.keys():
                raise ValueError(f"{label} lacks {min(missing)}")
        for panel in result.panels:
            names = panel.names or []
            if len(panel.kinds or []) != len(names):
                raise ValueError(f"the panel {panel.title} has not a kind for each name")
            if names and len(panel.lines) != len(names):
                raise ValueError(f"the panel {panel.title} has not a line for each name")
            for line in panel.lines:
                along = panel.x if line.x is None else line.x
                if along is None and not names:
                    raise ValueError(f"{panel.title}, {line.label}: has nothing along it")
                wanted = 1 if names else len(along or [])
                if not len(line.mean) == len(line.half) == wanted:
                    raise ValueError(f"{panel.title}, {line.label}: not {wanted} numbers")
        return result


def parse(kind: type[Result], entry: Any) -> Result:
    """What `to_json` made of one of these types. Raises ValueError, naming the place, if a field is
    missing, unknown or of another type."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(entry))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(f"{place}: {first['msg']}") from None


def read(
    path: str | Path, kind: str, parsed: Callable[[dict[str, Any]], Result], mend: str = MEND
) -> Result:
    """What a file of `files.write_json` holds, as `parsed` makes it of the content. Raises
    FileNotFoundError; ValueError, in a line with the file and the mend."""
    _, entry = read_json(path, kind, mend=mend)
    try:
        return parsed(entry)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {mend}") from None


def to_json(entry: Any) -> Any:
    """A result as dictionaries, lists and numbers: nan (and what is infinite) as None, and no field
    that is not there."""
    if is_dataclass(entry) and not isinstance(entry, type):
        held = {f.name: (getattr(entry, f.name), f.default) for f in fields(entry)}
        optional = {name for name, (value, default) in held.items() if value == default}
        return {name: to_json(held[name][0]) for name in held if name not in optional}
    if isinstance(entry, Mapping):
        return {key: to_json(value) for key, value in entry.items()}
    if isinstance(entry, list | tuple):
        return [to_json(value) for value in entry]
    return None if isinstance(entry, float) and not math.isfinite(entry) else entry


def with_nan(entry: Any) -> Any:
    """nan for the None that JSON holds in its place."""
    if isinstance(entry, dict):
        return {key: with_nan(value) for key, value in entry.items()}
    if isinstance(entry, list):
        return [with_nan(value) for value in entry]
    return math.nan if entry is None else entry
