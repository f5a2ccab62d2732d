"""Streams of one's own: data, models and scores of any kind, through the same runner."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from minimoe import LoRA, LoRAMoE, MoRA
from minimoe.adapt import grow
from minimoe.continual import Stream, Task, data
from minimoe.continual.learn import AdapterLearner, pretrain, run_stream, train
from minimoe.continual.probe import Recorder
from minimoe.continual.stream import (
    IGNORED,
    evaluate,
    explained,
    loss,
    minus_bits,
    score,
    share_right,
    usual_score,
)
from minimoe.roster import ROSTER
from minimoe.schemes.smora import SMoRA

X, Y = torch.arange(14.0).view(7, 2), torch.arange(7)


def seed(n=0):
    return torch.Generator().manual_seed(n)


# Data


def test_all_kinds_of_data_give_the_same_batches():
    pairs = [(x, y) for x, y in zip(X.split(3), Y.split(3), strict=True)]
    kinds = {
        "a pair": (X, Y),
        "a list of two": [X, Y],
        "a Dataset": TensorDataset(X, Y),
        "a DataLoader": DataLoader(TensorDataset(X, Y), 3),
        "batches": pairs,
    }
    for kind, given in kinds.items():
        data.require(given, kind)
        for (x, y), (ours, labels) in zip(pairs, data.batches(given, 3), strict=True):
            assert torch.equal(x, ours) and torch.equal(y, labels), kind
    dictionaries = {"a dictionary": {"x": X, "labels": Y}, "a pair of them": ({"x": X}, Y)}
    dictionaries["a DataLoader"] = DataLoader([{"x": X[n], "labels": Y[n]} for n in range(7)], 3)
    for kind, given in dictionaries.items():
        data.require(given, kind)
        for (x, y), (ours, labels) in zip(pairs, data.batches(given, 3), strict=True):
            assert list(ours) == ["x"], kind
            assert torch.equal(x, ours["x"]) and torch.equal(y, labels), kind


def test_a_seed_decides_the_order_and_no_example_is_lost():
    for given in ((X, Y), TensorDataset(X, Y)):
        first, again, other = (
            torch.cat([y for _, y in data.batches(given, 3, seed(n))]) for n in (0, 0, 1)
        )
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert sorted(first.tolist()) == Y.tolist() and first.tolist() != Y.tolist()


def test_parts_of_data():
    loader = DataLoader(TensorDataset(X, Y), 3)
    assert torch.equal(data.leading((X, Y), 5), X[:5])
    assert torch.equal(data.leading(loader, 5), X[:5])
    assert torch.equal(data.leading([(X[:2], Y[:2]), (X[2:, :1], Y[2:])], 5), X[:2])  # unlike
    torch.manual_seed(0)
    some = data.some(({"x": X}, Y), 4)["x"]
    torch.manual_seed(0)
    assert torch.equal(some, X[torch.randperm(7)[:4]])
    assert torch.equal(data.some(loader, 2), X[:2])
    both = data.together([(X, Y), (X + 1, Y)])
    assert torch.equal(both[0], torch.cat([X, X + 1])) and len(both[1]) == 14
    both = data.together([({"x": X}, Y), ({"x": X + 1}, Y)])
    assert torch.equal(both[0]["x"], torch.cat([X, X + 1]))
    # what does not fit together comes in turn, a batch of each
    turns = data.together([(X, Y), loader, (X.repeat(1, 2), Y)])
    data.require(turns, "turns")
    twice = data.together([loader, loader])
    assert [y.tolist() for _, y in data.batches(twice, 4)] == 2 * [[0, 1, 2], [3, 4, 5], [6]]
    shapes = [tuple(x.shape) for x, _ in data.batches(turns, 4)]
    assert shapes == [(4, 2), (3, 2), (4, 4), (3, 2), (3, 2), (3, 4), (1, 2)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((X, Y[:6]), "is of 6 and 7 examples"),
        ((X[:0], Y[:0]), "is of 0 examples"),
        (({"x": X, "more": X[:3]}, Y), "is of 3 and 7 examples"),
        (((x, y) for x, y in [(X, Y)]), "is a generator, allowed: "),
        (X, "is a Tensor, allowed: "),
        ("x", "is a str, allowed: "),
        ({"x": X}, "is a dict, allowed: "),
        (7, "is a int, allowed: "),
        ([], "has no examples"),
        ([X, X, X], "a batch is a Tensor, allowed: "),
        ([(X, Y[:6])], "is of 6 and 7 examples"),
        (TensorDataset(X[:0], Y[:0]), "has no examples"),
    ],
)
def test_other_data_are_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        Task("mine", (X, Y), given)


def test_a_stream_without_tasks_or_with_two_of_one_name_is_refused():
    task = Task("mine", (X, Y), (X, Y))
    with pytest.raises(ValueError, match="s has no tasks"):
        Stream("s", [])
    with pytest.raises(ValueError, match="s has two tasks of the name mine"):
        Stream("s", [task, task])
    with pytest.raises(ValueError, match="mine: its data come in batches"):
        _ = Task("mine", [(X, Y)], (X, Y)).x_train


# Losses and scores


def test_scores_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [0.0, math.log(3)]], [[9.0, 0.0], [0.0, 9.0]]])
    y = torch.tensor([[0, 1], [1, IGNORED]])
    right, of = share_right(logits, y)
    assert (right, of) == (2, 3)  # the third is wrong, the fourth is left out
    # 1 bit, and -log2(3/4), and that of 1 in 1 + e^9
    bits, of = minus_bits(logits, y)
    wrong = math.log2(1 + math.exp(9.0))
    assert bits.item() == pytest.approx(-1 + math.log2(0.75) - wrong) and of == 3
    expected = (math.log(2) - math.log(0.75) + math.log(1 + math.exp(9.0))) / 3
    assert loss(logits, y).item() == pytest.approx(expected)
    answers, y = torch.tensor([[3.0, 3.0]]), torch.tensor([[3.0, 4.0]])
    total, of = explained(answers, y)
    assert total / of == pytest.approx(1 - 1 / 25) and score(answers, y) == pytest.approx(0.96)
    assert loss(answers, y) == 0.5 and loss(answers[:0], y[:0]) == 0


@pytest.mark.parametrize("measure", [loss, usual_score, minus_bits])
def test_shapes_are_not_stretched(measure):
    real, logits, y = torch.randn(4), torch.randn(4, 3), torch.arange(4) % 3
    if measure is not minus_bits:
        with pytest.raises(ValueError, match=r"answers are \(4, 1\), allowed for real y: \(4,\)"):
            measure(real.unsqueeze(1), real)
    with pytest.raises(ValueError, match=r"answers are \(4, 3\), allowed for classes y: \(4, 1, C"):
        measure(logits, y.unsqueeze(1))
    # of (samples, C, tokens), as torch has it
    with pytest.raises(ValueError, match=r"allowed for classes y: \(4, 5, C\)"):
        measure(torch.randn(4, 3, 5), torch.zeros(4, 5, dtype=torch.int64))


def test_labels_may_be_of_any_integers():
    logits, y = torch.randn(4, 200, generator=seed()), torch.tensor([0, 1, 156, 0])
    for dtype in (torch.int32, torch.uint8):  # of which 156 is -100, too
        assert loss(logits, y.to(dtype)) == loss(logits, y)
        assert usual_score(logits, y.to(dtype)) == usual_score(logits, y)
        assert minus_bits(logits, y.to(dtype)) == minus_bits(logits, y)
    assert loss(logits, y[:2].bool().repeat(2)) == loss(logits, y[:2].repeat(2))


def test_a_base_domain_in_a_dataloader_is_learned_to_the_same_bits():
    base = DataLoader(TensorDataset(X, Y), 3, shuffle=True)
    stream = Stream("s", [Task("a", (X, Y), (X, Y))], Task("base", base, base))
    stream = dataclasses.replace(stream, pretraining={"epochs": 2})
    made = []
    for n in range(2):
        torch.manual_seed(n)
        made.append(pretrain(stream, 0, make=lambda s: nn.Linear(2, 7)).weight)
    assert torch.equal(*made)


def test_a_score_is_of_all_examples_whatever_the_batches(monkeypatch):
    torch.manual_seed(0)
    answers, y = torch.randn(7, 3), torch.randn(7, 3)

    def number(a, b):
        return float((a - b).abs().mean())

    for measure in (explained, number):
        whole = measure(answers, y)
        whole = float(whole[0] / whole[1]) if isinstance(whole, tuple) else whole
        for size in (1, 3, 7):
            monkeypatch.setattr("minimoe.continual.stream.EVALUATED", size)
            assert evaluate(lambda x: x, (answers, y), measure) == pytest.approx(whole)
    apart = [(answers[:2], y[:2]), (answers[2:], y[2:])]
    assert evaluate(lambda x: x, apart, number) == pytest.approx(number(answers, y))


def test_what_a_stream_says_of_itself():
    classes = Stream("s", [Task("a", (X, Y), (X, Y))])
    real = Stream("s", [Task("a", (X, X), (X, X))])
    assert not classes.real and real.real
    assert classes.label_space() == 7 and Stream("s", classes.tasks, classes=9).label_space() == 9
    assert (classes.measure, real.measure) == ("accuracy", "explained")
    assert Stream("s", classes.tasks, score=minus_bits).measure == "minus bits"


# Through the runner


class Bag(nn.Module):
    """Ids and a mask to classes."""

    targets = "fc"

    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(9, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, ids, mask):
        h = self.fc(self.embed(ids)).tanh() * mask.unsqueeze(-1)
        return self.head(h.sum(1) / mask.sum(1, keepdim=True))


def bag(n, t, length=5):
    draw = seed(t)
    ids = torch.randint(1, 9, (n, length), generator=draw)
    mask = (torch.arange(length) < torch.randint(1, length + 1, (n, 1), generator=draw)).long()
    return {"ids": ids * mask, "mask": mask}, (ids[:, 0] + t) % 3


BAGS = Stream(
    "bags", [Task(f"t{t}", bag(40, t), bag(20, t + 9)) for t in range(2)], model=lambda s: Bag()
)


def test_training_is_the_loop_written_out():
    """Batches of one's own, own loss, optimiser and lr."""
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    other = copy.deepcopy(model)
    batches = [(X / 9, Y % 3), (X[:2], Y[:2] % 3)]

    def own(answers, y):
        return F.cross_entropy(answers, y, label_smoothing=0.1)

    task = Task("mine", batches, batches)
    how = {"lr": 0.1, "optimiser": "SGD", "loss": own}
    assert train(model, model.parameters(), task, 2, 0, **how) == 4
    for x, y in batches * 2:
        other.zero_grad()
        own(other(x), y).backward()
        with torch.no_grad():
            for w in other.parameters():
                w.add_(w.grad, alpha=-0.1)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)


