"""Cells that are run once, and what the studies run."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import pytest
import torch
from torch import nn

from minimoe.adapt import adapt, count, grow
from minimoe.compare import compare
from minimoe.continual.backbones import Backbone
from minimoe.continual.learn import make_backbone
from minimoe.continual.streams import STREAMS, make
from minimoe.roster import ROSTER
from minimoe.studies import (
    STUDIES,
    atlas,
    growth,
    memory,
    recovery,
    routing,
    run_study,
    silence,
    study,
)
from minimoe.studies.common import carried, mean
from minimoe.studies.study import Rows, command, file_of, report, run
from minimoe.studies.why import CLASSES
from minimoe.tools.files import read_json, write_json
from minimoe.tools.results import StudyResult, to_json
from minimoe.tools.tables import findings

FINDINGS = Path(__file__).parent.parent.parent / "tutorials" / "findings"
TINY = {"study": "tiny", "row": "a", "seed": 0, "epochs": 1, "stream": "repeat", "tasks": 3}
MORA = {"scheme": "mora", "grows": True, "settings": {"rank": 4, "top_k": 4, "tau": 0.1}}


def measured(cell):
    """Leaves a mark each time it is run."""
    with open(cell["marks"], "a") as marks:
        marks.write(f"{cell['seed']}\n")
    if cell["seed"] == cell.get("fails"):
        raise FloatingPointError("as asked")
    return {"twice": 2 * cell["seed"], "none": math.nan, "line": [0.5, math.nan]}


def marked(path, seeds, **rest):
    return [{"row": "a", "seed": s, "marks": str(path / "marks"), **rest} for s in seeds]


def test_a_finished_cell_is_not_run_again(tmp_path):
    heard = []
    first = run(marked(tmp_path, [2, 1]), measured, tmp_path)
    found = run(
        marked(tmp_path, [0, 1, 2]), measured, tmp_path, done=lambda *said: heard.append(said)
    )
    assert (tmp_path / "marks").read_text().split() == ["2", "1", "0"]
    assert heard == [("", 2), ("a, seed 0", 1)]
    assert [cell["twice"] for cell in found] == [0, 2, 4]
    assert math.isnan(found[0]["none"]) and math.isnan(found[0]["line"][1])
    assert found[2]["seconds"] == first[0]["seconds"] > 0  # read, not measured anew


def test_what_was_finished_before_a_failure_is_kept(tmp_path):
    cells = [*marked(tmp_path, [0]), *marked(tmp_path, [1], fails=1)]
    with pytest.raises(FloatingPointError, match="as asked"):
        run(cells, measured, tmp_path)
    assert file_of(cells[0], tmp_path).exists() and not file_of(cells[1], tmp_path).exists()


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "truncated, or no JSON"),
        ("{", "truncated, or no JSON"),
        ("[]", "not written by minimoe"),
        ('{"cell": {"seed": 1}, "found": {}}', "not written by minimoe"),
        (None, "changed since it was written"),
        ({"kind": "run"}, "holds 'run', allowed here: cell"),
        ({"version": 0}, "of format 0, this minimoe reads 1"),
    ],
)
def test_a_damaged_file_of_a_cell_is_named(text, wrong, tmp_path):
    (cell,) = marked(tmp_path, [2])
    run([cell], measured, tmp_path)
    path = file_of(cell, tmp_path)
    if text is None:  # a digit
        text = path.read_text().replace('"twice": 4', '"twice": 5')
    elif isinstance(text, dict):
        entry = json.loads(path.read_text())
        text = json.dumps(entry | {"minimoe": entry["minimoe"] | text})
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path.name}: {wrong}.*; delete it to run its cell"):
        run([cell], measured, tmp_path)


def test_a_file_of_another_cell_or_of_odd_parts_is_named(tmp_path):
    cells = marked(tmp_path, [0, 1])
    run(cells, measured, tmp_path)
    first, second = (file_of(cell, tmp_path) for cell in cells)
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())  # swapped
    with pytest.raises(ValueError, match=f"{first.name}: the result of another cell"):
        run(cells, measured, tmp_path)
    first.write_bytes(kept)
    _, entry = read_json(first, "cell", mend="")
    for odd in ({"measured": [1]}, {"code": None}, {"cell": "a"}, {"more": 1}):
        write_json(first, "cell", entry | odd)
        with pytest.raises(ValueError, match=f"{first.name}: {next(iter(odd))}: "):
            run(cells, measured, tmp_path)


def test_cells_of_other_code_or_torch_are_run_again_and_named(tmp_path):
    cells, lines = marked(tmp_path, [0, 1]), []
    run(cells, measured, tmp_path, say=lines.append)
    assert not lines
    path = file_of(cells[1], tmp_path)
    _, entry = read_json(path, "cell", mend="")
    for key, there in (("code", "0123456789ab"), ("torch", "2.0.0")):
        write_json(path, "cell", entry | {key: there, "measured": {"seconds": 1.0, "twice": 99}})
        found = run(cells, measured, tmp_path, say=lines.append)
        assert [cell["twice"] for cell in found] == [0, 2]
        assert lines.pop() == f"cells of {key} {there} are run again: here it is {entry[key]}"
    assert (tmp_path / "marks").read_text().split() == ["0", "1", "1", "1"]


def test_a_study_leaves_torchs_threads_alone(tmp_path):
    torch.set_num_threads(2)
    try:
        run(marked(tmp_path, [0]), measured, tmp_path, jobs=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_code_that_is_edited_while_a_study_runs_is_no_result(tmp_path, monkeypatch):
    asked = iter(["before", "after"])
    monkeypatch.setattr(study, "fingerprint", lambda: next(asked))
    (cell,) = marked(tmp_path, [0])
    with pytest.raises(ValueError, match="a cell was run by other code: after there, before here"):
        run([cell], measured, tmp_path)
    assert not file_of(cell, tmp_path).exists()


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (b"{}", "atlas.json: not written by minimoe"),
        (b"\xff", "atlas.json: truncated, or no JSON"),
        ("why", "atlas.json: holds the study why; minimoe study atlas writes it"),
    ],
)
def test_a_damaged_page_of_another_study_is_named_before_anything_runs(odd, message, tmp_path):
    path = tmp_path / "atlas.json"
    if odd == "why":
        odd = (FINDINGS / "why.json").read_bytes()
    path.write_bytes(odd)
    with pytest.raises(ValueError, match=message):
        run_study("grain", tmp_path, quick=True)
    assert [p.name for p in tmp_path.iterdir()] == ["atlas.json"]
    with pytest.raises(ValueError, match="seeds is -1, allowed: 0 to 4294967295"):
        run_study("grain", tmp_path / "none", [0, -1])
    assert not (tmp_path / "none").exists()


def test_any_change_to_a_cell_is_another_cell(tmp_path):
    (cell,) = marked(tmp_path, [0])
    assert file_of(dict(reversed(cell.items())), tmp_path) == file_of(cell, tmp_path)
    for other in (cell | {"seed": 1}, cell | {"row": "b"}, cell | {"more": None}):
        assert file_of(other, tmp_path) != file_of(cell, tmp_path)


def tiny_cells():
    return [
        TINY | MORA | {"seed": 0},
        TINY | MORA | {"seed": 1},
        TINY | {"row": "b", "scheme": "lora", "grows": False, "settings": {"rank": 2}},
    ]


def without_seconds(found):
    for cell in found:
        del cell["seconds"]
    return json.dumps(found)  # in which nan equals nan


@pytest.mark.filterwarnings("ignore")  # of dask's and its servers'
@pytest.mark.slow
def test_on_a_local_dask_cluster_the_numbers_are_the_same(tmp_path):
    distributed = pytest.importorskip("distributed")
    here = run(tiny_cells(), carried, tmp_path / "here")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=tmp_path
    )
    with cluster, distributed.Client(cluster), joblib.parallel_config(backend="dask"):
        there = run(tiny_cells(), carried, tmp_path / "there", jobs=-1)
    assert without_seconds(there) == without_seconds(here)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
@pytest.mark.slow
def test_a_killed_study_repeats_no_finished_cell(tmp_path):
    words = "-m minimoe study grain --quick --seeds 0 1 --jobs 2 --out"
    start = [sys.executable, "-W", "error", *words.split()]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*start, tmp_path / "a"], start_new_session=True, **out)
    cells = tmp_path / "a" / "cells"
    while process.poll() is None and len(list(cells.glob("*.json"))) < 3:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    assert 3 <= len(kept) < 8 and not (tmp_path / "a" / "grain.json").exists()
    for folder in "ab":
        done = subprocess.run([*start, tmp_path / folder], **out, check=False)
        assert done.returncode == 0, done.stderr
        assert "findings.md" in done.stdout and "cell" in done.stderr  # the progress bar
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(cells.glob("*.json"))) == 8
    results = [json.loads((tmp_path / folder / "grain.json").read_text()) for folder in "ab"]
    for result in results:
        del result["core_minutes"], result["minimoe"]
    assert results[0] == results[1]
    page = (tmp_path / "a" / "findings.md").read_text()
    assert f"Made by code {results[0]['code']} with torch {torch.__version__}" in page
    assert results[0]["finding"] in page and results[0]["command"] in page
    assert (tmp_path / "a" / "grain.png").stat().st_size > 20_000


@pytest.mark.slow
def test_what_a_carried_cell_says():
    found = carried(TINY | MORA)  # A, B, A again
    assert len(found["seen"]) == 3 and found["seen"][-1] == pytest.approx(found["acc"])
    assert len(found["drift"]) == 2 and found["drift"][-1] == pytest.approx(found["interference"])
    assert 0 < found["back"] < found["back"] + found["anew"] < 1
    assert 0 < found["own"] < 1 and found["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert json.dumps(carried(TINY | MORA)) == json.dumps(found)
    longer = carried(TINY | MORA | {"stream": "permuted-digits", "tasks": 3})
    shorter = carried(TINY | MORA | {"stream": "permuted-digits", "tasks": 2})
    assert longer["seen"][:2] == shorter["seen"]  # a stream's start is the shorter stream


def test_what_growth_and_silence_say():
    grown = growth.measure(TINY | MORA)
    assert grown["sizes"] == [1, 3] == growth.sizes(3)
    assert growth.sizes(30) == [1, 5, 10, 15, 20, 25, 30]
    assert grown["reads"] == [4 * 640, 12 * 320 + 4 * 320]  # K (D + O) of 4; R D + K O of 12
    assert grown["read"] == grown["reads"][-1]
    assert grown["step"] == grown["steps"][-1] > 0 and grown["peak"] == grown["peaks"][-1] > 0
    assert grown["early"] == grown["seen"][-1] and growth.early([0.1] * 19 + [0.7, 0.2]) == 0.7
    closed = growth.measure(TINY | {"scheme": "own_ridge"})
    assert closed["acc"] == pytest.approx(closed["seen"][-1]) and closed["acc"] > 0.9
    assert closed["stored"] == 3 * (64 + 200 * 10) and math.isnan(closed["step"])
    delta = {"settings": MORA["settings"] | {"delta": 1.1}}  # nothing speaks
    silent = silence.measure(TINY | MORA | delta | {"stream": "permuted-digits"})
    assert [silent[name] for name in ("upright", "unseen", "noise", "tasks")] == [0, 0, 0, 0]
    loud = silence.measure(TINY | MORA | {"stream": "permuted-digits"})
    assert min(loud[name] for name in ("upright", "unseen", "noise", "tasks")) > 0.01
    assert silent["base_acc"] > 0.95


def test_the_arms_of_routing_are_as_equal_as_they_say():
    counts = {}
    for arm, rest in routing.arms().items():
        model = adapt(Backbone(), CLASSES[rest["scheme"]], targets=r"fc\d", **rest["settings"])
        for _ in range(19):
            grow(model)
        counts[arm] = count(model)
    own = counts[routing.SELF]
    for arm, counted in counts.items():
        assert counted["stored"] == pytest.approx(own["stored"], rel=0.06), arm
        assert counted["speaking"] == 640 * int(arm.split(", ")[1].split()[0]), arm


@pytest.mark.parametrize("stream", memory.TASKS)
def test_routed_loras_have_sizes_that_just_fit_the_memory_of_mora(stream):
    def stored(name, rank):
        entry = ROSTER[memory.METHODS[name].name]
        model = make_backbone(make(stream, 1))
        settings = entry.settings | {"rank": rank}
        adapt(model, entry.scheme, targets=model.targets, **settings)
        for _ in range(memory.TASKS[stream] - 1):
            grow(model)
        return count(model)["stored"]

    for rank in memory.METHODS["mora"].sizes:
        most = stored("mora", rank)
        for name in ("alone", "lora_moe"):
            fits = [r for r in memory.METHODS[name].sizes if stored(name, r) <= most]
            assert fits and stored(name, max(fits) + 1) > most, (name, rank)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", STUDIES)
def test_the_cells_of_a_study(name, quick, tmp_path):
    cells = STUDIES[name].cells([0, 1], quick)
    assert len({file_of(cell, tmp_path) for cell in cells}) == len(cells)
    assert {cell["seed"] for cell in cells} == {0, 1}
    assert len({(cell["row"], cell.get("repeat", 0)) for cell in cells}) == len(cells) / 2
    for cell in cells:
        if name in ("atlas", "tuning"):
            assert cell["name"] in ROSTER and cell["stream"] in STREAMS
        elif name == "memory":
            assert cell["method"] in memory.METHODS and cell["stream"] in STREAMS
        elif cell["scheme"] in growth.CLOSED:
            assert cell["scheme"] in ROSTER
        elif cell["scheme"] == recovery.CLOSED:
            assert name == "recovery" and not cell["settings"]
        else:
            CLASSES[cell["scheme"]](nn.Linear(64, 128), **cell["settings"])
    json.dumps(cells)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recovery", "capacity", "many_tasks"])
def test_what_is_learned_all_at_once_runs_quickly_and_is_drawn(name, tmp_path):
    result = run_study(name, tmp_path, [77], quick=True, jobs=1)
    assert to_json(StudyResult.read(tmp_path / f"{name}.json")) == to_json(result)
    assert list(result.rows) == [cell["row"] for cell in STUDIES[name].cells([77], True)]
    assert {claim.number for claim in result.claims} <= {11, 12, 13}
    assert {claim.verdict for claim in result.claims} == {"inconclusive"}  # of one seed
    assert result.finding in (tmp_path / "findings.md").read_text()
    assert (tmp_path / f"{name}.png").stat().st_size > 20_000


@pytest.mark.parametrize("name", STUDIES)
def test_the_words_of_a_finding_follow_the_numbers(name):
    cells = STUDIES[name].cells([0, 1, 2], quick=False)

    def made(slope):
        """Every measure at every cell, rising or falling with the row's place in the table."""
        order = list(dict.fromkeys(cell["row"] for cell in cells))
        found = []
        for cell in cells:
            place = slope * (order.index(cell["row"]) + 0.01 * (cell["seed"] * 7919 % 5) ** 0.5)
            value = 0.5 + place * (1 + 0.001 * cell["seed"])
            one = dict.fromkeys((*STUDIES[name].columns, "chance", "back", "anew"), value)
            curves = ("seen", "drift", "reads", "steps", "peaks")
            lines = {curve: [value, value] for curve in curves}
            found.append({"seconds": 60.0, **one, **lines, "sizes": [1.0, 2.0]})
        return report(name, STUDIES[name], [0, 1, 2], False, cells, found)

    rising, falling = made(0.1), made(-0.1)  # far above what matters
    assert rising.finding != falling.finding
    for up, down in zip(rising.claims, falling.claims, strict=True):
        assert up.claim == down.claim
    differing = [
        up.verdict != down.verdict for up, down in zip(rising.claims, falling.claims, strict=True)
    ]
    assert any(differing) or name in (
        "tuning",
        "memory",
    )  # which bear on none of the paper's claims
    assert rising.core_minutes == len(cells)
    page = findings([rising])
    assert rising.command == command(name, [0, 1, 2], False) and rising.command in page


