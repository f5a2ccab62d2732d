"""The streams of subspaces and of clusters: their construction, and what algebra says of them."""

import math

import pytest
import torch

from minimoe.cli import fresh
from minimoe.compare import compare
from minimoe.continual import clusters, streams, subspaces
from minimoe.continual.learn import make_backbone, pretrain, run_stream
from minimoe.options import Options
from minimoe.roster import ROSTER
from minimoe.tools.results import CompareResult, Spread, to_json
from minimoe.tools.tables import compare_page

D, M, Q, O = subspaces.D, subspaces.M, subspaces.Q, subspaces.O
ENERGY = "own map, by energy in its subspace"


def test_subspaces_are_drawn_as_their_equations_say():
    """The same draws in loops: a few rows of two tasks."""
    draw = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    for task in streams.make("subspaces", 2, seed=5).tasks:
        U = torch.linalg.qr(normal(D, M)).Q
        assert torch.allclose(U.T @ U, torch.eye(M, dtype=torch.float64))
        V = normal(Q, O) / 2  # √4
        for (x, y), n in ((task.train, 1024), (task.test, 512)):
            a, noise = normal(n, M), normal(n, O)
            assert x.shape == (n, D) and y.shape == (n, O)
            for i in (0, 7, n - 1):
                for d in (0, 33, D - 1):
                    # √(64 / 16) = 2
                    by_hand = sum(2 * U[d, k].item() * a[i, k].item() for k in range(M))
                    assert x[i, d].item() == pytest.approx(by_hand, abs=1e-5)
                for o in (0, 13, O - 1):
                    by_hand = sum(a[i, q].item() * V[q, o].item() for q in range(Q))
                    by_hand += 0.05 * noise[i, o].item()
                    assert y[i, o].item() == pytest.approx(by_hand, abs=1e-5)


def test_subspaces_have_no_mean_and_collide():
    stream = streams.make("subspaces", 8, seed=3)
    assert 8 * M > D
    spans = []
    for task in stream.tasks:
        x, y = task.x_train.double(), task.y_train.double()
        # one coordinate has variance 1 on average, a mean over 1,024 a deviation of 1/32
        assert x.mean(0).norm() / math.sqrt(D) < 2 / 32
        assert x.square().mean() == pytest.approx(1, abs=0.05)
        assert y.square().mean() == pytest.approx(1, abs=0.3)  # 4 × 32 entries of V
        assert torch.linalg.matrix_rank(x, rtol=1e-5) == M
        spans.append(torch.linalg.svd(x, full_matrices=False).Vh[:M])
    together = torch.linalg.matrix_rank(torch.cat(spans), rtol=1e-5)
    assert together == D  # of 8 × 16 directions
    for i, U in enumerate(spans):
        for j, task in enumerate(stream.tasks):
            x = task.x_test.double()
            share = (x @ U.T).square().sum() / x.square().sum()
            assert share == pytest.approx(1 if i == j else M / D, abs=1e-6 if i == j else 0.12)


def test_fewer_tasks_are_the_first_of_more():
    for name in ("subspaces", "clusters"):
        few, more = (streams.make(name, n, seed=2).tasks for n in (2, 4))
        for a, b in zip(few, more, strict=False):
            assert a.name == b.name and torch.equal(a.y_test, b.y_test)


