"""Closed forms against loops in NumPy, in any order of tasks, and by what they keep."""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from minimoe.continual import closed, data, streams
from minimoe.continual.backbones import Backbone
from minimoe.continual.checkpoints import Checkpoints
from minimoe.continual.closed import LDA, OwnRidge, OwnSubspace, Ridge
from minimoe.continual.learn import pretrain, run_stream
from minimoe.continual.linear import Linear
from minimoe.continual.stream import IGNORED, Stream, Task
from minimoe.roster import ROSTER, names

FORMS = {
    "ridge": partial(Ridge, M=9),
    "own_ridge": partial(OwnRidge, M=9),
    "own_subspace": partial(OwnSubspace, m=2),
    "lda": LDA,
}
NAMES = [*FORMS, *(f"{name}_features" for name in FORMS if name != "own_subspace")]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small(real=False, tasks=3):
    """Tasks of 5 inputs, awkward in size: 3 classes of 4, or 2 real answers."""
    draw, made = seeded(1), []
    for t in range(tasks):
        parts = []
        for n in (23 + t, 11):
            x = torch.randn(n, 5, generator=draw) + 2 * t
            y = torch.randn(n, 2, generator=draw) if real else torch.arange(n) % 3 + (t == 1)
            parts.append((x, y))
        made.append(Task(f"t{t}", *parts))
    return Stream("small", made, classes=None if real else 4)


def learned(name, stream, order=None, model=None, **settings):
    """A learner of one of NAMES, after the tasks in that order."""
    torch.manual_seed(5)
    model = model or (Linear(5, 2) if stream.real else Backbone(4, (5, 7, 7, 6)))
    frozen = {"frozen": True} if name.endswith("_features") else {}
    torch.manual_seed(6)
    learner = FORMS[name.removesuffix("_features")](model, stream, **frozen, **settings)
    for t in range(len(stream.tasks)) if order is None else order:
        learner.learn(stream, t, None)
    return learner


def layer_norm(u):
    return [(v - np.mean(u)) / math.sqrt(np.var(u) + 1e-5) for v in u]


def lifted(learner, u):
    """h of one u: relu(P [u, 1]), and behind [u, 1] where answers are real, or nothing else is."""
    u = [*u, 1.0]
    P = learner.P.numpy()
    h = [max(0.0, sum(P[m, d] * u[d] for d in range(len(u)))) for m in range(len(P))]
    return np.array([*u, *h] if learner.real or not h else h)


def read(learner, x):
    x = [float(v) for v in x]
    return np.array(x if learner.real else layer_norm(x))


def solved(pairs, width, O, penalty=1.0):
    """(Σ h hᵀ + λ I)⁻¹ Σ h yᵀ."""
    G, C = penalty * np.eye(width), np.zeros((width, O))
    for h, y in pairs:
        for i in range(width):
            for j in range(width):
                G[i, j] += h[i] * h[j]
            for o in range(O):
                C[i, o] += h[i] * y[o]
    return np.linalg.solve(G, C)


def pairs_of(learner, task):
    for x, y in zip(*task.train, strict=True):
        u = read(learner, x)
        target = y.double().numpy() if learner.real else np.eye(4)[int(y)]
        yield lifted(learner, u), target


@pytest.mark.parametrize("penalty", [1.0, 20.0])
@pytest.mark.parametrize("M", [9, 0])
@pytest.mark.parametrize("real", [False, True])
def test_ridge_is_the_loop_written_out(real, M, penalty):
    stream = small(real)
    learner = learned("ridge", stream, M=M, penalty=penalty)
    every = [pair for task in stream.tasks for pair in pairs_of(learner, task)]
    W = solved(every, M + 6 * (real or M == 0), 2 if real else 4, penalty)
    for task in stream.tasks:
        got = learner.predict(task.x_test, 0)
        want = [lifted(learner, read(learner, x)) @ W for x in task.x_test]
        np.testing.assert_allclose(got.numpy(), np.array(want), atol=1e-5)


