"""The ten schemes of the atlas, as test_schemes.py has the first three: each against its oracle,
outputs, losses and every gradient; numbers worked by hand; what each is told of a sample."""

import copy
import importlib.util
import itertools
import math
import re
from collections import OrderedDict

import numpy as np
import oracle
import pytest
import torch
from minimoe.learners import fisher_information
from minimoe.probe import dense_gate
from minimoe.schemes.loramoe import localized_balance
from torch import nn

from minimoe import LoRA
from minimoe.adapt import (
    Telling,
    adapt,
    adapters,
    after_step,
    aux_loss,
    count,
    grow,
    load,
    save,
    state,
    told,
)
from minimoe.schemes import (
    EWC,
    SEMA,
    FlyLoRA,
    LoRAMoEPlugin,
    MeteoRA,
    MoCLE,
    MoR1E,
    MoSLD,
    OLoRA,
    SMoRA,
)
from minimoe.schemes.meteora import label_loss

# samples, D, O, r, tasks: awkward ones; each sample has 2 tokens
SIZES = [(3, 5, 7, 2, 1), (5, 7, 3, 1, 4), (4, 13, 11, 3, 3), (1, 2, 2, 2, 2)]
PATHS = ["dense", "gather", "compact"]
PATHS += ["triton"] if importlib.util.find_spec("triton") else []
SCHEMES = {
    "smora": (SMoRA, {"scale": 0.7, "top_k": 3}),
    "flylora": (FlyLoRA, {"scale": 0.7, "top_k": 3}),
    "flylora signed": (FlyLoRA, {"scale": 0.7, "top_k": 3, "signed": True}),
    "mor1e": (MoR1E, {"scale": 0.7, "embedding": 3}),
    "loramoe": (LoRAMoEPlugin, {"scale": 0.7, "balance": 0.4, "delta": 0.3}),
    "mosld": (MoSLD, {"scale": 0.7, "top_k": 2, "dropout": 0.4}),
    "mocle": (MoCLE, {"scale": 0.7, "clusters": 2, "tau": 0.6, "embedding": 3}),
    "meteora": (MeteoRA, {"scale": 0.7, "top_k": 2, "tau": 0.6, "supervision": 0.5}),
    "sema": (SEMA, {"scale": 0.7, "width": 2}),
    "olora": (OLoRA, {"scale": 0.7, "orthogonality": 0.3}),
    "ewc": (EWC, {"scale": 0.7, "importance": 3.0}),
}
TOLD = {"mor1e": "embedding", "loramoe": "label", "mocle": "cluster", "meteora": "label"}
AUX = {  # of which weights each loss is
    "loramoe": {"router"},
    "meteora": {"router"},
    "sema": {"P", "Q"},
    "olora": {"A"},
    "ewc": {"A", "B"},
}


@torch.no_grad()
def filled(layer):
    """No value, frozen or live, is zero, and each is one that it can have."""
    for name, tensor in layer.state_dict().items():
        key = name.removeprefix("frozen_")
        if key == "bias":
            tensor.uniform_(-0.1, 0.4)
        elif not key.startswith("base"):
            tensor.normal_(std={"w1": 0.005, "w2": 0.005, "router": 0.5}.get(key, 1.0))
        if key == "sigma" or key.startswith("fisher"):
            tensor.abs_().add_(0.1)
    return layer


def grown(name, D=7, O=5, rank=2, tasks=3, dtype=torch.float64, **settings):
    """A layer of several tasks."""
    scheme, own = SCHEMES[name]
    layer = scheme(nn.Linear(D, O, dtype=dtype), rank=rank, **own | settings)
    for _ in range(tasks - 1):
        layer.grow()
    return filled(layer)


def network(name, tasks=3):
    """Two adapted layers, 6 to 9 and 9 to 6."""
    scheme, settings = SCHEMES[name]
    layers = [("fc1", nn.Linear(6, 9)), ("act", nn.ReLU()), ("fc2", nn.Linear(9, 6))]
    net = adapt(nn.Sequential(OrderedDict(layers)), scheme, r"fc\d", rank=2, **settings)
    for _ in range(tasks - 1):
        grow(net)
    for _, layer in adapters(net):
        filled(layer)
    return net


def say(layer, *samples):
    """Something of each sample, if the layer hears anything."""
    found = {}
    for name, what in layer.hears().items():
        index = isinstance(what, range)
        found[name] = torch.randint(len(what), samples) if index else torch.randn(*samples, what)
    return found


def arrays(layer):
    """Frozen and live rows by name, and what belongs to no task, as float64 arrays."""
    found = {name: layer.rows(name) for name in layer.fresh()}
    found |= {name: getattr(layer, name) for name in layer.shared()}
    found |= {"W0": layer.base.weight, "b": layer.base.bias}
    return {name: tensor.detach().double().numpy().copy() for name, tensor in found.items()}


def live(layer, n):
    """The part of the arrays that is trained, by name: views."""
    own = {name: p for name, p in layer.named_parameters() if not name.startswith("base")}
    return {name: n[name][len(n[name]) - len(p) :] for name, p in own.items()}


def expected(name, layer, x, n, told):
    """The oracle's y of tokens x (T, D), by arrays n and what is said of each token's sample."""
    of, scale = (x, n["W0"], n["b"], n["A"], n["B"]), layer.scale
    match name.split()[0]:
        case "smora":
            return oracle.smora(*of, n["router"], n["bias"], scale, layer.top_k)
        case "flylora":
            return oracle.flylora(*of, n["bias"], scale, layer.top_k, layer.signed)
        case "mor1e":
            knobs = n["w1"], n["w2"], scale
            return oracle.mor1e(*of, n["router"], n["centres"], *knobs, told["embedding"])
        case "loramoe":
            return oracle.loramoe(*of, n["router"], scale)
        case "mosld":
            return oracle.mosld(*of, n["router"], scale, layer.top_k)
        case "mocle":
            own = n["UA"], n["UB"], n["router"], n["C"]
            return oracle.mocle(*of, *own, scale, layer.tau, told["cluster"])
        case "meteora":
            return oracle.meteora(*of, n["router"], scale, layer.top_k, layer.tau)
        case "sema":
            return oracle.sema(*of, n["router"], scale, told["sample"])
        case "olora" | "ewc":
            return oracle.lora(*of, scale)


def expected_aux(name, layer, x, n, told):
    """The oracle's auxiliary loss, likewise."""
    match name:
        case "loramoe":
            said = told["sample"], told["label"], layer.delta
            return layer.balance * oracle.localized_balance(x, n["router"], *said)
        case "meteora":
            return layer.supervision * oracle.label_loss(x, n["router"], told["label"])
        case "sema":
            means, own = oracle.sample_means(x, told["sample"]).values(), live(layer, n)
            each = [oracle.reconstruction_error(m, own["P"], own["Q"]) for m in means]
            return sum(each) / len(each)
        case "olora":
            F = len(layer.frozen_A)
            return layer.orthogonality * oracle.overlap(n["A"][:F], n["A"][F:])
        case "ewc":
            each, r = [], layer.rank
            for key in "AB":
                task = n[f"fisher_{key}"][-r:], n[f"anchor_{key}"][-r:]
                each.append(oracle.elastic(n[key][-r:], [task]))
            return layer.importance / 2 * sum(each)