def test_a_mean_reads_as_in_a_table():
    for values, words in (([0.5, 0.6], ".550"), ([10.3], "10.300"), ([-0.25], "-.250")):
        assert mean(values) == words


def test_rows_keep_the_order_of_seeds():
    rows = Rows(tiny_cells(), [{"acc": 0.1}, {"acc": 0.2}, {"acc": 0.3}])
    assert list(rows) == ["a", "b"] and rows["a"]["acc"] == [0.1, 0.2]


def test_an_unknown_study_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="study is 'routes', allowed: memory, why, routing"):
        run_study("routes", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_atlas_cell_is_what_compare_has(tmp_path):
    cells = [c for c in atlas.cells([1], False) if c["row"] == "rotated-digits, sema"]
    found = atlas.measure(cells[0] | {"tasks": 2, "epochs": 2})
    scheme = compare(tmp_path, "rotated-digits", ["sema"], [1], tasks=2, epochs=2).schemes["sema"]
    for measure in ("acc", "plasticity", "forgetting"):
        assert found[measure] == scheme[measure].mean
    for name in ("stored", "read", "speaking"):
        assert found[name] == getattr(scheme, name)


def test_the_atlas_says_who_is_first_and_who_is_not_told_from_it():
    cells = [
        {"row": f"split-digits, {name}", "name": name, "seed": seed}
        for name in ROSTER
        for seed in (0, 1, 2)
    ]
    accs = {"olora": [0.9, 0.91, 0.92], "ewc": [0.7, 0.9, 1.0], "mora": [0.8, 0.81, 0.83]}
    accs["joint"] = accs["moore"] = [1.0, 1.0, 1.0]  # see all at once, or are told: not in the race
    found = [{"acc": accs.get(c["name"], [0.1, 0.12, 0.12])[c["seed"]]} for c in cells]
    racing = sum(not entry.privileged for entry in ROSTER.values())
    said = atlas.finding(Rows(cells, found))
    assert said == (
        "First of those that are not told the task or shown all at once: on split-digits olora "
        f"(.910, its lead not supported over ewc; mora .813, no. 3 of {racing})."
    )


def test_a_curve_over_memory_goes_from_what_stores_least():
    """Of own_ridge M 0 stores more than M 20: then h is linear in the inputs, and wide."""
    sizes = {0: 3570.0, 20: 1320.0, 400: 20320.0}
    cells = [{"row": f"clusters, own_ridge, M {M}", "seed": 0} for M in sizes]
    found = [{"acc": whole / 1e5, "stored": whole, "whole": whole} for whole in sizes.values()]
    (panel,) = memory.panels(Rows(cells, found))
    (line,) = panel.lines
    assert line.x == [1320.0, 3570.0, 20320.0] and line.mean == [0.0132, 0.0357, 0.2032]
