"""Settings that are picked where nothing is tested, and who takes them."""

import math

import pytest
import torch
from torch import nn

from minimoe import roster
from minimoe.compare import compare
from minimoe.continual import streams
from minimoe.continual.backbones import find
from minimoe.continual.learn import LEARNING_RATE, make_backbone, run_stream
from minimoe.options import Options
from minimoe.roster import ROSTER, entry_on, names, tuned
from minimoe.setting import Setting
from minimoe.studies import tuning
from minimoe.studies.common import PLACES, SIMPLE
from minimoe.studies.study import Rows, report
from minimoe.tools.files import write_json


def rows_of(x):
    return {tuple(row.flatten().sort().values.tolist()) for row in x}


@pytest.mark.parametrize("name", ["permuted-digits", "split-digits", "sequences"])
def test_what_is_held_out_is_not_trained_on_and_no_test(name):
    whole = streams.make(name, 3, seed=5)
    less = tuning.validation(whole, 5)
    for task, full in zip(less.tasks, whole.tasks, strict=True):
        n = len(full.x_train)
        assert len(task.x_test) == pytest.approx(n / 4, abs=0.51 if name != "split-digits" else 12)
        both = torch.cat([task.x_train, task.x_test])
        assert torch.equal(both.sort(0).values, full.x_train.sort(0).values)
    if name == "permuted-digits":  # of the same images, in every task and in the base domain
        held = [rows_of(task.x_test) for task in (*less.tasks, less.base)]
        assert all(part == held[0] for part in held)
        tests = rows_of(whole.tasks[0].x_test)
        for task in (*less.tasks, less.base):
            assert not held[0] & rows_of(task.x_train) and not held[0] & tests
    if name == "split-digits":  # its tasks are parts of the base domain
        assert all(not rows_of(task.x_test) & rows_of(less.base.x_train) for task in less.tasks)


def test_all_that_choose_have_as_many_trials_and_their_own_settings_first():
    for name, entry in ROSTER.items():
        trials = tuning.trials(name, 8)
        own = {key: entry.lr if key == "lr" else entry.settings[key] for key in entry.tunes}
        assert trials[0] == own and len({str(trial) for trial in trials}) == len(trials)
        possible = math.prod(map(len, entry.tunes.values()))
        assert len(trials) == min(8, possible), name
        for trial in trials:
            assert all(trial[key] in values for key, values in entry.tunes.items())
    # paired where learners differ in one thing
    assert tuning.trials("mora", 8) == tuning.trials("mora_detached", 8)
    assert tuning.trials("lora", 4) == tuning.trials("oracle", 4) == tuning.trials("replay_20", 4)
    # the same for every stream and machine, and few are the first of many
    assert tuning.trials("mora", 8)[:4] == tuning.trials("mora", 4)
    few = {name for name in ROSTER if len(tuning.trials(name, 8)) < 8}
    assert few == {"zero_shot", "class_mean", "trigram", "head_only"}
    # what defines these two is the share of their ranks that speaks
    for name in ("smora", "flylora"):
        assert "top_k" not in ROSTER[name].tunes and "rank" not in ROSTER[name].tunes


def result_of(values):
    """A study whose held accuracy is a function of the cell."""
    cells = tuning.cells([7], True)
    found = [{"held": values(cell), "seconds": 1.0} for cell in cells]
    return report("tuning", tuning.STUDY, [7], True, cells, found)


def test_the_best_trial_is_chosen_and_of_equals_the_first():
    second = {name: tuning.trials(name, 2)[-1] for name in ROSTER}
    place = next(iter(PLACES))

    def held(cell):
        if cell["name"] == "mora":
            return 0.5 + 0.1 * (cell["trial"] == second["mora"])
        if cell["name"] == "lora":  # its own settings diverge
            return 0.1 if cell["trial"] == second["lora"] else math.nan
        return math.nan if cell["name"] == "olora" else 0.5

    chosen = tuning.chosen(result_of(held))
    assert list(chosen) == [place] and "olora" not in chosen[place]
    assert chosen[place]["mora"] == second["mora"] and chosen[place]["lora"] == second["lora"]
    assert chosen[place]["ewc"] == tuning.trials("ewc", 1)[0]


def test_the_sentence_names_the_largest_gain():
    rows = Rows(
        [
            {"row": f"clusters, {name}, lr {lr}", "seed": 0}
            for name in ("mora", "ewc")
            for lr in (1, 2)
        ],
        [{"held": value} for value in (0.5, 0.6, 0.7, 0.4)],
    )
    said = tuning.finding(rows)
    assert "in the median over learners: on clusters .050 (at most .100, mora). Those" in said


def test_a_trial_that_diverges_has_no_value():
    (cell,) = [
        c
        for c in tuning.cells([3], True)
        if c["name"] == "mora" and c["trial"] == tuning.trials("mora", 1)[0]
    ]
    assert 0 < tuning.measure(cell | {"epochs": 20})["held"] < 1
    bad = cell | {"trial": cell["trial"] | {"tau": 1e-44}}
    assert math.isnan(tuning.measure(bad)["held"])


