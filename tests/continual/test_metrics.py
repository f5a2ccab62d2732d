import math

import pytest

from minimoe.continual import metrics

# Three tasks. Row 0 before any, then after the first, second, third.
R = [
    [0.1, 0.2, 0.3],
    [0.8, 0.3, 0.2],
    [0.6, 0.9, 0.6],
    [0.5, 0.7, 1.0],
]


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("acc", (0.5 + 0.7 + 1.0) / 3),
        ("last", (0.5 + 0.7 + 1.0) / 3),
        ("bwt", ((0.5 - 0.8) + (0.7 - 0.9)) / 2),
        ("fwt", ((0.3 - 0.2) + (0.6 - 0.3)) / 2),
        ("forgetting", ((0.8 - 0.5) + (0.9 - 0.7)) / 2),
        ("transfer", (0.3 + (0.2 + 0.6) / 2) / 2),
        ("plasticity", (0.8 + 0.9 + 1.0) / 3),
        ("mammoth_forgetting", ((0.8 - 0.5) + (0.9 - 0.7)) / 2),
        ("avalanche_forgetting", ((0.8 - 0.5) + (0.9 - 0.7)) / 2),
        ("average", (0.8 + 0.3 + 0.2 + 0.6 + 0.9 + 0.6 + 0.5 + 0.7 + 1.0) / 9),
    ],
)
def test_by_hand(name, by_hand):
    assert math.isclose(metrics.METRICS[name](R), by_hand)
    assert math.isclose(metrics.summary(R)[name], by_hand)


def test_forgetting_leaves_the_last_row_out_of_the_best():
    improves = [[0.0, 0.0], [0.5, 0.0], [0.7, 1.0]]
    assert math.isclose(metrics.forgetting(improves), 0.5 - 0.7)
    assert math.isclose(metrics.bwt(improves), 0.7 - 0.5)


def test_the_three_kinds_of_forgetting_part():
    a = [
        [0.1, 0.1, 0.1],
        [0.5, 0.9, 0.1],  # task 1 at its best before it is learned
        [0.4, 0.6, 0.1],
        [0.7, 0.5, 0.8],  # task 0 at its best in the end
    ]
    assert math.isclose(metrics.forgetting(a), ((0.5 - 0.7) + (0.9 - 0.5)) / 2)
    assert math.isclose(metrics.mammoth_forgetting(a), ((0.7 - 0.7) + (0.6 - 0.5)) / 2)
    assert math.isclose(metrics.avalanche_forgetting(a), ((0.5 - 0.7) + (0.6 - 0.5)) / 2)
    assert math.isclose(metrics.plasticity(a), (0.5 + 0.6 + 0.8) / 3)


def test_a_single_task_has_no_transfer():
    one = metrics.summary([[0.1], [0.9]])
    assert one["acc"] == one["average"] == 0.9
    assert all(math.isnan(one[name]) for name in ("bwt", "fwt", "forgetting", "transfer"))
    assert one["plasticity"] == 0.9 and math.isnan(one["mammoth_forgetting"])


def test_unknown_rows_make_unknown_measures_only():
    nan = math.nan
    joint = metrics.summary([[0.1, 0.2], [nan, nan], [0.9, 0.7]])
    assert math.isclose(joint["acc"], 0.8)
    assert all(math.isnan(joint[name]) for name in ("bwt", "fwt", "forgetting", "average"))
    assert all(math.isnan(joint[f"{name}_forgetting"]) for name in ("mammoth", "avalanche"))


@pytest.mark.parametrize("bad", [[[1.0, 1.0], [1.0, 1.0]], [1.0, 2.0], [[]]])
def test_shape_is_named(bad):
    with pytest.raises(ValueError, match=r"allowed: \(J \+ 1, J\)"):
        metrics.acc(bad)