@pytest.mark.parametrize("real", [False, True])
def test_own_ridge_is_the_loop_written_out(real):
    stream = small(real)
    learner = learned("own_ridge", stream)
    W, means = [], []
    for task in stream.tasks:
        W.append(solved(pairs_of(learner, task), 9 + 6 * real, 2 if real else 4))
        means.append(sum(read(learner, x) for x in task.x_train) / len(task.x_train))
    chosen = set()
    for task in stream.tasks:
        got = learner.predict(task.x_test, 0)
        for x, answer in zip(task.x_test, got, strict=True):
            u = read(learner, x)
            t = min(range(3), key=lambda t: ((u - means[t]) ** 2).sum())
            chosen.add(t)
            np.testing.assert_allclose(answer.numpy(), lifted(learner, u) @ W[t], atol=1e-5)
    assert chosen == {0, 1, 2}


@pytest.mark.parametrize("real", [False, True])
def test_own_subspace_is_the_loop_written_out(real):
    """Directions by a singular value decomposition, each known but for its sign, which W shares."""
    stream = small(real)
    learner = learned("own_subspace", stream)
    U, W = [], []
    for task in stream.tasks:
        u = np.array([read(learner, x) for x in task.x_train])
        U.append(np.linalg.svd(u)[2][:2])  # (m, D)
        y = task.y_train.double().numpy() if real else np.eye(4)[task.y_train.numpy()]
        pairs = [(U[-1] @ a, b) for a, b in zip(u, y, strict=True)]
        W.append(solved(pairs, 2, y.shape[1]))
    chosen = set()
    for task in stream.tasks:
        got = learner.predict(task.x_test, 0)
        for x, answer in zip(task.x_test, got, strict=True):
            u = read(learner, x)
            t = max(range(3), key=lambda t: sum((U[t] @ u) ** 2))
            chosen.add(t)
            np.testing.assert_allclose(answer.numpy(), (U[t] @ u) @ W[t], atol=1e-5)
    assert len(chosen) > 1


def test_own_subspace_is_what_algebra_says_of_tasks_without_a_mean():
    stream = streams.make("subspaces", 8, seed=2)
    learner = ROSTER["own_subspace"].make(stream.model(stream), stream)
    for t in range(8):
        learner.learn(stream, t, None)
    said = stream.reachable(None, stream, {})["own map, by energy in its subspace"]
    assert sum(learner.row(stream, 8)) / 8 == pytest.approx(said, abs=1e-3)
    assert learner.count()["stored"] == 8 * 16 * (64 + 32)


def test_lda_is_the_loop_written_out():
    stream = small()
    learner = learned("lda", stream)
    S, means = np.zeros((5, 5)), []
    for task in stream.tasks:
        u = np.array([read(learner, x) for x in task.x_train])
        for c in range(4):
            own = u[(task.y_train == c).numpy()]
            if len(own):
                means.append((c, sum(own) / len(own)))
                for v in own:
                    S += np.outer(v - means[-1][1], v - means[-1][1])
    inverse = np.linalg.inv(S + 1e-4 * np.trace(S) / 5 * np.eye(5))
    for task in stream.tasks:
        got = learner.predict(task.x_test, 0)
        for x, answer in zip(task.x_test, got, strict=True):
            u, best = read(learner, x), np.full(4, -np.inf)
            for c, m in means:
                best[c] = max(best[c], m @ inverse @ u - m @ inverse @ m / 2)
            np.testing.assert_allclose(answer.numpy(), best, rtol=1e-4, atol=1e-5)


def test_lda_by_hand():
    # two classes at ±1 in the second of two numbers, whose spread is the same in all directions:
    # the nearest mean answers. Their difference of scores at (0, s) is 2 s / (variance)
    class Plain(LDA):
        def read(self, x):
            return x.double()

    x = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    x = torch.cat([x, x - torch.tensor([0.0, 2.0])])
    y = torch.tensor([0] * 4 + [1] * 4)
    stream = Stream("s", [Task("a", (x, y), (x, y))])
    learner = Plain(Backbone(2, (2, 3, 3, 3)), stream)
    assert learner.predict(x, 0).isinf().all()  # nothing was seen
    learner.learn(stream, 0, None)
    assert torch.equal(learner.means, torch.tensor([[0.0, 1.0], [0.0, -1.0]]).double())
    assert torch.equal(learner.S, 4 * torch.eye(2).double())
    a, b = learner.predict(torch.tensor([[7.0, 0.5]]), 0)[0].tolist()
    assert a - b == pytest.approx(2 * 0.5 / (4 * (1 + 1e-4)), rel=1e-6)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_tasks_in_any_order_give_the_same(name, real):
    """λ too: it is fixed, so that it hangs on no order."""
    if real and name.startswith("lda"):
        pytest.skip("lda is for classes")
    stream = small(real)
    one, other = learned(name, stream), learned(name, stream, [2, 0, 1])
    x = torch.cat([task.x_test for task in stream.tasks])
    for a, b in zip(weights(one), weights(other), strict=True):
        assert (a - b).abs().max() < 1e-9 * max(1, b.abs().max())
    assert torch.allclose(one.predict(x, 0), other.predict(x, 0), atol=1e-5)