@pytest.mark.parametrize("name", [n for n, e in ROSTER.items() if not e.needs])
def test_every_learner_lives_in_a_model_of_dictionaries(name):
    backbone = pretrain(BAGS, 0)
    assert not any(p.requires_grad for p in backbone.parameters())
    entry = ROSTER[name]
    rank = {"rank": 4} if "rank" in entry.settings else {}
    run = run_stream(lambda m, s: entry.make(m, s, **rank), backbone, BAGS, 0, epochs=2)
    learned = [row for row in run.matrix if not any(map(math.isnan, row))]
    assert len(learned) == (2 if name == "joint" else 3)
    assert all(0 <= value <= 1 for row in learned for value in row)


@pytest.mark.parametrize("scheme", [LoRA, LoRAMoE, MoRA])
def test_tensors_and_dictionaries_of_them_learn_to_the_same_bits(scheme):
    class Named(nn.Module):
        targets = "fc"

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 7)

        def forward(self, x):
            return self.fc(x)

    plain = Stream("s", [Task(f"t{t}", (X + t, Y), (X - t, Y)) for t in range(2)])
    named = [Task(k.name, ({"x": k.x_train}, Y), ({"x": k.x_test}, Y)) for k in plain.tasks]
    torch.manual_seed(0)
    backbone = Named().requires_grad_(False)
    runs = [
        run_stream(lambda m, s: AdapterLearner(m, scheme, rank=2), backbone, stream, 0, epochs=3)
        for stream in (plain, Stream("s", named))
    ]
    assert runs[0].matrix == runs[1].matrix
    assert repr(runs[0].records) == repr(runs[1].records)  # where nan is nan


