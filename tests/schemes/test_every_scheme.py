"""What every scheme keeps, for all of the roster: outputs, losses and every gradient as its oracle
has them, a birth that changes nothing, states that load, counts that are the docstrings'."""

import copy
import inspect

import numpy as np
import pytest
import torch
from layers import (
    PATHS,
    arrays,
    calm,
    compiled_equals_eager,
    context_of,
    file_of,
    grown,
    live,
    network,
    own,
    situation,
    tokens_each,
)
from oracle import gradient
from torch import nn

from minimoe import LoRA
from minimoe.adapt import adapters, context, count, load, save, state
from minimoe.continual.probe import dense_gate
from minimoe.roster import ROSTER, SCHEMES

# every scheme of the roster, and its variants, "flylora signed"
CASES = [
    " ".join([name, variant]).strip()
    for name in SCHEMES
    for variant in ("", *getattr(file_of(name), "VARIANTS", {}))
]
# samples, D, O, r, tasks: awkward ones; each sample has 2 tokens
SIZES = [(3, 5, 7, 2, 1), (5, 7, 3, 1, 4), (4, 13, 11, 3, 3), (1, 2, 2, 2, 2)]
LARGE = (4, 13, 11, 3, 3)
THREE = [name for name, entry in ROSTER.items() if entry.kind == "scheme"]
WITH_AUX = [case for case in CASES if hasattr(own(case)[1], "AUX")]


@pytest.mark.parametrize(
    ("case", "size"),
    [
        pytest.param(
            case, size, marks=[pytest.mark.slow] if size == LARGE and case not in THREE else []
        )
        for case in CASES
        for size in SIZES
    ],
)
def test_output_and_every_gradient_equal_the_oracles(case, size):
    tests = own(case)[1]
    layer, x, given, points, each = situation(case, size)
    rows, dy = arrays(calm(layer)), torch.randn(*x.shape[:2], size[2], dtype=torch.float64)
    flat = dy.reshape(len(points), -1).numpy()
    leaves = {"x": x} | {key: getattr(layer, key) for key in live(layer, rows)}
    assert [key for key, p in layer.named_parameters() if p.requires_grad] == list(leaves)[1:]
    for training in (True, False):
        layer.train(training)

        def f():
            return tests.expected(layer, points, rows, each)

        y = f()
        wanted = {
            key: gradient(f, array, flat)
            for key, array in {"x": points, **live(layer, rows)}.items()
        }
        for layer.path in PATHS:
            with context(layer, **given):
                got = layer(x)
            where = f"{layer.path}, training {training}"
            np.testing.assert_allclose(
                got.detach().reshape(y.shape).numpy(), y, rtol=0, atol=1e-12, err_msg=where
            )
            grads = torch.autograd.grad(got, list(leaves.values()), dy, allow_unused=True)
            for (key, array), grad in zip(wanted.items(), grads, strict=True):
                assert (grad is None) == (key in getattr(tests, "AUX_ONLY", ())), key
                if grad is None:
                    assert not array.any(), key
                    continue
                np.testing.assert_allclose(
                    grad.reshape(array.shape).numpy(),
                    array,
                    atol=1e-7,
                    err_msg=f"{key}: {where}",
                )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", WITH_AUX)
def test_auxiliary_loss_and_its_gradient_equal_the_oracles(case, size):
    tests = own(case)[1]
    layer, x, given, points, each = situation(case, size)
    rows = arrays(layer)

    def f():
        return tests.expected_aux(layer, points, rows, each)

    with context(layer, **given) as batch:
        layer(x)
    loss = batch.aux_loss
    np.testing.assert_allclose(loss.item(), f(), rtol=1e-12, atol=1e-15)
    leaves = {"x": x} | {key: getattr(layer, key) for key in live(layer, rows)}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for (key, array), grad in zip({"x": points, **live(layer, rows)}.items(), grads, strict=True):
        # a router's loss is one of the inputs too; a descriptor does not shape what it describes
        assert (grad is not None) == (key in tests.AUX or (key == "x" and "router" in tests.AUX))
        if grad is not None:
            slope = gradient(f, array, np.ones(()))
            np.testing.assert_allclose(
                grad.reshape(array.shape).numpy(), slope, rtol=1e-6, atol=1e-7, err_msg=key
            )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_a_fresh_layer_is_the_base_layer_bit_for_bit_and_can_learn(case, dtype, training):
    scheme, _, settings = own(case)
    base = nn.Linear(7, 5, dtype=dtype)
    x = torch.randn(64, 7, dtype=dtype)  # so many that each task is named
    before = base(x)
    layer = scheme(base, rank=2, **settings).train(training)
    for _ in range(2):
        with context(layer, **context_of(layer, 64)):
            y = layer(x)
        assert torch.equal(y, before)
        y.sum().backward()
        grads = [p.grad for p in layer.parameters() if p.requires_grad]
        assert not training or any(grad is not None and grad.any() for grad in grads)
        layer.grow()


