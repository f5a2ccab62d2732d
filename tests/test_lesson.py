"""Lessons: a right function is right, a wrong one is told how; what is shipped is what it says."""

import itertools
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.text import Text
from torch import nn

from minimoe import LoRA, MoRA
from minimoe.adapt import adapt, grow, parameters
from minimoe.continual.learn import score
from minimoe.continual.streams import make
from minimoe.laws import same
from minimoe.lesson import (
    adapter_of,
    check,
    claim,
    expect,
    figures,
    hint,
    learn,
    predict,
    scheme_of,
)
from minimoe.lesson.learned import WEIGHTS, pretrained, shipped
from minimoe.lesson.questions import QUESTIONS
from minimoe.lesson.talk import HINTS
from minimoe.lesson.wrap import WRITTEN, package_of
from minimoe.tools.exercise import Wrong, exercise

# right answers, each by another way than the solutions go


def lora(x, W0, A, B):
    return F.linear(x, W0 + (A.T @ B).T)


def router_gate(x, W, r, k):
    l = F.linear(x, W)
    least = l.topk(k).values[..., -1:]
    w = l.masked_fill(l < least, -torch.inf).softmax(-1)
    return w.unsqueeze(-1).expand(*w.shape, r).flatten(-2)


def mora_gate(z, k, tau, delta):
    s = z / z.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    out = s < s.topk(k).values[..., -1:]
    w = (s / tau).masked_fill(out, -torch.inf).softmax(-1)
    return w if delta is None else torch.where(s < delta, 0, w)


RIGHT = {"lora": lora, "router_gate": router_gate, "mora_gate": mora_gate}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_answer_is_right_and_the_same_as_the_packages_in_all_cases(name, capsys):
    with exercise("9"):
        check(name, RIGHT[name])
    said = capsys.readouterr().out
    assert said.endswith("exercise 9: right\n") and "zero_at_birth" in said
    assert f"agrees with minimoe.{package_of(name).__name__} in" in said
    rows = same(adapter_of(name, RIGHT[name]), package_of(name), examples=15)
    assert [row for row in rows if row.verdict == "broken"] == []
    assert rows[1].evidence == "15 cases" and len(rows) == 12
    assert scheme_of(name, RIGHT[name]).written is RIGHT[name]


# wrong answers, as students write them, and what each is told


def no_W0(x, W0, A, B):
    return (x @ A.T) @ B


def W0_not_transposed(x, W0, A, B):
    return torch.matmul(x, W0) + (x @ A.T) @ B


def B_transposed(x, W0, A, B):
    z = x @ A.T
    return F.linear(x, W0) + F.linear(z, B)


def A_not_transposed(x, W0, A, B):
    z = torch.matmul(x, A)
    return F.linear(x, W0) + z @ B


def swapped(x, W0, A, B):
    return F.linear(x, W0) + torch.matmul(x @ B, A.mT)


def over_r(x, W0, A, B):
    r = A.shape[0]
    return F.linear(x, W0) + (1 / r) * (F.linear(x, A) @ B)


def before_top_k(x, W, r, k):
    p = F.softmax(x @ W.T, dim=-1)
    top, i = torch.topk(p, k, dim=-1)
    return torch.zeros_like(p).scatter_(-1, i, top).repeat_interleave(r, dim=-1)


def softmax_of_zeros(x, W, r, k):
    l = x @ W.T
    top, i = l.topk(k)
    return torch.zeros_like(l).scatter(-1, i, top).softmax(-1).repeat_interleave(r, -1)


def no_softmax(x, W, r, k):
    l = x @ W.T
    top, i = l.topk(k)
    return torch.zeros_like(l).scatter(-1, i, top).repeat_interleave(r, -1)


def per_expert(x, W, r, k):
    l = x @ W.T
    top, i = l.topk(k)
    return torch.zeros_like(l).scatter(-1, i, top.softmax(-1))


def tiled(x, W, r, k):
    return torch.cat([per_expert(x, W, r, k)] * r, dim=-1)


def logits_by_size(x, W, r, k):
    l = x @ W.T
    i = l.abs().topk(k).indices
    w = l.gather(-1, i).softmax(-1)
    return torch.zeros_like(l).scatter(-1, i, w).repeat_interleave(r, -1)


