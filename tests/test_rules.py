"""Rules on trained experts: numbers worked by hand, what must not change, and what may not be."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from layers import X, arrays, context_of, file_of, grown, network, situation
from torch import nn

from minimoe import LoRA, LoRAMoE, MoRA
from minimoe.adapt import adapt, adapters, context, load, parameters, save, unwrap
from minimoe.roster import SCHEMES
from minimoe.rules import (
    keep,
    prune,
    use,
)

ALL = [name for name in SCHEMES if SCHEMES[name].claims.equation]
SOME = ["lora", "lora_moe", "mora", "smora", "flylora", "mosld", "adamole", "sema", "alone"]
RULES = {
    "use": lambda layer: use(layer, X),
    "keep": lambda layer: keep(layer, [0]),
    "prune": lambda layer: prune(layer, X, 1),
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

    @pytest.mark.parametrize("rule", ["keep"])
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
        for rule in (keep,):
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

    def test_it_leaves_no_loss(self):
        layer = grown("lora_moe", balance=1.0).train()
        with context(layer) as batch:
            prune(layer, X, 2)
        assert batch.aux_loss == 0.0

    @pytest.mark.parametrize("n", [0, 4, 1.5])
    def test_n_out_of_range(self, n):
        with pytest.raises(ValueError, match=rf"^n is {n}, allowed: 1 to 3$"):
            prune(grown("lora_moe"), X, n)


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
