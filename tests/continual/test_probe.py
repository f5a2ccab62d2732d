"""The three problems by hand, and a recorder against plain loops."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from minimoe import Adapter, LoRA, LoRAMoE, MoRA
from minimoe.adapt import adapt, adapters, grow
from minimoe.continual.probe import PROBLEMS, Recorder, alike, dense_gate


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
    layer.A.data, layer.B.data = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2)
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
    # y' = x = (3, 4), of length 5; now rank 1 sees 4 and says .75 · 4 · (1, 0) = (3, 0) besides
    np.testing.assert_allclose(found["drift"], [[nan, nan], [0, nan], [0.6, 0]], atol=1e-7)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    np.testing.assert_allclose(found["entropy"], [[nan, nan], [0, nan], [entropy, entropy]])
    # one rank was chosen, now both are
    np.testing.assert_allclose(found["turnover"], [[nan, nan], [0, nan], [0.5, 0]])
    np.testing.assert_allclose(found["silent"], [[nan, nan], [0, nan], [0, 0]])
    np.testing.assert_allclose(found["mass"][1, 0], [1, nan])
    np.testing.assert_allclose(found["mass"][2], [[0.25, 0.75]] * 2)
    assert np.isnan(found["mass"][0]).all() and np.isnan(found["mass"][1, 1]).all()
    # rank 0 says nothing yet: it is like none
    np.testing.assert_allclose(found["alike"], [nan, nan, 0])
    by_hand = {"interference": 0.6, "intrusion": 0.75, "redundancy": 0, "instability": 0.5}
    for name, want in (by_hand | {"ambiguity": entropy}).items():
        assert math.isclose(PROBLEMS[name](recorder.records), want, abs_tol=1e-7), name


def test_alike_by_hand():
    A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, -5.0]])
    B = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 7.0]])
    # rank 2 has half of rank 0's key and its value; rank 3 is rank 1, turned round: the same line
    torch.testing.assert_close(alike(A, B, 2), torch.tensor([0.5**0.5, 1.0]).double())
    torch.testing.assert_close(alike(A, 0 * B, 2), torch.zeros(2).double())


def test_alike_is_the_cosine_of_the_rank_1_matrices():
    A, B = torch.randn(7, 5), torch.randn(7, 3)
    flat = torch.einsum("rd,ro->rdo", A, B).flatten(1)
    want = nn.functional.cosine_similarity(flat[4:, None], flat[None, :4], dim=-1).abs().amax(1)
    torch.testing.assert_close(alike(A, B, 4), want.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [(LoRA, {}), (LoRAMoE, {"top_k": 2}), (MoRA, {"top_k": 3, "tau": 0.2, "delta": 0.1})],
)
def test_a_recorder_against_loops(scheme, settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    adapt(model, scheme, targets="0|2", rank=2, **settings)
    T, N = 3, 4
    probes = [torch.randn(2, N // 2, 6) for _ in range(T)]
    recorder = Recorder(probes)
    recorder.record(model)
    then = {}

    def look(j):
        """(g (N, R), y (N, O)) of both layers."""
        h, seen = probes[j].flatten(0, 1), []
        for layer in (model[0], model[2]):
            y = layer(h)
            seen.append((dense_gate(layer, h).detach().numpy(), y.detach().numpy()))
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
            want = {"drift": [], "entropy": [], "turnover": [], "mass": []}
            for (g, y), (g_then, y_then) in zip(look(j), then[j], strict=True):
                per = {name: [] for name in want}
                for n in range(N):
                    apart, size = np.linalg.norm(y[n] - y_then[n]), np.linalg.norm(y_then[n])
                    per["drift"].append(apart / size)
                    now = {r for r in range(len(g[n])) if g[n, r]}
                    was = {r for r in range(len(g_then[n])) if g_then[n, r]}
                    if now | was:
                        per["turnover"].append(1 - len(now & was) / len(now | was))
                    if not now:
                        continue
                    p = g[n] / g[n].sum()
                    mass = [p[2 * s : 2 * s + 2].sum() for s in range(t + 1)] + [math.nan] * (
                        T - 1 - t
                    )
                    per["mass"].append(mass)
                    expert = mass[: t + 1] if scheme is LoRAMoE else p
                    H = -sum(q * math.log(q) for q in expert if q > 0)
                    per["entropy"].append(H / math.log(len(expert)) if len(expert) > 1 else 0)
                for name, values in per.items():
                    want[name].append(np.mean(values, axis=0))
            for name, layers in want.items():
                got = recorder.records[name][t + 1, j].numpy()
                np.testing.assert_allclose(got, np.mean(layers, axis=0), atol=1e-5, err_msg=name)
    assert PROBLEMS["interference"](recorder.records) > 0


def test_inputs_for_which_no_rank_speaks_are_silent_and_left_out():
    layer = MoRA(nn.Linear(3, 3), rank=2, top_k=1, delta=2.0)
    recorder = Recorder([torch.randn(5, 3)])
    recorder.record(layer)
    recorder.record(layer)
    assert recorder.records["silent"][1, 0] == 1
    assert recorder.records["drift"][1, 0] == 0
    for name in ("entropy", "turnover", "mass"):
        assert recorder.records[name][1, 0].isnan().all()


def test_what_was_skipped_is_not_known():
    layer = fixed()
    recorder = Recorder([torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])])
    recorder.skip(layer)
    recorder.skip(layer)
    second_task(layer)
    recorder.record(layer)
    assert recorder.records["drift"][2, 0].isnan() and recorder.records["turnover"][2, 0].isnan()
    torch.testing.assert_close(recorder.records["mass"][2, 0], torch.tensor([0.25, 0.75]).double())
    torch.testing.assert_close(recorder.records["entropy"][2, 0], recorder.records["entropy"][2, 1])
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
    for _ in range(4):
        recorder.record(layer)
    assert recorder.records["mass"][3, 1].tolist()[0] == 1
    assert recorder.records["mass"][3, :, 1:].isnan().all()
    assert math.isnan(PROBLEMS["intrusion"](recorder.records))
    assert math.isnan(PROBLEMS["redundancy"](recorder.records))
    assert PROBLEMS["interference"](recorder.records) == 0


def test_a_model_without_adapters_gives_nan():
    recorder = Recorder([torch.randn(2, 3)] * 2)
    for _ in range(3):
        recorder.record(nn.Linear(3, 3))
    assert all(math.isnan(measure(recorder.records)) for measure in PROBLEMS.values())


def test_the_measures_by_hand():
    nan = math.nan
    old = [[nan] * 3, [0.0, nan, nan], [0.1, 0.0, nan], [0.5, 0.3, 0.0]]
    mass = np.full((4, 3, 3), nan)
    mass[3] = [[0.5, 0.2, 0.3], [0.1, 0.5, 0.4], [0, 0, 1]]
    found = {
        "drift": old,
        "turnover": old,
        "entropy": [[nan] * 3, [0.9, nan, nan], [0.9, 0.9, nan], [0.2, 0.3, 0.7]],
        "alike": [nan, nan, 0.2, 0.6],
        "mass": mass,
    }
    want = {
        "interference": (0.5 + 0.3) / 2,
        "intrusion": ((0.2 + 0.3) + 0.4) / 2,
        "redundancy": (0.2 + 0.6) / 2,
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
    recorder.record(model)
    assert recorder.records["alike"][3] >= 0
