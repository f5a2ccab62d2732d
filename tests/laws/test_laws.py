"""The laws themselves: they hold for what ships, and each catches what it is there to catch."""

import contextlib
import importlib
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from layers import OWN, file_of
from torch import nn

from minimoe import Adapter, Claims, LoRA, LoRAMoE, MoRA
from minimoe.continual.baselines import ToldLoRA
from minimoe.laws import LAWS, Broken, Row, check, claimed, hold, says, table
from minimoe.laws.case import DRAWN_PATHS, large
from minimoe.laws.laws import EXAMPLES
from minimoe.laws.template import NewScheme
from minimoe.roster import ROSTER, SCHEMES
from minimoe.schemes.flylora import FlyLoRA
from minimoe.tools.files import write_atomic
from minimoe.tools.load import load_class

with contextlib.suppress(ImportError):  # while the interpreter is asked for (rows)
    importlib.import_module("minimoe.kernels")

NAMES = {law.__name__: law for law in LAWS}
BROKEN = Path(__file__).parents[1] / "broken"
WRONG = sorted(path.stem for path in BROKEN.glob("*.py"))
LONG = {"compiles", "active_is_read"}
QUICK = {"equation", "grow_keeps"}
# what does not claim a law, and so is not held to it
UNCLAIMED = {name: getattr(file_of(name), "UNCLAIMED", set()) for name in SCHEMES}
UNCLAIMED |= {
    "lora_moe, 2 a task": UNCLAIMED["lora_moe"],
    "lora_moe balanced": UNCLAIMED["lora_moe"],
    "mora detached": UNCLAIMED["mora"] | {"exact_gradient"},
    "flylora signed": UNCLAIMED["flylora"],
    "told": {"support", "simplex", "degenerates_to_lora", "merge_is_equal"},
    "template": {"support", "simplex", "merge_is_equal"},
}
SMALL = {  # of networks beside a gate: the laws that read every number of theirs take long
    "wemoe": {"width": 4},
    "mixda": {"width": 4},
    "task_level": {"width": 4},
    "input_domain_aware": {"code": 2},
}
EVERY = {name: (scheme, SMALL.get(name, {})) for name, scheme in SCHEMES.items()} | {
    "lora_moe, 2 a task": (LoRAMoE, {"rank": 4, "experts": 2}),
    "lora_moe balanced": (LoRAMoE, {"balance": 0.5}),
    "mora detached": (MoRA, {"detach_gate": True, "tau": 0.1}),
    "flylora signed": (FlyLoRA, {"signed": True}),
    "told": (ToldLoRA, {}),
    "template": (NewScheme, {}),
}


