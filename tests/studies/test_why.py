"""The gate taken apart: at its ends it is MoRA's and LoRA-MoE's, between them what a loop says."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from minimoe import LoRAMoE, MoRA
from minimoe.studies.verdicts import Comparison
from minimoe.studies.why import ARMS, TASKS, Factored, cells, told_apart

D, O, RANK = 11, 7, 4


def grown(make):
    """A layer of three tasks in float64, no row of it zero."""
    torch.manual_seed(0)
    layer = make(nn.Linear(D, O).double())
    for _ in range(2):
        layer.grow()
    with torch.no_grad():
        for name, rows in layer.state_dict().items():
            if "base" not in name:
                rows.copy_(torch.randn(rows.shape, dtype=torch.float64))
    return layer


def answered(layer, x):
    """Outputs, and the gradient of every live tensor."""
    y = layer(x)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    live = [p for p in layer.parameters() if p.requires_grad]
    return y, dict(zip(names, torch.autograd.grad(y.square().sum(), live), strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "theirs, ours",
    [
        (MoRA, {"top_k": 5, "tau": 0.1, "delta": 0.2}),
        (MoRA, {"top_k": 12, "tau": 0.3, "delta": -1.0}),
        (LoRAMoE, {"top_k": 2}),
    ],
)
def test_at_its_ends_it_is_the_schemes_own_gate(theirs, ours, training):
    routed = {"score": "linear", "grain": "block", "norm": False, "tau": 1.0}
    changes = ours | (routed if theirs is LoRAMoE else {})
    scheme = grown(lambda base: theirs(base, rank=RANK, **ours)).train(training)
    factored = grown(lambda base: Factored(base, rank=RANK, **changes)).train(training)
    factored.load_state_dict(scheme.state_dict())
    x = torch.randn(9, D, dtype=torch.float64)
    (y, grads), (other, others) = answered(scheme, x), answered(factored, x)
    torch.testing.assert_close(other, y)
    torch.testing.assert_close(others, grads)


def loop(layer, x):
    """What it answers, one token and one expert after the other."""
    A, B = layer.rows("A").detach().numpy(), layer.rows("B").detach().numpy()
    W = layer.rows("router").detach().numpy() if hasattr(layer, "router") else None
    n = layer.block
    answers = []
    for token in x.numpy():
        scores = []
        for e in range(len(A) // n):
            z = A[e * n : (e + 1) * n] @ token
            if layer.score == "linear":
                scores.append(W[e] @ token)
            elif layer.score == "cosine":
                scores.append(W[e] @ token / np.sqrt(W[e] @ W[e]) / np.sqrt(token @ token))
            elif n > 1 or layer.score == "size":
                scores.append(np.sqrt(z @ z))
            else:
                scores.append(z[0])
        scores = np.array(scores)
        if layer.norm:
            scores = scores / np.sqrt(scores @ scores)
        kept = sorted(range(len(scores)), key=lambda e: -scores[e])[: layer.top_k]
        total = sum(np.exp(scores[e] / layer.tau) for e in kept)
        y = layer.base.weight.detach().numpy() @ token + layer.base.bias.detach().numpy()
        for e in kept:
            w = np.exp(scores[e] / layer.tau) / total * (scores[e] >= layer.delta)
            for r in range(e * n, (e + 1) * n):
                y = y + layer.scale * w * (A[r] @ token) * B[r]
        answers.append(y)
    return np.array(answers)


@pytest.mark.parametrize(
    "score, grain, norm",
    list(itertools.product(("self", "size", "linear", "cosine"), ("rank", "block"), (True, False))),
)
def test_every_factor_is_what_a_loop_says(score, grain, norm):
    settings = {"score": score, "grain": grain, "norm": norm, "tau": 0.4, "delta": 0.25}
    layer = grown(lambda base: Factored(base, rank=RANK, scale=2.0, top_k=2, **settings)).eval()
    x = torch.randn(6, D, dtype=torch.float64)
    np.testing.assert_allclose(layer(x).detach().numpy(), loop(layer, x), rtol=1e-9)


def test_a_detached_gate_has_the_same_output_and_no_gradient_for_its_router():
    x = torch.randn(6, D, dtype=torch.float64)
    changes = {"score": "linear", "norm": False, "tau": 1.0}
    exact = grown(lambda base: Factored(base, rank=RANK, **changes))
    held = grown(lambda base: Factored(base, rank=RANK, detach=True, **changes))
    assert torch.equal(exact(x), held(x))
    assert answered(exact, x)[1]["router"].abs().sum() > 0
    unused = torch.autograd.grad(held(x).sum(), held.router, allow_unused=True)[0]
    assert unused is None


def test_all_arms_speak_with_as_many_ranks_but_for_those_that_say_so():
    for arm, changes in ARMS.items():
        layer = grown(lambda base: Factored(base, **{"rank": 6, "top_k": 12, **changes}))  # noqa: B023
        spoken = layer.kept * layer.block
        if "= stored" not in arm and "speak" not in arm:
            assert spoken == (12 if layer.grain == "rank" else 2 * 6), arm
    assert len({str(cell) for cell in cells([0, 1], quick=False)}) == 2 * len(TASKS) * len(ARMS)


def test_an_arm_is_told_apart_by_its_interval_and_by_what_matters():
    for more, less, apart in (
        ([0.7, 0.71, 0.72], [0.5, 0.51, 0.53], True),
        ([0.5, 0.51, 0.53], [0.7, 0.71, 0.72], True),
        ([0.501, 0.512, 0.522], [0.5, 0.51, 0.52], False),  # too small to matter
        ([0.9, 0.5, 0.6], [0.5, 0.51, 0.52], False),  # 0 is in its interval
        ([0.7, 0.7, 0.7], [0.5, 0.5, 0.5], False),  # seeds that do not differ: it has none
    ):
        assert told_apart(Comparison("", more, less)) == apart
