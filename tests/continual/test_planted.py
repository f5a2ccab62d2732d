"""The planted stream, and what is said of how far each learner can get on it."""

import json

import pytest
import torch

from minimoe import LoRAMoE, MoRA
from minimoe.cli import main
from minimoe.compare import compare
from minimoe.continual import planted, streams
from minimoe.continual.learn import pretrain
from minimoe.continual.linear import Linear, reduced_rank
from minimoe.continual.planted import reachable
from minimoe.continual.stream import score
from minimoe.roster import ROSTER, names

STREAM = streams.make("planted", 3, seed=1)
BY_DEFAULT = names(Linear(1, 1), "scheme", "baseline", "privileged")


def settings(**changes):
    return {name: entry.changed(changes) for name, entry in ROSTER.items()}


@pytest.fixture(scope="module")
def backbone():
    return pretrain(STREAM, seed=1)


def test_each_task_changes_the_teacher_at_rank_4_on_a_subspace_of_its_own():
    teacher = torch.linalg.lstsq(STREAM.base.x_train.double(), STREAM.base.y_train.double())
    spans = []
    for task in STREAM.tasks:
        x, y = task.x_train.double(), task.y_train.double()
        change = y - x @ teacher.solution
        assert torch.linalg.matrix_rank(x, rtol=1e-5) == 12
        assert torch.linalg.matrix_rank(change, rtol=1e-5) == 4
        fit = torch.linalg.lstsq(x, y, driver="gelsd", rcond=1e-5).solution
        assert torch.allclose(task.x_test.double() @ fit, task.y_test.double(), atol=1e-4)
        spans.append(torch.linalg.svd(x, full_matrices=False).Vh[:12])
    for i, U in enumerate(spans):
        for V in spans[:i]:
            assert (U @ V.T).abs().max() < 1e-5


def test_reduced_rank_by_hand():
    # e = x diag(3, 2). With x = I the larger wins. With the second input 4 times as long, its
    # answers are (0, 8) against (3, 0): now the other does.
    both = torch.tensor([[3.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    far = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
    for x, one in ((eye, [[3.0, 0.0], [0.0, 0.0]]), (far, [[0.0, 0.0], [0.0, 2.0]])):
        assert torch.allclose(reduced_rank(x, x @ both, 2), both)
        assert torch.allclose(reduced_rank(x, x @ both, 1), torch.tensor(one, dtype=torch.float64))


def test_no_training_gets_below_reduced_rank_and_long_training_gets_there():
    x, e = (torch.randn(30, n, dtype=torch.float64) for n in (7, 5))
    x[:, 0] *= 3
    for rank in (1, 2, 4):
        best = (e - x @ reduced_rank(x, e, rank).T).square().sum()
        found = []
        for _ in range(5):
            A = torch.randn(rank, 7, dtype=torch.float64)
            for _ in range(500):  # least squares in one factor, then in the other
                B = torch.linalg.lstsq(x @ A.T, e).solution
                A = (torch.linalg.lstsq(x, e).solution @ torch.linalg.pinv(B)).T
            found.append((e - x @ A.T @ B).square().sum())
        assert min(found) >= best - 1e-9
        assert torch.isclose(min(found), best, rtol=1e-6)
        assert torch.linalg.matrix_rank(reduced_rank(x, e, rank)) == rank


def test_what_is_reachable_on_known_tasks(backbone):
    found = reachable(backbone, STREAM, settings())
    assert set(found) == {*BY_DEFAULT, "olora", "ewc"} - {"ridge", "own_ridge", "own_subspace"}
    acc = {name: one.mean for name, one in found.items()}
    limits = {name for name, one in found.items() if one.limit}
    assert limits == set(found) - {"lora_moe", "mora", "mora_detached"}
    # three tasks' changes are 12 directions; lora has 8 of them, the others all
    assert acc["zero_shot"] < acc["lora"] < 0.95
    assert acc["ewc"] == acc["replay_20"] == acc["lora"] and acc["olora"] == acc["lora_grown"]
    for name in ("lora_grown", "joint", "oracle"):
        assert acc[name] == pytest.approx(1, abs=1e-5)
    # inputs on the far side of a subspace, Φ(-2) of them, are answered as the base does
    for name in ("lora_moe", "mora"):
        assert 0.95 < acc[name] < 1
    # at rank 12 one LoRA holds all; at rank 2 a task of four directions fits nobody
    assert reachable(backbone, STREAM, settings(rank=12))["lora"].mean > 0.9999
    small = reachable(backbone, STREAM, settings(rank=2))
    assert small["oracle"].mean < 0.9 and small["mora"].mean < small["oracle"].mean
    still = sum(score(backbone(k.x_test), k.y_test) for k in STREAM.tasks) / 3
    assert acc["zero_shot"] == pytest.approx(still, abs=1e-5)


@pytest.mark.parametrize("name", ["lora_moe", "mora"])
def test_a_planted_layer_answers_as_the_oracle_on_the_means_side(name, backbone):
    base = pretrain(STREAM, seed=1).fc1.double()
    plain = [(k.x_train.double(), k.y_train - base(k.x_train.double())) for k in STREAM.tasks]
    if name == "mora":
        layer = planted.plant_mora(MoRA(base, 8, top_k=8, tau=0.1, delta=0.2), plain)
    else:
        layer = planted.plant_lora_moe(LoRAMoE(base, 8, top_k=3), plain)
    assert layer.ranks == 24
    layer.eval()
    for k, (x_train, _) in zip(STREAM.tasks, plain, strict=True):
        x, y, mean = k.x_test.double(), k.y_test.double(), x_train.mean(0)
        near = x @ mean / mean.norm() > 1
        assert 0.7 < near.double().mean() < 0.95
        assert score(layer(x[near]), y[near]) > 0.999


def test_a_score_is_the_share_explained():
    # y = (3, 4), answered with (3, 3): 1 - 1/25
    y = torch.tensor([[3.0, 4.0]])
    assert score(torch.tensor([[3.0, 3.0]]), y) == pytest.approx(0.96)
    assert score(y, y) == 1 and score(0 * y, y) == 0 and score(-y, y) == -3


@pytest.mark.slow
def test_compare_prints_the_reachable_beside_the_learned(tmp_path, capsys):
    out = tmp_path / "run"
    asked = f"compare --stream planted --tasks 2 --epochs 3 --seeds 0 1 --out {out}"
    assert main(asked.split()) == 0
    result = json.loads((out / "compare.json").read_text())
    assert list(result["schemes"]) == BY_DEFAULT
    for name, scheme in result["schemes"].items():
        if name in ("ridge", "own_ridge", "own_subspace"):  # no linear answer
            assert "reachable" not in scheme
            continue
        shown = name in ("lora_moe", "mora", "mora_detached")
        assert scheme["reachable"]["limit"] == (not shown)
        if scheme["reachable"]["limit"]:
            assert scheme["acc"]["mean"] <= scheme["reachable"]["mean"] + 1e-6
    printed = capsys.readouterr().out
    assert "reachable" in printed.splitlines()[2] and "share of the answer explained" in printed
    assert (out / "compare.png").stat().st_size and (out / "gates.png").stat().st_size


def test_learners_that_need_classes_are_refused(tmp_path):
    lacks = set(names()) - set(names(Linear(1, 1)))
    assert lacks == {"class_mean", "head_only", "trigram", "lda", "lda_features", "wemoe"}
    with pytest.raises(ValueError, match="scheme is 'head_only', allowed on planted: lora, "):
        compare(tmp_path, "planted", ["head_only"])
