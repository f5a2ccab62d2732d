"""Rank-1 Expert Pool against its oracle, numbers worked by hand, and what is its own."""

from itertools import chain

import numpy as np
import pytest
import torch
from layers import X, arrays, grown
from oracle import base
from torch import nn

from minimoe.adapt import after_step, context
from minimoe.continual.probe import dense_gate
from minimoe.schemes.rank1_pool import Rank1Pool

SETTINGS = {"scale": 0.7, "top_k": 1, "keep": 1, "orthogonality": 0.3}
UNCLAIMED = {"granularity", "nan_stays", "support", "simplex", "merge_is_equal"}  # laws


def largest(values, k):
    """The places of the k largest, the first of equals first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def critical_loop(layer, votes):
    """The ranks of most votes of each task, a list for each."""
    r = layer.rank
    tasks = range(len(votes) // r)
    return [[t * r + i for i in largest(votes[t * r : t * r + r], layer.keep)] for t in tasks]


def pool(layer, x, n, V, sample):
    """Fa et al., 2601.22828: in training the batch's ranks for the live task."""
    *old, live = critical_loop(layer, n["votes"])
    R, r = len(n["A"]), layer.rank
    if layer.training:
        first = [sample.index(m) for m in sorted(set(sample))]
        votes = [0] * r
        for t in first:
            for i in largest([x[t] @ V[i] for i in range(r)], layer.top_k):
                votes[i] += 1
        live = [R - r + i for i in largest(votes, layer.top_k)]
    y = base(x, n["W0"], n["b"])
    for t in range(len(x)):
        for i in [*chain(*old), *live]:
            y[t] += layer.scale * (x[t] @ n["A"][i]) * n["B"][i]
    return y


def expected(layer, x, rows, given):
    return pool(layer, x, rows, layer.V.numpy(), given["sample"])


AUX = {"B"}


def expected_aux(layer, x, rows, given):
    *old, live = critical_loop(layer, rows["votes"])
    each = [abs(rows["B"][i] @ rows["B"][j]) for i in chain(*old) for j in live]
    return layer.orthogonality * sum(each) / max(len(each), 1)


def STORED(D, O, R, r, E):
    return R * (D + O + 1) + r * D