def placed(s, i, w):
    return torch.zeros_like(s).scatter(-1, i, w)


def by_size(z, k, tau, delta):
    s = F.normalize(z, dim=-1)
    i = torch.argsort(s.abs(), dim=-1, descending=True)[..., :k]
    w = placed(s, i, (s.gather(-1, i) / tau).softmax(-1))
    return w if delta is None else w * (s >= delta)


def norm_of_kept(z, k, tau, delta):
    top, i = z.topk(k)
    s = top / top.norm(dim=-1, keepdim=True)
    w = (s / tau).softmax(-1)
    if delta is not None:
        w = w * (s >= delta)
    return placed(z, i, w)


def no_tau(z, k, tau, delta):
    s = F.normalize(z, dim=-1)
    top, i = s.topk(k)
    w = placed(s, i, F.softmax(top, -1))
    return w if delta is None else w * (s >= delta)


def delta_always(z, k, tau, delta):
    s = F.normalize(z, dim=-1)
    top, i = s.topk(k)
    return placed(s, i, (top / tau).softmax(-1)) * (s >= (delta or 0))


def delta_compared(z, k, tau, delta):
    s = F.normalize(z, dim=-1)
    top, i = s.topk(k)
    return placed(s, i, (top / tau).softmax(-1)) * (s >= delta)


def delta_on_w(z, k, tau, delta):
    s = F.normalize(z, dim=-1)
    top, i = s.topk(k)
    w = (top / tau).softmax(-1)
    if delta is not None:
        w[w < delta] = 0
    return placed(s, i, w)


def no_norm(z, k, tau, delta):
    top, i = z.topk(k)
    w = placed(z, i, (top / tau).softmax(-1))
    return w if delta is None else torch.where(z >= delta, w, 0.0)


def all_then_top_k(z, k, tau, delta):
    s = F.normalize(z, dim=-1)
    w, i = (s / tau).softmax(-1).topk(k)
    w = placed(s, i, w)
    return w if delta is None else w * (s >= delta)


def rescaled(z, k, tau, delta):
    w = mora_gate(z, k, tau, delta)
    total = w.sum(-1, keepdim=True)
    return torch.where(total > 0, w / total, 0.0)


def times_tau(z, k, tau, delta):
    return mora_gate(z, k, 1 / tau, delta)


def no_delta(z, k, tau, delta):
    return mora_gate(z, k, tau, None)


def norm_of_all_tokens(z, k, tau, delta):
    s = z / torch.sqrt((z**2).sum())
    top, i = s.topk(k)
    w = placed(s, i, (top / tau).softmax(-1))
    return w if delta is None else w * (s >= delta)


def kept_only(z, k, tau, delta):
    s = F.normalize(z, dim=-1).topk(k)[0]
    w = (s / tau).softmax(-1)
    return w * (s >= delta) if delta is not None else w


TOLD = {
    no_W0: "W0 is left out: the frozen layer's output x W0ᵀ is part of y.",
    W0_not_transposed: "W0 is (O, D), so it is x @ W0.T: here W0 is not transposed.",
    A_not_transposed: "A is (R, D), so z = x @ A.T: here A is not transposed.",
    B_transposed: "B is (R, O), so it is z @ B: here B is transposed.",
    swapped: "A and B are in each other's place: z = x Aᵀ comes first, then z B.",
    over_r: "The update is divided by the rank: here the scale is 1.",
    before_top_k: "The softmax is over all, before the top k: take it over the kept ones,",
    softmax_of_zeros: "What is not kept is 0 when the softmax is taken, and e⁰ = 1 is a weight:",
    no_softmax: "The logits are the weights: a softmax over the kept ones is missing.",
    per_expert: "There is one weight per expert: repeat each r times, w.repeat_interleave(r, -1).",
    tiled: "Ranks of one expert follow one another: repeat_interleave, not repeat.",
    logits_by_size: "The k largest by size are kept: sign decides, l.topk(k).",
    by_size: "The k largest by size are kept: sign decides, s.topk(k) and not s.abs().topk(k).",
    norm_of_kept: "The norm is over the kept ranks only: divide by the norm of all R numbers of z.",
    no_tau: "tau is left out: the softmax is of s / tau.",
    delta_always: "delta is applied in training: there delta is None, and every kept rank keeps",
    delta_compared: "delta is applied in training: there delta is None, and every kept rank keeps",
    delta_on_w: "delta is on the weight w: it is on the score, w * (s >= delta).",
    no_norm: "There is no norm: the scores are s = z / ‖z‖, not z.",
    all_then_top_k: "The softmax is over all, before the top k: take it over the kept ones,",
    rescaled: "What delta leaves is rescaled to sum to 1: it is not",
    times_tau: "s is multiplied by tau: divide, so that a small tau is sharp.",
    no_delta: "delta is left out: where it is a number, ranks with s < delta get weight 0.",
    norm_of_all_tokens: "The norm is over all tokens: each token has its own, z.norm(dim=-1,",
    kept_only: "These are the weights of the kept ranks alone: put them in their places",
}


