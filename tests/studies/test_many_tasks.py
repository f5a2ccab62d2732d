"""Tuned on many rotations: who sees what, how often, and what the numbers say."""

import random

import pytest
import torch

from minimoe.adapt import adapt, count
from minimoe.continual import streams
from minimoe.continual.backbones import Backbone
from minimoe.roster import SCHEMES
from minimoe.studies import many_tasks
from minimoe.studies.many_tasks import ARMS, DENSE, MOE, ROTATIONS, SHOTS, STREAM, TUNED
from minimoe.studies.study import Rows
from minimoe.studies.verdicts import results


def test_equally_many_ranks_speak_and_the_wide_store_as_much():
    counts = {}
    for arm, (scheme, settings) in ARMS.items():
        counts[arm] = count(adapt(Backbone(), SCHEMES[scheme], r"fc\d", **settings))
    assert {counts[arm]["speaking"] for arm in (DENSE, MOE, "mora")} == {8 * 640}  # K Σ (D + O)
    assert counts["mora"]["stored"] == counts["lora, = stored"]["stored"] == 32 * 640
    assert counts[MOE]["stored"] == 32 * 640 + 8 * 320  # and a router's row for each of 8 experts
    assert counts["lora, = stored"]["speaking"] == 32 * 640


@pytest.mark.parametrize("seed", [0, 1, 4])
def test_the_rotation_left_is_tuned_on_by_nobody(seed):
    *order, left = many_tasks.drawn(seed).tolist()
    assert sorted([*order, left]) == list(range(ROTATIONS)) and len(order) == TUNED[-1]
    assert many_tasks.drawn(seed).tolist() == [*order, left]


def test_a_few_images_of_each_digit():
    task = streams.make(STREAM, ROTATIONS, 0).tasks[3]
    few = many_tasks.few(task, 0)
    assert few.y_train.bincount().tolist() == [SHOTS] * 10
    shown = {(x.tobytes(), y) for x, y in zip(task.x_train.numpy(), task.y_train.tolist())}  # noqa: B905
    assert {(x.tobytes(), y) for x, y in zip(few.x_train.numpy(), few.y_train.tolist())} <= shown  # noqa: B905
    assert few.test == task.test
    assert not torch.equal(many_tasks.few(task, 1).x_train, few.x_train)


def test_tuning_takes_as_many_steps_on_any_number_of_rotations(monkeypatch):
    heard = []

    def hears(model, weights, task, epochs, seed, **rest):
        heard.append((len(task.x_train), epochs, rest))

    monkeypatch.setattr(many_tasks, "train", hears)
    stream = streams.make(STREAM, ROTATIONS, 0)
    one = len(stream.tasks[0].x_train)
    for cell in many_tasks.cells([0], False):
        heard.clear()
        found = many_tasks.measure(cell)
        if cell["n"]:
            assert heard[0] == (cell["n"] * one, 40 // cell["n"], {})
        assert (found["tuned"] == found["tuned"]) == (len(heard) == 2) == (cell["n"] > 0)
        assert heard[-1] == (10 * SHOTS, 20, {"batch": 10})
        assert found["acc"] == found["before"]  # nothing was learned
    *order, _ = many_tasks.drawn(0).tolist()
    together = many_tasks.pooled([stream.tasks[t] for t in order[:2]])
    assert torch.equal(together.x_train[one:], stream.tasks[order[1]].x_train)
    assert len(together.y_test) == 2 * len(stream.tasks[0].y_test)


@pytest.mark.slow
def test_who_was_tuned_knows_what_it_was_tuned_on():
    cells = {(c["scheme"], c["n"]): c for c in many_tasks.cells([0], False)}
    found = many_tasks.measure(cells["lora_moe", 2] | {"epochs": 4})
    assert found["tuned"] > 0.8 and found["acc"] > 0.2
    assert found["stored"] == 32 * 640 + 8 * 320 and found["speaking"] == 8 * 640


def made_up(gaps):
    """Rows of which lora_moe is above lora by this, for each n of TUNED."""
    cells = many_tasks.cells([0, 1, 2, 3, 4], False)
    found = []
    for cell in cells:
        above = gaps[TUNED.index(cell["n"])] * (cell["scheme"] == "lora_moe")
        noise = random.Random(f"{cell['row']} {cell['seed']}").uniform(0, 0.005)
        found.append({"acc": 0.5 + above + noise, "before": 0.1})
    return Rows(cells, found)


@pytest.mark.parametrize(
    "gaps, said",
    [
        ((-0.1, -0.1, 0.0, 0.05, 0.1), ["supported"] * 3),
        ((0.0, 0.0, 0.0, 0.05, 0.1), ["supported"] * 3),
        ((0.1, 0.1, 0.0, 0.0, 0.0), ["refuted"] * 3),
        ((0.1, 0.1, 0.1, 0.1, 0.1), ["refuted", "supported", "refuted"]),
        ((-0.1, -0.1, 0.0, 0.0, -0.05), ["supported", "refuted", "supported"]),
        ((-0.1, 0.1, 0.2, 0.2, 0.2), ["conflicting", "supported", "supported"]),
    ],
)
def test_verdicts(gaps, said):
    rows = made_up(gaps)
    assert [claim.verdict for claim in results(many_tasks.claims(rows))] == said
    stands = "above" if gaps[0] > 0 else "below" if gaps[0] < 0 else "level with"
    assert f"lora_moe {stands} lora" in many_tasks.finding(rows).partition(";")[0]
    assert many_tasks.gap(rows, 8) == pytest.approx([gaps[-1]] * 5, abs=0.01)
