"""SMoRA against its oracle, numbers worked by hand, and what is its own."""

import math

import pytest
import torch
from layers import X, frozen_and_live, grown, lora_of
from oracle import base
from torch import nn

from minimoe.adapt import after_step, context
from minimoe.continual.probe import dense_gate
from minimoe.schemes.smora import SMoRA

SETTINGS = {"scale": 0.7, "top_k": 3}
UNCLAIMED = {"merge_is_equal"}  # laws


def smora(x, W0, b, A, B, W, bias, scale, top_k):
    """Zhao et al., 2501.15103: k sigmoid scores with their biases, as weights that sum to k."""
    y, R = base(x, W0, b), len(A)
    for t in range(len(x)):
        s = [1 / (1 + math.exp(-(x[t] @ W[i]))) + bias[i] for i in range(R)]
        kept = sorted(range(R), key=lambda i: -s[i])[:top_k]
        total = sum(s[i] for i in kept)
        for i in kept:
            y[t] += scale * len(kept) * s[i] / total * (x[t] @ A[i]) * B[i]
    return y


def expected(layer, x, rows, given):
    return smora(
        x, *frozen_and_live(rows), rows["router"], rows["expert_bias"], layer.scale, layer.top_k
    )


def STORED(D, O, R, r, E):
    return R * (2 * D + O + 1)


def ACTIVE(D, O, R, r, E, k):
    return R * (D + 1) + k * (D + O)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k is 0, allowed: 1 or more"),
        ({"rate": -1e-5}, "rate is -1e-05, allowed: 0 or more"),
        ({"rate": math.nan}, "rate is nan, allowed: 0 or more"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        SMoRA(nn.Linear(7, 5), **{"rank": 2} | settings)


def test_the_papers_settings_are_the_defaults():
    paper = {"rank": 64, "scale": 16 / 8, "top_k": 8, "rate": 1e-5}
    settings = SMoRA(nn.Linear(64, 64)).settings()
    assert {key: settings[key] for key in paper} == paper


class TestSMoRA:
    def test_by_hand(self):
        # s = sigmoid(ln 3, 0, -ln 3) + (0, -.4, 0) = (3/4, .1, 1/4); two kept, that sum to 1:
        # g = (3/2, 0, 1/2); z = (1, 9, 3); update = 2 · (3/2·1·(1, 0) + 1/2·3·(0, 2)) = (3, 6)
        layer = SMoRA(nn.Linear(2, 2, bias=False), rank=1, top_k=2).eval()
        nn.init.zeros_(layer.base.weight)
        layer.frozen_router = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
        layer.router.data = torch.tensor([[-math.log(3), 0.0]])
        layer.frozen_expert_bias, layer.expert_bias = torch.tensor([0.0, -0.4]), torch.tensor([0.0])
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
        layer = grown("smora", top_k=2).eval()
        layer.expert_bias.fill_(-1.0)
        layer.frozen_expert_bias.fill_(-1.0)
        layer.router.data.zero_()
        layer.frozen_router.zero_()  # every score is 1/2 - 1, so the kept weigh the same
        _, g, *_ = layer.gate(torch.randn(3, 7, dtype=torch.float64))
        assert torch.allclose(g, torch.ones_like(g))
        layer.expert_bias.fill_(-0.5)
        layer.frozen_expert_bias.fill_(-0.5)  # every score is 0: nobody speaks
        assert torch.equal(layer.gate(torch.randn(3, 7, dtype=torch.float64))[1], 0 * g)

    def test_what_was_counted_before_a_task_ended_moves_no_fresh_rank(self):
        layer = grown("smora", rate=0.1).train()
        with context(layer):
            layer(torch.randn(3, 7, dtype=torch.float64))
        layer.grow()
        layer.after_step()
        assert torch.equal(layer.expert_bias, torch.zeros_like(layer.expert_bias))

    def test_all_ranks_without_router_and_bias_are_lora(self):
        layer = grown("smora", top_k=6)
        for key in ("router", "expert_bias"):
            for rows in (getattr(layer, key), getattr(layer, f"frozen_{key}")):
                rows.data.zero_()
        layer.eval()
        assert torch.allclose(layer(X), lora_of(layer, layer.keys, layer.rows("B"))(X), atol=1e-12)


class TestBalanceByBias:
    """SMoRA's, and FlyLoRA's."""

    def layer(self, name, **settings):
        """Rank i answers to x_i alone; ranks 0 and 1 are frozen."""
        layer = grown(name, D=4, O=4, tasks=2, dtype=torch.float32, top_k=1, **settings)
        key = "A" if name == "flylora" else "router"
        layer.load_state_dict(
            layer.state_dict()
            | {f"frozen_{key}": torch.eye(4)[:2], key: torch.eye(4)[2:]}
            | {"frozen_expert_bias": torch.zeros(2), "expert_bias": torch.zeros(2)}
        )
        return layer

    @pytest.mark.parametrize("name", ["smora", "flylora", "flylora signed"])
    def test_starved_live_ranks_rise_by_u_and_overused_ones_fall_by_u(self, name):
        # chosen: rank 0 once, rank 2 three times; c = (1, 0, 3, 0), of mean 1
        layer = self.layer(name.split()[0], rate=0.25)
        x = torch.eye(4)[[2, 0, 2, 2]]
        with context(layer):
            layer(x.view(2, 2, 4))
        layer.after_step()
        assert layer.expert_bias.tolist() == [-0.25, 0.25]
        assert layer.frozen_expert_bias.tolist() == [0.0, 0.0]
        layer.after_step()  # no forward pass since
        layer.eval()(x)
        layer.after_step()
        assert layer.expert_bias.tolist() == [-0.25, 0.25]

    @pytest.mark.parametrize("name", ["smora", "flylora"])
    def test_the_mean_is_over_all_ranks(self, name):
        # c = (5, 0, 1, 0), of mean 3/2: rank 2 is used more than rank 3, and still too little
        layer = self.layer(name, rate=0.25)
        with context(layer):
            layer(torch.eye(4)[[0, 0, 0, 2, 0, 0]])
        layer.after_step()
        assert layer.expert_bias.tolist() == [0.25, 0.25]

    @pytest.mark.parametrize("name", ["smora", "flylora"])
    def test_even_use_moves_nothing(self, name):
        layer = self.layer(name, rate=0.25)
        with context(layer):
            layer(torch.eye(4))
        layer.after_step()
        assert layer.expert_bias.tolist() == [0.0, 0.0]

    @pytest.mark.parametrize(("name", "rate"), [("smora", 1e-5), ("flylora", 0.01)])
    def test_a_models_layers_all_move(self, name, rate):
        net = nn.Sequential(self.layer(name), self.layer(name))
        with context(net):
            for layer in net:
                layer(torch.eye(4)[[2, 0, 2, 2]])
        after_step(net)
        for layer in net:
            assert torch.equal(layer.expert_bias, torch.tensor([-rate, rate]))