def situation(name, size):
    """A layer, x (samples, 2, D), what is said of the samples, and the same for the oracle."""
    S, D, O, r, tasks = size
    layer = grown(name, D, O, r, tasks)
    x = torch.randn(S, 2, D, dtype=torch.float64, requires_grad=True)
    said = say(layer, S)
    each = {key: value.repeat_interleave(2, 0).tolist() for key, value in said.items()}
    points = x.detach().reshape(-1, D).numpy().copy()
    return layer, x, said, points, each | {"sample": [t // 2 for t in range(2 * S)]}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SCHEMES)
def test_output_and_every_gradient_equal_the_oracles(name, size):
    layer, x, said, points, each = situation(name, size)
    n, dy = arrays(layer), torch.randn(*x.shape[:2], size[2], dtype=torch.float64)
    if name == "mosld":
        layer.dropout = 0.0

    def f():
        return expected(name, layer, points, n, each)

    y = f()
    leaves = {"x": x} | {key: getattr(layer, key) for key in live(layer, n)}
    flat = dy.reshape(len(points), -1).numpy()
    wanted = {
        key: oracle.gradient(f, array, flat)
        for key, array in {"x": points, **live(layer, n)}.items()
    }
    for layer.path, training in itertools.product(PATHS, [True, False]):
        with told(layer, **said):
            got = layer.train(training)(x)
        where = f"{layer.path}, training {training}"
        np.testing.assert_allclose(
            got.detach().reshape(y.shape).numpy(), y, rtol=0, atol=1e-12, err_msg=where
        )
        grads = torch.autograd.grad(got, list(leaves.values()), dy, allow_unused=True)
        for (key, array), grad in zip(wanted.items(), grads, strict=True):
            if name == "sema" and key in "PQ":
                assert grad is None and not array.any()
                continue
            np.testing.assert_allclose(
                grad.reshape(array.shape).numpy(),
                array,
                rtol=1e-6,
                atol=1e-7,
                err_msg=f"{key}: {where}",
            )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", AUX)
def test_auxiliary_loss_and_its_gradient_equal_the_oracles(name, size):
    layer, x, said, points, each = situation(name, size)
    n = arrays(layer)

    def f():
        return expected_aux(name, layer, points, n, each)

    with told(layer, **said):
        layer(x)
    rtol = 1e-12
    np.testing.assert_allclose(layer.aux.item(), f(), rtol=rtol)
    leaves = {"x": x} | {key: getattr(layer, key) for key in live(layer, n)}
    grads = torch.autograd.grad(layer.aux, list(leaves.values()), allow_unused=True)
    for (key, array), grad in zip({"x": points, **live(layer, n)}.items(), grads, strict=True):
        if key == "x" and name == "sema":  # a descriptor does not shape what it describes
            assert grad is None
            continue
        assert (grad is not None) == (key in AUX[name] or (key == "x" and "router" in AUX[name]))
        if grad is not None:
            slope = oracle.gradient(f, array, np.ones(()))
            np.testing.assert_allclose(
                grad.reshape(array.shape).numpy(), slope, rtol=1e-6, atol=1e-7, err_msg=key
            )


@pytest.mark.parametrize("name", SCHEMES)
def test_a_fresh_layer_is_the_base_layer_bit_for_bit_and_can_learn(name):
    scheme, settings = SCHEMES[name]
    layer, x = scheme(nn.Linear(7, 5), rank=2, **settings), torch.randn(4, 7)
    for _ in range(2):
        with told(layer, **say(layer, 4)):
            y = layer(x)
        assert torch.equal(y, layer.base(x))
        y.sum().backward()
        # a cluster may choose an old expert, and leave the rest to MoCLE's universal one
        assert layer.B.grad.any() or layer.UB.grad.any()
        layer.grow()


@pytest.mark.parametrize("name", SCHEMES)
def test_an_auxiliary_loss_is_left_in_training_only(name):
    layer = grown(name).eval()
    x = torch.randn(3, 7, dtype=torch.float64)
    with told(layer, **say(layer, 3)):
        layer(x)
    assert layer.aux is None
    with told(layer.train(), **say(layer, 3)):
        layer(x)
    assert (layer.aux is not None) == (name in AUX)
    assert copy.deepcopy(layer).aux is None


@pytest.mark.parametrize("name", SCHEMES)
def test_a_grown_layers_state_loads_into_a_fresh_one(name):
    layer, other = grown(name).eval(), grown(name, tasks=1).eval()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 2, 7, dtype=torch.float64)
    said = say(layer, 4)
    ys = []
    for module in (layer, other, copy.deepcopy(layer)):
        with told(module, **said):
            ys.append(module(x))
    assert torch.equal(ys[0], ys[1]) and torch.equal(ys[0], ys[2])
    assert other.state_dict().keys() == layer.state_dict().keys()
    assert all(torch.equal(t, other.state_dict()[k]) for k, t in layer.state_dict().items())


@pytest.mark.parametrize("name", SCHEMES)
def test_adapters_alone_are_saved_and_load_into_a_fresh_model_after_grow(name, tmp_path):
    net, fresh = network(name).eval(), network(name, tasks=1).eval()
    for layer, other in ((net.fc1, fresh.fc1), (net.fc2, fresh.fc2)):
        other.base.load_state_dict(layer.base.state_dict())
    save(net, tmp_path / "a.safetensors")
    load(fresh, tmp_path / "a.safetensors")
    x = torch.randn(4, 2, 6)
    said = say(net.fc1, 4)
    with told(net, **said):
        y = net(x)
    with told(fresh, **said):
        assert torch.equal(fresh(x), y)
    assert all(torch.equal(tensor, state(fresh)[k]) for k, tensor in state(net).items())


# of D, O, R ranks, r a task, E experts, k kept, and 3 for widths of embeddings, 2 for descriptors
STORED = {
    "smora": lambda D, O, R, r, E: R * (2 * D + O + 1),
    "flylora": lambda D, O, R, r, E: R * (D + O + 1),
    "flylora signed": lambda D, O, R, r, E: R * (D + O + 1),
    "mor1e": lambda D, O, R, r, E: R * (2 * D + O + 3) + 2,
    "loramoe": lambda D, O, R, r, E: R * (D + O) + E * D,
    "mosld": lambda D, O, R, r, E: r * D + R * O + E * D,
    "mocle": lambda D, O, R, r, E: (R + r) * (D + O) + E * 3 + 2 * E * 3,
    "meteora": lambda D, O, R, r, E: R * (D + O) + E * D,
    "sema": lambda D, O, R, r, E: R * (D + O) + E * (D + 2 * 2 * D + 2),
    "olora": lambda D, O, R, r, E: R * (D + O),
    "ewc": lambda D, O, R, r, E: 3 * R * (D + O),
}
ACTIVE = {
    "smora": lambda D, O, R, r, E, k: R * (D + 1) + k * (D + O),
    "flylora": lambda D, O, R, r, E, k: R * (D + 1) + k * O if k < R else R * (D + O),
    "flylora signed": lambda D, O, R, r, E, k: R * (D + 1) + k * O if k < R else R * (D + O),
    "mor1e": lambda D, O, R, r, E, k: R * (2 * D + O + 3) + 2,
    "loramoe": lambda D, O, R, r, E, k: R * (D + O) + E * D,
    "mosld": lambda D, O, R, r, E, k: r * D + E * D + k * r * O,
    "mocle": lambda D, O, R, r, E, k: 2 * r * (D + O) + E * 3 + 3,
    "meteora": lambda D, O, R, r, E, k: E * D + k * r * (D + O),
    "sema": lambda D, O, R, r, E, k: R * (D + O) + E * D,
    "olora": lambda D, O, R, r, E, k: R * (D + O),
    "ewc": lambda D, O, R, r, E, k: R * (D + O),
}


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("name", SCHEMES)
def test_counts_are_the_docstrings_formulas(name, tasks):
    net, r = network(name, tasks), 2
    R, E = r * tasks, tasks
    k = min(SCHEMES[name][1].get("top_k", 0), R if "lora" in name or name == "smora" else E)
    counts = count(net)
    assert counts["stored"] == sum(STORED[name](*DO, R, r, E) for DO in ((6, 9), (9, 6)))
    assert counts["active"] == sum(ACTIVE[name](*DO, R, r, E, k) for DO in ((6, 9), (9, 6)))


@pytest.mark.parametrize(
    ("scheme", "settings", "message"),
    [
        *(
            (scheme, {"top_k": 0}, "top_k is 0, allowed: 1 or more")
            for scheme in (SMoRA, FlyLoRA, MoSLD, MeteoRA)
        ),
        (SMoRA, {"rate": -1e-5}, "rate is -1e-05, allowed: 0 or more"),
        (SMoRA, {"rate": math.nan}, "rate is nan, allowed: 0 or more"),
        (FlyLoRA, {"rate": -0.1}, "rate is -0.1, allowed: 0 or more"),
        (FlyLoRA, {"rate": math.nan}, "rate is nan, allowed: 0 or more"),
        (MoR1E, {"embedding": 0}, "embedding is 0, allowed: 1 or more"),
        (LoRAMoEPlugin, {"balance": -0.1}, "balance is -0.1, allowed: 0 or more"),
        (LoRAMoEPlugin, {"balance": math.nan}, "balance is nan, allowed: 0 or more"),
        (LoRAMoEPlugin, {"delta": 1.5}, "delta is 1.5, allowed: 0 to 1"),
        (LoRAMoEPlugin, {"delta": -0.1}, "delta is -0.1, allowed: 0 to 1"),
        (LoRAMoEPlugin, {"delta": math.nan}, "delta is nan, allowed: 0 to 1"),
        (MoSLD, {"dropout": 1.0}, "dropout is 1.0, allowed: 0 to below 1"),
        (MoSLD, {"dropout": -0.1}, "dropout is -0.1, allowed: 0 to below 1"),
        (MoSLD, {"dropout": math.nan}, "dropout is nan, allowed: 0 to below 1"),
        (MoCLE, {"clusters": 0}, "clusters is 0, allowed: 1 or more"),
        (MoCLE, {"embedding": 0}, "embedding is 0, allowed: 1 or more"),
        (MoCLE, {"tau": 0.0}, "tau is 0.0, allowed: above 0"),
        (MoCLE, {"tau": math.nan}, "tau is nan, allowed: above 0"),
        (MeteoRA, {"tau": -1.0}, "tau is -1.0, allowed: above 0"),
        (MeteoRA, {"tau": math.nan}, "tau is nan, allowed: above 0"),
        (MeteoRA, {"supervision": -1.0}, "supervision is -1.0, allowed: 0 or more"),
        (MeteoRA, {"supervision": math.nan}, "supervision is nan, allowed: 0 or more"),
        (SEMA, {"threshold": math.nan}, "threshold is nan, allowed: any number"),
        (SEMA, {"width": 0}, "width is 0, allowed: 1 or more"),
        (OLoRA, {"orthogonality": -0.5}, "orthogonality is -0.5, allowed: 0 or more"),
        (OLoRA, {"orthogonality": math.nan}, "orthogonality is nan, allowed: 0 or more"),
        (EWC, {"importance": -1.0}, "importance is -1.0, allowed: 0 or more"),
        (EWC, {"importance": math.nan}, "importance is nan, allowed: 0 or more"),
        *(
            (scheme, {"rank": 6}, "rank is 6, allowed for this layer: 1 to 5")
            for scheme, _ in SCHEMES.values()
        ),
    ],
)
def test_settings_out_of_range_are_named(scheme, settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        scheme(nn.Linear(7, 5), **{"rank": 2} | settings)


class TestTold:
    """What a gate is told of samples, which are the first axes of what its layer sees."""

    @pytest.mark.parametrize(
        ("samples", "tokens"),
        [((), ()), ((4,), ()), ((4,), (3,)), ((4,), (2, 3)), ((4, 2), (3,)), ((), (3,))],
    )
    @pytest.mark.parametrize("name", TOLD)
    def test_every_token_hears_what_is_said_of_its_sample(self, name, samples, tokens):
        layer = grown(name)
        x = torch.randn(*samples, *tokens, 7, dtype=torch.float64)
        said, flat = say(layer, *samples), x.reshape(-1, 7)
        each = {
            key: value.reshape(math.prod(samples), *value.shape[len(samples) :]).repeat_interleave(
                math.prod(tokens), 0
            )
            for key, value in said.items()
        }
        with told(layer, **said):
            y, aux = layer(x), layer.aux
        with told(layer, **each):
            assert torch.allclose(y.reshape(-1, 5), layer(flat), rtol=0, atol=1e-12)
        if name in AUX:
            sample = [t // math.prod(tokens) for t in range(len(flat))]
            numbers = {"label": each["label"].tolist(), "sample": sample}
            wanted = expected_aux(name, layer, flat.numpy(), arrays(layer), numbers)
            assert math.isclose(aux.item(), wanted, rel_tol=1e-9)

    @pytest.mark.parametrize("name", TOLD)
    def test_what_is_missing_is_named(self, name):
        layer, what = grown(name), TOLD[name]
        call = rf"with told\(model, {what}=...\): model\(x\)"
        message = f"^{type(layer).__name__} must be told the {what}: {call}$"
        with pytest.raises(RuntimeError, match=message), told(layer, other=torch.zeros(2)):
            layer(torch.randn(2, 7, dtype=torch.float64))

    @pytest.mark.parametrize("name", ["loramoe", "meteora"])
    def test_labels_are_for_training_only(self, name):
        layer = grown(name).eval()
        assert layer.hears() == {}
        assert layer(torch.randn(2, 7, dtype=torch.float64)).isfinite().all()

    @pytest.mark.parametrize(
        ("name", "said", "x", "allowed"),
        [
            ("mocle", (3,), (2, 4, 7), "its first axes"),
            ("mocle", (4,), (2, 4, 7), "its first axes"),
            ("mocle", (2, 4, 7), (2, 4, 7), "its first axes"),
            ("mocle", (1,), (7,), "its first axes"),
            ("loramoe", (3,), (2, 7), "its first axes"),
            ("meteora", (2, 3), (2, 4, 7), "its first axes"),
            ("mor1e", (3, 3), (2, 4, 7), "its first axes, then 3"),
            ("mor1e", (2, 5), (2, 4, 7), "its first axes, then 3"),
            ("mor1e", (2,), (2, 4, 7), "its first axes, then 3"),
            ("mor1e", (), (2, 4, 7), "its first axes, then 3"),
        ],
    )
    def test_what_is_said_of_other_samples_is_refused(self, name, said, x, allowed):
        layer, what = grown(name), TOLD[name]
        value = torch.zeros(said, dtype=torch.float64 if name == "mor1e" else torch.int64)
        message = re.escape(f"{what} is {said}, allowed for x {x}: {allowed}")
        with pytest.raises(ValueError, match=f"^{message}$"), told(layer, **{what: value}):
            layer(torch.zeros(x, dtype=torch.float64))

    @pytest.mark.parametrize(("name", "odd"), [("mocle", 6), ("mocle", -1), ("loramoe", 3)])
    def test_an_index_out_of_range_is_named(self, name, odd):
        layer = grown(name)
        most = 5 if name == "mocle" else 2
        with (
            pytest.raises(ValueError, match=f"{TOLD[name]} is {odd}, allowed: 0 to {most}$"),
            told(layer, **{TOLD[name]: torch.tensor([0, odd])}),
        ):
            layer(torch.randn(2, 7, dtype=torch.float64))

    def test_inside_another_both_are_said_and_the_inner_ends_first(self):
        net = nn.Sequential(grown("mocle", O=7), grown("mor1e"))
        x, e = torch.randn(2, 7, dtype=torch.float64), torch.randn(2, 3)
        first, second = torch.tensor([0, 3]), torch.tensor([5, 1])
        with told(net, cluster=first):
            with told(net, embedding=e):
                y = net(x)
                with told(net, cluster=second):
                    assert not torch.allclose(net(x), y)
                assert torch.equal(net(x), y)
            assert all(list(layer.told) == ["cluster"] for layer in net)
            with pytest.raises(RuntimeError, match="MoR1E must be told the embedding"):
                net(x)
        assert all(layer.told == {} for layer in net)

    def test_nothing_is_said_after_an_exception(self):
        layer = grown("mocle")
        with pytest.raises(KeyError), told(layer, cluster=torch.tensor(1)):
            raise KeyError
        assert layer.told == {}

    def test_a_copy_made_meanwhile_was_not_told(self):
        layer = grown("mocle")
        with told(layer, cluster=torch.tensor(1)):
            other = copy.deepcopy(layer)
        assert layer.told == other.told == {}

    def test_a_model_that_knows_nothing_of_it_passes_it_on(self):
        block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        net = nn.Sequential(nn.Sequential(nn.Linear(6, 8), block), nn.LayerNorm(8))
        adapt(net, MoCLE, r".*linear[12]", rank=2, clusters=4, tau=0.6)
        grow(net)
        for _, layer in adapters(net):
            filled(layer)
        x, clusters = torch.randn(3, 5, 6), torch.tensor([7, 0, 3])
        with told(net, cluster=clusters):
            y = net(x)
        for sample, cluster, answer in zip(x, clusters, y, strict=True):
            with told(net, cluster=cluster.view(1)):
                alone = net(sample.view(1, 5, 6))
            assert torch.allclose(alone[0], answer, atol=1e-5)
        with told(net, cluster=clusters.roll(1)):
            assert not torch.allclose(net(x), y, atol=1e-2)

    def test_telling_says_it_of_every_input(self):
        net, x = network("mocle"), torch.randn(4, 6)
        telling = Telling(net, lambda x: {"cluster": (x[:, 0] > 0).long()})
        with told(net, cluster=(x[:, 0] > 0).long()):
            y = net(x)
        with told(net, cluster=(x[:, 0] < 0).long()):
            assert torch.equal(telling(x), y)
            assert not torch.allclose(net(x), y)
        assert torch.equal(telling(x), y)
        assert net.fc1.told == {}

    # torch's own tracer makes an instance of autograd.Function, and torch's own Function warns
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("name", TOLD)
    def test_a_compiled_model_takes_it_as_an_input(self, name):
        net = network(name)
        x = torch.randn(4, 3, 6)
        torch.compiler.reset()
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        found = []
        with torch._dynamo.config.patch(error_on_recompile=True):
            for said in (say(net.fc1, 4), say(net.fc1, 4)):
                both = []
                for model in (compiled, net):
                    with told(net, **said):
                        y = model(x)
                    both.append(torch.cat([y.flatten(), torch.as_tensor(aux_loss(net)).view(1)]))
                assert torch.allclose(*both, atol=1e-5)
                found.append(both[0])
        assert not torch.allclose(*found, atol=1e-3)


def lora_of(layer, A, B):
    """LoRA's answer on the layer's base, at its scale."""
    return lambda x: layer.base(x) + layer.scale * x @ A.T @ B


X = torch.randn(40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("scheme", "paper"),
    [
        (SMoRA, {"rank": 64, "scale": 16 / 8, "top_k": 8, "rate": 1e-5}),
        (FlyLoRA, {"rank": 32, "scale": 64 / 32, "top_k": 8, "rate": 0.01, "signed": False}),
        (LoRAMoEPlugin, {"rank": 4, "scale": 32 / 4, "balance": 0.1, "delta": 0.1}),
        (MoSLD, {"rank": 8, "scale": 16 / 8, "top_k": 2, "dropout": 0.1}),
        (MoCLE, {"rank": 8, "clusters": 64, "tau": 0.05}),
        (MeteoRA, {"rank": 8, "top_k": 2, "supervision": 50.0}),
    ],
)
def test_the_papers_settings_are_the_defaults(scheme, paper):
    settings = scheme(nn.Linear(64, 64)).settings()
    assert {name: settings[name] for name in paper} == paper


@pytest.mark.parametrize(
    ("name", "shared"), [("mosld", "A"), ("mocle", "UA UB"), ("mor1e", "w1 w2")]
)
def test_what_belongs_to_no_task_trains_on_after_grow(name, shared):
    layer = grown(name)
    before = {key: (getattr(layer, key), getattr(layer, key).clone()) for key in shared.split()}
    layer.grow()
    for key, (parameter, value) in before.items():
        assert getattr(layer, key) is parameter and parameter.requires_grad
        assert torch.equal(parameter, value)


class TestBalanceByBias:
    """SMoRA's and FlyLoRA's."""

    def layer(self, name, **settings):
        """Rank i answers to x_i alone; ranks 0 and 1 are frozen."""
        layer = grown(name, D=4, O=4, tasks=2, dtype=torch.float32, top_k=1, **settings)
        key = "A" if name == "flylora" else "router"
        layer.load_state_dict(
            layer.state_dict()
            | {f"frozen_{key}": torch.eye(4)[:2], key: torch.eye(4)[2:]}
            | {"frozen_bias": torch.zeros(2), "bias": torch.zeros(2)}
        )
        return layer

    @pytest.mark.parametrize("name", ["smora", "flylora", "flylora signed"])
    def test_starved_live_ranks_rise_by_u_and_overused_ones_fall_by_u(self, name):
        # chosen: rank 0 once, rank 2 three times; c = (1, 0, 3, 0), of mean 1
        layer = self.layer(name.split()[0], rate=0.25)
        x = torch.eye(4)[[2, 0, 2, 2]]
        layer(x.view(2, 2, 4))
        layer.after_step()
        assert layer.bias.tolist() == [-0.25, 0.25]
        assert layer.frozen_bias.tolist() == [0.0, 0.0]
        layer.after_step()  # no forward pass since
        layer.eval()(x)
        layer.after_step()
        assert layer.bias.tolist() == [-0.25, 0.25]

    @pytest.mark.parametrize("name", ["smora", "flylora"])
    def test_the_mean_is_over_all_ranks(self, name):
        # c = (5, 0, 1, 0), of mean 3/2: rank 2 is used more than rank 3, and still too little
        layer = self.layer(name, rate=0.25)
        layer(torch.eye(4)[[0, 0, 0, 2, 0, 0]])
        layer.after_step()
        assert layer.bias.tolist() == [0.25, 0.25]

    @pytest.mark.parametrize("name", ["smora", "flylora"])
    def test_even_use_moves_nothing(self, name):
        layer = self.layer(name, rate=0.25)
        layer(torch.eye(4))
        layer.after_step()
        assert layer.bias.tolist() == [0.0, 0.0]

    @pytest.mark.parametrize(("name", "rate"), [("smora", 1e-5), ("flylora", 0.01)])
    def test_a_models_layers_all_move(self, name, rate):
        net = nn.Sequential(self.layer(name), self.layer(name))
        for layer in net:
            layer(torch.eye(4)[[2, 0, 2, 2]])
        after_step(net)
        for layer in net:
            assert torch.equal(layer.bias, torch.tensor([-rate, rate]))


class TestSMoRA:
    def test_by_hand(self):
        # s = sigmoid(ln 3, 0, -ln 3) + (0, -.4, 0) = (3/4, .1, 1/4); two kept, that sum to 1:
        # g = (3/2, 0, 1/2); z = (1, 9, 3); update = 2 · (3/2·1·(1, 0) + 1/2·3·(0, 2)) = (3, 6)
        layer = SMoRA(nn.Linear(2, 2, bias=False), rank=1, top_k=2)
        nn.init.zeros_(layer.base.weight)
        layer.frozen_router = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
        layer.router.data = torch.tensor([[-math.log(3), 0.0]])
        layer.frozen_bias, layer.bias = torch.tensor([0.0, -0.4]), torch.tensor([0.0])
        layer.frozen_A = torch.tensor([[1.0, 0.0], [9.0, 0.0]])
        layer.A.data = torch.tensor([[3.0, 0.0]])
        layer.frozen_B = torch.tensor([[1.0, 0.0], [7.0, 7.0]])
        layer.B.data = torch.tensor([[0.0, 2.0]])
        assert torch.allclose(layer(torch.tensor([1.0, 0.0])), torch.tensor([3.0, 6.0]))

    @pytest.mark.parametrize("top_k", [1, 4, 6, 99])
    def test_k_ranks_speak_with_weights_that_sum_to_k(self, top_k):
        g, k = dense_gate(grown("smora", top_k=top_k), X), min(top_k, 6)
        assert ((g > 0).sum(1) == k).all() and (g >= 0).all()
        assert torch.allclose(g.sum(1), torch.full((40,), float(k), dtype=torch.float64))

    def test_biases_that_make_scores_negative_still_give_finite_weights(self):
        layer = grown("smora", top_k=2)
        layer.bias.fill_(-1.0)
        layer.frozen_bias.fill_(-1.0)
        layer.router.data.zero_()
        layer.frozen_router.zero_()  # every score is 1/2 - 1, so the kept weigh the same
        _, g, _ = layer.gate(torch.randn(3, 7, dtype=torch.float64))
        assert torch.allclose(g, torch.ones_like(g))
        layer.bias.fill_(-0.5)
        layer.frozen_bias.fill_(-0.5)  # every score is 0: nobody speaks
        assert torch.equal(layer.gate(torch.randn(3, 7, dtype=torch.float64))[1], 0 * g)

    def test_what_was_counted_before_a_task_ended_moves_no_fresh_rank(self):
        layer = grown("smora", rate=0.1).train()
        layer(torch.randn(3, 7, dtype=torch.float64))
        layer.grow()
        layer.after_step()
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias))

    def test_all_ranks_without_router_and_bias_are_lora(self):
        layer = grown("smora", top_k=6)
        for key in ("router", "bias"):
            for rows in (getattr(layer, key), getattr(layer, f"frozen_{key}")):
                rows.data.zero_()
        assert torch.allclose(layer(X), lora_of(layer, layer.keys, layer.rows("B"))(X), atol=1e-12)


class TestFlyLoRA:
    @pytest.mark.parametrize(
        ("D", "r", "k", "p"), [(64, 8, 2, 16), (10, 4, 3, 7), (7, 5, 1, 1), (6, 3, 9, 6)]
    )
    def test_each_key_has_p_entries(self, D, r, k, p):
        layer = FlyLoRA(nn.Linear(D, 9), rank=r, top_k=k)
        layer.grow()
        assert ((layer.keys != 0).sum(1) == p).all() and len(layer.keys) == 2 * r
        assert not torch.equal(layer.frozen_A != 0, layer.A != 0) or p == D

    def test_keys_shrink_an_input_by_p_over_D_r_on_average(self):
        # D 24, r 16, p 24·4/16 = 6: r rows of p/D · 1/r² each. Of 2000 draws, 32000 rows, the
        # relative deviation is at most that of one entry: √((3 D/p - 1) / 32000) = .0185
        layer = FlyLoRA(nn.Linear(24, 24), rank=16, top_k=4)
        A = torch.stack([layer.fresh()["A"] for _ in range(2000)])
        for x in (torch.eye(24)[0], torch.eye(24)[23], torch.randn(24)):
            lengths = (A @ x).square().sum(-1) / x.square().sum()
            assert abs(lengths.mean() / (6 / (24 * 16)) - 1) < 5 * 0.0185

    def test_all_ranks_are_lora_with_frozen_keys(self):
        layer = grown("flylora", top_k=6)
        lora = LoRA(layer.base, rank=2, scale=layer.scale)
        lora.frozen_A, lora.frozen_B = layer.frozen_A, layer.frozen_B
        lora.A, lora.B = nn.Parameter(layer.A.clone()), nn.Parameter(layer.B.detach().clone())
        dy = torch.randn(40, 5, dtype=torch.float64)
        for module in (layer, lora):
            module(X).backward(dy)
        assert torch.allclose(layer(X), lora(X), atol=1e-12)
        assert torch.allclose(layer.B.grad, lora.B.grad, atol=1e-12)

    def test_training_moves_values_and_no_key(self):
        layer = grown("flylora", dtype=torch.float32)
        learning = {n: p for n, p in layer.named_parameters() if p.requires_grad}
        before = {key: layer.rows(key).detach().clone() for key in "AB"}
        optimiser = torch.optim.AdamW(learning.values(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            layer(X.float()).square().mean().backward()
            optimiser.step()
            layer.after_step()
        assert list(learning) == ["B"]
        assert torch.equal(layer.rows("A"), before["A"])
        assert not torch.equal(layer.rows("B"), before["B"])

    def test_two_tasks_on_the_same_keys_merge_exactly(self):
        first, second = grown("flylora", tasks=1, rank=5), grown("flylora", tasks=1, rank=5)
        second.load_state_dict(first.state_dict() | {"B": torch.randn(5, 5).double()})
        both = copy.deepcopy(first)
        both.B.data += second.B
        updates = [layer(X) - layer.base(X) for layer in (first, second, both)]
        assert torch.allclose(updates[0] + updates[1], updates[2], atol=1e-12)

    def test_by_size_or_by_sign(self):
        # z = (3, -4, 1); by size rank 1 speaks, by sign rank 0. A bias of 2 on rank 1: |-4 + 2| is
        # less than 3, so that by size rank 0 speaks; by sign 5 more are needed for rank 1
        for signed, bias, speaks in (
            (False, 0.0, 1),
            (False, 2.0, 0),
            (True, 0.0, 0),
            (True, 6.9, 0),
            (True, 7.1, 1),
        ):
            layer = FlyLoRA(nn.Linear(3, 3), rank=3, top_k=1, signed=signed)
            layer.A.copy_(torch.eye(3))
            layer.bias[1] = bias
            g = dense_gate(layer, torch.tensor([3.0, -4.0, 1.0]))
            assert g.tolist() == torch.eye(3)[speaks].tolist()


class TestMoR1E:
    def test_at_birth_by_hand(self):
        # e = (3, 4) is (.6, .8) at length 1; c = (.6, 1); g = 1/2 · (1/2 + 2 c) = (.85, 1.25)
        layer = MoR1E(nn.Linear(4, 4), rank=2, embedding=2)
        layer.centres = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        with told(layer, embedding=torch.tensor([[3.0, 4.0], [30.0, 40.0]])):
            g = dense_gate(layer, torch.randn(2, 4))
        assert torch.allclose(g, torch.tensor([0.85, 1.25]))

    def test_the_routers_part_sums_to_R_omega(self):
        # omega = sigmoid(ln 3) = 3/4, outer factor sigmoid(-ln 3) = 1/4, R = 6: 1/4 · 6 · 3/4
        layer = grown("mor1e")
        layer.w1.data.fill_(math.log(3) / 100)
        layer.w2.data.fill_(-math.log(3) / 100)
        layer.centres.zero_()
        layer.frozen_centres.zero_()
        with told(layer, **say(layer, 40)):
            g = dense_gate(layer, X)
        assert torch.allclose(g.sum(1), torch.tensor(1.125, dtype=torch.float64))
        assert g.std() > 0.01


class TestLoRAMoEPlugin:
    def test_by_hand(self):
        # w = softmax(ln 3, 0) = (3/4, 1/4), z = (1, 2): update = 3/4·1·(4, 0) + 1/4·2·(0, 2)
        layer = LoRAMoEPlugin(nn.Linear(2, 2, bias=False), rank=1, scale=1.0).eval()
        nn.init.zeros_(layer.base.weight)
        layer.grow()
        layer.frozen_router = torch.tensor([[math.log(3), 0.0]])
        layer.router.data = torch.tensor([[0.0, 0.0]])
        layer.frozen_A, layer.A.data = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        layer.frozen_B, layer.B.data = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        assert torch.allclose(layer(torch.tensor([1.0, 0.0])), torch.tensor([3.0, 1.0]))

    def test_one_expert_is_lora(self):
        layer = grown("loramoe", tasks=1).eval()
        assert torch.allclose(layer(X), lora_of(layer, layer.A, layer.B)(X), atol=1e-12)

    def test_balance_by_hand(self):
        # types (0, 1), delta 1/2: I = ((3/2, 1/2), (1/2, 3/2)). Q = ((3, 1), (1, 3)):
        # Z = ((9/2, 1/2), (1/2, 9/2)), of mean 5/2 and variance 4: 8/5
        Q, types = torch.tensor([[3.0, 1.0], [1.0, 3.0]]), torch.tensor([0, 1])
        assert torch.isclose(localized_balance(Q, types, 0.5), torch.tensor(1.6))
        # the same at delta 0: mean 2, variance 1
        assert torch.isclose(localized_balance(Q, types, 0.0), torch.tensor(0.5))
        assert localized_balance(Q[:0], types[:0], 0.5) == 0

    def test_balance_is_0_only_where_weight_is_inverse_to_importance(self):
        # 1 / I = ((2/3, 2), (2, 2/3), (2, 2)) for delta 1/2 and types (0, 1, 2 of 2 experts)
        types = torch.tensor([0, 1, 2])
        Q = 5 * torch.tensor([[2 / 3, 2.0], [2.0, 2 / 3], [2.0, 2.0]])
        assert localized_balance(Q, types, 0.5) < 1e-12
        for place in np.ndindex(3, 2):
            other = Q.clone()
            other[place] *= 1.1
            assert localized_balance(other, types, 0.5) > 1e-3

    def test_a_uniform_gate_is_balanced_at_delta_0_and_leaves_its_type_above(self):
        for delta, balanced in ((0.0, True), (0.3, False)):
            layer = grown("loramoe", delta=delta)
            layer.frozen_router.zero_()
            layer.router.data.zero_()
            with told(layer, label=torch.full((40,), 2)):
                layer(X.abs())
            assert (layer.aux.abs() < 1e-7) == balanced
        layer.aux.backward()  # of the sample's own type: a step down takes weight from it
        assert (layer.router.grad > 0).all()


class TestMoSLD:
    def test_experts_of_equal_values_are_lora(self):
        layer = grown("mosld").eval()
        layer.frozen_B = layer.B.detach().repeat(2, 1)
        assert torch.allclose(layer(X), lora_of(layer, layer.A, layer.B)(X), atol=1e-12)

    def test_dropped_keys_are_0_or_larger_and_right_on_average(self):
        # an entry's deviation is √(p / (1 - p)) of it: after 4000 draws, .0129 at p = .4
        layer, p = grown("mosld", tasks=1), 0.4
        eye = torch.eye(7, dtype=torch.float64)
        with torch.no_grad():
            draws = torch.stack([layer.gate(eye)[2].T / layer.A for _ in range(4000)])
        kept = 1 / (1 - p)
        assert torch.isclose(draws, torch.tensor(kept).double()).logical_or(draws == 0).all()
        assert (draws.mean(0) - 1).abs().max() < 5 * 0.0129

    def test_one_mask_is_for_all_experts_and_tokens_and_for_the_gradient(self):
        layer = grown("mosld", tasks=2)
        n, dy = arrays(layer), torch.randn(40, 5, dtype=torch.float64)
        torch.manual_seed(3)
        mask = (layer.gate(torch.eye(7, dtype=torch.float64))[2][:, :2].T / layer.A).detach()
        assert 0 < (mask == 0).sum() < mask.numel()

        def f():
            dropped = n | {"A": n["A"] * mask.numpy()}
            return expected("mosld", layer, X[:6].numpy(), dropped, {})

        torch.manual_seed(3)
        y = layer(X[:6])
        np.testing.assert_allclose(y.detach().numpy(), f(), rtol=0, atol=1e-12)
        y.backward(dy[:6])
        wanted = oracle.gradient(f, n["A"], dy[:6].numpy())
        np.testing.assert_allclose(layer.A.grad.numpy(), wanted, atol=1e-7)

    def test_evaluation_drops_nothing(self):
        layer, x = grown("mosld", dropout=0.9).eval(), X[:6]
        wanted = expected("mosld", layer, x.numpy(), arrays(layer), {})
        for _ in range(2):
            np.testing.assert_allclose(layer(x).detach().numpy(), wanted, rtol=0, atol=1e-12)
        assert not torch.allclose(layer.train()(x), layer.eval()(x))


class TestMoCLE:
    def test_by_hand(self):
        # cluster 1 has (1, 0): W C = (ln 3 / 2, 0), at tau 1/2 G = 3/4, expert 0. z = (1, 9), and
        # of the universal 2: update = 3/4·1·(4, 0) + 1/4·2·(0, 6) = (3, 3)
        layer = MoCLE(nn.Linear(2, 2, bias=False), rank=1, clusters=2, tau=0.5, embedding=2)
        nn.init.zeros_(layer.base.weight)
        layer.grow()
        layer.frozen_C = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        layer.frozen_router = torch.tensor([[math.log(3) / 2, 0.0]])
        layer.router.data = torch.tensor([[0.0, 5.0]])
        layer.frozen_A, layer.A.data = torch.tensor([[1.0, 0.0]]), torch.tensor([[9.0, 0.0]])
        layer.frozen_B, layer.B.data = torch.tensor([[4.0, 0.0]]), torch.tensor([[7.0, 7.0]])
        layer.UA.data, layer.UB.data = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 6.0]])
        with told(layer, cluster=torch.tensor(1)):
            assert torch.allclose(layer(torch.tensor([1.0, 0.0])), torch.tensor([3.0, 3.0]))

    def test_one_clusters_samples_have_one_gate(self):
        layer = grown("mocle")
        with told(layer, cluster=torch.arange(40) % 6):
            g = dense_gate(layer, X)
        assert torch.equal(g[:6], g[6:12])
        assert not torch.equal(g[0], g[1])
        assert ((g > 0).sum(1) == 2).all()  # one expert of two ranks

    def test_weights_sum_to_1(self):
        layer = grown("mocle")
        with told(layer, cluster=torch.arange(40) % 6):
            _, G, rest = layer.choose(X)
        assert torch.allclose(G + rest, torch.ones(40, 1, dtype=torch.float64))
        assert (G >= 1 / 3).all() and (rest > 0).all()

    def test_a_low_temperature_silences_the_universal_expert(self):
        layer = grown("mocle", tau=1e-4)
        with told(layer, cluster=torch.arange(40) % 6):
            idx, g, _ = layer.gate(X)
            y = layer(X)
        assert torch.equal(g, torch.ones_like(g))
        A, B = layer.keys[idx], layer.rows("B")[idx]  # (T, 2, D), (T, 2, O)
        update = torch.einsum("td,tkd,tko->to", X, A, B)
        assert torch.allclose(y, layer.base(X) + layer.scale * update, atol=1e-12)

    def test_one_expert_alone_is_lora(self):
        layer = grown("mocle", tasks=1)
        with told(layer, cluster=torch.arange(40) % 2):
            y = layer(X)
        assert torch.allclose(y, lora_of(layer, layer.A, layer.B)(X), rtol=0, atol=1e-12)
        y.sum().backward()
        assert not layer.UB.grad.any()