def question_of(function):
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    of = {("x", "W0", "A", "B"): "lora", ("x", "W", "r", "k"): "router_gate"}
    return of.get(arguments, "mora_gate")


@pytest.mark.parametrize("function", TOLD, ids=lambda function: function.__name__)
def test_a_wrong_answer_is_shown_its_case_and_told_its_slip(function, capsys):
    with exercise("9"):
        check(question_of(function), function)
    said = capsys.readouterr().out
    assert said.startswith("exercise 9: not yet\n")
    (slip,) = re.findall(r"^  slip      (.*)$", said, re.M)
    assert slip.startswith(TOLD[function])
    for what in ("case", "expected", "got"):
        assert re.search(rf"^  {what} +\S", said, re.M), what
    assert scheme_of(question_of(function), function) is package_of(question_of(function))


def test_what_is_shown_are_the_numbers(capsys):
    with exercise("3"):
        check("mora_gate", by_size)
    assert capsys.readouterr().out.splitlines()[:4] == [
        "exercise 3: not yet",
        "  case      z = (2, -3, 6), k = 2, tau = 0.52, delta = None",
        "  expected  (0.25, 0, 0.75)",
        "  got       (0, 0.0779, 0.922)",  # 9/7 apart: 1 / (1 + 3 ** (9/4))
    ]


def test_ones_own_line_is_shown_where_it_raises_and_only_there(capsys):
    def helper(z):
        return z.no_such_thing

    def through(z, k, tau, delta):
        return helper(z)

    with exercise("3"):
        check("mora_gate", through)
    with exercise("3"):
        check("mora_gate", by_size)
    with exercise("3"):
        torch.zeros(2) @ torch.zeros(3)
    with exercise("3"):
        helper(torch.zeros(2))
    said = capsys.readouterr().out
    line = helper.__code__.co_firstlineno + 1
    assert said.count("your line") == 2 and said.count(f"  your line {line}: return z.no_such") == 2
    assert "got       AttributeError: 'Tensor' object has no attribute 'no_such_thing'" in said
    assert "exercise 3: not yet (RuntimeError: " in said


def test_ones_own_line_is_shown_where_a_law_finds_an_error(capsys):
    def two_at_least(z, k, tau, delta):
        second = z.sort(-1).values[..., -2]  # of one rank there is no second
        return mora_gate(z, k, tau, delta) + 0 * second.unsqueeze(-1)

    with exercise("3"):
        check("mora_gate", two_at_least)
    said = capsys.readouterr().out
    assert "  law       " in said and "IndexError" in said
    line = two_at_least.__code__.co_firstlineno + 1
    assert f"  your line {line}: second = " in said


def test_what_is_not_written_is_said_to_be_so(capsys):
    def stub(x, W, r, k):
        raise NotImplementedError

    with exercise("2"):
        check("router_gate", stub)
    with exercise("2"):
        check("lora", lambda x, W0, A, B: None)
    stubbed, empty = capsys.readouterr().out.split("exercise 2: not yet")[1:]
    assert stubbed == " (nothing is written yet: replace `raise NotImplementedError`)\n"
    assert "got       None\n  slip      `return` is missing.\n" in empty