def pairs():
    """(name, law): the three schemes under every law, and each quick law for all, are quick."""
    for name in EVERY:
        for law in NAMES:
            quick = name in SCHEMES and (ROSTER[name].kind == "scheme" or law in QUICK)
            yield pytest.param(name, law, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize(("name", "law"), list(pairs()))
def test_what_ships_keeps_every_law_that_it_claims(name, law, monkeypatch):
    if name in SCHEMES and name not in OWN:  # the kernels' interpreter is slow
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    scheme, settings = EVERY[name]
    row = hold(NAMES[law], scheme, **settings)
    assert row.verdict == ("not claimed" if law in UNCLAIMED[name] else "held"), str(row)


def load_wrong(stem):
    return load_class(BROKEN / f"{stem}.py", "Scheme", Adapter)


@cache
def rows(stem):
    """(the law that a wrong scheme is there to break, what came of all laws, of the others in fewer
    cases; but of LONG, as they take as long as all others, only if it is there to break one)."""
    scheme = load_wrong(stem)
    meant = sys.modules[scheme.__module__].LAW
    with pytest.MonkeyPatch.context() as patch:  # the kernels' interpreter is slow, and no wrong
        patch.delenv("TRITON_INTERPRET", raising=False)  # scheme here needs it to be caught
        for name, law in NAMES.items():
            if name != meant:
                patch.setitem(EXAMPLES, law, min(EXAMPLES.get(law, 30), 10))
        return meant, [hold(NAMES[law], scheme) for law in NAMES if law not in LONG - {meant}]


@pytest.fixture(autouse=True, scope="module")
def shared(tmp_path_factory):
    """A folder of this run, for all of pytest's processes."""
    own = tmp_path_factory.getbasetemp()
    broken.folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def broken(stem):
    """The laws that it breaks. Pytest's processes tell each other: it takes seconds."""
    told = broken.folder / f"{stem}.broken"
    if not told.exists():
        laws = {row.law for row in rows(stem)[1] if row.verdict == "broken"}
        write_atomic(told, " ".join(sorted(laws)).encode())
    return set(told.read_text().split())


@pytest.mark.parametrize("stem", WRONG)
def test_a_wrong_scheme_breaks_its_law(stem, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as in `rows`
    scheme = load_wrong(stem)
    row = hold(NAMES[sys.modules[scheme.__module__].LAW], scheme)
    assert row.verdict == "broken" and row.evidence


@pytest.mark.slow
@pytest.mark.parametrize("stem", WRONG)
def test_a_wrong_scheme_is_caught_by_the_law_meant_for_it_and_few_others(stem):
    meant, found = rows(stem)
    assert meant in broken(stem), [str(row) for row in found]
    # and what is right about it is not blamed: a mistake shows in few places
    assert len(broken(stem)) <= 5
    for row in found:
        if row.verdict == "broken":
            assert row.evidence and str(row.case) in row.evidence
            with pytest.raises(Exception) as again:  # the evidence breaks the law again
                NAMES[row.law](row.case)
            said = str(again.value)
            assert " ".join(said.split())[:400] in row.evidence


@pytest.mark.slow
@pytest.mark.parametrize("law", NAMES)
def test_no_law_is_idle(law):
    """Without it, at least one wrong scheme would go through: probably one that is meant for it."""
    meant = {stem: sys.modules[load_wrong(stem).__module__].LAW for stem in WRONG}
    stems = sorted(WRONG, key=lambda stem: meant[stem] != law)
    assert any(broken(stem) == {law} for stem in stems)


@pytest.mark.parametrize("law", NAMES)
def test_a_law_says_what_it_holds_and_why(law):
    what, _, why = NAMES[law].__doc__.partition("\n\n")
    assert says(NAMES[law]) == what and what.endswith(".") and len(what) < 76
    assert len(why.split()) > 15


class Silent(Adapter):
    """Claims nothing."""

    claims = Claims(equation=False, exact_gradient=False)

    def gate(self, x):
        return None, 1.0, self.project(x, "A")

    def active(self):
        return self.ranks * (self.base.in_features + self.base.out_features)


def test_a_scheme_that_claims_nothing_is_held_to_what_is_for_everyone():
    universal = "any_shape paths_agree only_live_learns grow_keeps learns_from_birth round_trips "
    universal += "eval_is_still padding_is_left_out passes_add_up half_precision compiles "
    universal += "zero_is_finite active_is_read"
    verdicts = {row.law: row.verdict for row in check(Silent)}
    assert list(verdicts) == list(NAMES)
    assert {law for law, verdict in verdicts.items() if verdict == "held"} == set(universal.split())
    assert set(verdicts.values()) == {"held", "not claimed"}


def test_settings_are_used_and_torchs_random_state_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    row = hold(NAMES["active_is_read"], load_wrong("keys_not_counted"), rank=3, top_k=2, tau=0.5)
    assert row.verdict == "broken" and "rank 3, top_k 2, tau 0.5" in row.evidence
    assert torch.equal(torch.get_rng_state(), before)


class Kept(Silent):
    def __init__(self, base, rank=2, scale=1.0, extra=(1, 2)):
        super().__init__(base, rank, scale)
        self.extra = extra


class Lost(Kept):
    def __init__(self, base, rank=2, scale=1.0, extra=(1, 2)):
        super().__init__(base, rank, scale, [])


@pytest.mark.parametrize("value", [(1, 2), math.nan, None, {"a": [1.5]}])
def test_settings_of_any_kind_that_a_file_can_hold_survive(value):
    row = hold(NAMES["round_trips"], Kept, extra=value)
    assert row.verdict == "held", str(row)
    row = hold(NAMES["round_trips"], Lost, extra=value)
    assert f"extra {value!r} is kept as []" in row.evidence


class Stopping(MoRA):
    """Its n-th gate stops all, by what it is given."""

    def __init__(self, base, rank=2, scale=1.0, top_k=2, tau=0.1, error=SystemExit, at=5):
        super().__init__(base, rank, scale, top_k, tau)
        self.error, self.at = error, at

    def gate(self, x):
        calls.append(x)
        if len(calls) >= self.at:
            raise self.error("enough")
        return super().gate(x)


calls = []


@pytest.mark.parametrize("law", sorted(NAMES.keys() - {"merge_is_equal", "grow_keeps"}))
@pytest.mark.parametrize("at", [1, 4])
def test_an_interrupt_goes_through_every_law_and_an_exit_is_evidence(law, at):
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        hold(NAMES[law], Stopping, error=KeyboardInterrupt, at=at)
    calls.clear()
    row = hold(NAMES[law], Stopping, error=SystemExit, at=at)
    assert row.verdict == "broken" and "SystemExit" in row.evidence


def test_the_same_evidence_every_time():
    first, second = (hold(NAMES["simplex"], load_wrong("softmax_before_top_k")) for _ in range(2))
    assert first.evidence == second.evidence
    # shrunk: two ranks, so that one is left out, and nothing else
    assert first.case.experts == 2 and first.case.T == 1 and first.case.settings["top_k"] == 1


@pytest.mark.parametrize(
    ("stem", "sizes"),
    [
        ("oldest_fade", {"tasks": 4, "D": 3, "O": 3, "T": 1}),  # and a fifth by the law
        ("sixteen_inputs_seen", {"tasks": 1, "D": 17, "O": 3, "T": 1}),
        ("two_hundred_tokens_learn", {"tasks": 1, "D": 3, "T": 201}),
        ("ten_have_weights", {"tasks": 4, "D": 3, "O": 3, "T": 1}),  # of 3 ranks each
    ],
)
def test_what_is_wrong_in_large_layers_alone_is_shown_in_the_smallest_such(stem, sizes):
    scheme = load_wrong(stem)
    row = hold(NAMES[sys.modules[scheme.__module__].LAW], scheme)
    assert row.verdict == "broken"
    assert {name: getattr(row.case, name) for name in sizes} == sizes


@pytest.mark.parametrize("name", ["lora", "lora_moe", "mora"])
def test_every_law_sees_large_layers(name):
    scheme, settings = EVERY[name]
    for given in (settings, settings | {"rank": 20}):
        claims = claimed(scheme, given)
        both = large(scheme, given, claims)
        for size, most in {"T": 1000, "D": 64, "O": 48, "tasks": 8}.items():
            assert max(getattr(case, size) for case in both) >= most
        if claims.top_k:
            assert max(case.settings["top_k"] for case in both) == 16
            assert all(case.settings["top_k"] < case.experts for case in both)
        assert {case.path for case in both} == set(DRAWN_PATHS)
        assert {case.training for case in both} == {True, False}
    for law in ("equation", "grow_keeps"):
        assert hold(NAMES[law], scheme, **settings).evidence == "30 cases, 2 large ones"


def test_a_law_that_could_be_looked_at_nowhere_is_not_said_to_hold():
    class Noisy(Silent):
        claims = Claims(granularity="token")

        def gate(self, x):
            z = self.project(x, "A")
            return None, torch.rand(z.shape).to(z), z

    row = hold(NAMES["granularity"], Noisy)
    assert (row.verdict, row.evidence) == ("broken", "no case at which it could be looked at")


def test_samples_are_each_others_strangers_where_that_is_claimed():
    class Sample(Silent):
        claims = Claims(granularity="sample")

        def gate(self, x):
            z = self.project(x, "A")
            mean = z.mean(-2, keepdim=True) if z.dim() > 2 else z
            return None, mean.sigmoid().expand(z.shape), z

    for law in ("granularity", "nan_stays"):
        assert hold(NAMES[law], Sample).verdict == "held"

        class Token(Sample):
            claims = Claims(granularity="token")

        assert hold(NAMES["any_shape"], Token).verdict == "broken"

    class Batch(Silent):
        claims = Claims(granularity="sample")

        def gate(self, x):
            z = self.project(x, "A")
            return None, z.mean().sigmoid(), z

    for law in ("granularity", "nan_stays"):
        assert hold(NAMES[law], Batch).verdict == "broken"


def test_ranks_of_a_block_weigh_the_same_where_blocks_are_claimed():
    class Uneven(LoRAMoE):
        def gate(self, x):
            idx, w, z, *_ = super().gate(x)
            return idx, w * torch.linspace(1.0, 0.5, w.shape[-1]).to(w), z

    row = hold(NAMES["simplex"], Uneven)
    assert "ranks of one block have different weights" in row.evidence


def test_a_negative_weight_is_no_share():
    class Signed(LoRAMoE):
        def gate(self, x):
            idx, w, z, *_ = super().gate(x)
            return idx, 2 * w - 1 / min(self.top_k, self.ranks // self.rank), z

    assert "a weight is -" in hold(NAMES["simplex"], Signed).evidence


@pytest.mark.parametrize(
    ("scheme", "settings", "error", "message"),
    [
        (nn.Linear, {}, TypeError, "Linear'>, allowed: a subclass of minimoe.Adapter"),
        ("mora", {}, TypeError, "scheme is 'mora', allowed"),
        (
            MoRA,
            {"tau": -1.0},
            ValueError,
            r"MoRA\(nn.Linear\(8, 8\), rank=2, tau=-1.0\) raises Val",
        ),
        (MoRA, {"topk": 3}, ValueError, "raises TypeError.*topk"),
        (MoRA, {"rank": 0}, ValueError, "rank=0.* raises ValueError: rank is 0, allowed"),
    ],
)
def test_what_cannot_be_checked_is_named(scheme, settings, error, message):
    with pytest.raises(error, match=message):
        check(scheme, **settings)


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"granularity": "tokens"}, "claims granularity 'tokens', allowed: token, sample, batch"),
        ({"expert": "ranks"}, "claims expert 'ranks', allowed: rank, block"),
    ],
)
def test_a_claim_that_there_is_not_is_named(claims, message):
    scheme = type("Typo", (Silent,), {"claims": replace(Silent.claims, **claims)})
    with pytest.raises(ValueError, match=f"Typo {message}"):
        check(scheme)


