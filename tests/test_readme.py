"""What README and the pages say is what the files and the code say."""

import contextlib
import io
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import get_args

import pytest

from minimoe import bench
from minimoe.compare import shown_settings
from minimoe.continual import streams
from minimoe.continual.backbones import Backbone
from minimoe.continual.learn import make_backbone
from minimoe.continual.metrics import METRICS
from minimoe.continual.probe import PROBLEMS
from minimoe.laws import LAWS
from minimoe.lesson.numbers import NUMBERS, numbers
from minimoe.roster import EPOCHS, ROSTER, SCHEMES, TUNED, entry_on, names, under
from minimoe.schemes.alone import TrainedAlone
from minimoe.studies import STUDIES, routing
from minimoe.studies.atlas import ROUGH
from minimoe.studies.common import PLACES, beside
from minimoe.studies.memory import TASKS as MEMORY_TASKS
from minimoe.studies.why import TASKS
from minimoe.tools import tables
from minimoe.tools.files import read_json
from minimoe.tools.results import CompareResult, StudyResult, Verdict, to_json

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "tutorials"))
import pages  # noqa: E402


def fences(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def stored(name):
    return json.loads((ROOT / "tutorials" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_readme_is_short_and_shows_first_what_to_read():
    assert len(README.splitlines()) <= 200
    rows = re.findall(r"^\| \[(\w+\.py)\]\((minimoe/\S+)\) \| (\d+) \|", README, re.M)
    assert [name for name, *_ in rows] == ["lora.py", "lora_moe.py", "mora.py", "adapter.py"]
    for name, path, lines in rows:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert len(source.splitlines()) == int(lines), name


@pytest.mark.parametrize("path", sorted(pages.pages()), ids=lambda path: path.name)
def test_a_page_is_what_its_command_writes(path):
    """If this fails: python tutorials/pages.py"""
    assert path.read_text(encoding="utf-8") == pages.pages()[path]


@pytest.mark.parametrize(
    ("name", "stream", "seeds"),
    [
        ("compare", "subspaces", [0]),
        ("permuted", "permuted-digits", [0]),
        ("planted", "planted", [0, 1, 2]),
    ],
)
def test_the_stored_results_are_of_the_settings_and_the_roster_of_today(name, stream, seeds):
    result = stored(name)
    model = make_backbone(streams.make(stream, 1))
    usual = names(model, "scheme", "baseline", "privileged")
    # a scheme that was added since then has not been run yet
    assert list(result["schemes"]) == [n for n in usual if n in result["schemes"]]
    assert {"lora", "lora_moe", "mora"} <= set(result["schemes"])
    assert (result["stream"], result["seeds"]) == (stream, seeds)
    then = result["settings"]
    assert (then["tasks"], then["epochs"]) == (streams.usual_tasks(stream), EPOCHS)
    entries = {n: entry_on(n, stream) for n in result["schemes"]}
    assert shown_settings(entries, {}, None).items() <= then.items()


def test_the_settings_are_those_that_the_study_of_them_picked():
    """If this fails: python tutorials/pages.py"""
    assert read_json(TUNED, "tuned", mend="")[1] == pages.settings()


def test_the_numbers_that_lessons_read_are_those_of_the_stored_results():
    """If this fails: python tutorials/pages.py"""
    assert read_json(NUMBERS, "lesson", mend="")[1] == pages.lesson_numbers()
    assert numbers("atlas")["permuted-digits"]["mora"]["stored"] == 25600
    with pytest.raises(ValueError, match="section is 'x', allowed: atlas, planted, bench"):
        numbers("x")


def test_a_stored_result_is_whole_and_reads_and_writes_to_the_same():
    for path in (ROOT / "tutorials").glob("*/*.json"):
        kind, entry = read_json(path, "compare", "study", "bench", mend="")
        read = {"compare": CompareResult.read, "study": StudyResult.read, "bench": bench.read}
        assert to_json(read[kind](path)) == entry, path.name


def test_tables_name_all_measures():
    shown = [*tables.COLUMNS, "last", "plasticity"]
    assert [*shown, "mammoth_forgetting", "avalanche_forgetting"] == list(METRICS)
    assert list(tables.PROBLEMS) == list(PROBLEMS)


@cache
def stored_atlas():
    path = ROOT / "tutorials" / "findings" / "atlas.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_what_readme_concludes_from_the_numbers():
    """A closed form is above every gate that the task's loss trains, on all four streams of digits
    and in each seed, and no scheme above it; where a gate sees a part of a sample, MoRA is not
    above whom README names."""
    rows = stored_atlas()["rows"]
    digits = [p for p in PLACES if "digit" in p and " under " not in p]
    untold = [name for name in SCHEMES if not ROSTER[name].privileged]
    assert all(f"{stream}, {name}" in rows for stream in digits for name in untold)
    level = set()
    for stream in digits:
        accs = {n: rows[f"{stream}, {n}"]["acc"] for n in (*untold, "own_ridge", "ridge")}
        form = max(("own_ridge", "ridge"), key=lambda name: accs[name]["mean"])
        for name in untold:
            gates = accs[name]["values"]  # of some fewer seeds
            closed = accs[form]["values"][: len(gates)]
            if name == "input_domain_aware" or issubclass(SCHEMES[name], TrainedAlone):
                stands = beside(closed, gates)  # below: .02 or more
                assert stands != "below"
                level |= {name} if stands != "above" else set()
            else:
                assert all(a > b for a, b in zip(closed, gates, strict=True)), (stream, name)
        stands = beside(accs["alone"]["values"], accs["mora"]["values"])
        assert stands == ("level with" if stream == "permuted-digits" else "above"), stream
    four = {"mixture_of_loras", "mixda", "phatgoose", "token_level"}
    assert level == {"input_domain_aware", "alone", *four}
    for place, other, stands in (
        (under("permuted-digits", "attention"), "lora", "not told from"),
        ("sequences", "lora", "level with"),
        ("docstrings", "zero_shot", "level with"),
    ):
        mora, theirs = (rows[f"{place}, {name}"]["acc"]["values"] for name in ("mora", other))
        assert beside(mora, theirs) == stands, (place, other)
    still, lda = (
        tables.short(rows[f"docstrings, {n}"]["acc"]["mean"]) for n in ("zero_shot", "lda_features")
    )
    said = f"the bare model, {still}; `lda_features`, without a step, has {lda}."
    assert said in " ".join(README.split())
    stream = streams.make("permuted-digits", 5)
    learner = ROSTER["own_ridge"].make(Backbone(), stream)
    for t in range(5):
        learner.learn(stream, t, lambda *args: None)
    mora = stored("permuted")["schemes"]["mora"]["stored"]
    frozen = sum(p.numel() for p in Backbone().parameters())
    said = f"stores {learner.count()['stored']:,} numbers, MoRA {mora:,} beside a"
    assert f"{said} backbone of {frozen:,}" in " ".join(README.split())


def test_who_is_above_mora_is_as_readme_says():
    """As the page of all schemes has it, by its verdicts; those marked * are told the task."""
    rows, words = stored_atlas()["rows"], " ".join(README.split())
    page = (ROOT / "tutorials" / "results" / "schemes.md").read_text(encoding="utf-8")
    above = {}
    for place in PLACES:
        (found,) = re.findall(rf"^\*\*{place}\*\*, mora \S+\. Above: (.*?)\. Below", page, re.M)
        above[place] = re.findall(r"(\w+) [.\d]+", found)
    assert above["subspaces"] == ["input_domain_aware", "aoe", "mixda"]
    for name, said in (
        ("input_domain_aware", "`input_domain_aware`, a density of each task's inputs, {}"),
        ("aoe", "`aoe`, LoRAs that score themselves, {}"),
        ("mixda", "`mixda`, {}"),
    ):
        assert said.format(tables.short(rows[f"subspaces, {name}"]["acc"]["mean"])) in words
    counts = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    digits = [p for p in PLACES if "digit" in p and " under " not in p]
    clusters, *each = (counts[len(above[place])] for place in ("clusters", *digits))
    assert f"on clusters {clusters}, on digits {', '.join(each)}." in words
    assert f"all {len(SCHEMES)}. Above MoRA, not told the task, are on subspaces" in words


def test_what_readme_says_of_the_two_streams_that_decide_more():
    folder, words = ROOT / "tutorials" / "findings", " ".join(README.split())
    why, memory = (
        json.loads((folder / f"{name}.json").read_text())["rows"] for name in ("why", "memory")
    )
    for said, row in (
        ("a subspace for each task, a closed form, gives", "subspaces, own_subspace, m 8"),
        ("at the memory of 8 ranks,", "subspaces, own_subspace, m 16"),
        ("MoRA's signed ranks,", "subspaces, mora, rank 8"),
        ("ranks that score |z|,", "subspaces, mora by size, rank 8"),
        ("whole LoRAs that score ‖z‖,", "subspaces, mora of blocks, rank 8"),
        ("above all four at each memory; at 8 ranks it has", "clusters, alone, rank 7"),
        ("the best of them", "clusters, mora_detached, rank 8"),
    ):
        mean = f"{memory[row]['acc']['mean']:.3f}".replace("0.", ".", 1)
        assert f"{said} {mean}" in words, row
    apart = {}  # from mora, on each stream
    for arm in ("linear router", "cosine router", "detached gate"):
        apart[arm] = sorted(
            why[f"{stream}, mora"]["acc"]["mean"] - why[f"{stream}, {arm}"]["acc"]["mean"]
            for stream in TASKS
        )
    spans = {arm: " to ".join(tables.short(v) for v in (d[0], d[-1])) for arm, d in apart.items()}
    assert f"self-scoring is {spans['linear router']} above a linear router's" in words
    assert f"and {spans['cosine router']} above a cosine router's" in words
    costs = " to ".join(tables.short(-v) for v in (apart["detached gate"][i] for i in (-1, 0)))
    assert f"the gate's gradient costs {costs}." in words
    atlas = stored_atlas()["rows"]
    tuned, detached = (atlas[f"subspaces, {n}"]["acc"] for n in ("mora", "mora_detached"))
    gain = tables.short(tuned["mean"] - detached["mean"])
    assert f"It pays at tuned settings on subspaces, {gain}, and after 50 tasks" in words
    assert beside(tuned["values"], detached["values"]) == "above"
    same, twice = (memory[f"subspaces, own_subspace, m {m}"]["whole"]["mean"] for m in (8, 16))
    assert same == memory["subspaces, mora, rank 8"]["whole"]["mean"] == twice / 2
    closed = memory["subspaces, own_subspace, m 8"]["acc"]["values"]
    for own, word in (("mora", "below"), ("by size", "above"), ("of blocks", "above")):
        row = f"subspaces, {own if own == 'mora' else f'mora {own}'}, rank 8"
        assert beside(memory[row]["acc"]["values"], closed) == word
    alone, self_scored = memory["clusters, alone, rank 7"], "clusters, mora"
    assert alone["whole"]["mean"] < memory["clusters, mora, rank 8"]["whole"]["mean"]
    for row in (row for row in memory if row.startswith(self_scored)):
        assert beside(alone["acc"]["values"], memory[row]["acc"]["values"]) == "above", row
    page = (folder / "self-activation.md").read_text(encoding="utf-8")
    assert "equal memory is supported on: subspaces at rank 2, 8. Refuted on: subspaces" in page
    assert "at rank 16; clusters at rank 2, 8, 16;" in page
    assert "Inconclusive on: nothing." in page and len(MEMORY_TASKS) == 4


def test_what_readme_says_of_fifty_tasks():
    result = json.loads((ROOT / "tutorials" / "findings" / "growth.json").read_text())["rows"]
    names = ("mora", "mora_detached", "lora_moe", "own_ridge")
    mora, detached, moe, ridge = (tables.short(result[name]["acc"]["mean"]) for name in names)
    said = f"permuted-digits, {mora} to {detached} (`growth`; LoRA-MoE {moe}, `own_ridge` {ridge})"
    assert f"after 50 tasks of {said}" in " ".join(README.split())
    stands = beside(*(result[name]["acc"]["values"] for name in names[:2]))
    assert stands == "above"


def test_where_mora_has_settings_that_were_picked_on_test_data():
    own = {**ROSTER["mora"].settings, "lr": ROSTER["mora"].lr}
    settings = read_json(TUNED, "tuned", mend="")[1]["settings"]
    same = [p for p in settings if settings[p]["mora"].items() <= own.items()]
    words = " ".join(README.split())
    assert len(same) == 4 and "MoRA's first trial, which four streams kept, was itself" in words


def test_how_far_the_order_of_sums_moves_a_mean():
    moved = [
        abs(fmean(again) - row["acc"]["mean"])
        for row in stored_atlas()["rows"].values()
        for again in row["acc"].get("repeats") or []
    ]
    words = " ".join(README.split())
    assert len(moved) == 2 * len(ROUGH)
    assert f"digit-worlds by up to {tables.short(max(moved))}, which" in words


def test_what_the_planted_page_shows():
    """MoRA learns each task less than it could, and keeps it; LoRA-MoE learns, and forgets."""
    result = stored("planted")

    def forgotten(name):
        return result["schemes"][name]["forgetting"]["mean"]

    first = [m[t + 1][t] for m in result["schemes"]["lora_moe"]["matrix"] for t in range(5)]
    assert min(first) > 0.94 and forgotten("lora_moe") > 0.1 > 0.01 > forgotten("mora")
    assert forgotten("lora_grown") > 0.05
    for scheme in result["schemes"].values():
        limit = scheme.get("reachable")  # of a closed form none is known
        assert not limit or not limit["limit"] or scheme["acc"]["mean"] <= limit["mean"] + 1e-6


@pytest.mark.parametrize("word", ["layer.grow()", "adapt import", "report(result"])
def test_the_python_examples_run_and_print_what_they_say(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = (fence for fence in fences("python") if word in fence)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {})
    (wanted,) = re.findall(r"^print\(.*\)(?:\n#|  #) (.*)$", example, re.M)
    assert printed.getvalue() == wanted + "\n"
    assert (tmp_path / "adapters.safetensors").exists() == (word == "adapt import")


def test_the_findings_are_of_the_studies_of_today_and_as_readme_says():
    folder = ROOT / "tutorials" / "findings"
    ran = [name for name in STUDIES if (folder / f"{name}.json").exists()]
    results = [json.loads((folder / f"{name}.json").read_text()) for name in ran]
    waiting = ", ".join(f"`{name}`" for name in STUDIES if name not in ran)
    words = " ".join(README.split())
    said = f"Not run yet with today's measures: {waiting}."
    assert (said in words) if waiting else ("Not run yet" not in words)
    seen = {row.split(", ")[0] for row in stored_atlas()["rows"]}
    places = ", ".join(place for place in PLACES if place not in seen)
    assert (f"The atlas waits for: {places}." in words) if places else ("atlas waits" not in words)
    for name, result in zip(ran, results, strict=True):
        rows = dict.fromkeys(cell["row"] for cell in STUDIES[name].cells(result["seeds"], False))
        # a scheme that was added since then has not been run yet
        assert [row for row in rows if row in result["rows"]] == list(result["rows"])
        fewest = 1 if name == "tuning" else 5
        assert len(result["seeds"]) >= fewest and not result["quick"]
    verdicts = [claim["verdict"] for result in results for claim in result["claims"]]
    words = " ".join(README.split())
    count = ", ".join(f"{verdicts.count(v)} {v}" for v in get_args(Verdict))
    assert f"{len(verdicts)} claims: {count}." in words


def test_what_speaks_against_the_headline_is_beside_it():
    result = json.loads((ROOT / "tutorials" / "findings" / "routing.json").read_text())
    loras, own = (
        f"{result['rows'][f'permuted-digits, {arm}']['acc']['mean']:.3f}".lstrip("0")
        for arm in (routing.LORAS_81, routing.SELF)
    )
    (claim,) = (claim for claim in result["claims"] if claim["number"] == 8)
    words = " ".join(README.split())
    said = f"of which 81 ranks speak reaches {loras} and MoRA, of which 9 do, {own}: that"
    assert f"After 20 tasks of permuted-digits a router over LoRAs {said}" in words
    assert f"that self-activation does better than routing is {claim['verdict']}." in words


def test_the_number_of_laws():
    words = {22: "twenty-two"}
    assert f"holds it to {words[len(LAWS)]} laws" in README


@pytest.mark.slow
def test_the_commands_for_a_scheme_of_ones_own_run(tmp_path):
    commands = next(fence for fence in fences("sh") if "new-scheme" in fence)
    _, new, check, compare = (line.partition("#")[0].split() for line in commands.splitlines())
    (tmp_path / "test_mine.py").write_text(
        next(fence for fence in fences("python") if "laws_of(MyGate)" in fence)
    )
    compare += ["--tasks", "2", "--epochs", "1"]
    for command in (new, check, compare, ["pytest", "-q"]):
        done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "minimoe-compare" / "compare.json").read_text())
    assert list(result["schemes"]) == ["mora", "MyGate"]
    scheme = tmp_path / "my_gate.py"
    broken = scheme.read_text().replace("torch.ones_like(z)", "1 / z.norm(dim=-1, keepdim=True)")
    scheme.write_text(broken)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 1 and b"MyGate breaks zero_is_finite" in done.stdout


def test_what_is_named_is_there():
    tree = next(fence for fence in fences("text") if fence.startswith("minimoe/"))
    for name in re.findall(r"(\w+\.py)", tree):
        assert (ROOT / "minimoe" / name).exists(), name
    for folder in re.findall(r"\b(\w+)/", tree):
        assert any((ROOT / at / folder).is_dir() for at in (".", "minimoe", "tests", "tutorials"))
    rooms = {p.name for p in (ROOT / "minimoe").iterdir() if (p / "__init__.py").exists()}
    assert all(f"{room}/" in tree for room in rooms)
    for path in re.findall(r"\]\(((?!https?:)[^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:minimoe|tests|tutorials)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path


def test_what_readme_says_of_speed_is_what_bench_found():
    result = bench.read(ROOT / "tutorials" / "results" / "bench-cpu.json")
    ratio = {
        (row["pass"], row["name"], row["R"]): row["ratio"]["median"]
        for row in result["rows"]
        if (row["part"], row["routing"]) == ("layer", "random")
    }
    ranks = sorted({R for *_, R in ratio})

    def said(which, name, less=0, between=", ", at=ranks):
        return between.join(f"{ratio[which, name, R] - less:.2f}".lstrip("0") for R in at)

    words = " ".join(README.split())
    mora = [said(which, "mora") for which in ("forward", "training")]
    ends = {"between": " to ", "at": (ranks[0], ranks[-1])}
    mask = [said(which, "dense-masked", **ends) for which in ("forward", "training")]
    top_k = said("forward", "GEMMs and top-k", 1)
    at = ", ".join(map(str, ranks))
    assert f"takes {mora[0]} forward at R {at}, of which torch's top k is {top_k}, and" in words
    assert f"a step {mora[1]}; a mask in plain autograd {mask[0]} and {mask[1]}." in words
    where = f"T {result['tokens']}, D = O {result['width']}, K {result['top_k']}"
    assert f"(two CPU threads, {where})" in words
    assert result["threads"] == 2 and result["complete"]
    # "nothing is gained": within a tenth of the mask
    for which in ("forward", "training"):
        assert ratio[which, "dense-masked", 64] < 1.1 * ratio[which, "mora", 64]


def test_readme_says_whether_a_gpu_was_measured():
    files = (ROOT / "tutorials" / "results").glob("bench-*.json")
    devices = {json.loads(path.read_text(encoding="utf-8"))["device"] for path in files}
    said = "For a GPU, where `auto` leaves dense is arithmetic, not measured yet"
    assert (said in " ".join(README.split())) == (devices == {"cpu"})
