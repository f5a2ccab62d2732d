"""What every scheme keeps, for all of the roster: outputs, losses and every gradient as its oracle
has them, a birth that changes nothing, states that load, counts that are the docstrings'."""

import copy

import numpy as np
import pytest
import torch
from layers import (
    PATHS,
    arrays,
    context_of,
    file_of,
    grown,
    live,
    network,
    own,
    situation,
)
from oracle import gradient
from torch import nn

from minimoe import LoRA
from minimoe.adapt import adapters, context, count, load, save, state
from minimoe.roster import ROSTER, SCHEMES

# every scheme of the roster, and its variants, "flylora signed"
CASES = [
    " ".join([name, variant]).strip()
    for name in SCHEMES
    for variant in ("", *getattr(file_of(name), "VARIANTS", {}))
]
# samples, D, O, r, tasks: awkward ones; each sample has 2 tokens
SIZES = [(3, 5, 7, 2, 1), (5, 7, 3, 1, 4), (4, 13, 11, 3, 3), (1, 2, 2, 2, 2)]
THREE = [name for name, entry in ROSTER.items() if entry.kind == "scheme"]
WITH_AUX = [case for case in CASES if hasattr(own(case)[1], "AUX")]


def calm(layer):
    """Without the noise of training."""
    if hasattr(layer, "dropout"):
        layer.dropout = 0.0
    return layer


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_output_and_every_gradient_equal_the_oracles(case, size):
    tests = own(case)[1]
    layer, x, given, points, each = situation(case, size)
    rows, dy = arrays(calm(layer)), torch.randn(*x.shape[:2], size[2], dtype=torch.float64)
    flat = dy.reshape(len(points), -1).numpy()
    leaves = {"x": x} | {key: getattr(layer, key) for key in live(layer, rows)}
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
                if grad is None:  # a descriptor, say, does not shape the output
                    assert key in getattr(tests, "AUX", ()) and not array.any(), key
                    continue
                np.testing.assert_allclose(
                    grad.reshape(array.shape).numpy(),
                    array,
                    rtol=1e-6,
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

    with context(layer, **given):
        layer(x)
    np.testing.assert_allclose(layer.aux.item(), f(), rtol=1e-12)
    leaves = {"x": x} | {key: getattr(layer, key) for key in live(layer, rows)}
    grads = torch.autograd.grad(layer.aux, list(leaves.values()), allow_unused=True)
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
    x = torch.randn(4, 7, dtype=dtype)
    before = base(x)
    layer = scheme(base, rank=2, **settings).train(training)
    for _ in range(2):
        with context(layer, **context_of(layer, 4)):
            y = layer(x)
        assert torch.equal(y, before)
        y.sum().backward()
        # a cluster may choose an old expert, and leave the rest to MoCLE's universal one
        assert layer.B.grad.any() or layer.UB.grad.any() or not training
        layer.grow()


@pytest.mark.parametrize("case", CASES)
def test_an_auxiliary_loss_is_left_in_training_only(case):
    layer = grown(case).eval()
    x = torch.randn(3, 7, dtype=torch.float64)
    with context(layer, **context_of(layer, 3)):
        layer(x)
    assert layer.aux is None
    with context(layer.train(), **context_of(layer, 3)):
        layer(x)
    assert (layer.aux is not None) == (case in WITH_AUX)
    assert copy.deepcopy(layer).aux is None


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
    layer = next(layer for _, layer in adapters(net))
    k = layer.kept if layer.claims.top_k else 0
    counts = count(net)
    assert counts["stored"] == sum(tests.STORED(*DO, R, r, E) for DO in ((6, 9), (9, 6)))
    assert counts["active"] == sum(tests.ACTIVE(*DO, R, r, E, k) for DO in ((6, 9), (9, 6)))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_rank_beyond_the_layer_is_named(name):
    with pytest.raises(ValueError, match=r"^rank is 6, allowed for this layer: 1 to 5$"):
        SCHEMES[name](nn.Linear(7, 5), rank=6)


def test_only_a_linear_layer_is_adapted():
    with pytest.raises(TypeError, match=r"base is Conv2d, allowed: nn\.Linear"):
        LoRA(nn.Conv2d(1, 1, 1))


def test_a_scheme_without_a_test_file_is_named():
    with pytest.raises(AssertionError, match=r"gate is in the roster, and has no tests/schemes/te"):
        file_of("gate")


@pytest.mark.parametrize("name", SCHEMES)
def test_what_belongs_to_no_task_trains_on_after_grow(name):
    layer = grown(name)
    shared = {key: getattr(layer, key) for key in layer.task_agnostic()}
    assert bool(shared) == (name in ("mosld", "mocle", "mor1e"))
    before = {key: parameter.clone() for key, parameter in shared.items()}
    layer.grow()
    for key, parameter in shared.items():
        assert getattr(layer, key) is parameter and parameter.requires_grad
        assert torch.equal(parameter, before[key])


# The laws hold every scheme to what follows, on drawn cases; here the three at sizes of their own.


@pytest.mark.parametrize("name", THREE)
def test_any_leading_shape_and_no_tokens(name):
    layer = grown(name)
    x = torch.randn(2, 3, 4, 7, dtype=torch.float64)
    assert torch.allclose(layer(x), layer(x.view(-1, 7)).view(2, 3, 4, 5), atol=1e-12)
    assert torch.allclose(layer(x[0, 0, 0]), layer(x)[0, 0, 0], atol=1e-12)
    assert layer(x[:, :0]).shape == (2, 0, 4, 5)


@pytest.mark.parametrize("path", ["plain", "dense", "gather"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "autocast"])
@pytest.mark.parametrize("name", THREE)
def test_half_precision_and_autocast_come_near(name, dtype, path):
    layer = grown(name, 20, 30, 4, 3, dtype=torch.float32)
    layer.path = path
    x = 0.5 * torch.randn(50, 20)
    wanted = layer(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        y = layer(x) if dtype == "autocast" else layer.to(dtype)(x.to(dtype))
    assert y.dtype == (torch.bfloat16 if dtype == "autocast" else dtype)
    y.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.requires_grad)
    # a token may choose another rank where two are within rounding: most must agree
    near = ((y.float() - wanted).norm(dim=1) / wanted.norm(dim=1)) < 0.05
    assert near.float().mean() > 0.9


# torch's own tracer makes an instance of autograd.Function, and torch's own Function warns of it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("path", ["plain", "dense", "gather"])
@pytest.mark.parametrize("name", [*THREE, "mora detached"])
def test_compiled_equals_eager_in_one_graph(name, path):
    detached = {"detach_gate": True} if "detached" in name else {}
    layer = grown(name.split()[0], dtype=torch.float32, **detached)
    layer.path = path
    x = torch.randn(3, 4, 7, requires_grad=True)
    dy = torch.randn(3, 4, 5)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    both = []
    for module in (layer, compiled):
        y = module(x)
        both.append((y, *torch.autograd.grad(y, [x, layer.A, layer.B], dy)))
    for eager, graph in zip(*both, strict=True):
        assert torch.allclose(eager, graph, atol=1e-6)


@pytest.mark.parametrize("name", THREE)
def test_only_live_rows_learn(name):
    layer = grown(name, dtype=torch.float32)
    before = copy.deepcopy(layer.state_dict())
    trained = [n for n, p in layer.named_parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        layer(torch.randn(50, 7)).square().mean().backward()
        optimiser.step()
    for key, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[key]) == (key not in trained), key
    layer.grow()
    after = layer.state_dict()
    for key in trained:
        parameters = optimiser.param_groups[0]["params"]
        rows_before = torch.cat([before[f"frozen_{key}"], parameters[trained.index(key)]])
        assert torch.equal(after[f"frozen_{key}"], rows_before), key
    assert torch.equal(layer.B, torch.zeros(2, 5))