def test_padding_counts_for_nobody():
    """The mask that comes with an input is the adapters' too: SMoRA counts the tokens it leaves."""
    learner = AdapterLearner(pretrain(BAGS, 0), SMoRA, rank=4, top_k=2)
    x, _ = bag(6, 0)
    learner.model.train()
    learner.predict(x, 0)
    tokens = int(x["mask"].sum())
    assert learner.model.fc.step.counts.sum() == 2 * tokens < 2 * x["mask"].numel()


@pytest.mark.parametrize(("scheme", "settings"), [(MoRA, {"tau": 1.0}), (LoRAMoE, {"top_k": 2})])
def test_what_stands_at_padding_is_not_recorded(scheme, settings):
    (x, _), (other, _) = bag(20, 0), bag(20, 0)
    other["ids"] = other["ids"].where(other["mask"] == 1, torch.tensor(8))
    assert not torch.equal(x["ids"], other["ids"])
    learner = AdapterLearner(pretrain(BAGS, 0), scheme, rank=2, **settings)
    grow(learner.model)
    for _, w in learner.model.named_parameters():
        if w.requires_grad:
            nn.init.normal_(w, generator=seed(1))
    found = []
    for inputs in (x, other):
        recorder = Recorder([inputs])
        for _ in range(2):
            recorder.record(learner.model, learner.predict)
        found.append(recorder.records["undecided"][1, 0].item())
    assert found[0] == found[1] and found[0] > 0.01