@pytest.mark.parametrize("case", CASES)
def test_an_auxiliary_loss_is_left_in_training_only(case):
    layer = grown(case).eval()
    x = torch.randn(3, 7, dtype=torch.float64)
    with context(layer, **context_of(layer, 3)) as batch:
        layer(x)
    assert batch.aux_loss == 0.0 and layer.counts is None
    with context(layer.train(), **context_of(layer, 3)) as batch:
        layer(x)
        assert copy.deepcopy(layer).step.record is None
    assert (batch.aux_loss != 0.0) == (case in WITH_AUX)


@pytest.mark.parametrize("case", CASES)
def test_a_grown_layers_state_loads_into_a_fresh_one(case):
    layer, other = grown(case).eval(), grown(case, tasks=1).eval()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 2, 7, dtype=torch.float64)
    given = context_of(layer, 4)
    ys = []
    for module in (layer, other, copy.deepcopy(layer)):
        with context(module, **given):
            ys.append(module(x))
    assert torch.equal(ys[0], ys[1]) and torch.equal(ys[0], ys[2])
    assert other.state_dict().keys() == layer.state_dict().keys()
    assert all(torch.equal(t, other.state_dict()[k]) for k, t in layer.state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_adapters_alone_are_saved_and_load_into_a_fresh_model_after_grow(case, tmp_path):
    net, fresh = network(case).eval(), network(case, tasks=1).eval()
    for layer, other in ((net.fc1, fresh.fc1), (net.fc2, fresh.fc2)):
        other.base.load_state_dict(layer.base.state_dict())
    save(net, tmp_path / "a.safetensors")
    load(fresh, tmp_path / "a.safetensors")
    x = torch.randn(4, 2, 6)
    given = context_of(net.fc1, 4)
    with context(net, **given):
        y = net(x)
    with context(fresh, **given):
        assert torch.equal(fresh(x), y)
    assert all(torch.equal(tensor, state(fresh)[k]) for k, tensor in state(net).items())


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_counts_are_the_docstrings_formulas(case, tasks):
    net, r, tests = network(case, tasks), 2, own(case)[1]
    R, E = r * tasks, tasks
    most = R if own(case)[0].claims.expert == "rank" else E
    k = min(tests.SETTINGS.get("top_k", 0), most)
    counts = count(net)
    assert counts["stored"] == sum(tests.STORED(*DO, R, r, E) for DO in ((6, 9), (9, 6)))
    assert counts["read"] == sum(tests.ACTIVE(*DO, R, r, E, k) for DO in ((6, 9), (9, 6)))


@pytest.mark.parametrize("case", CASES)
def test_those_who_speak_are_counted(case):
    """Of 40 tokens, the most ranks that one gives a weight: their keys and values, or what the
    scheme's own test file says of them."""
    net = network(case, tasks=3).eval()
    layer, x = net.fc1, torch.randn(40, 6, dtype=net.fc1.B.dtype)
    if hasattr(layer, "delta"):
        layer.delta = -1.0  # none is silent
    with context(net, **context_of(layer, 40)):
        K = int((dense_gate(layer, x) != 0).sum(-1).max())
    D, O, r = 6, 9, layer.rank
    SPEAKING = getattr(own(case)[1], "SPEAKING", lambda D, O, r, K: K * (D + O))
    speak = SPEAKING(D, O, r, K)
    assert layer.speaking() == speak or (layer.claims.active_at_most and layer.speaking() > speak)
    assert count(net)["speaking"] == sum(adapter.speaking() for _, adapter in adapters(net))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_rank_beyond_the_layer_is_named(name):
    with pytest.raises(ValueError, match=r"^rank is 6, allowed: 1 to 5 for this layer$"):
        SCHEMES[name](nn.Linear(7, 5), rank=6)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_part_of_a_whole_number_is_named(name):
    kinds = inspect.get_annotations(SCHEMES[name].__init__)
    for setting in [setting for setting, kind in kinds.items() if kind is int]:
        with pytest.raises(ValueError, match=rf"\b{setting} (is )?2\.5\b"):
            SCHEMES[name](nn.Linear(7, 5), **{"rank": 1, setting: 2.5})


def test_only_a_linear_layer_is_adapted():
    with pytest.raises(TypeError, match=r"base is Conv2d \(torch.*\), allowed: nn\.Linear"):
        LoRA(nn.Conv2d(1, 1, 1))


def test_a_scheme_without_a_test_file_is_named():
    with pytest.raises(AssertionError, match=r"gate is in the roster, and has no tests/schemes/te"):
        file_of("gate")


@pytest.mark.parametrize("name", SCHEMES)
def test_what_belongs_to_no_task_trains_on_after_grow(name):
    layer = grown(name)
    assert layer.task_agnostic().keys() == getattr(file_of(name), "TASK_AGNOSTIC", set())
    kept = {key: getattr(layer, key) for key in layer.task_agnostic()}
    before = {key: parameter.clone() for key, parameter in kept.items()}
    layer.grow()
    for key, parameter in kept.items():
        assert getattr(layer, key) is parameter and parameter.requires_grad
        assert torch.equal(parameter, before[key])
    for key, _ in layer.named_parameters():
        assert key in kept or key.startswith("base") or hasattr(layer, f"frozen_{key}")


@pytest.mark.parametrize("case", CASES)
def test_any_leading_shape_and_no_tokens(case):
    layer = calm(grown(case))
    x, given = torch.randn(2, 3, 4, 7, dtype=torch.float64), context_of(layer, 2, 3)

    def answer(x, given):
        with context(layer, **given):
            return layer(x)

    y = answer(x, given)
    nothing = {key: value[:, :0] for key, value in given.items()}
    assert answer(x[:, :0], nothing).shape == (2, 0, 4, 5)
    if layer.claims.granularity == "sample":  # which the first axis counts
        assert torch.allclose(answer(x.flatten(1, 2), given), y.flatten(1, 2), atol=1e-12)
        return
    each = tokens_each(given, (2, 3), (4,))
    assert torch.allclose(y, answer(x.view(-1, 7), each).view(2, 3, 4, 5), atol=1e-12)
    first = {key: value[0] for key, value in each.items()}
    assert torch.allclose(answer(x[0, 0, 0], first), y[0, 0, 0], atol=1e-12)


@pytest.mark.parametrize("path", ["plain", "dense", "gather"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "autocast"])
@pytest.mark.parametrize("case", CASES)
def test_half_precision_and_autocast_come_near(case, dtype, path):
    layer = calm(grown(case, 20, 30, 4, 3, dtype=torch.float32))
    layer.path = path
    x, given = 0.5 * torch.randn(50, 20), context_of(layer, 50)
    with context(layer, **given) as batch:
        wanted = layer(x)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast")
    with context(layer, **given) as batch, autocast:
        y = layer(x) if dtype == "autocast" else layer.to(dtype)(x.to(dtype))
    assert y.dtype == (torch.bfloat16 if dtype == "autocast" else dtype)
    square = y.float().square()
    # beyond float16, sums' gradients: of MoR1E's w2, behind a factor of 100, 5e6; MoFME is a square
    mean = case in ("mor1e", "mofme")
    (batch.aux_loss + (square.mean() if mean else square.sum())).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.requires_grad)
    # a token may choose another rank where two are within rounding: most must agree
    near = ((y.float() - wanted).norm(dim=1) / wanted.norm(dim=1)) < 0.05
    assert near.float().mean() > 0.9


# torch's own tracer makes an instance of autograd.Function, and torch's own Function warns of it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("case", "path"),
    [
        pytest.param(
            case,
            path,
            marks=[] if case in THREE else pytest.mark.slow,
        )
        for case in CASES
        for path in ("plain", "dense", "gather")
    ],
)
def test_compiled_equals_eager_in_one_graph(case, path):
    layer = calm(grown(case, dtype=torch.float32))
    layer.path = path
    compiled_equals_eager(layer)


@pytest.mark.parametrize("case", CASES)
def test_only_live_rows_learn(case):
    layer = grown(case, dtype=torch.float32)
    before = copy.deepcopy(layer.state_dict())
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        with context(layer, **context_of(layer, 50)) as batch:
            (layer(torch.randn(50, 7)).square().mean() + batch.aux_loss).backward()
        optimiser.step()
    for key, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[key]) == (key not in trained), key
    layer.grow()
    after = layer.state_dict()
    for key in trained.keys() - layer.task_agnostic().keys():
        rows_before = torch.cat([before[f"frozen_{key}"], trained[key]])
        assert torch.equal(after[f"frozen_{key}"], rows_before), key
    assert "B" in layer.task_agnostic() or layer.B.any() == layer.fresh()["B"].any()
