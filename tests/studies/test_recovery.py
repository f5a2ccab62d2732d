"""Clusters in conflict: the algebra of the stream, what a gate set by hand finds in it, and what
the numbers say."""

import math
import random

import pytest
import torch
from torch import nn

from minimoe import LoRA, LoRAMoE
from minimoe.adapt import adapt, adapters
from minimoe.continual.linear import least_squares, one_map, own_maps, zero
from minimoe.continual.stream import Stream, Task
from minimoe.roster import SCHEMES
from minimoe.studies import recovery
from minimoe.studies.recovery import CASES, DISTANCE, MOE, D, O, Q, arms, mixture, scored
from minimoe.studies.study import Rows
from minimoe.studies.verdicts import results


def parts(C, apart, seed=3):
    """Each cluster's map W (D, O), as least squares finds it, and the mean of its inputs."""
    stream, c = mixture(C, apart, seed)
    x, y = (part.double() for part in stream.tasks[0].test)
    maps = [least_squares(x[c == k], y[c == k]) for k in range(C)]
    for k, W in enumerate(maps):  # y is x W, and nothing else
        torch.testing.assert_close(x[c == k] @ W, y[c == k], rtol=0, atol=1e-4)
        assert torch.linalg.matrix_rank(W, tol=1e-3) == Q
    return torch.stack(maps), torch.stack([x[c == k].mean(0) for k in range(C)])