class TestMeteoRA:
    def test_loop_gathered_and_dense_paths_agree(self):
        layer = grown("meteora", D=12, O=10, rank=4, tasks=5, top_k=3).eval()
        x = torch.randn(30, 12, dtype=torch.float64)
        n = arrays(layer)
        wanted = expected("meteora", layer, x.numpy(), n, {})
        for layer.path in PATHS:
            np.testing.assert_allclose(layer(x).detach().numpy(), wanted, rtol=0, atol=1e-12)

    def test_one_kept_is_that_lora_at_any_temperature(self):
        layer = grown("meteora", top_k=1, tau=7.0).eval()
        A, B = layer.keys.unflatten(0, (3, 2)), layer.rows("B").unflatten(0, (3, 2))
        y, best = layer(X), (X @ layer.rows("router").T).argmax(1)
        assert set(best.tolist()) == {0, 1, 2}
        for x, answer, e in zip(X, y, best, strict=True):
            assert torch.allclose(lora_of(layer, A[e], B[e])(x), answer, atol=1e-12)

    def test_label_loss_by_hand(self):
        # logits (ln 3, 0): -ln 3/4 at label 0, -ln 1/4 at label 1
        logits = torch.tensor([[math.log(3), 0.0]] * 2)
        wanted = (math.log(4 / 3) + math.log(4)) / 2
        assert math.isclose(label_loss(logits, torch.tensor([0, 1])).item(), wanted, rel_tol=1e-6)
        assert label_loss(logits[:0], torch.tensor([], dtype=torch.int64)) == 0

    def test_a_uniform_router_has_loss_ln_E(self):
        layer = grown("meteora", supervision=50.0)
        layer.frozen_router.zero_()
        layer.router.data.zero_()
        with told(layer, label=torch.arange(40) % 3):
            layer(X)
        assert math.isclose(layer.aux.item(), 50 * math.log(3), rel_tol=1e-12)