def weights(learner):
    """What it has solved for, and the means in an order of their own."""
    if isinstance(learner, Ridge):
        return [closed.ridge(learner.G, learner.C, 1.0)]
    if isinstance(learner, OwnSubspace):  # without the directions' signs
        every = [learner.U @ learner.U.mT, learner.U @ learner.W]
        return [each[every[0][:, 0, 0].argsort()] for each in every]
    order = learner.means[:, 0].argsort()
    if isinstance(learner, OwnRidge):
        return [learner.means[order], learner.W[order]]
    return [learner.S, learner.means[order], learner.of[order]]


@pytest.mark.parametrize("name", NAMES)
def test_data_in_batches_is_the_same_data(name):
    whole = small()
    parts = [
        Task(k.name, [(k.x_train[:9], k.y_train[:9]), (k.x_train[9:], k.y_train[9:])], k.test)
        for k in whole.tasks
    ]
    one, other = learned(name, whole), learned(name, dataclasses.replace(whole, tasks=parts))
    near = 1e-4 if name.endswith("_features") else 1e-9  # of a model in float32
    for a, b in zip(weights(one), weights(other), strict=True):
        assert torch.allclose(a, b, rtol=near, atol=near)


@pytest.mark.parametrize("name", NAMES)
def test_a_label_that_does_not_count_counts_for_nothing(name):
    whole = small()
    x, y = whole.tasks[0].train
    more = (torch.cat([x, x[:4] + 9]), torch.cat([y, torch.full((4,), IGNORED)]))
    first = Task("t0", more, whole.tasks[0].test)
    one = learned(name, whole)
    other = learned(name, dataclasses.replace(whole, tasks=[first, *whole.tasks[1:]]))
    for a, b in zip(weights(one), weights(other), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_loads_into_a_learner_of_another_seed(name):
    stream = small()
    one = learned(name, stream)
    torch.manual_seed(99)
    frozen = {"frozen": True} if name.endswith("_features") else {}
    other = FORMS[name.removesuffix("_features")](one.model, stream, **frozen)
    other.load_state({key: t.clone() for key, t in one.state().items()})
    assert torch.equal(
        one.predict(stream.tasks[1].x_test, 0), other.predict(stream.tasks[1].x_test, 0)
    )
    for learner in (one, other):
        learner.learn(stream, 0, None)
    assert torch.equal(
        one.predict(stream.tasks[1].x_test, 0), other.predict(stream.tasks[1].x_test, 0)
    )


@pytest.mark.parametrize("name", FORMS)
def test_a_state_is_a_copy(name):
    stream = small()
    learner = learned(name, stream, [0])
    state = learner.state()
    before = {key: tensor.clone() for key, tensor in state.items()}
    learner.learn(stream, 1, None)
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.items())


