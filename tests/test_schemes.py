"""Each scheme against its oracle, outputs and every gradient; numbers worked by hand; laws that
the equations imply."""

import copy
import importlib.util
import math

import numpy as np
import oracle
import pytest
import torch
from torch import nn

from minimoe import LoRA, LoRAMoE, MoRA
from minimoe.lora_moe import switch_balance

# T, D, O, r, tasks: awkward ones, none a power of two but by chance
SIZES = [(3, 5, 7, 2, 1), (5, 7, 3, 1, 4), (4, 13, 11, 3, 3), (1, 2, 2, 2, 2)]
SCHEMES = {
    "lora": (LoRA, {"scale": 0.7}),
    "lora_moe": (LoRAMoE, {"scale": 0.7, "top_k": 2}),
    "mora": (MoRA, {"scale": 0.7, "top_k": 3, "tau": 0.3, "delta": 0.25}),
}


PATHS = ["dense", "gather", "compact"]
PATHS += ["triton"] if importlib.util.find_spec("triton") else []


def grown(scheme, D=7, O=5, rank=2, tasks=3, dtype=torch.float64, **settings):
    """A layer of several tasks in which no value, frozen or live, is still zero."""
    layer = scheme(nn.Linear(D, O, dtype=dtype), rank=rank, **settings)
    for _ in range(tasks - 1):
        layer.grow()
    for name, tensor in layer.state_dict().items():
        if not name.startswith("base"):
            tensor.normal_()
    return layer


def rows(layer, name):
    """Frozen and live rows as one float64 array."""
    frozen, live = getattr(layer, f"frozen_{name}"), getattr(layer, name)
    return torch.cat([frozen, live]).detach().double().numpy().copy()