class TestSEMA:
    def weights(self, layer, x):
        return dense_gate(layer, x)[..., :: layer.block]

    def test_old_weights_keep_their_proportions_when_an_expert_comes(self):
        layer = grown("sema")
        before = self.weights(layer, X)
        layer.grow()
        torch.nn.init.normal_(layer.router)
        after = self.weights(layer, X)
        assert torch.allclose(after[:, :3] / after[:, :3].sum(1, keepdim=True), before, atol=1e-12)
        assert (after[:, 3] > 0).all()

    def test_one_expert_has_weight_1(self):
        layer = grown("sema", tasks=1)
        assert torch.equal(self.weights(layer, X), torch.ones(40, 1, dtype=torch.float64))

    def test_a_samples_tokens_share_a_weight_which_is_its_means(self):
        layer, x = grown("sema"), X.view(5, 2, 4, 7)
        w = self.weights(layer, x)
        assert torch.equal(w, w[:, :1, :1].expand_as(w))
        assert torch.allclose(w[:, 0, 0], self.weights(layer, x.mean((1, 2))), atol=1e-12)
        spread = x + torch.tensor([[3.0, -1.0, -1.0, -1.0]]).T  # of the same mean
        assert torch.allclose(self.weights(layer, spread), w, atol=1e-12)
        other = torch.cat([x[:1], -x[1:]])
        assert torch.equal(self.weights(layer, other)[0], w[0])
        assert not torch.allclose(self.weights(layer, other)[1:], w[1:])

    def test_tokens_without_a_sample_axis_are_samples(self):
        layer = grown("sema")
        assert torch.allclose(layer(X), layer(X.unsqueeze(1)).squeeze(1), atol=1e-12)
        assert torch.allclose(layer(X[0]), layer(X)[0], atol=1e-12)

    def test_surprise_is_the_oracles(self):
        layer = grown("sema")
        n = arrays(layer)
        P, Q = n["P"].reshape(3, 2, 7), n["Q"].reshape(3, 2, 7)
        x = X.view(10, 4, 7)
        means = oracle.sample_means(X.numpy(), [t // 4 for t in range(40)]).values()
        eps = layer.errors(x.mean(1)).detach().numpy()
        wanted = [[oracle.reconstruction_error(m, P[e], Q[e]) for e in range(3)] for m in means]
        np.testing.assert_allclose(eps, wanted, rtol=1e-12)
        s = oracle.surprise(means, P, Q, n["mu"], n["sigma"])
        for layer.threshold in (s - 1e-9, s + 1e-9):
            assert layer.surprised(x) == (layer.threshold < s)

    def test_settling_by_hand(self):
        # descriptors of zeros: eps is the mean square, here of (1, 1), (2, 0) and (3, 3), the mean
        # tokens: 1, 2 and 9, of mean 4 and deviation √((9 + 4 + 25) / 2)
        layer = SEMA(nn.Linear(2, 2), rank=1, width=1)
        for rows in (layer.P, layer.Q):
            rows.data.zero_()
        x = torch.tensor([[[0.0, 1.0], [2.0, 1.0]], [[2.0, 0.0]] * 2, [[3.0, 3.0]] * 2])
        layer.settle(x[:2])
        assert layer.sigma.tolist() == [math.inf] and not layer.surprised(1e3 * x)
        layer.settle(x)
        assert layer.mu.tolist() == [4.0]
        assert math.isclose(layer.sigma.item(), math.sqrt(19), rel_tol=1e-6)
        # s = (3, 2, 5) / √19, of mean .76
        for layer.threshold in (0.75, 0.78):
            assert layer.surprised(x) == (layer.threshold == 0.75)

    def test_samples_that_are_all_alike_settle_too(self):
        layer = grown("sema", tasks=1)
        seen = torch.ones(5, 7, dtype=torch.float64)
        layer.settle(seen)
        assert layer.sigma == 0 and not layer.surprised(seen)
        assert layer.surprised(torch.cat([seen, 3 * seen]))

    def test_a_fresh_layer_is_never_surprised(self):
        assert not SEMA(nn.Linear(7, 7), rank=2).surprised(1e3 * X.float())

    def test_a_seen_task_does_not_surprise_and_a_far_one_does(self):
        layer = SEMA(nn.Linear(12, 12), rank=2, width=3)
        bases = torch.randn(3, 3, 12)

        def draw(task, samples=200):
            tokens = torch.randn(samples, 4, 3) @ bases[task]
            return tokens + 0.1 * torch.randn_like(tokens)

        for task in range(2):
            if task:
                assert layer.surprised(draw(task))
                layer.grow()
            x = draw(task)
            optimiser = torch.optim.Adam([layer.P, layer.Q], lr=0.02)
            for _ in range(300):
                optimiser.zero_grad()
                layer(x)
                layer.aux.backward()
                optimiser.step()
            layer.settle(x)
            assert not any(layer.surprised(draw(seen)) for seen in range(task + 1))
        assert layer.surprised(draw(2)) and layer.surprised(5 * draw(0))


class TestOLoRA:
    def test_penalty_by_hand(self):
        # |(1, 0, 0) · (3, -1, 5)| + |(0, 2, 0) · (3, -1, 5)| = 3 + 2, times 1/2
        layer = OLoRA(nn.Linear(3, 3), rank=1, orthogonality=0.5)
        layer.grow()
        layer.grow()
        layer.frozen_A = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        for new, aux in (([3.0, -1.0, 5.0], 2.5), ([0.0, 0.0, 4.0], 0.0), ([0.0, 1.0, 4.0], 1.0)):
            layer.A.data = torch.tensor([new])
            layer(torch.ones(3))
            assert layer.aux == aux

    def test_penalty_is_0_only_where_row_spaces_are_orthogonal(self):
        layer, frame = grown("olora"), torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0]
        layer.frozen_A = torch.randn(4, 4, dtype=torch.float64) @ frame[:4]
        layer.A.data = torch.randn(2, 3, dtype=torch.float64) @ frame[4:]
        layer(X)
        assert layer.aux < 1e-12
        layer.A.data += 1e-3 * frame[0]
        layer(X)
        assert layer.aux > 1e-5

    def test_the_first_task_is_free(self):
        layer = grown("olora", tasks=1)
        layer(X)
        assert layer.aux == 0


class TestEWC:
    def test_penalty_by_hand(self):
        # 2/2 · (2·(3 - 1)² + 5·0² + 1/2·(2 - 0)²) = 10
        layer = EWC(nn.Linear(2, 1), rank=1, importance=2.0)
        layer.A.data, layer.B.data = torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0]])
        layer.anchor_A.copy_(torch.tensor([[1.0, 1.0]]))
        layer.fisher_A.copy_(torch.tensor([[2.0, 5.0]]))
        layer.fisher_B.fill_(0.5)
        layer(torch.ones(2))
        assert layer.aux == 10

    def test_before_any_task_has_ended_nothing_holds(self):
        layer = EWC(nn.Linear(7, 5), rank=2)
        nn.init.normal_(layer.B)
        layer(X.float())
        layer.aux.backward()
        assert layer.aux == 0 and not layer.A.grad.any()

    def test_three_tasks_penalties_are_kept_up_to_a_constant(self):
        layer = grown("ewc", tasks=1)
        for key in ("fisher_A", "fisher_B", "anchor_A", "anchor_B"):
            getattr(layer, key).zero_()
        tasks = {"A": [], "B": []}
        for _ in range(3):
            F = {}
            for key in "AB":
                theta = getattr(layer, key).data.normal_()
                F[key] = torch.rand_like(theta) * (torch.rand_like(theta) > 0.3)  # some are 0
                tasks[key].append((F[key].numpy().copy(), theta.numpy().copy()))
            layer.consolidate(F)

        def penalties():
            for key in "AB":
                getattr(layer, key).data.normal_()
            layer(X)
            each = [oracle.elastic(arrays(layer)[key], tasks[key]) for key in "AB"]
            return layer.aux.item(), layer.importance / 2 * sum(each)

        (kept, literal), *others = (penalties() for _ in range(4))
        assert literal - kept > 1
        for other, theirs in others:
            assert math.isclose(other - kept, theirs - literal, rel_tol=1e-9)