@pytest.mark.parametrize(
    ("name", "permuted", "split"),
    # a triangle of 300, and 10 classes; by task 64 means and 200 by 10 weights; a triangle of 64,
    # and 64 for each task and class that occurs together
    [
        ("ridge", 300 * 301 // 2 + 3000, 300 * 301 // 2 + 3000),
        ("own_ridge", 5 * (64 + 2000), 5 * (64 + 2000)),
        ("own_subspace", 5 * 16 * (64 + 10), 5 * 16 * (64 + 10)),
        ("lda", 64 * 65 // 2 + 50 * 64, 64 * 65 // 2 + 10 * 64),
        ("ridge_features", 200 * 201 // 2 + 2000, 200 * 201 // 2 + 2000),
        ("own_ridge_features", 5 * (64 + 2000), 5 * (64 + 2000)),
        ("lda_features", 64 * 65 // 2 + 50 * 64, 64 * 65 // 2 + 10 * 64),
    ],
)
def test_stored_is_what_must_be_kept_to_go_on(name, permuted, split):
    for stream, stored in (("permuted-digits", permuted), ("split-digits", split)):
        made = streams.make(stream, 5, seed=1)
        learner = ROSTER[name].make(Backbone(), made)
        for t in range(5):
            learner.learn(made, t, None)
        assert learner.count()["stored"] == stored


@pytest.mark.parametrize("name", ["ridge", "own_ridge", "own_subspace", "lda_features"])
def test_a_run_repeats_and_goes_on_to_the_same_bits(name, tmp_path):
    stream = streams.make("split-digits", 3, seed=1)
    backbone = pretrain(streams.Stream("split", stream.tasks), seed=1)
    whole, again = (run_stream(ROSTER[name].make, backbone, stream, 1, 1) for _ in range(2))
    assert whole.matrix == again.matrix and math.isnan(whole.step)
    kept = Checkpoints(tmp_path / "c", {"scheme": name})
    short = dataclasses.replace(stream, tasks=stream.tasks[:2])
    run_stream(ROSTER[name].make, backbone, short, 1, 1, checkpoints=kept)
    assert run_stream(ROSTER[name].make, backbone, stream, 1, 1, checkpoints=kept).matrix == (
        whole.matrix
    )


def test_they_forget_little_where_a_lora_forgets():
    stream = streams.make("permuted-digits", 3, seed=3)
    backbone = pretrain(dataclasses.replace(stream, base=None), seed=3)  # it needs no pretraining
    for name, least in (("ridge", 0.93), ("own_ridge", 0.93), ("lda", 0.9)):
        run = run_stream(ROSTER[name].make, backbone, stream, 3, 1)
        assert min(run.matrix[-1]) > least
        assert run.matrix[0] == [pytest.approx(0.1, abs=0.05)] * 3  # one class is all it answers


def test_a_real_stream_is_explained():
    stream = streams.make("planted", 3, seed=0)
    model = Linear(64, 64)
    for name in ("ridge", "own_ridge", "ridge_features", "own_ridge_features"):
        run = run_stream(ROSTER[name].make, model, stream, 0, 1)
        assert min(run.matrix[-1]) > 0.95
        assert run.matrix[0] == [0, 0, 0]


def test_they_live_where_a_model_reads_numbers():
    every = set(NAMES)
    assert every <= set(names(Backbone()))
    assert every & set(names(Linear(3, 2))) == every - {"lda", "lda_features"}  # without classes
    assert not every & set(names(nn.Linear(3, 2)))
    words = streams.make("sequences", 1)
    assert not every & set(names(words.model(words)))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (
            torch.ones(4, 3).long(),
            torch.arange(4),
            "inputs are torch.int64, allowed: a tensor of r",
        ),
        ({"a": torch.ones(4, 3)}, torch.arange(4), "inputs are dict, allowed: a tensor of real"),
        (
            torch.ones(4, 3),
            torch.ones(4, 2).long(),
            r"y is \(1, 2\) for an example, allowed: one c",
        ),
    ],
)
def test_what_they_cannot_read_is_named(x, y, message):
    stream = Stream("s", [Task("a", (x, y), (x, y))])
    with pytest.raises(ValueError, match=f"^{message}"):
        Ridge(Backbone(4, (3, 4, 4, 4)), stream)


def test_frozen_features_may_be_of_dictionaries():
    class Bag(Backbone):
        def features(self, a):
            return super().features(a)

        def forward(self, a):
            return self.features(a) @ self.classes.T

    plain = small()
    named = [
        Task(k.name, ({"a": k.x_train}, k.y_train), ({"a": k.x_test}, k.y_test))
        for k in plain.tasks
    ]
    torch.manual_seed(0)
    model = Bag(4, (5, 7, 7, 6))
    one = learned("ridge_features", plain, model=model)
    other = learned("ridge_features", dataclasses.replace(plain, tasks=named), model=model)
    assert torch.equal(one.G, other.G) and data.count(named[0].train[0]) == 23


@pytest.mark.parametrize("make", [Ridge, OwnRidge, OwnSubspace])
def test_a_penalty_is_above_0(make):
    with pytest.raises(ValueError, match=r"penalty is 0\.0, allowed: above 0"):
        make(Linear(5, 2), small(True), penalty=0.0)


def test_a_shrinkage_is_above_0():
    with pytest.raises(ValueError, match=r"shrink is -1\.0, allowed: above 0"):
        LDA(Backbone(4, (5, 7, 7, 6)), small(), shrink=-1.0)