def expected(name, layer, x, arrays):
    W0, b = (t.detach().double().numpy() for t in (layer.base.weight, layer.base.bias))
    if name == "lora":
        return oracle.lora(x, W0, b, arrays["A"], arrays["B"], layer.scale)
    if name == "lora_moe":
        return oracle.lora_moe(
            x, W0, b, arrays["A"], arrays["B"], arrays["router"], layer.scale, layer.top_k
        )
    delta = None if layer.training else layer.delta
    return oracle.mora(
        x, W0, b, arrays["A"], arrays["B"], layer.scale, layer.top_k, layer.tau, delta
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SCHEMES)
def test_output_and_every_gradient_equal_the_oracles(name, size, path, training):
    T, D, O, r, tasks = size
    scheme, settings = SCHEMES[name]
    layer = grown(scheme, D, O, r, tasks, **settings).train(training)
    layer.path = path
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(T, O, dtype=torch.float64)
    y = layer(x)
    y.backward(dy)

    arrays = {key: rows(layer, key) for key in layer.fresh()}
    points = x.detach().numpy().copy()

    def f():
        return expected(name, layer, points, arrays)

    np.testing.assert_allclose(y.detach().numpy(), f(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(x.grad.numpy(), oracle.gradient(f, points, dy.numpy()), atol=1e-7)
    for key, array in arrays.items():
        live = getattr(layer, key)
        wanted = oracle.gradient(f, array, dy.numpy())[-len(live) :]
        np.testing.assert_allclose(live.grad.numpy(), wanted, atol=1e-7, err_msg=key)
    assert [n for n, p in layer.named_parameters() if p.grad is not None] == list(arrays)


@pytest.mark.parametrize("name", SCHEMES)
def test_any_leading_shape_and_no_tokens(name):
    scheme, settings = SCHEMES[name]
    layer = grown(scheme, **settings)
    x = torch.randn(2, 3, 4, 7, dtype=torch.float64)
    assert torch.allclose(layer(x), layer(x.view(-1, 7)).view(2, 3, 4, 5), atol=1e-12)
    assert torch.allclose(layer(x[0, 0, 0]), layer(x)[0, 0, 0], atol=1e-12)
    assert layer(x[:, :0]).shape == (2, 0, 4, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_fresh_layer_is_the_base_layer_bit_for_bit(name, training, dtype):
    base = nn.Linear(20, 18, dtype=dtype)
    x = torch.randn(6, 20, dtype=dtype)
    before = base(x)
    layer = SCHEMES[name][0](base, rank=4).train(training)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("path", ["dense", "gather"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "autocast"])
@pytest.mark.parametrize("name", SCHEMES)
def test_half_precision_and_autocast_come_near(name, dtype, path):
    scheme, settings = SCHEMES[name]
    layer = grown(scheme, 20, 30, 4, 3, dtype=torch.float32, **settings)
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
@pytest.mark.parametrize("path", ["dense", "gather"])
@pytest.mark.parametrize("name", [*SCHEMES, "mora detached"])
def test_compiled_equals_eager_in_one_graph(name, path):
    scheme, settings = SCHEMES[name.split()[0]]
    detached = {"detach_gate": True} if "detached" in name else {}
    layer = grown(scheme, dtype=torch.float32, **settings, **detached)
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


@pytest.mark.parametrize("name", SCHEMES)
def test_only_live_rows_learn(name):
    scheme, settings = SCHEMES[name]
    layer = grown(scheme, dtype=torch.float32, **settings)
    before = copy.deepcopy(layer.state_dict())
    live = [n for n, p in layer.named_parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        layer(torch.randn(50, 7)).square().mean().backward()
        optimiser.step()
    for key, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[key]) == (key not in live), key
    layer.grow()
    after = layer.state_dict()
    for key in live:
        rows_before = torch.cat(
            [before[f"frozen_{key}"], optimiser.param_groups[0]["params"][live.index(key)]]
        )
        assert torch.equal(after[f"frozen_{key}"], rows_before), key
    assert torch.equal(layer.B, torch.zeros(2, 5))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_grown_layers_state_loads_into_a_fresh_one(name):
    scheme, settings = SCHEMES[name]
    layer = grown(scheme, **settings)
    other = scheme(nn.Linear(7, 5, dtype=torch.float64), rank=2, **settings)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(9, 7, dtype=torch.float64)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize(
    ("scheme", "settings", "message"),
    [
        (LoRA, {"rank": 0}, "rank is 0, allowed for this layer: 1 to 5"),
        (LoRA, {"rank": 6}, "rank is 6, allowed for this layer: 1 to 5"),
        (LoRAMoE, {"rank": 2, "top_k": 0}, "top_k is 0, allowed: 1 or more"),
        (LoRAMoE, {"rank": 2, "balance": -1.0}, "balance is -1.0, allowed: 0 or more"),
        (
            LoRAMoE,
            {"rank": 3, "experts": 2},
            "experts is 2, allowed: a divisor of rank, which is 3",
        ),
        (MoRA, {"rank": 2, "top_k": -3}, "top_k is -3, allowed: 1 or more"),
        (MoRA, {"rank": 2, "tau": 0.0}, "tau is 0.0, allowed: above 0"),
        (MoRA, {"rank": 2, "tau": math.nan}, "tau is nan, allowed: above 0"),
        (MoRA, {"rank": 2, "delta": math.nan}, "delta is nan"),
    ],
)
def test_settings_out_of_range_are_named(scheme, settings, message):
    with pytest.raises(ValueError, match=message):
        scheme(nn.Linear(7, 5), **settings)


def test_only_a_linear_layer_is_adapted():
    with pytest.raises(TypeError, match=r"base is Conv2d, allowed: nn\.Linear"):
        LoRA(nn.Conv2d(1, 1, 1))


class TestLoRA:
    def test_merged_equals_unmerged_and_unmerge_restores_every_bit(self):
        layer = grown(LoRA, scale=0.3)
        x = torch.randn(6, 7, dtype=torch.float64)
        y, W0 = layer(x), layer.base.weight.clone()
        for _ in range(5):
            layer.merge()
            assert not torch.equal(layer.base.weight, W0)
            assert torch.allclose(layer(x), y, atol=1e-12)
            layer.unmerge()
            assert torch.equal(layer.base.weight, W0)

    def test_the_update_has_at_most_R_ranks(self):
        layer = grown(LoRA, D=20, O=20, rank=2, tasks=3)
        W0 = layer.base.weight.clone()
        layer.merge()
        assert torch.linalg.matrix_rank(layer.base.weight - W0) == 6

    def test_a_merged_layer_neither_grows_nor_saves(self):
        layer = grown(LoRA)
        with pytest.raises(RuntimeError, match="not merged"):
            layer.unmerge()
        layer.merge()
        for call in (layer.merge, layer.grow, layer.state_dict):
            with pytest.raises(RuntimeError, match=r"merged: call unmerge\(\) first"):
                call()

    def test_by_hand(self):
        # z = (2·1 + 0·1, 1·1 + 1·1) = (2, 2); update = .5 · (2·(1, 0) + 2·(3, 1)) = (4, 1)
        layer = LoRA(nn.Linear(2, 2, bias=False), rank=2, scale=0.5)
        nn.init.eye_(layer.base.weight)
        layer.A.data = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
        layer.B.data = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
        assert layer(torch.ones(2)).tolist() == [5.0, 2.0]


class TestLoRAMoE:
    @pytest.mark.parametrize("experts", [1, 2, 4])
    def test_a_task_may_add_several_experts(self, experts):
        layer = grown(LoRAMoE, rank=4, tasks=3, top_k=2, experts=experts)
        assert len(rows(layer, "router")) == 3 * experts and layer.block == 4 // experts
        arrays = {key: rows(layer, key) for key in layer.fresh()}
        x = torch.randn(5, 7, dtype=torch.float64)
        wanted = expected("lora_moe", layer, x.numpy(), arrays)
        np.testing.assert_allclose(layer(x).detach().numpy(), wanted, rtol=0, atol=1e-12)
        idx, g, _ = layer.gate(x)
        assert idx.shape == g.shape == (5, 2 * (4 // experts))
        stored = sum(t.numel() for n, t in layer.state_dict().items() if "base" not in n)
        assert stored == 12 * (7 + 5) + 3 * experts * 7
        assert layer.active() == 3 * experts * 7 + 2 * (4 // experts) * (7 + 5)

    def test_by_hand(self):
        # logits (ln 3, 0, -1) of which two are kept: w = (3/4, 1/4). z = (1, 2, 9).
        # update = 3/4 · 1 · (4, 0) + 1/4 · 2 · (0, 2) = (3, 1)
        layer = LoRAMoE(nn.Linear(2, 2, bias=False), rank=1, top_k=2)
        nn.init.zeros_(layer.base.weight)
        layer.frozen_router = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
        layer.router.data = torch.tensor([[-1.0, 0.0]])
        layer.frozen_A = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
        layer.A.data = torch.tensor([[9.0, 0.0]])
        layer.frozen_B = torch.tensor([[4.0, 0.0], [0.0, 2.0]])
        layer.B.data = torch.tensor([[5.0, 5.0]])
        assert torch.allclose(layer(torch.tensor([1.0, 0.0])), torch.tensor([3.0, 1.0]))

    def test_one_expert_is_lora(self):
        layer = grown(LoRAMoE, tasks=1, top_k=2)
        lora = LoRA(layer.base, rank=2)
        lora.A, lora.B = layer.A, layer.B
        x = torch.randn(6, 7, dtype=torch.float64)
        assert torch.allclose(layer(x), lora(x), atol=1e-14)

    def test_balance_loss(self):
        # two experts, top-1. Uniform: f = P = (1/2, 1/2), so 2 · (1/4 + 1/4) = 1.
        even = torch.zeros(4, 2)
        assert switch_balance(even, torch.tensor([[0], [1], [0], [1]])) == 1
        # logits (ln 3, 0) for all: P = (3/4, 1/4), f = (1, 0), so 2 · 3/4 = 1.5.
        skewed = torch.tensor([[math.log(3), 0.0]]).repeat(4, 1)
        assert torch.isclose(switch_balance(skewed, torch.zeros(4, 1).long()), torch.tensor(1.5))
        assert switch_balance(even[:0], torch.zeros(0, 1).long()) == 0

    def test_balance_is_left_in_aux_in_training_only_where_asked_for(self):
        x = torch.randn(6, 7, dtype=torch.float64)
        for balance, training in ((0.0, True), (0.5, False), (0.5, True)):
            layer = grown(LoRAMoE, top_k=1, balance=balance).train(training)
            layer(x)
            assert (layer.aux is not None) == (balance > 0 and training)
        assert layer.aux.requires_grad
        assert copy.deepcopy(layer).aux is None


class TestMoRA:
    x = torch.randn(40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def gate(self, layer, x=None):
        """g as a whole row (T, R)."""
        x = self.x if x is None else x
        idx, w, _ = layer.gate(x)
        return torch.zeros(len(x), layer.ranks, dtype=w.dtype).scatter(1, idx, w)

    def test_by_hand(self):
        # x = (1, 1): z = (3, 4, -12), |z| = 13, s = (3, 4, -12)/13; two kept: ranks 1 and 0.
        # tau = 1/(13 ln 3): w = (1/4, 3/4, 0); update = 1/4·3·(4, 0) + 3/4·4·(0, 2) = (3, 6)
        layer = MoRA(nn.Linear(2, 2, bias=False), rank=1, top_k=2, tau=1 / (13 * math.log(3)))
        nn.init.zeros_(layer.base.weight)
        layer.frozen_A = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
        layer.A.data = torch.tensor([[0.0, -12.0]])
        layer.frozen_B = torch.tensor([[4.0, 0.0], [0.0, 2.0]])
        layer.B.data = torch.tensor([[7.0, 7.0]])
        assert torch.allclose(layer(torch.ones(2)), torch.tensor([3.0, 6.0]))
        layer.eval().delta = 0.25  # s = (.23, .31): the first goes, the second keeps its 3/4
        assert torch.allclose(layer(torch.ones(2)), torch.tensor([0.0, 6.0]))

    def test_the_papers_settings_are_the_defaults(self):
        settings = MoRA(nn.Linear(32, 32)).settings()
        paper = {"rank": 16, "scale": 1.0, "top_k": 16, "tau": 0.01, "delta": 0.2}
        assert settings == {**paper, "detach_gate": False}

    @pytest.mark.parametrize("top_k", [1, 4, 6, 99])
    def test_weights_are_a_simplex_with_k_entries_capped_at_R(self, top_k):
        w = self.gate(grown(MoRA, top_k=top_k, tau=0.5))
        assert torch.allclose(w.sum(1), torch.ones(40, dtype=torch.float64))
        assert (w >= 0).all()
        assert ((w > 0).sum(1) == min(top_k, 6)).all()

    def test_weights_ignore_the_inputs_length_but_not_its_sign(self):
        layer = grown(MoRA, top_k=3, tau=0.1)
        assert torch.allclose(self.gate(layer), self.gate(layer, 7.5 * self.x))
        assert not torch.allclose(self.gate(layer), self.gate(layer, -self.x))

    def test_all_ranks_at_high_temperature_are_lora_over_R(self):
        layer = grown(MoRA, top_k=6, tau=1e9, scale=0.6)
        lora = LoRA(layer.base, rank=2, scale=0.1)
        lora.load_state_dict(layer.state_dict())
        assert torch.allclose(layer(self.x), lora(self.x), atol=1e-8)

    def test_delta_prunes_in_evaluation_only(self):
        layer = grown(MoRA, top_k=4, tau=0.2, delta=0.3)
        trained, base = layer(self.x), layer.base(self.x)
        layer.eval()
        pruned = layer(self.x)
        assert not torch.equal(pruned, trained)
        layer.delta = -1.0
        assert torch.equal(layer(self.x), trained)
        layer.delta = 1.01
        assert torch.equal(layer(self.x), base)

    def test_pruned_weights_are_not_renormalised(self):
        layer = grown(MoRA, top_k=4, tau=0.2, delta=0.3)
        kept = self.gate(layer)
        pruned = self.gate(layer.eval())
        assert ((pruned == kept) | (pruned == 0)).all()
        assert (pruned.sum(1) < 1).any()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_zero_input_is_finite_and_the_base_layers(self, dtype):
        layer = grown(MoRA, top_k=3, dtype=dtype)
        x = torch.zeros(2, 7, dtype=dtype, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert torch.equal(y, layer.base(x))
        assert torch.isfinite(x.grad).all() and torch.isfinite(layer.A.grad).all()

    def test_unchosen_ranks_have_no_value_gradient_and_a_key_gradient(self):
        layer = grown(MoRA, rank=5, tasks=1, top_k=2, tau=0.3)
        x = self.x[:1]
        chosen = self.gate(layer, x)[0] > 0
        layer(x).sum().backward()
        assert (layer.B.grad[~chosen] == 0).all()
        assert (layer.A.grad[~chosen] != 0).all()  # through the norm of z
        detached = grown(MoRA, rank=5, tasks=1, top_k=2, tau=0.3, detach_gate=True)
        detached.load_state_dict(layer.state_dict())
        detached(x).sum().backward()
        assert (detached.A.grad[~chosen] == 0).all()
        assert torch.equal(detached.B.grad, layer.B.grad)
        assert not torch.allclose(detached.A.grad[chosen], layer.A.grad[chosen])

    @pytest.mark.parametrize("path", PATHS)
    def test_a_detached_gates_gradients_are_those_of_a_constant_gate(self, path):
        layer = grown(MoRA, top_k=3, tau=0.3, detach_gate=True)
        layer.path = path
        x = self.x.clone().requires_grad_()
        dy = torch.randn(40, 5, dtype=torch.float64)
        got = torch.autograd.grad(layer(x), [x, layer.A, layer.B], dy)
        A, B = torch.cat([layer.frozen_A, layer.A]), torch.cat([layer.frozen_B, layer.B])
        y = layer.base(x) + (self.gate(layer).detach() * (x @ A.T)) @ B
        wanted = torch.autograd.grad(y, [x, layer.A, layer.B], dy)
        for mine, theirs in zip(got, wanted, strict=True):
            assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)

    def test_a_detached_gates_backward_touches_no_dense_array(self, monkeypatch):
        """Nothing of (T, R) is made in it: that is the point of detaching."""
        layer = grown(MoRA, rank=1, tasks=90, D=4, O=4, top_k=3, detach_gate=True)
        layer.path = "gather"
        y = layer(self.x[:, :4].clone().requires_grad_())
        largest = 0

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal largest
                out = func(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor):
                    largest = max(largest, out.numel())
                return out

        with Watch():
            y.sum().backward()
        assert largest < 40 * 90

    def test_growing_moves_old_inputs_before_any_training(self):
        layer = grown(MoRA, top_k=3, tau=0.1)
        before = layer(self.x)
        layer.grow()
        assert not torch.allclose(layer(self.x), before)