@pytest.fixture
def picked(tmp_path, monkeypatch):
    """As if the study had picked these on clusters."""
    settings = {"clusters": {"mora": {"lr": 0.5, "tau": 0.7}, "ridge": {"penalty": 3.0}}}
    write_json(tmp_path / "tuned.json", "tuned", {"settings": settings})
    monkeypatch.setattr(roster, "TUNED", tmp_path / "tuned.json")
    tuned.cache_clear()
    yield
    tuned.cache_clear()


def test_the_roster_has_the_settings_of_the_stream(picked):
    mora = entry_on("mora", "clusters")
    assert (mora.lr, mora.settings["tau"]) == (0.5, 0.7)
    assert mora.settings["top_k"] == ROSTER["mora"].settings["top_k"]
    assert entry_on("ridge", "clusters").settings == {"penalty": 3.0}
    for name, stream in (("mora", "subspaces"), ("mora", None), ("lora", "clusters")):
        assert entry_on(name, stream) == ROSTER[name]


def test_compare_takes_them_on_a_stream_of_this_package_with_its_own_model(picked, tmp_path):
    how = {"tasks": 2, "epochs": 1}
    found = compare(tmp_path / "a", "clusters", ["mora", "lora"], **how).settings
    assert found["tau"] == 0.7 and found["lr"] == {"mora": 0.5, "lora": LEARNING_RATE}
    given = compare(tmp_path / "b", "clusters", ["mora"], lr=0.1, changes={"tau": 0.2}, **how)
    assert (given.settings["lr"], given.settings["tau"]) == (0.1, 0.2)

    def own(stream):
        return nn.Sequential(nn.Linear(128, 64))

    for more in ({"backbone": own}, {"targets": ".*"}):
        settings = compare(tmp_path / str(more), "clusters", ["mora"], **how, **more).settings
        assert (settings["lr"], settings["tau"]) == (LEARNING_RATE, 0.1)
    other = compare(tmp_path / "c", streams.make("clusters", 2), ["mora"], epochs=1).settings
    assert (other["lr"], other["tau"]) == (LEARNING_RATE, 0.1)


def test_what_a_run_may_be_given_again_is_what_it_has(picked):
    run = Options("clusters", ["mora"], tasks=5)
    assert run.extended({"changes": {"tau": 0.7}}).tasks == 5
    with pytest.raises(ValueError, match=r"tau is 0\.1, allowed in this run: 0\.7"):
        run.extended({"changes": {"tau": 0.1}})
    with pytest.raises(ValueError, match=r"lr is 0\.1, allowed in this run: each learner's own"):
        run.extended({"lr": 0.1})


def test_a_place_is_a_stream_under_a_model():
    def place(stream="permuted-digits", backbone=None, targets=None):
        return Setting(stream, backbone, targets, 5, "cpu").tuned_as

    assert place() == "permuted-digits"
    assert place(backbone="attention") == "permuted-digits under attention"
    assert place(targets="fc1") is place(backbone=nn.Linear) is None
    assert place(streams.make("clusters", 2)) is None
    for label, there in PLACES.items():
        assert place(there.stream, there.backbone) == label
        assert {"lora", "lora_moe", "mora", "oracle"} <= set(there.names())
        assert ("smora" in there.names()) == there.all
        assert ("ridge_features" in there.names()) == ("features" in there.has)
    assert "class_mean" not in PLACES["clusters"].names()
    assert {"trigram", "head_only"} <= set(PLACES["sequences"].names())


@pytest.mark.parametrize(
    "label",
    [
        pytest.param(label, marks=[pytest.mark.slow] if label == "docstrings" else [])
        for label in PLACES
    ],
)
def test_who_lives_in_a_place_can_live_in_its_model(label):
    place = PLACES[label]
    make = find(place.backbone) if place.backbone else None
    able = names(make_backbone(streams.make(place.stream, 1), make))
    atlas = {n for n in able if ROSTER[n].kind == "atlas"}
    kept = atlas if place.all else atlas & {*SIMPLE}
    assert place.names() == [n for n in able if n in kept or n not in atlas]
    assert "alone" in kept


@pytest.mark.slow
@pytest.mark.parametrize("label", PLACES)
def test_all_who_live_in_a_place_can_be_carried_through_it(label):
    place = PLACES[label]
    stream, backbone = tuning.held_out(place.stream, 2, 1000, place.backbone)
    for name in place.names():
        own = label == next(iter(PLACES)) or ROSTER[name].kind != "atlas"  # trials are alike there
        for trial in (tuning.trials(name, place.trials)[i] for i in (0, -1)[not own :]):
            entry = ROSTER[name].with_trial(trial)
            run = run_stream(entry.make, backbone, stream, 0, 1, name=name, how={"lr": entry.lr})
            assert len(run.matrix) == 3, (name, trial)