def test_an_error_of_torch_is_no_empty_stub(capsys):
    def swapped(x, W, r, k):
        where, what = (x @ W.T).topk(k)
        return what.softmax(-1) * where

    with exercise("2"):
        check("router_gate", swapped)
    said = capsys.readouterr().out
    assert "nothing is written" not in said and "your line" in said and "case" in said


@pytest.mark.parametrize(
    ("name", "function", "said"),
    [
        ("lora", lambda x, W0, A, B: None, "slip      `return` is missing."),
        ("lora", lambda x, W0, A, B: lora(x, W0, A, B).tolist(), "slip      return a tensor."),
        ("lora", lambda x, W0, A, B: lora(x, W0, A, B).to_sparse(), "torch.sparse_coo"),
        ("mora_gate", lambda z, k, tau, delta: z.div_(2), "changes its input z: make a new"),
    ],
)
def test_what_is_no_answer_is_told_so(name, function, said):
    with pytest.raises(Wrong) as raised:
        check(name, function)
    assert said in str(raised.value) and len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    "function",
    [
        lambda x, W0, A, B: torch.einsum("...d,od->...o", x, W0) + x @ A.T @ B,
        lambda x, W0, A, B: x @ (W0 + B.T @ A).T,
        lambda x, W0, A, B: torch.cat([x, x @ A.T], -1) @ torch.cat([W0.T, B]),
    ],
)
def test_another_way_to_the_same_numbers_is_right(function):
    check("lora", function)


RIGHT_VALUES = [
    (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0004], dtype=torch.float64)),
    (24, 24),
    (torch.tensor(0.5), 0.5),
    ((0.8, 0, 0.2), (0.8, 0.0, 0.2)),
    ([1, (2.0, "a")], (1, [2, "a"])),
    ("a", "a"),
    (None, None),
    ((torch.tensor([0.8, 0]), np.array([0.2])), ((0.8, 0), (0.2,))),
    (np.array([0.8, 0.2]), [0.8, 0.2]),
]
WRONG_VALUES = [
    (torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0]])),
    (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1])),
    (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0])),
    ([1.0, 2.0], torch.tensor([1.0, 2.0])),
    (torch.tensor([24, 24]), 24),
    (25, 24),
    ("24", 24),
    (None, 24),
    ((0.8, 0), (0.8, 0, 0.2)),
    (0.8, (0.8,)),
    (1, "a"),
]


@pytest.mark.parametrize(("got", "want"), RIGHT_VALUES)
def test_a_value_that_is_expected_is_right(got, want):
    expect("case", got, want)


@pytest.mark.parametrize(("got", "want"), WRONG_VALUES)
def test_a_value_that_is_not_expected_is_wrong(got, want):
    with pytest.raises(Wrong):
        expect("case", got, want)


def test_a_wrong_value_is_shown_its_case_and_told_its_slip(capsys):
    slips = {"The two are added: multiply them.": 10, "A second one.": 10}
    with exercise("2"):
        expect("D = 4, O = 6", 10, 24, slips=slips)
    with exercise("2"):
        expect("D = 4, O = 6", None, (24, np.float64(0.5)), slips=slips)
    assert capsys.readouterr().out.splitlines() == [
        "exercise 2: not yet",
        "  case      D = 4, O = 6",
        "  expected  24",
        "  got       10",
        "  slip      The two are added: multiply them.",
        "exercise 2: not yet",
        "  case      D = 4, O = 6",
        "  expected  (24, 0.5)",
        "  got       None",
        "  slip      `return` is missing.",
    ]


@pytest.mark.parametrize("got", [[1.0, 2.0], np.array([1.0, 2.0]), torch.tensor([[1.0], [2.0]])])
def test_right_numbers_in_another_form_are_told_so(got):
    with pytest.raises(Wrong, match=r"The numbers are right: return a tensor of shape \(2,\)\."):
        expect("case", got, torch.tensor([1.0, 2.0]))
    with pytest.raises(Wrong, match=r"^(?!.*numbers are right)"):
        expect("case", [1.0, 3.0], torch.tensor([1.0, 2.0]))


