"""The three problems by hand, a recorder against plain loops, and what changes no measure."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from minimoe import Adapter, LoRA, LoRAMoE, MoRA
from minimoe.adapt import adapt, adapters, grow
from minimoe.continual.baselines import Oracle
from minimoe.continual.probe import PROBLEMS, Recorder, alike, chance_alike, dense_gate, lengths


class Fixed(Adapter):
    """A gate of given weights."""

    weights = (1.0,)

    def gate(self, x):
        z = self.project(x, "A")
        return None, torch.tensor(self.weights).expand(z.shape), z

    def active(self):
        return 0


def fixed():
    base = nn.Linear(2, 2, bias=False)
    base.weight.data = torch.eye(2)
    layer = Fixed(base, rank=1)
    layer.A.data, layer.B.data = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    return layer


def second_task(layer):
    layer.grow()
    layer.A.data, layer.B.data = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    layer.weights = (0.25, 0.75)


def test_a_recorder_by_hand():
    layer = fixed()
    recorder = Recorder([torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])])
    recorder.record(layer)
    recorder.record(layer)
    second_task(layer)
    recorder.record(layer)
    found = {name: array.numpy() for name, array in recorder.records.items()}
    nan = math.nan
    # rank 0 sees 3 and says u' = (0, 3): y' = (3, 7). Then it says .25 · (0, 3), and rank 1, which
    # sees 4, .75 · 4 · (1, 0): y = (6, 4.75), which is (3, -2.25), 3.75 long, from y'
    np.testing.assert_allclose(found["drift"], [[nan, nan], [0, nan], [3.75 / 3, 0]], atol=1e-7)
    np.testing.assert_allclose(found["learned"][2, 0], 3 / 58**0.5)
    # 1 / (1/16 + 9/16) = 1.6 of two experts
    np.testing.assert_allclose(found["undecided"], [[nan, nan], [0, nan], [0.6, 0.6]], atol=1e-7)
    # rank 0 said all, now it says .75 of 3.75
    np.testing.assert_allclose(found["turnover"], [[nan, nan], [0, nan], [0.8, 0]], atol=1e-7)
    np.testing.assert_allclose(found["silent"], [[nan, nan], [0, nan], [0, 0]])
    np.testing.assert_allclose(found["mass"][1, 0], [1, nan])
    np.testing.assert_allclose(found["mass"][2], [[0.25, 0.75]] * 2)
    # on the second task's (1, 0) rank 1 sees nothing, and says nothing
    np.testing.assert_allclose(found["said"][2], [[0.2, 0.8], [1, 0]])
    for name in ("mass", "said"):
        assert np.isnan(found[name][0]).all() and np.isnan(found[name][1, 1]).all()
    np.testing.assert_allclose(found["alike"], [nan, nan, 0])
    by_hand = {"interference": 1.25, "intrusion": 0.8, "redundancy": 0, "instability": 0.8}
    for name, want in (by_hand | {"ambiguity": 0.6}).items():
        assert math.isclose(PROBLEMS[name](recorder.records), want, abs_tol=1e-7), name


def test_alike_by_hand():
    A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, -5.0]])
    B = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 7.0]])
    # rank 2 has half of rank 0's key and its value; rank 3 is rank 1, turned round: the same line
    torch.testing.assert_close(alike(A, B, 2), torch.tensor([0.5**0.5, 1.0]).double())
    assert alike(A, 0 * B, 2).isnan().all()
    B[0] = B[3] = 0  # dead ranks are like none, and none is like them
    torch.testing.assert_close(
        alike(A, B, 2), torch.tensor([0.0, math.nan]).double(), equal_nan=True
    )


@pytest.mark.parametrize("block", [1, 2, 3])
def test_alike_is_the_cosine_of_the_updates(block):
    A, B = torch.randn(6 * block, 5), torch.randn(6 * block, 4)
    each = torch.einsum("erd,ero->edo", A.view(6, block, 5), B.view(6, block, 4)).flatten(1)
    want = nn.functional.cosine_similarity(each[4:, None], each[None, :4], dim=-1).abs().amax(1)
    found = alike(A, B, 4 * block, block)
    torch.testing.assert_close(found, want.double(), rtol=1e-5, atol=1e-6)
    # the same in another basis, its factors elsewhere, its experts in another order
    M = torch.randn(6, block, block, dtype=torch.float64)
    A2, B2 = (
        (M @ A.view(6, block, 5).double()),
        torch.linalg.inv(M).mT @ B.view(6, block, 4).double(),
    )
    order = torch.tensor([2, 0, 3, 1, 5, 4])
    moved = alike(A2[order].flatten(0, 1), B2[order].flatten(0, 1), 4 * block, block)
    torch.testing.assert_close(moved, found[[1, 0]], rtol=1e-6, atol=1e-9)
    # an exact duplicate is 1, in whatever basis
    twice = alike(
        torch.cat([A, A2.flatten(0, 1)]), torch.cat([B, B2.flatten(0, 1)]), 6 * block, block
    )
    torch.testing.assert_close(twice, torch.ones(6).double(), rtol=0, atol=1e-9)


def test_the_chance_of_alike_is_that_of_random_updates():
    A, B = torch.ones(80, 12), torch.ones(80, 20)
    one, many = chance_alike(A[:41], B[:41], 1), chance_alike(A, B, 40)
    draws = [alike(torch.randn(80, 12), torch.randn(80, 20), 40).mean() for _ in range(20)]
    assert many == pytest.approx(float(np.mean(draws)), rel=0.1)
    assert chance_alike(A, B, 40) == many > one > 0  # seeded
    # of two single ranks: E|cos| E|cos| = 2 / (π √(D O)), by draws of its own
    pairs = [alike(torch.randn(2, 12), torch.randn(2, 20), 1).item() for _ in range(4000)]
    assert np.mean(pairs) == pytest.approx(2 / (math.pi * 240**0.5), rel=0.1)
    assert math.isnan(chance_alike(A, 0 * B, 40))
    B[:39] = 0  # of experts that say nothing none is counted, older or new
    assert chance_alike(A, B, 40) == chance_alike(A[39:], B[39:], 1) < many / 2
    assert chance_alike(torch.cat([A, A]), torch.cat([B, 0 * B]), 40) == chance_alike(A, B, 40)
    # a block is one in any basis: here a rank of it is 0, there it is not
    B = torch.ones(12, 20)
    B[1::2] = 0
    assert chance_alike(A[:12], B, 8, 2) == chance_alike(A[:12], torch.ones(12, 20), 8, 2)


@pytest.mark.parametrize("block", [1, 3])
def test_lengths_are_those_of_what_experts_say(block):
    gz, B = torch.randn(7, 4 * block).double(), torch.randn(4 * block, 5).double()
    u = torch.einsum("ner,ero->neo", gz.view(7, 4, block), B.view(4, block, 5))
    torch.testing.assert_close(lengths(gz, B, block), u.norm(dim=-1))


CASES = [
    (LoRA, {}),
    (LoRAMoE, {"top_k": 2}),
    (LoRAMoE, {"top_k": 3, "experts": 2}),
    (MoRA, {"top_k": 3, "tau": 0.2, "delta": 0.1}),
]


@pytest.mark.parametrize(("scheme", "settings"), CASES)
def test_a_recorder_against_loops(scheme, settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    adapt(model, scheme, targets="0|2", rank=2, scale=0.7, **settings)
    T, N = 3, 4
    probes = [torch.randn(2, N // 2, 6) for _ in range(T)]
    recorder = Recorder(probes)
    recorder.record(model)
    then = {}

    def look(j):
        """(p (N, E), q (N, E), y (N, O), u (N, O)) of both layers."""
        h, seen = probes[j].flatten(0, 1), []
        for layer in (model[0], model[2]):
            y = layer(h)
            g, z, B = (
                t.detach().numpy()
                for t in (dense_gate(layer, h), h @ layer.keys.T, layer.rows("B"))
            )
            e = np.arange(layer.ranks) // layer.block
            p, q = np.zeros((2, N, e[-1] + 1))
            for n in range(N):
                for r in range(layer.ranks):
                    p[n, e[r]] += abs(g[n, r])
                for x in range(e[-1] + 1):
                    q[n, x] = np.linalg.norm(
                        sum(g[n, r] * z[n, r] * B[r] for r in np.flatnonzero(e == x))
                    )
            p, q = (s / np.maximum(s.sum(1, keepdims=True), 1e-300) for s in (p, q))
            seen.append((p, q, y.detach().numpy(), (y - layer.base(h)).detach().numpy()))
            h = y.relu()
        return seen

    for t in range(T):
        if t:
            grow(model)
        for _, layer in adapters(model):
            for parameter in (layer.A, layer.B):
                nn.init.normal_(parameter)
        model.train()
        recorder.record(model)
        assert all(module.training for module in model.modules())
        model.eval()
        then[t] = look(t)
        for j in range(t + 1):
            want = {name: [] for name in ("drift", "undecided", "turnover", "mass", "said")}
            for (p, q, y, _), (_, q_then, y_then, u_then) in zip(look(j), then[j], strict=True):
                E, per = p.shape[1], {name: [] for name in want}
                kept = min(settings.get("top_k", E), E)
                moved, learned = np.linalg.norm(y - y_then, axis=1), np.linalg.norm(u_then, axis=1)
                want["drift"].append(moved.sum() / learned.sum())
                for n in range(N):
                    was = np.concatenate([q_then[n], np.zeros(E - q_then.shape[1])])
                    if q[n].any() or was.any():
                        silent = bool(q[n].any()) != bool(was.any())
                        per["turnover"].append((np.abs(q[n] - was).sum() + silent) / 2)
                    if p[n].any():
                        effective = 1 / sum(share**2 for share in p[n])
                        per["undecided"].append((effective - 1) / (kept - 1) if kept > 1 else 0)
                    for name, s in (("mass", p[n]), ("said", q[n])):
                        if s.any():
                            of_task = s.reshape(t + 1, -1).sum(1)
                            per[name].append([*of_task, *[math.nan] * (T - 1 - t)])
                for name in ("undecided", "turnover", "mass", "said"):
                    want[name].append(np.mean(per[name], axis=0))
            for name, layers in want.items():
                got = recorder.records[name][t + 1, j].numpy()
                np.testing.assert_allclose(got, np.mean(layers, axis=0), atol=1e-5, err_msg=name)
    assert PROBLEMS["interference"](recorder.records) > 0
    # what later experts say was not said by them before
    assert PROBLEMS["instability"](recorder.records) >= PROBLEMS["intrusion"](recorder.records)


class Given(LoRAMoE):
    """A gate of given weights, one per expert, whatever the keys."""

    weights = torch.tensor([1.0])

    def gate(self, x):
        z = self.project(x, "A")
        return None, self.weights.repeat_interleave(self.block).expand(z.shape), z


def measured(change=lambda layer: None, top_k=3, weights=(0.6, 0.3, 0.1), tasks=3):
    """Every measure, of a layer that has learned some tasks and that `change` alters after each."""
    seeded = torch.Generator().manual_seed(5)
    layer = Given(nn.Linear(7, 5).double(), rank=3, top_k=top_k).double()
    with torch.no_grad():
        for n, parameter in enumerate((layer.base.weight, layer.base.bias)):
            parameter.copy_(torch.randn(parameter.shape, generator=seeded) + n)
    probes = torch.randn(3, 6, 7, generator=seeded).double()
    recorder = Recorder(probes[:tasks])
    recorder.record(layer)
    for t in range(tasks):
        if t:
            layer.grow()
        layer.weights = torch.tensor(weights[: t + 1]).double()
        layer.A.data = torch.randn(3, 7, generator=seeded).double()
        layer.B.data = torch.randn(3, 5, generator=seeded).double()
        change(layer)
        recorder.record(layer)
    return {name: measure(recorder.records) for name, measure in PROBLEMS.items()}


def other_basis(layer):
    M = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()
    layer.A.data, layer.B.data = M @ layer.A.data, torch.linalg.inv(M).T @ layer.B.data


def other_order(layer):
    layer.A.data, layer.B.data = layer.A.data[[2, 0, 1]], layer.B.data[[2, 0, 1]]


def scale_moved(layer):
    by = torch.tensor([[3.0], [-0.2], [50.0]]).double()
    layer.A.data, layer.B.data = layer.A.data * by, layer.B.data / by


@pytest.mark.parametrize("change", [other_basis, other_order, scale_moved])
def test_no_measure_changes_where_the_function_does_not(change):
    usual = measured()
    assert all(value > 0.01 for value in usual.values())
    assert measured(change) == pytest.approx(usual, rel=1e-9)


def test_dead_experts_are_neutral():
    def dead(layer):  # the last task's
        if len(layer.weights) == 3:
            layer.B.data.zero_()

    found, usual = measured(dead), measured()
    # an expert that says nothing neither intrudes nor moves anything, though it has weight
    still = measured(dead, weights=(0.6, 0.3, 0.0))
    for name in ("interference", "intrusion", "redundancy", "instability"):
        assert found[name] == pytest.approx(still[name]), name
        assert found[name] < usual[name] or name == "redundancy", name
    assert found["ambiguity"] == pytest.approx(usual["ambiguity"])  # it is of the weights alone
    # the last task's expert is left out of redundancy, not counted as 0
    assert found["redundancy"] == measured(tasks=2)["redundancy"] > 0.01


@pytest.mark.parametrize("top_k", [2, 3])
def test_ambiguity_has_one_scale_for_all(top_k):
    one, even = (1.0, 0.0, 0.0), [1 / top_k] * top_k + [0.0] * (3 - top_k)
    assert measured(weights=one, top_k=top_k)["ambiguity"] == pytest.approx(0)
    assert measured(weights=even, top_k=top_k)["ambiguity"] == pytest.approx(1)
    assert measured(weights=[-w for w in even], top_k=top_k)["ambiguity"] == pytest.approx(1)


def test_a_told_oracle_is_decided_and_nothing_moves():
    torch.manual_seed(0)
    learner = Oracle(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), rank=2)
    recorder = Recorder([torch.randn(5, 6) for _ in range(3)])
    recorder.record(learner.model, learner.predict)
    for t in range(3):
        if t:
            grow(learner.model)
        for _, layer in adapters(learner.model):
            nn.init.normal_(layer.B)
        recorder.record(learner.model, learner.predict)
    found = {name: measure(recorder.records) for name, measure in PROBLEMS.items()}
    for name in ("interference", "intrusion", "ambiguity", "instability"):
        assert found[name] == pytest.approx(0, abs=1e-6), name
    assert 0 < found["redundancy"] < 1 and 0 < found["redundancy_chance"] < 1


@pytest.mark.parametrize(("scheme", "settings"), CASES)
def test_who_learned_nothing_has_no_interference(scheme, settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    adapt(model, scheme, targets="0|2", rank=2, **settings)
    recorder = Recorder([torch.randn(5, 6) for _ in range(3)])
    for t in range(4):  # a learning rate of 0: all values stay 0
        if t > 1:
            grow(model)
        recorder.record(model)
    found = {name: measure(recorder.records) for name, measure in PROBLEMS.items()}
    assert 0 <= found.pop("ambiguity") <= 1
    assert all(math.isnan(value) for value in found.values())


def test_an_update_lost_in_rounding_is_none():
    layer = fixed()
    layer.B.data *= 1e-8
    recorder = Recorder([torch.tensor([[3.0, 4.0]])] * 2)
    for _ in range(3):
        recorder.record(layer)
    assert recorder.records["drift"][1:, 0].isnan().all()


def test_inputs_for_which_no_rank_speaks_are_silent_and_left_out():
    layer = MoRA(nn.Linear(3, 3), rank=2, top_k=1, delta=2.0)
    nn.init.normal_(layer.B)
    recorder = Recorder([torch.randn(5, 3)])
    recorder.record(layer)
    recorder.record(layer)
    assert recorder.records["silent"][1, 0] == 1
    for name in ("drift", "undecided", "turnover", "mass", "said"):
        assert recorder.records[name][1, 0].isnan().all()


def test_who_falls_silent_has_turned_over():
    layer = MoRA(nn.Linear(3, 3), rank=2, top_k=1, delta=-1.0)
    nn.init.normal_(layer.B)
    recorder = Recorder([torch.randn(5, 3)] * 2)
    recorder.record(layer)
    recorder.record(layer)
    layer.delta = 2.0
    recorder.record(layer)
    assert recorder.records["turnover"][2, 0] == 1 and recorder.records["said"][2, 0].isnan().all()


def test_what_was_skipped_is_not_known():
    layer = fixed()
    recorder = Recorder([torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])])
    recorder.skip(layer)
    recorder.skip(layer)
    second_task(layer)
    recorder.record(layer)
    assert recorder.records["drift"][2, 0].isnan() and recorder.records["turnover"][2, 0].isnan()
    torch.testing.assert_close(recorder.records["mass"][2, 0], torch.tensor([0.25, 0.75]).double())
    undecided = recorder.records["undecided"][2]
    torch.testing.assert_close(undecided[0], undecided[1])
    with pytest.raises(ValueError, match="all 2 tasks are recorded already"):
        recorder.record(layer)


def test_a_recorder_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    adapt(model, LoRAMoE, targets="0", rank=1, balance=1.0)
    model[0].eval()
    before = torch.get_rng_state()
    recorder = Recorder([torch.randn(2, 3, generator=torch.Generator().manual_seed(1))])
    recorder.record(model)
    recorder.record(model, call=lambda x, j: model(x + j))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and model[1].training and not model[0].training
    assert model[0].step.record is None and not model[0]._forward_hooks


def test_a_layer_that_does_not_grow_has_no_later_ranks():
    recorder = Recorder([torch.randn(2, 3)] * 3)
    layer = LoRA(nn.Linear(3, 3), rank=2)
    nn.init.normal_(layer.B)
    for _ in range(4):
        recorder.record(layer)
    assert recorder.records["mass"][3, 1].tolist()[0] == 1
    assert PROBLEMS["ambiguity"](recorder.records) == PROBLEMS["instability"](recorder.records) == 0
    assert recorder.records["mass"][3, :, 1:].isnan().all()
    assert math.isnan(PROBLEMS["intrusion"](recorder.records))
    assert math.isnan(PROBLEMS["redundancy"](recorder.records))
    assert PROBLEMS["interference"](recorder.records) == 0


def test_where_layers_grow_apart_shares_are_still_shares():
    """As SEMA's do: one is born in task 1 and grows in task 2, the other in task 3."""
    torch.manual_seed(0)
    model = nn.Sequential(LoRA(nn.Linear(4, 4), rank=2), LoRA(nn.Linear(4, 4), rank=2))
    recorder = Recorder([torch.randn(6, 4) for _ in range(3)])
    recorder.record(model)
    for grows in ((), (model[0],), (model[1],)):
        for layer in grows:
            layer.grow()
        for layer in model:
            nn.init.normal_(layer.B)
        recorder.record(model)
    for name in ("mass", "said"):
        shares = recorder.records[name]
        for i in (1, 2, 3):
            torch.testing.assert_close(shares[i, :i, :i].sum(-1), torch.ones(i).double())
            assert shares[i, :, i:].isnan().all()
        # what one layer has added, the mean with the 0 of the other
        assert 0 < shares[3, 0, 1] < 0.5 and 0 < shares[3, 0, 2] < 0.5
    assert PROBLEMS["intrusion"](recorder.records) <= 1
    assert PROBLEMS["intrusion"](recorder.records) <= PROBLEMS["instability"](recorder.records)