def test_files_are_loaded_apart_from_each_other(tmp_path):
    for folder, rank in (("a", 3), ("b", 4)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helper.py").write_text(f"RANK = {rank}\n")
        (tmp_path / folder / "json.py").write_text(
            "from minimoe import LoRA\n\n\nclass Mine(LoRA):\n    pass\n"
        )
    one, two = (load_class(tmp_path / folder / "json.py", "Mine", Adapter) for folder in "ab")
    assert one is not two and one.__module__ != two.__module__
    import json

    assert json.loads("1") == 1
    for scheme in (one, two):
        assert hold(NAMES["round_trips"], scheme).verdict == "held"


@pytest.mark.slow
def test_the_table_shows_every_scheme_and_all_evidence():
    rows = [Row(law, "held", "30 cases") for law in NAMES]
    law = list(NAMES).index("only_live_learns")
    wrong = hold(NAMES["only_live_learns"], load_wrong("unused_parameter"))
    results = {"lora": check(LoRA), "wrong": [*rows[:law], wrong, *rows[law + 1 :]]}
    shown = table(results)
    assert "only_live_learns     held    BROKEN  Training moves live rows only" in shown
    assert "simplex              –       held    " in shown
    assert "wrong breaks only_live_learns: noise has no gradient; T 1" in shown
    assert max(len(line) for line in shown.splitlines()) <= 110


def test_importing_the_package_imports_no_hypothesis():
    code = "import sys, minimoe.cli; sys.exit('hypothesis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_broken_is_an_assertion():
    """So that pytest shows it as a failure, where a law is called by itself."""
    assert issubclass(Broken, AssertionError)
