"""To remember and to work out: what is asked, ranks that are all live, and what the numbers say."""

import random

import pytest
import torch
from torch import nn

from minimoe.continual.linear import least_squares, reduced_rank
from minimoe.continual.stream import score
from minimoe.roster import SCHEMES
from minimoe.studies import capacity
from minimoe.studies.capacity import BIRTH, GATES, SPEAKING, STORED, D, N, O, Q, asked, widen
from minimoe.studies.study import Rows
from minimoe.studies.verdicts import results


def test_the_teacher_is_of_equal_singular_values():
    task = asked("reasoning", 0)
    W = least_squares(*(part.double() for part in task.train))
    wanted = torch.cat([torch.ones(Q), torch.zeros(D - Q)]).double()
    torch.testing.assert_close(torch.linalg.svdvals(W), wanted, rtol=0, atol=1e-4)
    assert not torch.equal(task.x_train, task.x_test) and len(task.x_test) == N


@pytest.mark.parametrize("K", SPEAKING)
def test_one_map_of_k_ranks_explains_k_of_q(K):
    """1 - ‖T - T_K‖² / ‖T‖² = K / Q, of Q equal singular values; on N inputs, nearly so."""
    x, y = (part.double() for part in asked("reasoning", 0).test)
    assert score(x @ reduced_rank(x, y, K).T, y) == pytest.approx(K / Q, abs=0.05)


def test_memory_is_of_random_labels_and_asks_for_what_it_showed():
    task = asked("memory", 0)
    assert torch.equal(task.x_train, task.x_test) and torch.equal(task.y_train, task.y_test)
    assert set(task.y_train.tolist()) == set(range(O)) and N >= 64 * D
    # of the inputs the labels know nothing: one linear map, fitted to them all, is near chance
    onehot = nn.functional.one_hot(task.y_train).double()
    guess = task.x_train.double() @ least_squares(task.x_train.double(), onehot)
    assert score(guess, task.y_train) < 0.15
    assert torch.equal(asked("reasoning", 0).x_train, task.x_train)  # the same inputs
    assert not torch.equal(asked("memory", 1).x_train, task.x_train)


def layer_of(gate, R, grows=False, K=4):
    torch.manual_seed(0)
    layer = SCHEMES[gate](nn.Linear(D, O), **{**GATES[gate], "rank": BIRTH, "top_k": K})
    if grows:
        for _ in range(R // BIRTH - 1):
            layer.grow()
    else:
        widen(layer, R)
    return layer


@pytest.mark.parametrize("gate", GATES)
def test_a_wide_layer_is_a_grown_one_whose_ranks_all_learn(gate):
    R = 32
    wide, grown = layer_of(gate, R), layer_of(gate, R, grows=True)
    x = torch.randn(64, D)
    assert torch.equal(wide(x), wide.base(x))  # values are 0 at birth
    assert len(wide.frozen_A) == 0 and wide.ranks == wide.n_experts == R
    assert len(wide.A.unique(dim=0)) == R and wide.kept == 4 and wide.block == 1
    assert wide.speaking() == 4 * (D + O) == grown.speaking()
    names = [name for name in ("A", "B", "router") if hasattr(wide, name)]
    with torch.no_grad():
        for name in names:
            rows = torch.randn(R, D if name != "B" else O)
            getattr(wide, name).copy_(rows)
            getattr(grown, f"frozen_{name}").copy_(rows[:-BIRTH])
            getattr(grown, name).copy_(rows[-BIRTH:])
    for mode in (True, False):
        torch.testing.assert_close(wide.train(mode)(x), grown.train(mode)(x))
    wide(x.repeat(8, 1) + torch.randn(512, D)).square().sum().backward()
    for name in names:
        assert (getattr(wide, name).grad.abs().sum(1) > 0).float().mean() > 0.9, name


def test_at_birth_a_layer_of_as_many_ranks_is_as_it_was():
    for gate in GATES:
        layer = layer_of(gate, BIRTH, K=8)
        assert layer.ranks == layer.kept == BIRTH  # all speak


def test_cells_differ_in_what_they_say_and_nothing_else():
    cells = capacity.cells([0], False)
    assert len(cells) == 2 * len(GATES) * len(SPEAKING) * len(STORED)
    assert len({(c["epochs"], c["settings"]["rank"]) for c in cells}) == 1
    found = capacity.measure(cells[-1] | {"epochs": 1})
    assert cells[-1]["row"] == "reasoning, lora_moe, 8 of 512"
    assert found["stored"] == 512 * (D + O + D) and found["speaking"] == 8 * (D + O)
    mora = next(c for c in cells if c["scheme"] == "mora")
    assert capacity.measure(mora | {"epochs": 1})["stored"] == 8 * (D + O)


def made_up(memory, reasoning, active):
    """Rows: what each gains from least to most ranks, and reasoning from K to 2 K speaking."""
    cells = capacity.cells([0, 1, 2, 3, 4], False)
    found = []
    for cell in cells:
        K, share = cell["settings"]["top_k"], STORED.index(cell["R"]) / (len(STORED) - 1)
        gain = memory if cell["kind"] == "memory" else reasoning
        more = active * SPEAKING.index(K) * (cell["kind"] == "reasoning")
        noise = random.Random(f"{cell['row']} {cell['seed']}").uniform(0, 0.005)
        found.append({"score": 0.2 + share * gain + more + noise, "stored": 1, "speaking": 1})
    return Rows(cells, found)


@pytest.mark.parametrize(
    "gains, said",
    [
        ((0.5, 0.0, 0.3), ["supported"] * 3),
        ((0.0, 0.5, 0.0), ["refuted"] * 3),
        ((0.5, 0.02, 0.3), ["supported"] * 3),  # too little to matter
        ((0.5, 0.2, 0.3), ["supported", "refuted", "supported"]),
    ],
)
def test_verdicts(gains, said):
    rows = made_up(*gains)
    assert [claim.verdict for claim in results(capacity.claims(rows))] == said
    assert ".250, .500" in capacity.finding(rows)