def test_clusters_have_means_of_length_5_and_maps_that_cancel():
    stream = streams.make("clusters", 5, seed=3)
    means, maps = [], []
    for task in stream.tasks:
        x, y = task.x_train.double(), task.y_train.double()
        assert x.shape == (1024, 128) and y.shape == (1024, 64) and len(task.x_test) == 512
        mean = x.mean(0)
        # 128 coordinates, each with a deviation of 1/32: 25 + 128 / 1024
        assert mean.square().sum() == pytest.approx(25.1, abs=1.5)
        assert (x - mean).square().mean() == pytest.approx(1, abs=0.02)
        means.append(mean)
        W = torch.linalg.lstsq(x, y).solution
        assert (y - x @ W).square().mean().sqrt() == pytest.approx(0.1, abs=0.01)
        maps.append(W)
    W = torch.stack(maps)
    # an RMS of 1/√Q over the Q × O entries of V_c is Σ‖U V_c‖² = C O; noise adds a little
    assert W.square().sum() == pytest.approx(5 * 64, rel=0.02)
    assert W.mean(0).square().sum() < 0.01 * W.square().sum() / 5
    assert torch.linalg.matrix_rank(W.transpose(1, 2).reshape(-1, 128), rtol=0.1) == 4  # all on U
    for i, a in enumerate(means):
        for b in means[:i]:
            assert (a - b).norm() == pytest.approx(5 * math.sqrt(2), abs=0.5)
        assert (a @ W[i]).norm() < 0.1 * a.norm() * W[i].norm()  # the map does not read the mean


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_closed_forms_score_on_subspaces(seed):
    found = subspaces.reachable(None, streams.make("subspaces", 8, seed), {})
    assert found["one linear map"] == pytest.approx(0.49, abs=0.02)
    assert found["own map, by nearest mean"] == pytest.approx(0.07, abs=0.025)
    # the noise is .05² of a variance of 1
    for name in (ENERGY, "own map, told which"):
        assert found[name] == pytest.approx(0.997, abs=0.001)
    # three subspaces leave room for one map: then nothing is decided
    room = subspaces.reachable(None, streams.make("subspaces", 3, seed), {})
    assert room["one linear map"] > 0.99


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_closed_forms_score_on_clusters(seed):
    found = clusters.reachable(None, streams.make("clusters", 5, seed), {})
    # one map fits noise alone: of 5,120 examples with 128 inputs each, -128 / 5120 = -.025
    assert found["one linear map"] == pytest.approx(-0.025, abs=0.01)
    assert found["own map, by nearest mean"] == pytest.approx(0.985, abs=0.007)
    assert found["own map, told which"] == pytest.approx(0.988, abs=0.004)


@pytest.mark.parametrize("name", ["subspaces", "clusters"])
def test_the_model_answers_0_before_it_learns(name):
    stream = streams.make(name, 2)
    model = make_backbone(stream)
    assert not model(stream.tasks[0].x_test).any()


@pytest.mark.parametrize("name", ["subspaces", "clusters"])
def test_told_loras_learn_each_task_and_one_forgets_the_first(name):
    stream = streams.make(name, 2, seed=1)
    oracle, lora = (
        run_stream(ROSTER[who].make, pretrain(stream, 1), stream, 1, epochs=10).matrix
        for who in ("oracle", "lora")
    )
    assert min(oracle[2]) > 0.95
    assert lora[1][0] > 0.95 and lora[2][1] > 0.8
    assert lora[2][0] < lora[1][0] - 0.1


def test_compare_shows_closed_forms_and_takes_eight_subspaces(tmp_path):
    result = compare(tmp_path, "subspaces", ["zero_shot"])
    assert result.settings["tasks"] == 8 and result.schemes["zero_shot"].reachable is None
    assert result.closed_forms == {
        name: Spread(acc, None)
        for name, acc in subspaces.reachable(None, streams.make("subspaces", 8), {}).items()
    }
    page = compare_page(result, "")
    one, energy = (f"{result.closed_forms[n].mean:.3f}"[1:] for n in ("one linear map", ENERGY))
    assert f"\none linear map                      {one}\n" in page
    assert f"\nown map, by energy in its subspace  {energy}\n" in page
    assert "Closed forms: ACC by algebra" in page and "reachable" not in page
    assert CompareResult.from_json(to_json(result)).closed_forms == result.closed_forms


def test_a_run_of_subspaces_has_eight_tasks_unless_it_says_otherwise():
    assert fresh({"stream": "subspaces"}).tasks == 8
    assert fresh({"stream": "subspaces", "tasks": 3}).tasks == 3
    assert fresh({"stream": "clusters"}).tasks == 5
    assert (fresh({}).stream, fresh({}).tasks) == ("subspaces", 8)
    for name, tasks, more in (
        ("subspaces", 8, ""),
        ("subspaces", 5, " --tasks 5"),
        ("clusters", 5, ""),
    ):
        run = Options(name, ["lora"], tasks=tasks)
        named = "" if name == "subspaces" else f" --stream {name}"  # the default is not named
        assert run.command(["lora"]) == f"minimoe compare{named}{more}"
        assert run.extended({}).tasks == tasks  # resumed
    assert Options("subspaces", ["lora"], tasks=8).extended({"tasks": 9}).tasks == 9