def ACTIVE(D, O, R, r, E, k):
    return E * (D + O) + r * D  # in training: 1 of each task


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k is 0, allowed: 1 or more"),
        ({"keep": 0}, "keep is 0, allowed: 1 or more"),
        ({"orthogonality": -0.1}, "orthogonality is -0.1, allowed: 0 or more"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Rank1Pool(nn.Linear(7, 5), **{"rank": 2} | settings)


def test_the_codes_settings_are_the_defaults():
    paper = {"rank": 12, "scale": 1 / 12, "top_k": 8, "keep": 4, "orthogonality": 0.1}
    assert Rank1Pool(nn.Linear(64, 64)).settings() == paper


def several(tasks=2, **settings):
    """Ranks 4 a task, of which 2 are voted for and 1 is kept, with votes of their own."""
    layer = grown("rank1_pool", rank=4, tasks=tasks, **{"top_k": 2} | settings)
    for name in ("votes", "frozen_votes"):
        votes = getattr(layer, name)
        votes.copy_(torch.arange(len(votes)) * 7 % 5)
    return layer


class TestRank1Pool:
    def test_a_ballot_by_hand(self):
        # l is x itself. Three samples' two largest are (0, 1), (1, 3), (1, 2): votes 1, 3, 1, 1
        layer = several(tasks=1)
        layer.V.copy_(torch.eye(4, 7))
        x = torch.zeros(3, 5, 7).double()
        x[:, 0, :4] = torch.tensor([[4.0, 3.0, 1.0, 2.0], [0, 9, 1, 5], [-3, -1, -2, -4]])
        x[:, 1:] = torch.randn(3, 4, 7)  # which have no vote
        with context(layer):
            layer(x)
            assert layer.counts.tolist() == [1, 3, 1, 1]
        # rank 1, and of those with one vote each the first
        assert dense_gate(layer, x).unique(dim=1)[0].tolist() == [[1, 1, 0, 0]]

    @pytest.mark.parametrize(("top_k", "keep"), [(1, 3), (2, 1), (3, 2), (9, 9)])
    @pytest.mark.parametrize("training", [True, False])
    def test_several_ranks_equal_the_oracles(self, top_k, keep, training):
        layer = several(tasks=3, top_k=top_k, keep=keep).train(training)
        x = torch.randn(5, 3, 7).double()
        sample = [t // 3 for t in range(15)]
        y = pool(layer, x.view(-1, 7).numpy(), arrays(layer), layer.V.numpy(), sample)
        with context(layer):
            got = layer(x).detach().view(15, 5)
        np.testing.assert_allclose(got, y, rtol=0, atol=1e-12)
        n = arrays(layer)
        assert np.isclose(layer.penalty().item(), expected_aux(layer, None, n, None), rtol=1e-12)

    def test_votes_add_up_over_steps_and_say_who_is_kept(self):
        layer, votes = several(tasks=2), []
        before, frozen = layer.votes.clone(), layer.frozen_votes.clone()
        for _ in range(3):
            with context(layer):
                layer(X)
                layer(X[:9])
            votes.append(layer.counts[4:].clone())
            after_step(layer)
        total = before + sum(votes)
        assert sum(votes).sum() == 3 * 2 * 49 and torch.equal(layer.votes, total)
        assert torch.equal(layer.frozen_votes, frozen)
        g = dense_gate(layer.eval(), X)
        wanted = [i in (largest(frozen, 1)[0], 4 + largest(total, 1)[0]) for i in range(8)]
        assert torch.equal(g, torch.tensor(wanted).double().expand(40, 8))

    def test_padding_does_not_vote(self):
        layer, x = several(), torch.randn(3, 4, 7).double()
        mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
        with context(layer, mask=mask):
            layer(x)
        counts = layer.counts.clone()
        after_step(layer)
        with context(layer):
            layer(x[[0, 2]])
        assert torch.equal(layer.counts, counts) and counts.sum() == 4

    def test_in_evaluation_no_token_looks_at_another(self):
        layer = several().eval()
        assert torch.allclose(layer(X)[:1], layer(X[:1]), atol=1e-13)

    def test_what_is_not_kept_is_silent_for_ever(self):
        layer = several().eval()
        kept = largest(layer.frozen_votes, 1)[0]
        y = layer(X)
        for i in range(4):
            if i != kept:
                layer.frozen_A[i], layer.frozen_B[i] = 9.0, 9.0
        assert torch.equal(layer(X), y)
        layer.frozen_B[kept] = 9.0
        assert not torch.equal(layer(X), y)

    def test_the_router_never_learns(self):
        layer = several()
        assert not layer.V.requires_grad
        assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"A", "B"}

    def test_penalty_by_hand(self):
        # old (1, 0) and (0, 2), live (3, -1): |3| and |-2|, of whom 1/2 · 5 / 2 = 1.25
        layer = Rank1Pool(nn.Linear(2, 2), rank=1, top_k=1, keep=1, orthogonality=0.5)
        layer.grow(), layer.grow()
        layer.frozen_B = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        layer.B.data = torch.tensor([[3.0, -1.0]])
        assert layer.penalty() == 1.25

    def test_the_first_task_is_free(self):
        assert several(tasks=1).penalty() == 0

    def test_active_counts_the_router_only_where_it_chooses(self):
        layer = several(tasks=3)
        assert layer.active() == (2 + 1 + 1) * 12 + 4 * 7
        assert layer.eval().active() == 3 * 12
        assert several(tasks=3, top_k=4).active() == (4 + 1 + 1) * 12