def test_what_check_refuses_does_not_run(capsys):
    assert scheme_of("mora_gate", lambda *args: mora_gate(*args).detach()) is MoRA
    assert "mora_gate is not right yet: minimoe.MoRA runs in its place." in capsys.readouterr().out


def test_what_no_case_shows_a_law_does():
    """0 / 0."""

    def divides(z, k, tau, delta):
        s = z / z.norm(dim=-1, keepdim=True)
        top, i = s.topk(k)
        w = placed(s, i, (top / tau).softmax(-1))
        return w if delta is None else w * (s >= delta)

    with pytest.raises(Wrong, match=r"law +zero_is_finite: .*\nwhy +Padding is zero(.*\n)+broken"):
        check("mora_gate", divides)


def test_what_no_case_and_no_law_shows_the_comparison_does():
    """No gradient of the gate: the numbers are right."""

    def constant(z, k, tau, delta):
        return mora_gate(z, k, tau, delta).detach()

    with pytest.raises(Wrong, match=r"beside minimoe.MoRA\nbroken +as if weights are constant"):
        check("mora_gate", constant)


def test_an_answer_that_changes_its_input_spoils_no_other_answer():
    def in_place(z, k, tau, delta):
        z.div_(z.norm(dim=-1, keepdim=True))
        return z.mul_(tau)

    before = [case["z"].clone() for case in QUESTIONS["mora_gate"].cases]
    with pytest.raises(Wrong):
        check("mora_gate", in_place)
    for case, z in zip(QUESTIONS["mora_gate"].cases, before, strict=True):
        assert torch.equal(case["z"], z)


def test_an_answer_that_changes_torch_for_all_is_told_so_and_the_change_undone():
    def wide(x, W0, A, B):
        torch.set_default_dtype(torch.float64)
        return lora(x, W0, A, B)

    with pytest.raises(Wrong, match="changes torch's default dtype"):
        check("lora", wide)
    assert torch.get_default_dtype() is torch.float32


def test_every_slip_is_wrong_and_no_two_are_alike():
    for name, question in QUESTIONS.items():
        told = {sentence for sentence, _ in question.slips}
        assert len(told) >= 8, name
        for sentence, slip in question.slips:
            with pytest.raises(Wrong) as raised:
                check(name, slip)
            assert str(raised.value).splitlines()[3] == f"slip      {sentence}"


@pytest.mark.parametrize("name", RIGHT)
def test_a_written_scheme_has_the_packages_settings_and_learns_in_a_model(name):
    scheme, x = adapter_of(name, RIGHT[name]), torch.randn(16, 6)
    assert issubclass(scheme, package_of(name)) and scheme.__name__ == (
        f"Your{package_of(name).__name__}"
    )
    model = adapt(nn.Sequential(nn.Linear(6, 5)), scheme, targets="0", rank=2, scale=0.5)
    grow(model)
    model(x).square().mean().backward()
    assert model[0].B.grad.any() and len(parameters(model)) in (2, 3)
    other = adapt(nn.Sequential(nn.Linear(6, 5)), package_of(name), targets="0", rank=2, scale=0.5)
    grow(other)
    for p in model.parameters():
        nn.init.normal_(p)
    other.load_state_dict(model.state_dict())
    assert torch.allclose(model(x), other(x), atol=1e-5)
    with pytest.raises(ValueError, match="name is 'moar', allowed: lora, router_gate, mora_gate"):
        adapter_of("moar", RIGHT[name])


def test_a_written_router_takes_no_setting_that_it_would_not_keep():
    for setting in ("balance", "experts"):
        with pytest.raises(TypeError, match=setting):
            adapter_of("router_gate", router_gate)(nn.Linear(4, 4), rank=2, **{setting: 1})
    layer = adapter_of("mora_gate", mora_gate)(nn.Linear(4, 4), rank=2, detach_gate=True)
    nn.init.normal_(layer.B)
    assert not layer.gate(torch.randn(3, 4)).weight.requires_grad