class Answers(nn.Module):
    """One linear layer, and class embeddings if its answers are logits."""

    def __init__(self, classes):
        super().__init__()
        self.fc1 = nn.Linear(3, 2, dtype=torch.float64)
        if classes:
            self.classes = nn.Parameter(torch.randn(classes, 2, dtype=torch.float64))

    def forward(self, x):
        return self.fc1(x) @ self.classes.T if hasattr(self, "classes") else self.fc1(x)


@pytest.mark.parametrize("classes", [2, 3, 0])
def test_fisher_information_is_the_expectation_over_the_models_own_answers(classes):
    """Within 5 standard errors, which are at most √(E slope⁴ / draws)."""
    net = adapt(Answers(classes), LoRA, "fc1", rank=1, scale=0.7)
    filled(net.fc1)
    x, draws = torch.randn(4, 3, dtype=torch.float64), 2000
    found = fisher_information(net, x.repeat(draws // 4, 1))
    n = arrays(net.fc1)

    def answers():
        vectors = oracle.lora(x.numpy(), n["W0"], n["b"], n["A"], n["B"], 0.7)
        return vectors @ net.classes.detach().numpy().T if classes else vectors

    assert list(found) == ["fc1"] and list(found["fc1"]) == ["A", "B"]
    for key in "AB":
        if classes:
            F, fourth = (oracle.fisher(answers, n[key], power) for power in (2, 4))
        else:  # y - answer is normal: the slope is too, with Σ (d answer_o)² as its variance
            F, fourth = np.zeros_like(n[key]), np.zeros_like(n[key])
            for t in range(4):
                slopes = [
                    oracle.gradient(lambda t=t, o=o: answers()[t][o], n[key], np.ones(()))
                    for o in range(2)
                ]
                variance = sum(slope**2 for slope in slopes)
                F, fourth = F + variance / 4, fourth + 3 * variance**2 / 4
        error = np.sqrt(fourth / draws)
        got = found["fc1"][key].numpy()
        assert (abs(got - F) < 5 * error + 1e-9).all()
        assert (5 * error < F / 2).all()  # the mean slope is 0, and so would its square be


def test_each_inputs_slope_is_squared_before_the_mean(monkeypatch):
    """Told by answers that are always 0, whose slopes do not cancel out."""
    monkeypatch.setattr(torch, "multinomial", lambda p, n: torch.zeros(len(p), n).long())
    net = adapt(Answers(2), LoRA, "fc1", rank=1, scale=0.7)
    n, x = arrays(filled(net.fc1)), torch.randn(4, 3, dtype=torch.float64)
    found, C = fisher_information(net, x)["fc1"], net.classes.detach().numpy()

    def log_p(t):
        (answer,) = oracle.lora(x[t : t + 1].numpy(), n["W0"], n["b"], n["A"], n["B"], 0.7) @ C.T
        return math.log(oracle.softmax(answer)[0])

    for key in "AB":
        slopes = [oracle.gradient(lambda t=t: log_p(t), n[key], np.ones(())) for t in range(4)]
        wanted = sum(slope**2 for slope in slopes) / 4
        np.testing.assert_allclose(found[key].numpy(), wanted, rtol=1e-6, atol=1e-9)
        assert not np.allclose(sum(slopes) ** 2 / 4, wanted, rtol=1e-3)
