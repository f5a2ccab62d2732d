"""MoRA against its oracle, numbers worked by hand, and what is its own."""

import copy
import math

import pytest
import torch
from layers import PATHS, compiled_equals_eager, frozen_and_live, grown
from oracle import base
from torch import nn

from minimoe import LoRA, MoRA

SETTINGS = {"scale": 0.7, "top_k": 3, "tau": 0.3, "delta": 0.25}
UNCLAIMED = {"merge_is_equal"}  # laws


def mora(x, W0, b, A, B, scale, top_k, tau, delta=None):
    """Lu et al., 2506.21035, eq. 5-8; delta None in training."""
    y, R = base(x, W0, b), len(A)
    for t in range(len(x)):
        z = [x[t] @ A[i] for i in range(R)]
        norm = math.sqrt(sum(value**2 for value in z))
        s = [value / norm if norm > 0 else 0.0 for value in z]  # eq. 5
        kept = sorted(range(R), key=lambda i: -s[i])[:top_k]  # eq. 6
        highest = max(s[i] for i in kept)
        total = sum(math.exp((s[i] - highest) / tau) for i in kept)
        for i in kept:
            w = math.exp((s[i] - highest) / tau) / total  # eq. 7
            if delta is not None and s[i] < delta:  # eq. 8
                w = 0.0
            y[t] += scale * w * z[i] * B[i]
    return y


def expected(layer, x, rows, given):
    delta = None if layer.training else layer.delta
    return mora(x, *frozen_and_live(rows), layer.scale, layer.top_k, layer.tau, delta)


def STORED(D, O, R, r, E):
    return R * (D + O)


def ACTIVE(D, O, R, r, E, k):
    return R * D + k * O


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": -3}, "top_k is -3, allowed: 1 or more"),
        ({"tau": 0.0}, "tau is 0.0, allowed: above 0"),
        ({"tau": math.nan}, "tau is nan, allowed: above 0"),
        ({"delta": math.nan}, "delta is nan, allowed: any number"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        MoRA(nn.Linear(7, 5), **{"rank": 2} | settings)


class TestMoRA:
    x = torch.randn(40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def gate(self, layer, x=None):
        """g as a whole row (T, R)."""
        x = self.x if x is None else x
        idx, w, *_ = layer.gate(x)
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

    @pytest.mark.parametrize("path", ["plain", "gather"])
    def test_a_small_temperature_or_a_long_input_is_finite_in_16_bits(self, path):
        for tau, length in ((1e-6, 1.0), (0.1, 4e3)):  # s / tau, and ‖z‖, past 65504
            layer = grown(MoRA, D=16, O=12, rank=8, top_k=3, tau=tau, dtype=torch.float16).half()
            layer.path = path
            x = torch.randn(9, 16, generator=torch.Generator().manual_seed(2)).half()
            idx, w, z, *_ = layer.gate(length * x)
            assert z.isfinite().all()
            assert w.isfinite().all() and torch.allclose(w.sum(-1), torch.ones(9))
            wide = copy.deepcopy(layer).float()
            # the ranks that float32 keeps, but where two are within rounding
            agree = (idx == wide.gate(length * x.float()).idx).float().mean()
            assert agree > 0.9

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

    # torch's own tracer makes an instance of autograd.Function, and torch's own Function warns
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("path", ["plain", "dense", "gather"])
    def test_a_detached_gate_compiles(self, path):
        layer = grown("mora", dtype=torch.float32, detach_gate=True)
        layer.path = path
        compiled_equals_eager(layer)

    def test_growing_moves_old_inputs_before_any_training(self):
        layer = grown(MoRA, top_k=3, tau=0.1)
        before = layer(self.x)
        layer.grow()
        assert not torch.allclose(layer(self.x), before)