def test_a_frozen_batch_norm_does_not_move():
    x, y = torch.randn(30, 4, generator=seed()) + 3, torch.arange(30) % 3
    task = Task("a", (x, y), (x, y))

    def net(stream):
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3))

    stream = Stream("s", [task], base=Task("base", (x, y), (x, y)), model=net)
    backbone = pretrain(stream, 0)
    norm = backbone[1]
    assert norm.running_mean.abs().max() > 0.1  # that it learned
    learner = AdapterLearner(copy.deepcopy(backbone), LoRA, rank=2)
    learner.learn(stream, 0, lambda m, w, t: train(m, w, t, 3, 0))
    assert torch.equal(learner.model[1].running_mean, norm.running_mean)
    assert learner.model[0].B.abs().max() > 0


def test_buffers_that_move_in_training_are_put_back():
    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 4))
            self.head = nn.Linear(4, 7)
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x):
            if self.training:
                self.mean.add_(x.mean(0))
            return self.head(self.fc(x - self.mean))

    torch.manual_seed(0)
    model = Moving().eval().requires_grad_(False)
    model.targets = "head"
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    learner = AdapterLearner(model, LoRA, rank=2)
    learner.learn(Stream("s", [Task("a", (X, Y), (X, Y))]), 0, lambda m, w, t: train(m, w, t, 3, 0))
    assert learner.model.head.B.abs().max() > 0
    for name, value in before.items():
        assert torch.equal(model.get_buffer(name), value), name


def test_a_loaders_own_generator_is_seeded_too():
    loader = DataLoader(TensorDataset(X, Y), 3, shuffle=True, generator=seed(5))
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Linear(2, 7)
        train(model, model.parameters(), Task("a", loader, (X, Y)), 2, seed=1)
        found.append(model.weight)
    assert torch.equal(*found)


def test_what_was_trained_on_has_a_digest():
    task = Task("a", {"x": X, "labels": Y}, (X, Y)).to("cpu")
    assert data.digest(task.train) == data.digest(({"x": X.clone()}, Y.clone()))
    loader, other = (DataLoader(TensorDataset(x, Y), 3) for x in (X, X + 1))
    kinds = [(X, Y), (X + 1, Y), (X, Y + 1), (X.double(), Y), (X.view(7, 2, 1), Y), loader, other]
    kinds += [TensorDataset(X, Y), (X.bfloat16(), Y)]
    assert len({data.digest(given) for given in kinds}) == len(kinds)


def test_a_models_own_targets_or_all_linear_layers():
    model = pretrain(BAGS, 0)
    AdapterLearner(model, LoRA, rank=2)
    assert isinstance(model.fc, LoRA) and isinstance(model.head, nn.Linear)
    every = pretrain(BAGS, 0, targets=".*")
    AdapterLearner(every, LoRA, rank=2)
    assert isinstance(every.head, LoRA) and isinstance(every.fc, LoRA)
