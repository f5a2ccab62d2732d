"""The page that answers: who is compared with whom, by hand-made numbers."""

import pytest

from minimoe.studies import answer, memory, why
from minimoe.studies.study import report

SEEDS = [0, 1, 2, 3]


def page(accs, sizes, arms):
    """accs and sizes: of rows of memory on clusters; arms: of why on clusters."""
    cells = [c for c in memory.cells(SEEDS, False) if c["row"].removeprefix("clusters, ") in accs]
    cells = [c for c in cells if c["stream"] == "clusters"]
    found = [
        {
            "acc": accs[row := c["row"].removeprefix("clusters, ")]
            + 0.002 * (c["seed"] % 2) * (1 + list(accs).index(row) % 3),
            "stored": sizes[row],
            "whole": sizes[row],
            "seconds": 1.0,
        }
        for c in cells
    ]
    study = memory.STUDY
    result = report("memory", study, SEEDS, False, cells, found)
    tried = [c for c in why.cells(SEEDS, False) if c["stream"] == "clusters"]
    measured = [
        dict.fromkeys(why.STUDY.columns, 0.0)
        | {"acc": arms[arm := c["row"].removeprefix("clusters, ")], "seconds": 1.0}
        | ({"acc": arms[arm] + 0.01 * c["seed"]} if arm == why.USUAL else {})
        for c in tried
    ]
    return answer.page(result, report("why", why.STUDY, SEEDS, False, tried, measured))


@pytest.fixture(autouse=True)
def no_words(monkeypatch):
    """memory's own sentence and claims need all of its rows."""
    for study in (memory, why):
        plain = {"finding": lambda rows: "", "claims": lambda rows: []}
        made = type(study.STUDY)(**{**vars(study.STUDY), **plain})
        monkeypatch.setattr(study, "STUDY", made)


ACCS = {
    "mora, rank 2": 0.3,
    "mora, rank 8": 0.5,
    "mora of blocks, rank 2": 0.4,
    "mora of blocks, rank 8": 0.35,
    "lora, rank 8": 0.2,
    "alone, rank 1": 0.45,
    "own_ridge, M 0": 0.9,
    "oracle, rank 8": 1.0,
}
SIZES = {
    "mora, rank 2": 100,
    "mora, rank 8": 400,
    "mora of blocks, rank 2": 100,
    "mora of blocks, rank 8": 400,
    "lora, rank 8": 50,
    "alone, rank 1": 120,
    "own_ridge, M 0": 1000,
    "oracle, rank 8": 10,
}
ARMS = dict.fromkeys(why.ARMS, 0.5) | {"linear router": 0.2, "detached gate": 0.6}


def test_the_best_is_compared_with_the_best_that_stores_no_more():
    lines = [
        line for line in page(ACCS, SIZES, ARMS).splitlines() if line.startswith("| clusters, ")
    ]
    # row i of ACCS has .001 (1 + i mod 3) more in the mean; 3.182 · .00115 / √4 = .002
    assert lines == [
        "| clusters, rank 2 | .301 | mora of blocks, rank 2: .403 (100 numbers) | lora, rank 8: "
        ".202 (50 numbers) | +.201 [+.199, +.203] | supported | alone, rank 1: .453 (120 "
        "numbers) |",
        "| clusters, rank 8 | .502 | mora, rank 8: .502 (400 numbers) | alone, rank 1: .453 (120 "
        "numbers) | +.049 [+.047, +.051] | supported | own_ridge, M 0: .901 (1,000 numbers) |",
    ]


def test_the_same_comparison_at_two_sizes_is_one():
    accs, sizes = ({**known, "mora, rank 16": more} for known, more in ((ACCS, 0.45), (SIZES, 800)))
    said = page(accs, sizes, ARMS)
    assert "| clusters, rank 8, 16 | .502, .453 | mora, rank 8: .502 (400 numbers) |" in said
    assert "supported on: clusters at rank 2, 8, 16. Refuted" in said
    (line,) = (line for line in said.splitlines() if line.startswith("| clusters, rank 8"))
    assert line in page(ACCS, SIZES, ARMS).replace("rank 8 | .502", "rank 8, 16 | .502, .453")


def test_the_sentence_says_where_it_helps_and_where_not():
    said = page(ACCS | {"alone, rank 1": 0.51}, SIZES, ARMS)
    assert "supported on: clusters at rank 2. Refuted on: clusters at rank 8." in said
    assert "Inconclusive on: nothing.**" in said


def test_a_part_of_the_gate_that_helps_is_above_0():
    said = page(ACCS, SIZES, ARMS)
    # .5 to .53 in the seeds, from .2 and .6: 3.182 · .0129 / √4 = .021
    assert "| ranks score themselves, not a linear router | +.315 [+.294, +.336] |" in said
    assert "| the gate has a gradient | -.085 [-.106, -.064] |" in said


def test_where_nothing_passes_it_there_is_a_dash():
    said = page(ACCS | {"mora, rank 8": 0.95}, SIZES, ARMS)
    assert said.count("| supported | – |") == 1


def test_its_parts_are_arms_of_the_study():
    assert set(answer.PARTS.values()) <= set(why.ARMS)
