"""Verdicts: what a comparison over the same seeds says, and what the comparisons of a claim say.

Of one comparison, with d_i = more - less in seed i, n seeds, and R runs that differ in the order of
their sums alone (R = 1 where a study did not ask for more):

    effect     e = mean d_i, of the first run
    error      s² / n + u       s²: variance of d_i over seeds; u: variance of mean d_i over runs
    interval   e ± t(.975, ν) √(s² / n + u)
               ν = min(n - 1, (s² / n + u)² / ((s² / n)² / (n - 1) + u² / (R - 1))), Satterthwaite
    p(a)       2 P(T_ν > |e - a| / √(s² / n + u)), the p-value of "the true difference is a"

u is not divided by R: another machine makes one run, and not the mean of R. Without repeats u is 0,
and the spread between machines is not in the interval. Where s and u are 0, seeds that all say the
same do not say how far another would be off: there is no interval, and p is 1.

A study makes a family of comparisons, each with `matters`, the smallest effect that matters, which
its source states before anybody looks. Holm's correction (1979) is over that family, once for all
p(0) and once for all p(matters):

    supported      e >= matters, and Holm's p(0) is below 5 %
    refuted        e < matters, and Holm's p(matters) is below 5 %
    inconclusive   neither

So to be supported is to be told from 0, by an estimate of at least what matters: the true effect is
above 0, and may be somewhat less than that. To be refuted is to have what was claimed excluded: by
an effect that points the other way, by none, and by one that is there but too small to matter. Each
of the two families can err on one side only, at 2.5 %, so in at most 5 % of all studies any verdict
is wrong: "above 0" or "below what matters".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

from ..tools.results import ClaimResult, ComparisonResult, Verdict

Values = list[float]  # one per seed
LEVEL = 0.05
DECIMALS = 12  # of a difference; what is below is the values' own rounding


@dataclass(frozen=True)
class Comparison:
    """Is `more` above `less`, over the same seeds, and by how much?

    more, less: values, one per seed; or such a list for each run, the first run first; less may be
    one number.
    """

    label: str
    more: Values | list[Values]
    less: Values | list[Values] | float
    matters: float = 0.0

    def __post_init__(self) -> None:
        if not self.matters >= 0:
            raise ValueError(f"matters is {self.matters}, allowed: 0 or more")

    def above(self, at: float = 0.0) -> np.ndarray:
        """more - less - at, (R, n). A run that is no number, on either side, is left out, but for
        the first."""
        each = np.atleast_2d(self.more) - np.atleast_2d(self.less) - at
        whole = np.isfinite(each).all(1)
        whole[0] = True
        return np.round(each[whole], DECIMALS)

    def mean_above(self, at: float = 0.0) -> float:
        """The mean of more - less - at, of the first run."""
        return round(float(self.above(at)[0].mean()), DECIMALS)

    @property
    def effect(self) -> float:
        return self.mean_above()

    def spread(self) -> tuple[float, float]:
        """√(s² / n + u), and ν; of one seed, or where a value is nan, an error of nan."""
        each = self.above()
        R, n = each.shape
        if n < 2:
            return math.nan, math.nan
        seeds = variance(each[0]) / n
        runs = variance(np.round(each.mean(1), DECIMALS)) if R > 1 else 0.0
        total = seeds + runs
        if not runs:
            return math.sqrt(total), n - 1
        of = total**2 / (seeds**2 / (n - 1) + runs**2 / (R - 1))
        return math.sqrt(total), min(n - 1, of)

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 %, nothing corrected; nan where there is none."""
        error, of = self.spread()
        half = float(stdtrit(of, 1 - LEVEL / 2)) * error if error else math.nan
        return self.effect - half, self.effect + half

    def p(self, at: float = 0.0) -> float:
        """p(at); 1 where nothing can be told."""
        error, of = self.spread()
        away = abs(self.mean_above(at))
        if math.isnan(error + away) or error == 0:
            return 1.0
        return float(2 * stdtr(of, -away / error))

    @property
    def verdict(self) -> Verdict:
        """In a family of its own."""
        return judged([self])[0].verdict

    def __str__(self) -> str:
        low, high = self.interval
        spread = "" if math.isnan(low) else f" [{low:+.3f}, {high:+.3f}]"
        return f"{self.label}: {self.effect:+.3f}{spread} ({self.verdict})"


def shared(label: str, more: list[Values], less: list[Values], matters: float = 0.0) -> Comparison:
    """Of runs of which one side may have fewer seeds: of the first, that both have."""
    n = min(len(more[0]), len(less[0]))
    return Comparison(label, [run[:n] for run in more], [run[:n] for run in less], matters)


def variance(values: np.ndarray) -> float:
    """The sample's; of equal values 0, and not the rounding of their mean."""
    return float(values.var(ddof=1)) if np.ptp(values) else 0.0


@dataclass(frozen=True)
class Claim:
    """A claim of the paper (its number in the list that findings.md prints), put as comparisons."""

    number: int
    claim: str
    comparisons: list[Comparison]


def holm(p: Sequence[float]) -> list[float]:
    """p-values of a family of m, corrected: with p_(1) <= ... <= p_(m), the k-th is the largest of
    (m + 1 - j) p_(j) over j <= k, and at most 1 (Holm, Scand. J. Statistics 6, 1979)."""
    corrected, largest = [0.0] * len(p), 0.0
    for k, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, (len(p) - k) * p[i])
        corrected[i] = min(1.0, largest)
    return corrected


def judged(family: Sequence[Comparison]) -> list[ComparisonResult]:
    """Every comparison of a family with its numbers and its verdict."""
    p, p_matters = [c.p() for c in family], [c.p(c.matters) for c in family]
    found = []
    for i, (of_0, of_matters) in enumerate(zip(holm(p), holm(p_matters), strict=True)):
        c = family[i]
        enough = c.mean_above(c.matters) >= 0
        verdict: Verdict = "inconclusive"
        if enough and of_0 < LEVEL:
            verdict = "supported"
        elif not enough and of_matters < LEVEL:
            verdict = "refuted"
        numbers = (c.effect, *c.interval, p[i], of_0, c.matters, p_matters[i], of_matters)
        found.append(ComparisonResult(c.label, *numbers, verdict))
    return found


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim, which is about all its comparisons: supported if each of them supports it;
    refuted if none does and more than half refute it; conflicting if some support it and others
    refute it; else inconclusive."""
    supported, refuted = verdicts.count("supported"), verdicts.count("refuted")
    if supported and refuted:
        return "conflicting"
    if 0 < supported == len(verdicts):
        return "supported"
    return "refuted" if 2 * refuted > len(verdicts) else "inconclusive"


def results(claims: Sequence[Claim]) -> list[ClaimResult]:
    """All claims of a study, whose comparisons are one family, as JSON holds them."""
    family = iter(judged([comparison for claim in claims for comparison in claim.comparisons]))
    found = []
    for claim in claims:
        own = [next(family) for _ in claim.comparisons]
        verdict = together([comparison.verdict for comparison in own])
        found.append(ClaimResult(claim.number, claim.claim, verdict, own))
    return found