def test_two_clusters_cancel_each_other():
    """E[yᵀ x] = Σ W_cᵀ (I + m_cᵀ m_c) / 2 = 0 and E[y] = Σ m_c W_c / 2 = 0."""
    W, m = parts(2, True)
    torch.testing.assert_close(W[0], -W[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(m.norm(dim=1), torch.full((2,), DISTANCE).double(), rtol=0.1, atol=0)
    assert m[0] @ m[1] < -0.95 * DISTANCE**2
    m = (m[0] - m[1]) / 2 * torch.tensor([[1.0], [-1.0]])  # without the noise of a mean of 500
    moments = torch.eye(D) + m.unsqueeze(2) * m.unsqueeze(1)  # (2, D, D)
    assert (W.mT @ moments).sum(0).abs().max() < 1e-3 * (W[0].mT @ moments[0]).abs().max()
    assert (m[0] @ W[0]).norm() < 0.3 < W[0].norm()  # orthogonal, but for the noise of m
    assert one_map(mixture(2, True, 3)[0]) == pytest.approx(0, abs=0.02)


def test_of_four_clusters_the_mean_map_is_what_one_map_has():
    W, m = parts(4, True)
    share = W.mean(0).square().sum() / W.square().sum((1, 2)).mean()
    assert one_map(mixture(4, True, 3)[0]) == pytest.approx(share.item(), abs=0.03)
    assert 0.1 < share < 0.5
    between = m @ m.T / DISTANCE**2
    torch.testing.assert_close(between, torch.eye(4).double(), rtol=0, atol=0.15)


@pytest.mark.parametrize("C", [2, 4])
def test_at_equal_means_clusters_lie_on_each_other(C):
    W, m = parts(C, False)
    apart, _ = parts(C, True)
    torch.testing.assert_close(W, apart)  # the same maps: nothing but the means differs
    assert (m - m[0]).norm(dim=1).max() < 0.5 < DISTANCE


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_is_a_mixture(seed):
    again, other = mixture(4, True, seed), mixture(4, True, seed + 1)
    (task,), c = mixture(4, True, seed)[0].tasks, mixture(4, True, seed)[1]
    assert torch.equal(task.x_train, again[0].tasks[0].x_train) and torch.equal(c, again[1])
    assert not torch.equal(task.x_train, other[0].tasks[0].x_train)
    assert c.bincount().min() > 0.8 * recovery.TEST / 4


def planted(case, router=30.0):
    """A model whose router's rows are the means, and whose experts are the clusters' maps."""
    C, apart = CASES[case]
    stream, c = mixture(C, apart, 3)
    W, m = (part.float() for part in parts(C, apart))
    model = adapt(zero(stream), LoRAMoE, "fc1", rank=C * Q, experts=C, top_k=2).eval()
    ((_, layer),) = adapters(model)
    U, S, V = torch.linalg.svd(W)
    with torch.no_grad():
        layer.A.copy_((U[:, :, :Q] * S[:, None, :Q]).mT.reshape(C * Q, D))
        layer.B.copy_(V[:, :Q].reshape(C * Q, O))
        layer.router.copy_(router * m / DISTANCE)
    return model, stream.tasks[0], c


def test_a_gate_that_reads_the_means_explains_all_where_they_differ():
    for case, (C, apart) in CASES.items():
        found = scored(*planted(case))
        assert (found["explained"] > 0.97 and found["nmi"] > 0.97) == apart, case
        if not apart:
            assert found["nmi"] < 0.02
            assert found["explained"] < 0.4 if C == 4 else found["explained"] < 0.02
    # weights of a half each: the mean map, which of two clusters is 0
    model, task, cluster = planted("two", router=0.0)
    assert scored(model, task, cluster)["explained"] == pytest.approx(0, abs=1e-3)


def test_a_dense_update_names_no_cluster():
    stream, cluster = mixture(2, True, 3)
    model = adapt(zero(stream), LoRA, "fc1", rank=2 * Q).eval()
    assert scored(model, stream.tasks[0], cluster) == {"explained": 0.0, "nmi": 0.0}


@pytest.mark.parametrize("C", [2, 4])
def test_all_learners_have_as_many_ranks(C):
    found = arms(C)
    made = [SCHEMES[s](nn.Linear(D, O), **rest) for s, rest in found.values() if s in SCHEMES]
    assert len(made) == len(found) - 1 and {layer.ranks for layer in made} == {C * Q}
    routed = [layer for layer in made if isinstance(layer, LoRAMoE)]
    assert all((layer.n_experts, layer.block) == (C, Q) for layer in routed)
    assert sorted(layer.kept for layer in routed) == ([2] if C == 2 else [2, 4])


def test_least_squares_is_told_apart_from_no_gate():
    cells = [c for c in recovery.cells([3], False) if c["scheme"] == recovery.CLOSED]
    found = {cell["case"]: recovery.measure(cell) for cell in cells}
    assert set(found) == set(CASES) and all(math.isnan(one["nmi"]) for one in found.values())
    assert found["two"]["explained"] == one_map(mixture(2, True, 3)[0])


def test_a_cell_is_its_seeds_alone():
    cells = {c["row"]: c for c in recovery.cells([77], quick=True)}
    assert {c["case"] for c in cells.values()} == {"two", "two of equal means"}
    for row in (f"two, {MOE}", "two, mora"):
        found = recovery.measure(cells[row] | {"epochs": 1})
        torch.manual_seed(5)
        assert recovery.measure(cells[row] | {"epochs": 1}) == found
        assert 0 <= found["nmi"] <= 1 and -1 < found["explained"] < 1


def made_up(explained, nmi):
    """Rows of which lora_moe has these where means differ, and all else has none."""
    cells = recovery.cells([0, 1, 2, 3, 4], False)
    found = []
    for cell in cells:
        ours = cell["row"] in (f"two, {MOE}", f"four, {MOE}")
        noise = random.Random(f"{cell['row']} {cell['seed']}").uniform(0, 0.005)
        found.append({"explained": ours * explained + noise, "nmi": ours * nmi + noise})
    return Rows(cells, found)


@pytest.mark.parametrize("explained, nmi", [(0.9, 0.9), (0.9, 0.0), (0.02, 0.9)])
def test_verdicts(explained, nmi):
    rows = made_up(explained, nmi)
    said = [claim.verdict for claim in results(recovery.claims(rows))]
    assert said == ["supported" if v > 0.05 else "refuted" for v in (explained, nmi)]
    assert "two of equal means: least squares" in recovery.finding(rows)


def test_own_maps_explain_each_cluster():
    """What an oracle has: the clusters as tasks."""
    stream, c = mixture(4, True, 3)
    x, y = stream.tasks[0].test
    tasks = [Task(str(k), *[(x[c == k], y[c == k])] * 2) for k in range(4)]
    assert own_maps(Stream("clusters", tasks)) == pytest.approx(1.0, abs=1e-6)