def test_a_model_without_adapters_gives_nan():
    recorder = Recorder([torch.randn(2, 3)] * 2)
    for _ in range(3):
        recorder.record(nn.Linear(3, 3))
    assert all(math.isnan(measure(recorder.records)) for measure in PROBLEMS.values())


def test_the_measures_by_hand():
    nan = math.nan
    old = [[nan] * 3, [0.0, nan, nan], [0.1, 0.0, nan], [0.5, 0.3, 0.0]]
    said = np.full((4, 3, 3), nan)
    said[3] = [[0.5, 0.2, 0.3], [0.1, 0.5, 0.4], [0, 0, 1]]
    found = {
        "drift": old,
        "learned": np.array([3.0, 1.0, 2.0]) * np.ones((4, 1)),
        "turnover": old,
        "undecided": [[nan] * 3, [0.9, nan, nan], [0.9, 0.9, nan], [0.2, 0.3, 0.7]],
        "alike": [nan, nan, 0.2, 0.6],
        "chance": [nan, nan, 0.1, 0.3],
        "said": said,
    }
    want = {
        "interference": (3 * 0.5 + 1 * 0.3) / 4,
        "intrusion": ((0.2 + 0.3) + 0.4) / 2,
        "redundancy": (0.2 + 0.6) / 2,
        "redundancy_chance": (0.1 + 0.3) / 2,
        "ambiguity": (0.2 + 0.3 + 0.7) / 3,
        "instability": (0.5 + 0.3) / 2,
    }
    assert {name: measure(found) for name, measure in PROBLEMS.items()} == pytest.approx(want)


def test_adapters_may_come_after_the_first_records():
    model = nn.Sequential(nn.Linear(6, 5))
    recorder = Recorder([torch.randn(4, 6)] * 3)
    recorder.record(model)
    recorder.record(model)  # a task was learned without adapters
    adapt(model, MoRA, "0", rank=2)
    recorder.record(model)
    assert recorder.records["alike"].isnan().all()  # no older ranks to be like
    grow(model)
    for layer in (model[0],):
        layer.frozen_B.normal_(), nn.init.normal_(layer.B)
    recorder.record(model)
    assert recorder.records["alike"][3] > 0 and recorder.records["chance"][3] > 0
