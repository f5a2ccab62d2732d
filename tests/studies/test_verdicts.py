"""Verdicts by hand, against SciPy, and every rule at its border."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from minimoe.continual.learn import train
from minimoe.continual.stream import Task
from minimoe.studies import atlas
from minimoe.studies.common import ACC, beside
from minimoe.studies.study import Rows, Study, report
from minimoe.studies.verdicts import Claim, Comparison, holm, judged, results, shared, together
from minimoe.tools.results import Sample, Spread, StudyResult, half_interval, parse, to_json
from minimoe.tools.tables import cell, study_table

VALUES = np.random.default_rng(0).normal(size=(2, 7))


def test_a_comparison_by_hand():
    # differences 1, 2, 3: mean 2, deviation 1, error 1/√3 = .577; t(.975, 2) = 4.303, half 2.484
    close = Comparison("a - b", [1.0, 3.0, 5.0], [0.0, 1.0, 2.0])
    assert close.effect == 2 and close.spread() == (pytest.approx(1 / math.sqrt(3)), 2)
    assert close.interval == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)
    assert str(close) == "a - b: +2.000 [-0.484, +4.484] (inconclusive)"
    # 2, 3, 4: mean 3 is beyond that
    assert Comparison("", [2.0, 4.0, 6.0], [0.0, 1.0, 2.0]).verdict == "supported"
    assert Comparison("", [0.0, 1.0, 2.0], [2.0, 4.0, 6.0]).verdict == "refuted"
    assert Comparison("", [2.0, 3.0, 4.0], 0.0).verdict == "supported"


def test_of_fewer_seeds_those_that_both_have_are_compared():
    more, less = [[1.0, 3.0, 5.0, 9.0]], [[0.0, 1.0, 2.0], [0.0, 1.0, 2.5]]
    both = shared("a - b", more, less, 0.5)
    assert both == Comparison("a - b", [[1.0, 3.0, 5.0]], less, 0.5) and both.effect == 2
    assert shared("", less, more).effect == -2


def test_schemes_of_the_atlas_have_the_first_five_seeds():
    seeds = {}
    for run in atlas.cells(range(10, 17), False):
        if "repeat" not in run:
            seeds.setdefault(run["row"], []).append(run["seed"])
    assert seeds["clusters, alone"] == seeds["clusters, mora"] == [*range(10, 17)]
    assert seeds["clusters, ewc"] == seeds["split-digits, poly"] == [*range(10, 15)]


def test_interval_and_p_are_scipys():
    more, less = VALUES
    one = Comparison("", list(more), list(less))
    paired = scipy.stats.ttest_rel(more, less)
    assert one.interval == pytest.approx(tuple(paired.confidence_interval(0.95)), rel=1e-12)
    assert one.p() == pytest.approx(paired.pvalue, rel=1e-12)
    for at in (0.3, 5.0):
        other = scipy.stats.ttest_1samp(more - less, at)
        assert one.p(at) == pytest.approx(other.pvalue, rel=1e-10)


def test_holm_by_hand():
    # in order .005, .01, .03, .04, times 4, 3, 2, 1: .02, .03, .06, .04; none below one before it
    p = [0.04, 0.005, 0.03, 0.01]
    assert holm(p) == pytest.approx([0.06, 0.02, 0.06, 0.03])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([0.03]) == [0.03] and holm([]) == []


def around(effect, error=0.001):
    """Five seeds with that mean difference and error."""
    d = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    return list(0.5 + effect + d * error * math.sqrt(5) / d.std(ddof=1))


@pytest.mark.parametrize(
    ("effect", "error", "verdict"),
    [
        (0.1, 0.001, "supported"),
        (0.021, 0.001, "supported"),
        (0.1, 0.04, "inconclusive"),  # large, and not told from 0
        (0.019, 0.001, "inconclusive"),  # told from 0, and not from what matters
        (0.01, 0.001, "refuted"),  # there, and too small to matter
        (0.0, 0.001, "refuted"),
        (-0.1, 0.001, "refuted"),
        (0.0, 0.1, "inconclusive"),
        (-0.01, 0.02, "inconclusive"),
    ],
)
def test_every_case_of_one_comparison(effect, error, verdict):
    one = Comparison("", around(effect, error), [0.5] * 5, matters=0.02)
    assert one.effect == pytest.approx(effect) and one.spread()[0] == pytest.approx(error)
    assert one.verdict == verdict


def test_what_is_lost_in_rounding_is_no_difference():
    same = Comparison("", [0.1 + 0.2] * 5, [0.3] * 5)
    assert 0.1 + 0.2 != 0.3 and same.effect == 0 and same.p() == 1
    assert same.verdict == "inconclusive"
    # differences of 12, 6, ... images of 450, in the mean just what matters: not less than it
    for shift in range(200):
        less = [shift / 450] * 10
        more = [(12 + shift) / 450] * 5 + [(6 + shift) / 450] * 5
        just = Comparison("", more, less, matters=0.02)
        assert just.effect == pytest.approx(0.02) and just.verdict == "supported"


def test_seeds_that_all_say_the_same_say_nothing_of_another():
    for more in ([0.5, 0.5], [0.7, 0.7], [0.1 + 0.2, 0.3], [0.7] * 10):
        for one in (
            Comparison("", more, [0.5] * len(more), 0.02),
            Comparison("", [0.5] * len(more), more),
        ):
            assert one.verdict == "inconclusive" and one.p() == one.p(0.02) == 1
            assert all(map(math.isnan, one.interval)) and "[" not in str(one)
        assert math.isnan(half_interval(more)) and Sample(more[0], 0.0, more).half is None


def test_a_run_that_is_no_number_is_left_out_on_both_sides():
    more, less = [[1.0, 3.0, 5.0], [math.nan, 2.0, 3.0], [2.0, 3.0, 5.0]], [[0.0, 1.0, 2.0]] * 3
    both = Comparison("", more, less)
    assert both.spread() == Comparison("", [more[0], more[2]], less[:2]).spread()
    assert math.isnan(Comparison("", more[1:], less[1:]).spread()[0])


def test_one_seed_tells_nothing_and_nan_nothing():
    for more, less in (([0.9], [0.1]), ([math.nan, 1.0], [0.0, 0.0])):
        one = Comparison("", more, less, 0.02)
        assert one.verdict == "inconclusive" and one.p() == one.p(0.02) == 1
        assert all(map(math.isnan, one.interval))
    with pytest.raises(ValueError, match="matters is -1, allowed: 0 or more"):
        Comparison("", [1.0], [0.0], -1)


def test_a_family_is_corrected():
    # alone p is .03: four of them are four chances
    d = scipy.stats.t.ppf(1 - 0.015, 4)
    one = Comparison("", around(d * 0.1, 0.1), [0.5] * 5)
    assert one.p() == pytest.approx(0.03) and one.verdict == "supported"
    found = judged([one] * 4)
    assert [c.verdict for c in found] == ["inconclusive"] * 4
    assert found[0].p == pytest.approx(0.03) and found[0].holm == pytest.approx(0.12)
    # and what is refuted, likewise: .03 of what matters
    low = Comparison("", around(0.2 - d * 0.1, 0.1), [0.5] * 5, matters=0.2)
    assert low.verdict == "refuted" and judged([low] * 2)[0].verdict == "inconclusive"
    assert judged([low] * 2)[0].holm_matters == pytest.approx(0.06)
    # the family is the whole study's, not the claim's
    both = results([Claim(1, "a", [one]), Claim(2, "b", [one, one])])
    assert [c.holm for claim in both for c in claim.comparisons] == pytest.approx([0.09] * 3)
    assert [len(claim.comparisons) for claim in both] == [1, 2]


def test_a_claim_is_of_all_its_comparisons():
    s, r, i = "supported", "refuted", "inconclusive"
    for verdict, each in {
        s: ([s], [s, s]),
        r: ([r], [r, r, r, i]),
        i: ([i], [s, i], [s, s, s, i], [r, i], [r, i, i], []),
        "conflicting": ([s, r], [s, s, s, r], [r, r, i, s]),
    }.items():
        for verdicts in each:
            assert together(verdicts) == verdict, verdicts


def test_repeats_widen_the_interval_by_hand():
    alone = Comparison("", [2.0, 3.0, 4.0], 0.0)
    # means over seeds 3, 4, 5: u = 1; s² / n = 1/3
    thrice = Comparison("", [[2.0, 3.0, 4.0], [3.0, 4.0, 5.0], [6.0, 5.0, 4.0]], 0.0)
    error, of = thrice.spread()
    assert thrice.effect == alone.effect == 3 and error == pytest.approx(math.sqrt(4 / 3))
    assert of == pytest.approx(2) and alone.spread() == (pytest.approx(math.sqrt(1 / 3)), 2)
    assert alone.verdict == "supported" and thrice.verdict == "inconclusive"
    # with u far above s² / n only R - 1 degrees are left
    far = Comparison("", [[2.0, 3.0, 4.0], [102.0, 103.0, 104.0]], 0.0)
    assert far.spread()[1] == pytest.approx(1, abs=1e-3)
    draw = np.random.default_rng(1)
    for _ in range(100):
        runs = draw.normal(size=(3, 5)) * draw.uniform(0.01, 3, size=(3, 1))
        wide, narrow = (Comparison("", r.tolist(), [0.0] * 5) for r in (runs, runs[:1]))
        assert np.ptp(wide.interval) >= np.ptp(narrow.interval)
    with pytest.raises(ValueError):
        Comparison("", [[1.0, 2.0]] * 3, [[0.0, 1.0]] * 2).spread()


def test_where_an_accuracy_stands():
    half = [0.5] * 5
    for effect, error, word in (
        (0.1, 0.01, "above"),
        (-0.1, 0.01, "below"),
        (0.001, 0.001, "level with"),
        (-0.01, 0.001, "level with"),
        (0.03, 0.03, "not told from"),
        (ACC - 0.001, 0.002, "not told from"),  # told from 0, and perhaps large enough to matter
    ):
        assert beside(around(effect, error), half) == word


def test_rows_keep_repeats_apart_and_a_page_says_so():
    measured = {0: [0.1, 0.2], 1: [0.3, 0.4], 2: [math.nan, 0.5]}
    cells = [
        {"row": "a", "seed": s} | ({"repeat": r} if r else {}) for r in measured for s in (0, 1)
    ]
    found = [{"acc": v, "seconds": 1.0} for values in measured.values() for v in values]
    rows = Rows(cells, found)
    assert rows["a"]["acc"] == [0.1, 0.2]
    first, repeat, broken = rows.runs("a", "acc")
    assert (first, repeat) == ([0.1, 0.2], [0.3, 0.4]) and math.isnan(broken[0])

    def claims(rows):
        return [Claim(1, "Large.", [Comparison("acc - 0", rows.runs("a", "acc"), 0.0, 0.02)])]

    study = Study("?", None, None, {"acc": "ACC"}, lambda rows: [], lambda rows: "Found.", claims)
    for n, words in ((6, "Of a, runs were made again"), (2, "in no interval")):
        result = report("tiny", study, [0, 1], False, cells[:n], found[:n])
        assert parse(StudyResult, to_json(result)) == result
        text = study_table(result)
        assert "1. Large." in text and "  acc - 0 " in text and words in text
        assert result.rows["a"]["acc"].repeats == ([[0.3, 0.4]] if n == 6 else None)


def test_a_repeat_is_the_same_run_but_for_rounding():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=draw, dtype=torch.float64)
    task = Task("one", (x, (x.sum(-1) > 0).long()), (x, torch.zeros(50).long()))

    def trained(**how):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)).double()
        train(model, model.parameters(), task, epochs=3, seed=5, batch=16, **how)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    run, again, other = trained(), trained(rows=1), trained(rows=2)
    for repeat in (again, other):
        assert not torch.equal(run, repeat)
        torch.testing.assert_close(run, repeat, rtol=1e-9, atol=1e-11)
    assert not torch.equal(again, other) and torch.equal(again, trained(rows=1))


def test_half_an_interval_of_a_mean_is_that_of_its_difference_from_0():
    assert half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)
    low, high = Comparison("", [0.2, 0.7, 0.4, 0.4], 0.0).interval
    assert half_interval([0.2, 0.7, 0.4, 0.4]) == pytest.approx((high - low) / 2)
    assert math.isnan(half_interval([1.0]))
    assert Sample(1.0, None, [1.0]).half is None
    assert cell(Sample(2.0, 1.0, [1.0, 2.0, 3.0])) == "2.000±2.484" and cell(Spread(2.0, 1.0)) == (
        "2.000±1.000"
    )


def test_an_atlas_repeats_what_its_sums_move(monkeypatch):
    cells = atlas.cells([0, 1], quick=False)
    repeats = [cell for cell in cells if "repeat" in cell]
    assert len(repeats) == 2 * len(atlas.ROUGH) * 2  # two seeds, twice
    assert all(cell["stream"] == "digit-worlds" for cell in repeats)
    assert not any("repeat" in cell for cell in atlas.cells([0, 1], quick=True))
    heard = []

    def told(make, backbone, stream, *rest, how, **more):
        heard.append((how, dict(stream.pretraining)))
        counts = dict.fromkeys(("stored", "read", "speaking"), 1)
        return type("Run", (), {"matrix": [[0.1], [0.5]], "records": {"mass": [[[1]]]}, **counts})

    monkeypatch.setattr(atlas, "run_stream", told)
    cell = repeats[0] | {"stream": "permuted-digits", "tasks": 1}
    for repeat, how in ((0, {}), (2, {"rows": 2})):
        assert atlas.measure(cell | {"repeat": repeat})["acc"] == 0.5
        trained, pretrained = heard.pop()
        assert trained == {"lr": cell["lr"]} | how and pretrained.get("rows", 0) == repeat
