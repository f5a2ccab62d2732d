"""What `compare` and `study` find, as types; each writes and reads its own JSON.

Numbers that say nothing are nan in Python, and null in JSON, which has no nan.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Spread:
    """Over seeds: mean, and the sample's standard deviation; None where there is none."""

    mean: float | None
    std: float | None

    @classmethod
    def of(cls, values: Iterable[float], **more: Any) -> Self:
        """Of one value per seed. One nan makes all of it None; one seed has no deviation."""
        values = list(values)
        if any(map(math.isnan, values)):
            return cls(None, None, **more)
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, **more)


@dataclass(frozen=True)
class Sample(Spread):
    """A spread, and the values themselves, by seed."""

    values: list[float | None]


@dataclass(frozen=True)
class Reachable(Spread):
    """What a scheme can reach on the planted stream: a limit, or else what it is shown to reach."""

    limit: bool


@dataclass(frozen=True)
class SchemeResult:
    """One row of `compare`.

    matrix: (seeds, J + 1, J), the accuracy matrix of each seed (metrics.py), J tasks. found: what a
    probe.Recorder recorded, mean over seeds. seconds: learning, per seed; step: of a step of
    training. trainable, stored, active: numbers of parameters.
    """

    acc: Spread
    bwt: Spread
    forgetting: Spread
    fwt: Spread
    transfer: Spread
    average: Spread
    last: Spread
    interference: Spread
    intrusion: Spread
    redundancy: Spread
    ambiguity: Spread
    instability: Spread
    trainable: int
    stored: int
    active: int
    seconds: Spread
    step: Spread
    matrix: list[list[list[float]]]
    found: dict[str, list[Any]]
    reachable: Reachable | None = None

    def __getitem__(self, measure: str) -> Spread:
        """A measure by its name."""
        spread = getattr(self, measure)
        assert isinstance(spread, Spread)
        return spread


@dataclass(frozen=True)
class CompareResult:
    """What compare.json holds."""

    stream: str
    device: str
    torch: str
    seeds: list[int]
    settings: dict[str, Any]
    schemes: dict[str, SchemeResult]

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "CompareResult":
        schemes = {}
        for name, row in entry["schemes"].items():
            known = {f.name: row[f.name] for f in fields(SchemeResult) if f.name in row}
            for key, value in known.items():
                if key == "reachable":
                    known[key] = Reachable(**value)
                elif isinstance(value, dict) and key != "found":
                    known[key] = Spread(**value)
            known |= {key: with_nan(known[key]) for key in ("matrix", "found")}
            schemes[name] = SchemeResult(**known)
        return cls(**{**entry, "schemes": schemes})


@dataclass(frozen=True)
class Line:
    """One line of a panel: means over seeds, and standard deviations, at each of the panel's x."""

    label: str
    mean: list[float]
    std: list[float]


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


@dataclass(frozen=True)
class ClaimResult:
    """A claim of the paper, by its number, with what came of it."""

    number: int
    claim: str
    verdict: str
    numbers: list[str]


@dataclass(frozen=True)
class StudyResult:
    """What NAME.json of a study holds. columns: measures of the table, and their heads."""

    study: str
    asks: str
    command: str
    seeds: list[int]
    quick: bool
    torch: str
    core_minutes: float
    columns: dict[str, str]
    rows: dict[str, dict[str, Sample]]
    panels: list[Panel]
    finding: str
    claims: list[ClaimResult] = field(default_factory=list)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "StudyResult":
        rows = {
            label: {measure: Sample(**value) for measure, value in row.items()}
            for label, row in entry["rows"].items()
        }
        panels = [
            Panel(**{**panel, "lines": [Line(**with_nan(line)) for line in panel["lines"]]})
            for panel in entry["panels"]
        ]
        claims = [ClaimResult(**claim) for claim in entry["claims"]]
        return cls(**{**entry, "rows": rows, "panels": panels, "claims": claims})


def to_json(entry: Any) -> Any:
    """A result as dictionaries, lists and numbers: nan as None, and no field that is not there."""
    if is_dataclass(entry) and not isinstance(entry, type):
        held = {f.name: (getattr(entry, f.name), f.default) for f in fields(entry)}
        optional = {name for name, (value, default) in held.items() if value == default}
        return {name: to_json(held[name][0]) for name in held if name not in optional}
    if isinstance(entry, Mapping):
        return {key: to_json(value) for key, value in entry.items()}
    if isinstance(entry, list | tuple):
        return [to_json(value) for value in entry]
    return None if entry != entry else entry


def with_nan(entry: Any) -> Any:
    """nan for the None that JSON holds in its place."""
    if isinstance(entry, dict):
        return {key: with_nan(value) for key, value in entry.items()}
    if isinstance(entry, list):
        return [with_nan(value) for value in entry]
    return math.nan if entry is None else entry