def test_learn_is_a_run_of_the_packages_learner_and_leaves_the_random_state():
    stream, state = make("permuted-digits", 2), torch.get_rng_state()
    one = learn(stream, LoRA, rank=2, grows=False, epochs=1)
    assert torch.equal(state, torch.get_rng_state())
    assert one.matrix.shape == (3, 2) and one.model.fc1.ranks == 2
    two = learn(stream, MoRA, rank=2, epochs=1, top_k=2, tau=0.1)
    assert two.model.fc1.ranks == 4 and two.model.fc1.tau == 0.1
    assert two.mass.shape == (3, 2, 2) and np.allclose(two.mass[2].sum(1), 1)
    with torch.no_grad():
        task = stream.tasks[0]
        assert np.isclose(score(two.model(task.x_test), task.y_test), two.matrix[2, 0])
    written = learn(stream, adapter_of("lora", lora), rank=2, grows=False, epochs=1)
    assert np.allclose(written.matrix, one.matrix, atol=0.02)


def test_the_backbone_that_is_shipped_knows_upright_digits():
    backbone, stream = shipped(), make("permuted-digits", 1)
    assert not any(p.requires_grad for p in backbone.parameters()) and not backbone.training
    assert score(backbone(stream.base.x_test), stream.base.y_test) > 0.95
    assert sum(p.numel() for p in backbone.parameters()) == 33_728
    assert WEIGHTS.stat().st_size < 200_000


@pytest.mark.slow
def test_the_backbone_that_is_shipped_is_what_its_command_makes():
    """If this fails: python -m minimoe.lesson.learned"""
    made, kept = pretrained().state_dict(), shipped().state_dict()
    assert made.keys() == kept.keys()
    for name in made:  # other processors round otherwise
        assert torch.allclose(made[name], kept[name], atol=0.01), name


def test_a_prediction_is_shown_beside_its_outcome(capsys):
    predict("accuracy", 0.9).beside(0.564)
    predict("the rank").beside(0)
    assert capsys.readouterr().out.splitlines() == [
        "Noted: accuracy: .900",
        "accuracy: you wrote .900, it is .564; off by .336.",
        "Predict: the rank? Write a number in this cell before you go on.",
        "the rank: you wrote no number, it is 0.",
    ]
    with pytest.raises(ValueError, match=r"number is .0\.5., allowed: a"):
        predict("accuracy", "0.5")


def test_a_claim_says_in_words_whether_it_holds(capsys):
    claim("it fell", 0.4, True)
    claim("it fell", -0.1, False)
    assert capsys.readouterr().out == (
        "it fell: .400. This holds.\nit fell: -.100. THIS DOES NOT HOLD HERE.\n"
    )


def test_hints_come_one_by_one(capsys):
    assert HINTS.keys() == WRITTEN.keys() == QUESTIONS.keys()
    for name, hints in HINTS.items():
        for _ in range(len(hints) + 1):
            hint(name)
        *given, last = capsys.readouterr().out.splitlines()
        n = len(hints)
        assert given == [f"Hint {i + 1} of {n}: {text}" for i, text in enumerate(hints)]
        assert last == f"There is no more hint. The solutions have {name}, written out."
    with pytest.raises(ValueError, match="name is '1', allowed: lora, router_gate, mora_gate"):
        hint("1")


A = [[0.06, 0.04, 0.03], [0.97, 0.05, 0.03], [0.6, 0.96, 0.03], [0.55, 0.97, 0.96]]
NAMES = ["just learned", "at the end", "later experts hidden", "own expert alone"]
CROWD = dict.fromkeys("abcd", (9, 9.8))
PICTURES = {
    "equation": lambda: figures.equation("zg"),
    "digits": lambda: figures.digits(make("permuted-digits", 2)),
    "accuracies": lambda: figures.accuracies(A),
    "shares": lambda: figures.shares(A[1:]),
    "bars": lambda: figures.bars({"a": (0.1, -0.2), "b": (0.3, 0.4)}, ["one", "two"], "bars"),
    "bars of four": lambda: figures.bars(dict.fromkeys("abcd", (0.9, 1, -0.9, 1)), NAMES, ""),
    "curves": lambda: figures.curves({"LoRA": A, "MoRA": A}),
    "lines": lambda: figures.lines((1, 8), {"a": (2, 5), "b": (5, 5)}, "x", "y", "t", (0, 10)),
    "crowded": lambda: figures.lines((1, 2), CROWD, "x", "y", "t", (0, 10)),
    "spread": lambda: figures.spread({"a": (0.1, 0.3), "b": (0.5, 0.5)}, "ACC", "title", (0, 1)),
}


