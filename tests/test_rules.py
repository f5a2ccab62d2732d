"""Rules on trained experts: numbers worked by hand, what must not change, and what may not be."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from layers import X, arrays, context_of, file_of, filled, grown, network, situation
from torch import nn

from minimoe import LoRA, LoRAMoE, MoRA
from minimoe.adapt import adapt, adapters, context, load, parameters, save, unwrap
from minimoe.continual.baselines import ToldLoRA
from minimoe.continual.probe import dense_gate
from minimoe.roster import SCHEMES
from minimoe.rules import (
    choose_experts,
    extract,
    keep,
    merge,
    merged,
    nudge,
    prune,
    quantise,
    skip,
    upcycle,
    use,
)

ALL = [name for name in SCHEMES if SCHEMES[name].claims.equation]
SOME = ["lora", "lora_moe", "mora", "smora", "flylora", "mosld", "adamole", "sema", "alone"]
RULES = {
    "use": lambda layer: use(layer, X),
    "keep": lambda layer: keep(layer, [0]),
    "prune": lambda layer: prune(layer, X, 1),
    "merge": lambda layer: merge(layer, [0]),
    "skip": lambda layer: skip(layer, X),
    "quantise": lambda layer: quantise(layer, 4),
    "nudge": lambda layer: nudge(layer, [0], 1.0),
    "upcycle": lambda layer: upcycle(layer, 2),
    "extract": lambda layer: extract(layer, 0),
    "merged": lambda layer: merged(layer, 1.0),
}


def by_hand(scheme, A, B, **settings):
    """A layer of one task with these keys and values, and W0 = 0."""
    A, B = (torch.tensor(rows, dtype=torch.float64) for rows in (A, B))
    base = nn.Linear(A.shape[1], B.shape[1], bias=False, dtype=torch.float64)
    nn.init.zeros_(base.weight)
    rows = {key: settings.pop(key) for key in ("router",) if key in settings}
    layer = scheme(base, rank=len(A), **settings).eval()
    for name, values in {"A": A, "B": B, **rows}.items():
        getattr(layer, name).data = torch.as_tensor(values, dtype=torch.float64)
    return layer


def answers(layer, x, given):
    with context(layer, **given):
        return layer(x)


def equal_states(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def eighths(layer):
    """A layer of eighths, of which sums and products are exact, in whatever order; and inputs."""
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if "expert_bias" not in name:  # which keeps scores apart
                tensor.copy_((8 * tensor).round() / 8)
    return layer, (8 * X).round() / 8


class TestUse:
    def test_by_hand(self):
        # logits (ln 3, 0), (0, ln 3), (ln 3, 0): weights (¾, ¼), (¼, ¾), (¾, ¼): 7 of 12
        A = [[1.0, 0.0], [0.0, 1.0]]
        layer = by_hand(LoRAMoE, A, A, experts=2, router=torch.eye(2) * math.log(3))
        x = torch.tensor([[1.0, 0], [0, 1], [1, 0]], dtype=torch.float64)
        assert torch.allclose(use(layer, x), torch.tensor([7 / 12, 5 / 12]).double())
        layer.top_k = 1
        assert torch.allclose(use(layer, x), torch.tensor([2 / 3, 1 / 3]).double())
        mask = torch.tensor([1, 1, 0])
        with context(layer, mask=mask):
            assert use(layer, x).tolist() == [0.5, 0.5]

    def test_of_ranks_and_of_blocks(self):
        # z (2, 1), s (.894, .447), weights at tau 1 as of a softmax
        s = torch.tensor([2.0, 1.0]).double() / math.sqrt(5)
        layer = by_hand(MoRA, [[2.0, 0], [1.0, 0]], [[1.0, 0], [0, 1]], tau=1.0, delta=-1)
        x = torch.tensor([[1.0, 0]], dtype=torch.float64)
        assert torch.allclose(use(layer, x), s.softmax(-1))
        layer.delta = 2.0  # nobody speaks
        assert use(layer, x).tolist() == [0, 0]
        assert torch.allclose(use(grown("lora"), X), torch.full((3,), 1 / 3).double())

    @pytest.mark.parametrize("name", ALL)
    def test_shares_of_each_expert_sum_to_1(self, name):
        layer = grown(name).eval()
        with context(layer, **context_of(layer, 40)):
            each = use(layer, X)
        assert each.shape == (layer.n_experts,) and each.min() >= 0
        assert each.sum().item() == pytest.approx(1)

    def test_tokens_first(self):
        layer = grown("sema").eval()
        x = X.view(5, 8, 7)
        wanted = use(layer, x)
        layer.batch_first = False
        assert torch.allclose(use(layer, x.transpose(0, 1)), wanted, rtol=0, atol=1e-12)


class TestKeep:
    @pytest.mark.parametrize("name", ALL)
    def test_of_all_is_the_identity(self, name):
        layer = grown(name).eval()
        given, new = context_of(layer, 40), keep(layer, range(layer.n_experts))
        assert torch.equal(answers(layer, X, given), answers(new, X, given))
        assert equal_states(layer, new) and new.settings() == layer.settings()
        assert [n for n, _ in new.named_parameters()] == [n for n, _ in layer.named_parameters()]

    @pytest.mark.parametrize("name", SOME)
    def test_of_some_is_the_oracle_with_their_rows(self, name):
        layer, x, given, points, each = situation(name, (3, 7, 5, 2, 3))
        layer.eval()
        S = [0, layer.n_experts - 1]
        new, rows = keep(layer, reversed(S)), arrays(layer)
        assert new.n_experts == 2
        for key in layer.fresh():
            rows[key] = rows[key].reshape(layer.n_experts, -1, *rows[key].shape[1:])[S]
            rows[key] = rows[key].reshape(-1, *rows[key].shape[2:])
            assert np.array_equal(rows[key], new.rows(key).detach().double().numpy())
        wanted = file_of(name).expected(new, points, rows, each)
        got = answers(new, x, given).detach().reshape(wanted.shape)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)

    def test_what_is_frozen_and_what_is_live(self):
        layer = grown(LoRAMoE)
        a = [part.detach() for part in layer.rows("A").split(2)]
        new = keep(layer, [0, 2])
        assert torch.equal(new.frozen_A, a[0]) and torch.equal(new.A, a[2])
        assert new.rank == 2 and len(new.frozen_router) == len(new.router) == 1
        for tensor in (new.frozen_A, new.A):  # no more is saved or copied with it
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
        new = keep(layer, [0, 1])  # the live one is gone: the last one left takes its place
        assert torch.equal(new.frozen_A, a[0]) and torch.equal(new.A, a[1])
        assert [n for n, p in new.named_parameters() if p.requires_grad] == ["A", "B", "router"]
        new.train()(X).sum().backward()
        assert new.A.grad.any() and layer.A.grad is None
        new.grow()
        assert new.ranks == 6 and torch.equal(new.frozen_A, torch.cat(a[:2]))

    def test_fewer_than_a_task_has(self):
        layer = MoRA(nn.Linear(7, 5), rank=4)
        new = keep(layer, [1, 3])
        assert new.rank == 2 and new.settings() == layer.settings() | {"rank": 2}
        assert torch.equal(new.A, layer.A[[1, 3]]) and not len(new.frozen_A)
        layer = LoRAMoE(nn.Linear(9, 9), rank=6, experts=3)
        layer.grow()
        new = keep(layer, [0, 5])
        assert (new.rank, new.experts, new.block) == (4, 2, 2) and not len(new.frozen_A)
        assert torch.equal(new.A, layer.rows("A")[[0, 1, 10, 11]])
        new = keep(layer, [0, 1, 4, 5])  # three of a task are live, as before
        assert new.settings() == layer.settings() and len(new.frozen_B) == 2

    @pytest.mark.parametrize("name", SOME)
    def test_a_grown_layer_round_trips_through_its_state(self, name):
        layer = grown(name, tasks=4)
        block = 1 if layer.claims.expert == "rank" else 2
        new = keep(layer, [0, 2, 3] if block == 2 else [0, 1, 2, 5, 6]).eval()
        fresh = type(new)(new.base, **new.settings()).double().eval()
        fresh.load_state_dict(new.state_dict())
        given = context_of(new, 40)
        assert torch.equal(answers(fresh, X, given), answers(new, X, given))

    @pytest.mark.parametrize("name", SOME)
    def test_in_a_model_that_is_saved_and_loaded(self, name, tmp_path):
        net, fresh = network(name).eval(), network(name, tasks=1).eval()
        for old, new in ((net.fc1, fresh.fc1), (net.fc2, fresh.fc2)):
            new.base.load_state_dict(old.base.state_dict())
        x, before = torch.randn(4, 2, 6), net.fc2
        net.fc2 = keep(net.fc2, range(1, net.fc2.n_experts))
        y = answers(net, x, context_of(net.fc1, 4))  # its weight is not read past it
        assert net.fc2 in [layer for _, layer in adapters(net)] and net.fc2.base is before.base
        save(net, tmp_path / "a.safetensors")
        load(fresh, tmp_path / "a.safetensors")
        assert torch.equal(answers(fresh, x, {}), y)
        assert len(parameters(net)) == len(parameters(fresh))
        assert type(unwrap(net).fc2) is nn.Linear

    @pytest.mark.parametrize("rule", ["keep", "extract", "upcycle", "merged", "nudge"])
    def test_hooks_go_with_it(self, rule):
        net = nn.Sequential(nn.Linear(9, 9, dtype=torch.float64))
        net[0].register_forward_hook(lambda module, inputs, y: y + 1)
        adapt(net, LoRA if rule == "upcycle" else LoRAMoE, "0", rank=2)
        x = torch.randn(3, 9, dtype=torch.float64)
        y = net(x)
        net[0] = RULES[rule](net[0])
        assert torch.equal(net(x), y)

    def test_a_base_that_is_read_past_the_new_layer_is_told_of(self):
        class Reads(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(3, 3)

            def forward(self, x):
                return x @ self.fc.weight

        net = adapt(Reads(), LoRA, "fc", rank=1)
        net.fc = keep(net.fc, [0])
        with pytest.raises(RuntimeError, match="uses its weight and does not call it"):
            net(torch.ones(2, 3))

    @pytest.mark.parametrize("experts", [[], [0, 0], [3], [-1], [0, 1.5]])
    def test_experts_that_are_not_there(self, experts):
        for rule in (keep, merge):
            with pytest.raises(ValueError, match=r"^experts is \[.*\], allowed: some of 0 to 2"):
                rule(grown("lora_moe"), experts)


class TestPrune:
    @pytest.mark.parametrize("top_k", [1, 2])
    @pytest.mark.parametrize("name", ["lora_moe", "smora", "mosld", "meteora"])
    def test_one_that_is_never_chosen_goes_first_and_is_not_missed(self, name, top_k):
        layer, x = eighths(grown(name, top_k=top_k).eval())
        x = x.abs()
        with torch.no_grad():
            layer.frozen_router[1] = -100  # of positive x: a logit that is never the largest
        never = use(layer, x) == 0
        assert never[1] and never.sum() < len(never)
        S = [e for e in range(layer.n_experts) if not never[e]]
        new = prune(layer, x, len(S))
        assert equal_states(new, keep(layer, S))
        assert torch.allclose(new(x), layer(x), rtol=0, atol=1e-12)
        assert torch.equal(new(x), layer(x)) or top_k == 2  # weights that are no eighths

    def test_a_duplicate_that_nobody_sees_costs_nothing(self):
        layer = grown("mask_moe", top_k=2).eval()
        layer.frozen_A[2:4], layer.frozen_B[2:4] = layer.frozen_A[:2], layer.frozen_B[:2]
        layer.frozen_router[1] = layer.frozen_router[0]
        layer.frozen_M.fill_(True)
        layer.M.fill_(True)
        layer.frozen_M[1] = False  # its logit is -inf
        with context(layer, **context_of(layer, 40)):
            new = prune(layer, X, 2)
        assert equal_states(new, keep(layer, [0, 2]))

    def test_mora_misses_a_rank_only_for_its_part_in_the_norm(self):
        # z (3, 2, -1): two are kept, the third never; ‖z‖ is √14 with it and √13 without
        eye = torch.eye(3).tolist()
        layer = by_hand(MoRA, eye, eye, top_k=2, tau=1.0, delta=-1)
        x = torch.tensor([[3.0, 2.0, -1.0]], dtype=torch.float64)
        new = prune(layer, x, 2)
        assert torch.equal(new.A, layer.A[:2])
        w = (torch.tensor([3.0, 2.0]).double() / math.sqrt(13)).softmax(-1)
        assert torch.allclose(new(x)[0, :2], w * x[0, :2]) and not torch.equal(new(x), layer(x))
        layer.A.data[2] = 0
        assert torch.equal(prune(layer, x, 2)(x), layer(x))

    def test_by_hand(self):
        # the updates on x are 3, 1, 2 in three directions: of two the second is missed least
        layer = LoRA(nn.Linear(3, 3), rank=1).eval()
        for _ in range(2):
            layer.grow()
        layer.frozen_A, layer.A.data = torch.ones(2, 3), torch.ones(1, 3)
        layer.frozen_B, layer.B.data = torch.diag(torch.tensor([3.0, 1, 2])).split([2, 1])
        x = torch.ones(1, 3)
        assert equal_states(prune(layer, x, 2), keep(layer, [0, 2]))
        # 5, 1 and -5 in one direction: the two that cancel are not missed, though each alone is
        layer.frozen_B = torch.tensor([[5.0, 0, 0], [1, 0, 0]])
        layer.B.data = torch.tensor([[-5.0, 0, 0]])
        assert equal_states(prune(layer, x, 1), keep(layer, [1]))
        assert equal_states(prune(layer, x, 2), keep(layer, [0, 2]))
        assert equal_states(prune(layer, x, 3), layer)

    @pytest.mark.parametrize("name", ["lora_moe", "mora", "adamole"])
    def test_no_subset_changes_less(self, name):
        layer = grown(name).eval()
        E, y = layer.n_experts, layer(X)
        for n in range(1, E + 1):
            change = {
                S: (keep(layer, S)(X) - y).norm().item()
                for S in itertools.combinations(range(E), n)
            }
            new = prune(layer, X, n)
            assert equal_states(new, keep(layer, torch.tensor(min(change, key=change.get))))

    def test_more_than_12_are_dropped_one_at_a_time(self):
        # 14 in one direction: 1, 2, ..., 12 and 50, -50: one at a time the small ones go first
        values = [[float(v)] for v in [*range(1, 13), 50, -50]]
        layer = by_hand(LoRAMoE, [[1.0]], [[1.0]])
        layer.rank = layer.experts = 14
        layer.top_k, layer.scale = 14, 14.0
        layer.A.data, layer.B.data = torch.ones(14, 1).double(), torch.tensor(values).double()
        layer.router.data = torch.zeros(14, 1).double()
        x = torch.ones(2, 1, dtype=torch.float64)
        S, y = list(range(14)), 78.0
        while len(S) > 11:
            left = {e: [i for i in S if i != e] for e in S}
            change = {e: abs(sum(values[i][0] for i in left[e]) / len(S[1:]) * 14 - y) for e in S}
            S.remove(min(reversed(S), key=change.get))
        assert torch.equal(prune(layer, x, 11).B, layer.B[S])

    def test_padding_does_not_count(self):
        # of two experts at g = 1 the first answers the first token, the second the other, padding
        layer = LoRA(nn.Linear(2, 2), rank=1).eval()
        layer.grow()
        layer.frozen_A, layer.A.data = torch.eye(2).split(1)
        layer.frozen_B, layer.B.data = torch.tensor([[1.0, 1.0]]), torch.tensor([[9.0, 9.0]])
        assert equal_states(prune(layer, torch.eye(2), 1), keep(layer, [1]))
        with context(layer, mask=torch.tensor([1, 0])):
            assert equal_states(prune(layer, torch.eye(2), 1), keep(layer, [0]))

    @pytest.mark.parametrize("rule", [lambda layer, x: prune(layer, x, 1), skip])
    def test_tokens_first(self, rule):
        layer, x, mask = grown("lora_moe").eval(), X.view(5, 8, 7), torch.rand(5, 8) < 0.5
        with context(layer, mask=mask):
            new = rule(layer, x)
            layer.batch_first = False
            other = rule(layer, x.transpose(0, 1))
        assert equal_states(new, other) and torch.equal(new(X), other(X))

    def test_it_leaves_no_loss(self):
        layer = grown("lora_moe", balance=1.0).train()
        with context(layer) as batch:
            prune(layer, X, 2)
        assert batch.aux_loss == 0.0

    @pytest.mark.parametrize("n", [0, 4, 1.5])
    def test_n_out_of_range(self, n):
        with pytest.raises(ValueError, match=rf"^n is {n}, allowed: 1 to 3$"):
            prune(grown("lora_moe"), X, n)


class TestMerge:
    @pytest.mark.parametrize("length", [1.0, -2.5])
    @pytest.mark.parametrize("S", [[0], [1, 2], [0, 2]])
    def test_duplicate_keys_merge_without_change_under_g_1(self, S, length):
        layer = grown("lora").eval()
        keys = layer.frozen_A[:2].clone()
        layer.frozen_A[2:] = length * keys.flip(0)  # the other way round
        layer.A.data = 0.5 * keys
        new = merge(layer, S)
        assert new.ranks == 2 * len(S)
        assert torch.allclose(new(X), layer(X), rtol=0, atol=1e-12)
        assert torch.equal(new.keys, keep(layer, S).keys)

    def test_single_ranks_too(self):
        layer = grown("flylora", top_k=6).eval()  # all are kept: g = 1
        layer.frozen_A[2] = layer.frozen_A[0]
        layer.A[0] = -layer.frozen_A[1]
        new = merge(layer, [0, 1, 3, 5])
        assert torch.allclose(new(X), layer(X), rtol=0, atol=1e-12)

    def test_by_hand(self):
        # the key (2, 1) is most like (3, 0), cosine .89 and not .45: 6 / 9 of its value goes there
        A = [[3.0, 0.0], [0.0, 1.0], [2.0, 1.0]]
        layer = by_hand(MoRA, A[:2], [[1.0, 0.0], [0.0, 1.0]])
        layer.rank = 3
        layer.A.data = torch.tensor(A).double()
        layer.B.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]).double()
        new = merge(layer, [0, 1])
        assert torch.allclose(new.B, torch.tensor([[7.0, 6.0], [0.0, 1.0]]).double())
        new = merge(layer, [1, 2])  # and (3, 0) is like (2, 1) alone: 6 / 5 of (1, 0)
        assert torch.allclose(new.B, torch.tensor([[0.0, 1.0], [10.2, 9.0]]).double())

    @pytest.mark.parametrize("name", SOME)
    def test_no_other_value_of_the_kept_keys_is_nearer(self, name):
        layer = grown(name)
        S = [0, layer.n_experts - 1]
        new, old = merge(layer, S), keep(layer, S)
        gained = (new.rows("B") - old.rows("B")).detach()
        kept = layer.of_ranks(torch.tensor([e in S for e in range(layer.n_experts)]))
        left = torch.zeros_like(gained)
        for a, b in zip(layer.keys[~kept].detach(), layer.rows("B")[~kept].detach(), strict=True):
            update = torch.outer(b, a)
            fits = [(update @ k / k.dot(k)).outer(k) for k in old.keys.detach()]
            best = min(range(len(fits)), key=lambda j: (update - fits[j]).norm().item())
            left[best] += update @ old.keys[best].detach() / old.keys[best].detach().square().sum()
        assert torch.allclose(gained, left, rtol=0, atol=1e-12) and gained.any()
        assert not new.frozen_B.requires_grad and new.B.is_leaf

    def test_a_key_or_a_value_of_0(self):
        layer = grown("lora")
        layer.frozen_A[0] = 0
        new = merge(layer, [0])
        assert torch.equal(new.keys[0], torch.zeros(7).double()) and new.B.isfinite().all()
        assert torch.equal(new.B[0], layer.frozen_B[0])


class TestSkip:
    def weighted(self, w2, **settings):
        """Two experts, of which the second has weight w2 of each token, the first 1 - w2."""
        layer = by_hand(LoRAMoE, [[1.0] * len(w2)] * 2, [[1.0, 0.0], [0.0, 1.0]], experts=2)
        layer.router.data = torch.tensor([[0.0] * len(w2), [math.log(w / (1 - w)) for w in w2]])
        layer.router.data = layer.router.data.double()
        return layer, torch.eye(len(w2), dtype=torch.float64)

    def test_by_hand(self):
        # w2 / w1 are 1/9, 1/4, 2/3: the median is 1/4, and the first token alone is below it
        layer, x = self.weighted([0.1, 0.2, 0.4])
        new = skip(layer, x)
        wanted = torch.tensor([[1.0, 0.0], [0.8, 0.2], [0.6, 0.4]]).double()
        assert torch.allclose(new(x), wanted) and torch.allclose(layer(x)[0, 1], wanted[1, 1] / 2)
        assert torch.equal(new.train()(x), layer.train()(x))  # in evaluation only
        # beta is of what the rule was shown, and not of padding
        layer, x = self.weighted([0.1, 0.2, 0.4])
        new = skip(layer.eval(), x[2:])
        assert torch.allclose(new(x), torch.tensor([[1.0, 0.0], [1, 0], [0.6, 0.4]]).double())
        with context(layer, mask=torch.tensor([0, 0, 1])):
            assert torch.equal(skip(layer, x)(x), new(x))

    @pytest.mark.parametrize("name", ["lora_moe", "smora", "mora", "mosld", "mixture_of_routers"])
    def test_weights_have_the_sum_they_had(self, name):
        settings = {"tau": 1.0, "delta": -1.0} if name == "mora" else {}
        layer = grown(name, top_k=2, **settings).eval()
        if name == "smora":
            layer.frozen_expert_bias.abs_()
            layer.expert_bias.abs_()
        new = skip(layer, X)
        g, h = dense_gate(layer, X), dense_gate(new, X)
        assert torch.allclose(g.sum(-1), h.sum(-1))
        w = g.unflatten(-1, (-1, layer.block))[..., 0].sort(-1, descending=True).values
        beta = (w[:, 1] / w[:, 0]).median()
        alone = w[:, 1] < beta * w[:, 0]
        assert alone.sum() in range(15, 20)  # all but those from the median on
        assert torch.equal((h > 0).sum(-1), (2 - alone.long()) * layer.block)
        assert torch.equal(h[~alone], g[~alone])
        assert torch.equal(h[alone].argmax(-1), g[alone].argmax(-1))

    @pytest.mark.parametrize("name", ["lora", "alone", "flylora", "adamoe", "adamole"])
    def test_only_of_two_weights_of_0_or_more(self, name):
        with pytest.raises(ValueError, match=r"^layer is \w+, allowed: a simplex of two kept"):
            skip(grown(name).eval(), X)
        with pytest.raises(ValueError, match="two kept"):
            skip(grown("lora_moe", top_k=1), X)


class TestQuantise:
    def test_by_hand(self):
        # 3 bits: 3 steps to the largest, which is 1: 3, -1.5 and .75 round to 3, -2 and 1. The
        # value: 3 steps to 6: 6, 1 and 3 are 3, .5 and 1.5 steps, which round to 3, 0 and 2
        layer = by_hand(LoRA, [[1.0, -0.5, 0.25]], [[6.0, 1.0, 3.0]])
        new = quantise(layer, 3)
        assert torch.equal(new.A, torch.tensor([[1.0, -2 / 3, 1 / 3]], dtype=torch.float64))
        assert torch.equal(new.B, torch.tensor([[6.0, 0.0, 4.0]], dtype=torch.float64))

    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("name", ALL)
    def test_each_rank_by_itself_and_nothing_else(self, name, bits):
        layer = grown(name)
        new = quantise(layer, bits)
        again = quantise(new, bits)
        assert equal_states(new, again)
        for key, tensor in layer.state_dict().items():
            other = new.state_dict()[key]
            if key.removeprefix("frozen_") not in ("A", "B"):
                assert torch.equal(tensor, other)
                continue
            s = tensor.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
            assert ((tensor - other).abs() <= s / 2 * (1 + 1e-12)).all()
            assert torch.allclose((other / s).round(), other / s, rtol=0, atol=1e-9)
            assert not torch.equal(tensor, other)

    def test_zero_stays_and_what_is_live_goes_on_learning(self):
        layer = LoRA(nn.Linear(7, 5), rank=2)
        new = quantise(layer, 8)
        assert not new.B.any()
        new(X.float()).sum().backward()
        assert new.B.grad.any() and layer.B.grad is None

    @pytest.mark.parametrize("bits", [1, 0, 2.5])
    def test_bits_out_of_range(self, bits):
        with pytest.raises(ValueError, match=rf"^bits is {bits}, allowed: whole numbers from 2"):
            quantise(grown("lora"), bits)


ROUTED = ["lora_moe", "smora", "mosld", "adamole", "ld_mole", "sema", "mixture_of_routers"]
ROUTED += ["lora_moe_plugin", "mask_moe", "meteora", "adamoe", "evomoe", "rexmoe", "mor1e"]


class TestNudge:
    def test_by_hand(self):
        # logits (0, 0, ln 2): weights (1, 1, 2) / 4; the first two less by ln 2: (1, 1, 4) / 6
        layer = by_hand(LoRAMoE, [[1.0]], [[1.0]], top_k=3)
        layer.rank = layer.experts = 3
        layer.A.data, layer.B.data = torch.ones(3, 1).double(), torch.eye(3).double()
        layer.router.data = torch.tensor([[0.0], [0.0], [math.log(2)]]).double()
        x = torch.ones(1, 1).double()
        g = dense_gate(nudge(layer, [2], math.log(2)), x)
        assert torch.allclose(g, torch.tensor([[1.0, 1, 4]]).double() / 6)
        assert dense_gate(nudge(layer, [0], math.inf), x).tolist() == [[1, 0, 0]]
        assert dense_gate(nudge(layer, [0, 1], math.inf), x).tolist() == [[0.5, 0.5, 0]]

    @pytest.mark.parametrize("name", ROUTED)
    def test_0_is_the_identity_and_the_router_stays(self, name):
        layer = grown(name).eval()
        given = context_of(layer, 40)
        for delta in (0.0, 3.0):
            new = nudge(layer, [0], delta)
            assert equal_states(new, layer)
            same = torch.equal(answers(new, X, given), answers(layer, X, given))
            assert same == (delta == 0) or name == "mask_moe"

    @pytest.mark.parametrize(
        "name", [n for n in ROUTED if n not in ("mask_moe", "mor1e", "adamoe")]
    )
    def test_inf_leaves_the_preferred_alone_to_speak(self, name):
        layer = grown(name).eval()
        if name == "smora":
            layer.frozen_expert_bias.zero_()
            layer.expert_bias.zero_()
        given, S = context_of(layer, 40), [0, layer.n_experts - 1]
        new = nudge(layer, S, math.inf)
        with context(new, **given):
            share = use(new, X)
        others = [e for e in range(layer.n_experts) if e not in S]
        assert not share[others].any() and share.sum().item() == pytest.approx(1)
        assert answers(new, X, given).isfinite().all()

    @pytest.mark.parametrize("name", ["lora_moe", "mosld", "adamole", "sema"])
    def test_to_a_softmax_it_is_more_for_the_preferred(self, name):
        layer = grown(name).eval()
        new, S = nudge(layer, [1], 0.7), [1]

        def more(x, key):
            l = type(layer).project(layer, x, key)
            if key == "router":
                l[..., S] += 0.7
            return l

        other = copy.deepcopy(layer)
        other.project = more
        assert torch.allclose(new(X), other(X), rtol=0, atol=1e-12)

    def test_use_of_one_domain_beyond_the_general_says_whom(self):
        layer = grown("lora_moe", top_k=1).eval()
        e = layer.logits(X).argmax(-1)
        task = X[e == 1][:3]
        S = (use(layer, task) - use(layer, X)).topk(1).indices
        assert S.tolist() == [1] and use(nudge(layer, S, 50.0), X).tolist() == [0, 1, 0]

    def test_in_evaluation_only_and_after_growing_too(self):
        layer = grown("lora_moe")
        new = nudge(layer, [1], 2.0)
        assert torch.equal(new.train()(X), layer.train()(X))
        new.eval().grow()
        filled(new)
        twin = LoRAMoE(new.base, **new.settings()).double().eval()
        twin.load_state_dict(new.state_dict())  # no file holds the rule
        assert torch.equal(twin.logits(X)[:, 1], new.logits(X)[:, 1])
        assert torch.allclose(twin.logits(X)[:, [0, 2, 3]] - 2, new.logits(X)[:, [0, 2, 3]])

    def test_gradients_pass(self):
        layer = grown("lora_moe").eval()
        x = X.clone().requires_grad_()
        for new in (nudge(layer, [1], 1.0), skip(layer, X)):
            new(x).sum().backward()
            assert new.router.grad.any() and x.grad.isfinite().all()

    @pytest.mark.parametrize("name", ["lora", "mora", "flylora", "alone", "dselect_k"])
    def test_without_a_router(self, name):
        with pytest.raises(ValueError, match=r"^layer is \w+, allowed: schemes with a router$"):
            nudge(grown(name), [0], 1.0)

    def test_settings_out_of_range(self):
        layer = grown("lora_moe")
        for experts in ([], [3], [-1], [1, 1]):
            with pytest.raises(
                ValueError, match=r"^experts is \[.*\], allowed: some of 0 to 2, each"
            ):
                nudge(layer, experts, 1.0)
        for delta in (-1.0, math.nan):
            with pytest.raises(ValueError, match=rf"^delta is {delta}, allowed: 0 or more$"):
                nudge(layer, [0], delta)


def test_rules_add_up_and_a_copy_has_its_own():
    layer = grown("lora_moe").eval()
    new = skip(nudge(layer, [1], 1.0), X)
    beta = new.gate.args[1]
    for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new)), keep(new, [0, 1, 2])):
        assert torch.equal(other(X), new(X)) and other.gate.args == (other, beta)
        assert other.project.args[0] is other
        with torch.no_grad():
            other.router += 1 - 2 * torch.rand_like(other.router)
        assert not torch.equal(other(X), new(X))
    assert not torch.equal(new(X), skip(layer, X)(X))


class TestUpcycle:
    @pytest.mark.parametrize("top_k", [1, 2, 3])
    @pytest.mark.parametrize("tasks", [1, 2])
    def test_no_router_changes_the_output_where_weights_sum_to_1(self, tasks, top_k):
        layer = grown("lora", D=16, O=15, tasks=tasks)
        x = torch.randn(40, 16, dtype=torch.float64)
        new = upcycle(layer, 3, top_k=top_k)
        assert type(new) is LoRAMoE and new.n_experts == 3 and new.block == 2 * tasks
        assert not len(new.frozen_B) and new.B.dtype == new.router.dtype == torch.float64
        for std in (0.02, 5.0):
            new.router.data.normal_(std=std)
            assert torch.allclose(new(x), layer(x), rtol=0, atol=1e-12)

    def test_a_top_k_that_is_not_renormalised_scales_the_update(self):
        layer = grown("lora", D=16, O=15, tasks=1)
        x = torch.randn(40, 16, dtype=torch.float64)
        new = upcycle(layer, 4, SCHEMES["adamoe"], top_k=2)
        new.router.data.normal_()
        p = (x @ new.router.T).softmax(-1).topk(2).values.sum(-1, keepdim=True)
        update = layer(x) - layer.base(x)
        assert (p < 0.99).any()
        assert torch.allclose(new(x), layer.base(x) + p * update, rtol=0, atol=1e-12)

    def test_the_router_learns_once_copies_differ(self):
        layer = grown("lora", D=16, O=15, tasks=1)
        x = torch.randn(40, 16, dtype=torch.float64)
        for noise in (0.0, 0.1):
            new = upcycle(layer, 3, noise=noise).train()
            (new(x) * torch.randn(40, 15)).sum().backward()
            assert (new.router.grad.abs().max() > 1e-9) == (noise > 0)
            assert new.A.grad.any() and new.B.grad.any()
        moved = (new.B - layer.B.repeat(3, 1)).detach()
        assert 0.07 < moved.std() < 0.13 and torch.equal(new.A, layer.A.repeat(3, 1))

    def test_in_a_model_in_its_own_dtype(self, tmp_path):
        net = adapt(nn.Sequential(nn.Linear(6, 9)), LoRA, "0", rank=2, dtype=torch.bfloat16)
        filled(net[0])
        y = net(torch.ones(1, 6))
        net[0] = upcycle(net[0], 3, top_k=1)
        assert net[0].name == "0" and {p.dtype for p in parameters(net)} == {torch.bfloat16}
        assert torch.allclose(net(torch.ones(1, 6)), y, atol=0.05) and net.training
        save(net, tmp_path / "a.safetensors")
        fresh = adapt(nn.Sequential(nn.Linear(6, 9)), LoRAMoE, "0", **net[0].settings())
        load(fresh.bfloat16(), tmp_path / "a.safetensors")
        assert torch.equal(fresh[0].router, net[0].router)

    def test_buffers_that_are_no_numbers_stay_so(self):
        net = adapt(nn.Sequential(nn.Linear(6, 9)), LoRA, "0", rank=2, dtype=torch.bfloat16)
        filled(net[0])
        new = upcycle(net[0], 3, SCHEMES["mask_moe"], classes=4, rare=1)
        assert new.M.dtype == torch.bool and new.M.sum() == 1 + 3 * 2
        x = torch.randn(8, 6)
        y = answers(new, x, {"token_class": torch.randint(4, (8,))})
        assert torch.allclose(y, net(x), atol=0.2)

    def test_it_stands_as_the_lora_stood(self):
        layer = grown("lora", D=16, O=15, tasks=1, scale=0.3)
        layer.path, layer.batch_first, layer.tied, layer.name = "dense", False, "head", "fc"
        layer.base.eval()
        for new in (upcycle(layer, 2), extract(layer, 0), keep(layer, [0])):
            for name in ("path", "batch_first", "tied", "name", "scale", "training", "use"):
                assert getattr(new, name) is getattr(layer, name)
            assert not new.base.training

    def test_settings_out_of_range(self):
        layer = LoRA(nn.Linear(7, 5), rank=2)
        for settings, message in (
            ({"experts": 0}, "experts is 0, allowed: 1 or more"),
            ({"experts": 3}, "rank is 6, allowed: 1 to 5 for this layer"),
            ({"experts": 2, "noise": -1.0}, "noise is -1.0, allowed: 0 or more"),
            ({"experts": 2, "top_k": 0}, "top_k is 0, allowed: 1 or more"),
        ):
            with pytest.raises(ValueError, match=f"^{message}$"):
                upcycle(layer, **settings)
        with pytest.raises(ValueError, match=r"^layer is MoRA, allowed: LoRA$"):
            upcycle(grown("mora"), 2)
        told = SCHEMES["speech_moe"]
        with pytest.raises(ValueError, match=r"^scheme is .*, allowed: one with a setting exp"):
            upcycle(layer, 2, told)


class TestExtract:
    @pytest.mark.parametrize("path", ["auto", "plain", "dense", "gather"])
    @pytest.mark.parametrize("e", [0, 1, 2])
    def test_of_a_layer_that_is_told_it_equals_the_whole_bit_for_bit(self, e, path):
        layer, x = eighths(grown(ToldLoRA).eval())
        layer.path = path
        new = extract(layer, e)
        assert type(new) is LoRA and new.ranks == 2 and new.path == path
        assert torch.equal(new(x), answers(layer, x, {"label": torch.full((40,), e)}))

    @pytest.mark.parametrize("name", ["lora_moe", "mora", "smora", "alone", "mosld", "meteora"])
    def test_it_equals_the_whole_where_it_has_weight_1_alone(self, name):
        layer = grown(name, **({} if name == "alone" else {"top_k": 1})).eval()
        if name == "mora":
            layer.delta = -1.0
        e = dense_gate(layer, X).unflatten(-1, (-1, layer.block))[..., 0].argmax(-1)
        y = layer(X)
        for one in e.unique().tolist():
            y_one = extract(layer, one)(X)
            assert torch.allclose(y_one[e == one], y[e == one], rtol=0, atol=1e-12)
        assert len(e.unique()) > 1

    def test_it_is_a_lora_that_learns_and_merges(self):
        layer = grown("lora_moe", scale=0.3)
        new = extract(layer, 1)
        assert new.scale == 0.3 and new.rank == 2
        new(X).sum().backward()
        assert new.A.grad.any() and not layer.frozen_A.requires_grad
        y, base = new(X), copy.deepcopy(layer.base)
        new.merge()
        assert torch.allclose(new(X), y, rtol=0, atol=1e-12)
        new.unmerge()
        assert torch.equal(layer.base.weight, base.weight)
        with pytest.raises(ValueError, match=r"^experts is \[3\], allowed: some of 0 to 2"):
            extract(layer, 3)


class TestMerged:
    @pytest.mark.parametrize("name", SOME)
    def test_loops(self, name):
        layer, rows = grown(name, scale=0.3), arrays(grown(name, scale=0.3))
        E, r = layer.n_experts, layer.block
        rows["A"], rows["B"] = (t.detach().numpy() for t in (layer.keys, layer.rows("B")))
        w, W = torch.randn(E).tolist(), layer.base.weight.numpy().copy()
        for i in range(layer.ranks):
            W += 0.3 * w[i // r] * np.outer(rows["B"][i], rows["A"][i])
        new = merged(layer, w)
        assert type(new) is nn.Linear and torch.equal(new.bias, layer.base.bias)
        np.testing.assert_allclose(new.weight, W, rtol=0, atol=1e-12)
        assert not new.weight.requires_grad and new.weight.is_contiguous()

    def test_one_for_all(self):
        layer = grown("lora")
        assert torch.allclose(merged(layer, 1.0)(X), layer(X), rtol=0, atol=1e-12)
        layer = grown("lora_moe")
        soup = sum(extract(layer, e)(X) for e in range(3)) / 3
        assert torch.allclose(merged(layer, 1 / 3)(X), soup, rtol=0, atol=1e-12)
        assert torch.equal(merged(layer, 0)(X), layer.base(X))
        one = merged(layer, torch.eye(3)[1])
        assert torch.allclose(one(X), extract(layer, 1)(X), rtol=0, atol=1e-12)

    def test_in_the_bases_dtype_without_a_bias(self):
        layer = LoRAMoE(nn.Linear(7, 5, bias=False, dtype=torch.bfloat16), rank=2).eval()
        new = merged(layer, 1.0)
        assert new.bias is None and new.weight.dtype == torch.bfloat16 and not new.training
        assert torch.equal(new.weight, layer.base.weight) and new.weight is not layer.base.weight

    def test_conv1d(self):
        Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
        layer = filled(LoRA(Conv1D(5, 7), rank=2).eval())
        assert torch.allclose(merged(layer, 1.0)(X.float()), layer(X.float()), atol=1e-5)

    def test_weights_of_another_number(self):
        for weights, shape in (([1.0, 2.0], r"\(2,\)"), ([[1.0]], r"\(1, 1\)")):
            message = rf"^weights is {shape}, allowed: \(\) and \(3,\)$"
            with pytest.raises(ValueError, match=message):
                merged(grown("lora_moe"), weights)
        with pytest.raises(RuntimeError, match="cannot be merged"):
            merged(LoRA(nn.utils.parametrizations.weight_norm(nn.Linear(7, 5)), rank=2), 1.0)


class TestChooseExperts:
    x = torch.eye(4).repeat(3, 1)  # of four classes
    y = torch.arange(4).repeat(3)

    def candidate(self, answer, rank=4):
        """A model of logits x · answer, answer (4, 4) being a LoRA's update."""
        net = adapt(nn.Sequential(nn.Linear(4, 4, bias=False)), LoRA, "0", rank=rank)
        nn.init.zeros_(net[0].base.weight)
        net[0].A.data, net[0].B.data = torch.eye(4), torch.as_tensor(answer)
        return net.eval()

    def test_of_two_copies_of_the_best_only_one_is_taken(self):
        best, other = 9 * torch.eye(4), 2 * torch.eye(4) - torch.eye(4).roll(1, 0)
        nets = [self.candidate(t) for t in (other, best, best)]
        assert choose_experts(nets, self.x, self.y, 1) == [1]
        assert choose_experts(nets, self.x, self.y, 2) == [1, 0]
        assert choose_experts(nets, self.x, self.y, 3) == [1, 0]
        scaled = self.candidate(3 * best)  # a copy at another length is a copy
        assert choose_experts([*nets, scaled], self.x, self.y, 4) == [3, 0]

    def test_one_at_chance_is_never_taken(self):
        eye, constant = torch.eye(4), torch.zeros(4, 4)
        constant[:, 0] = 9
        sure = -9 * eye  # right in one of four, and sure of what is wrong
        sure[0, 0] = 9
        half = 30 * eye.roll(1, 1)  # half are right, but the others are far off
        half[:2] = eye[:2]
        nets = [self.candidate(t) for t in (constant, 0 * eye, sure, half, eye)]
        assert choose_experts(nets, self.x, self.y, 5) == [4]
        assert choose_experts(nets[:-1], self.x, self.y, 5) == []
        # always answering 0 is right in 9 of 12 here, and a good guess, but no skill
        y = torch.tensor([0] * 9 + [1, 2, 3])
        assert choose_experts([self.candidate(constant / 9)], self.x[y], y, 1) == []

    def test_then_the_least_alike(self):
        eye, part = torch.eye(4), torch.eye(4)[0].diag()
        near, far = 8 * eye + 2 * part, 4 * eye - 2 * part + eye.roll(1, 0)
        nets = [self.candidate(t) for t in (near, 9 * eye, far)]
        assert choose_experts(nets, self.x, self.y, 2) == [1, 2]
        assert choose_experts(nets, self.x, self.y, 3) == [1, 2, 0]

    def test_cosines_are_of_all_layers_and_of_ranks_however_many(self):
        def net(first, second, rank):
            layers = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
            adapt(layers, LoRA, "[01]", rank=rank)
            for layer, answer in zip(layers, (first, second), strict=True):
                layer.base.weight.copy_(torch.eye(4))
                layer.A.data = torch.eye(4)[:rank]
                layer.B.data = torch.as_tensor(answer)[:rank]
            return layers.eval()

        eye = torch.eye(4)
        top = eye.clone()
        top[2:] = 0
        nets = [net(9 * eye, eye, 4), net(9 * eye, 0 * eye, 4), net(9 * top, 0 * top, 2)]
        # cosines with the first: 9 / √82 and 9 · 2 / (√(82 · 4) √2 · 9) · ...: the last is farthest
        assert choose_experts(nets, self.x, self.y, 3) == [0, 2, 1]

    def test_settings_out_of_range(self):
        nets = [self.candidate(torch.eye(4))]
        with pytest.raises(ValueError, match=r"^n is 0, allowed: 1 or more$"):
            choose_experts(nets, self.x, self.y, 0)
        for others in ([], [nn.Linear(4, 4)], [*nets, nn.Linear(4, 4)]):
            message = r"^candidates is \[.*\], allowed: some, adapted alike$"
            with pytest.raises(ValueError, match=message):
                choose_experts(others, self.x, self.y, 1)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_given_stays_as_it_is(rule):
    layer = grown(
        "lora" if rule == "upcycle" else "lora_moe", O=7, tasks=1 if rule == "upcycle" else 3
    )
    before = copy.deepcopy(layer)
    names, modes = set(vars(layer)), (layer.training, layer.base.training)
    drawn = torch.get_rng_state()
    new = RULES[rule](layer)
    assert equal_states(layer, before) and set(vars(layer)) == names
    assert (layer.training, layer.base.training) == modes
    assert all(p.grad is None for p in layer.parameters())
    makes = rule in ("upcycle", "extract", "merged")  # a layer of another kind, as its class does
    assert makes or torch.equal(torch.get_rng_state(), drawn)
    if isinstance(new, nn.Module):
        for tensor in (*new.parameters(), *new.buffers()):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
        ours = {t.data_ptr() for n, t in layer.state_dict().items() if n not in ("weight", "bias")}
        assert not ours & {t.data_ptr() for t in new.state_dict().values()}
        assert rule == "merged" or new.base is layer.base


@pytest.mark.parametrize("rule", RULES)
def test_layers_that_are_none_of_theirs(rule):
    for layer in (grown("mocle"), nn.Linear(7, 5)):
        with pytest.raises(ValueError, match=rf"^layer is {type(layer).__name__}, allowed: "):
            RULES[rule](layer)
    if rule != "nudge":
        layer = LoRA(nn.Linear(7, 5), rank=2)
        layer.merge()
        with pytest.raises(RuntimeError, match="is merged"):
            RULES[rule](layer)