@pytest.fixture
def picture(request):
    PICTURES[request.param]()
    yield plt.gcf()
    plt.close("all")


@pytest.mark.parametrize("picture", PICTURES, indirect=True)
def test_letters_are_of_eleven_points_at_a_hundred_dots(picture):
    picture.draw_without_rendering()
    sizes = {text.get_fontsize() for text in picture.findobj(Text) if text.get_text().strip()}
    assert picture.dpi == 100 and sizes <= {11.0}


@pytest.mark.parametrize("picture", ["accuracies", "shares"], indirect=True)
def test_a_shade_has_its_number(picture):
    (axes,) = picture.axes
    assert len(axes.texts) == axes.images[0].get_array().size
    assert {text.get_text() for text in axes.texts} >= {"0.97", "0.55", "0.03"}


@pytest.mark.parametrize("picture", ["curves"], indirect=True)
def test_lines_differ_in_more_than_colour_and_have_their_names(picture):
    (axes,) = picture.axes
    lines = axes.lines
    assert len({line.get_marker() for line in lines}) == 2
    assert len({line.get_linestyle() for line in lines}) == 2
    assert np.allclose(lines[0].get_ydata(), [0.97, 0.78, np.mean(A[3])])
    names = sorted((text.get_position()[1], text.get_text()) for text in axes.texts)
    assert [name for _, name in names] == ["  LoRA 0.83", "  MoRA 0.83"]
    assert names[1][0] - names[0][0] >= 0.079  # neither covers the other


@pytest.mark.parametrize("picture", ["lines"], indirect=True)
def test_lines_of_any_height_have_names_apart(picture):
    (axes,) = picture.axes
    assert axes.get_ylim() == (0, 10) and np.allclose(axes.lines[1].get_ydata(), [5, 5])
    low, high = sorted(text.get_position()[1] for text in axes.texts)
    assert high - low == pytest.approx(0.73)


@pytest.mark.parametrize("picture", ["crowded"], indirect=True)
def test_names_at_the_top_stay_in_the_picture(picture):
    (axes,) = picture.axes
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert heights[-1] <= 10 and all(b - a > 0.72 for a, b in itertools.pairwise(heights))


@pytest.mark.parametrize("picture", ["spread"], indirect=True)
def test_a_spread_has_a_tick_for_each_value_and_the_mean_in_numbers(picture):
    (axes,) = picture.axes
    ticks = [line for line in axes.lines if line.get_marker() == "|"]
    assert [list(line.get_xdata()) for line in ticks] == [[0.1, 0.3], [0.5, 0.5]]
    assert [text.get_text().strip() for text in axes.texts] == ["0.20", "0.50"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]


@pytest.mark.parametrize("picture", ["bars"], indirect=True)
def test_bars_differ_in_hatch_and_have_their_numbers(picture):
    (axes,) = picture.axes
    assert len({bars[0].get_hatch() for bars in axes.containers}) == 2
    assert {"0.10", "-0.20", "0.30", "0.40"} <= {text.get_text() for text in axes.texts}


@pytest.mark.parametrize("picture", ["bars of four"], indirect=True)
def test_numbers_of_bars_do_not_cover_each_other(picture):
    picture.draw_without_rendering()
    boxes = [text.get_window_extent() for text in picture.axes[0].texts]
    assert len(boxes) == 16
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


@pytest.mark.parametrize("picture", ["equation"], indirect=True)
def test_todays_steps_have_a_thick_frame(picture):
    (axes,) = picture.axes
    thick = [t.get_text() for t in axes.texts if (b := t.get_bbox_patch()) and b.get_lw() > 2]
    assert thick == ["z = x Aᵀ", "g"]
    assert sum("(today)" in text.get_text() for text in axes.texts) == 2
