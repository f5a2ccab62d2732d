"""Methods that need no file of their own: each is a setting of a scheme that is there.

A test a method, held to the method's own equation or to a sum that is built by hand.
"""

import pytest
import torch
from layers import X, filled, grown, lora_of
from torch import nn

from minimoe import LoRA, LoRAMoE, MoRA
from minimoe.adapt import adapt, adapters, context
from minimoe.continual.baselines import ToldLoRA
from minimoe.continual.probe import dense_gate
from minimoe.schemes.adamoe import AdaMoE
from minimoe.schemes.lora_moe_plugin import LoRAMoEPlugin
from minimoe.schemes.mocle import MoCLE
from minimoe.schemes.mosld import MoSLD


def experts_of(layer):
    """Each expert's (A, B)."""
    A, B = (layer.rows(name).unflatten(0, (-1, layer.block)) for name in "AB")
    return list(zip(A, B, strict=True))


def update(layer, A, B):
    return lora_of(layer, A, B)(X) - layer.base(X)


def near(got, want):
    return torch.allclose(got, want, rtol=0, atol=1e-12)


def test_ming_moe_is_a_router_over_experts_that_are_all_there_from_the_start():
    """Liao et al., arXiv 2404.09027: E LoRAs, the top 2, by token."""
    layer = grown(LoRAMoE, rank=4, experts=4, top_k=2, tasks=1)
    top, e = (X @ layer.router.T).topk(2)
    each = torch.stack([update(layer, A, B) for A, B in experts_of(layer)])  # (E, T, O)
    kept = each[e, torch.arange(40).unsqueeze(-1)]
    want = layer.base(X) + (top.softmax(-1).unsqueeze(-1) * kept).sum(1)
    assert near(layer(X), want)


def test_molora_is_a_dense_router_over_experts_that_are_all_there_from_the_start():
    """Zadouri et al., arXiv 2309.05444: softmax over all."""
    layer = grown(LoRAMoE, D=8, O=6, rank=6, experts=3, top_k=3, tasks=1)
    plugin = LoRAMoEPlugin(layer.base, rank=2, scale=1.0, balance=0.0)
    plugin.grow(), plugin.grow()
    for name in ("A", "B", "router"):
        rows = layer.rows(name).detach()
        live = 1 if name == "router" else 2
        setattr(plugin, f"frozen_{name}", rows[:-live].clone())
        getattr(plugin, name).data = rows[-live:].clone()
    x = torch.randn(40, 8, dtype=torch.float64)
    assert near(layer(x), plugin(x))


def test_awakers_weight_is_the_likelihood_of_the_likeliest():
    """Awaker2.5-VL, arXiv 2411.10669: top 1, not renormalised. (LoRAMoE's weight would be 1.)"""
    layer = AdaMoE(nn.Linear(7, 5).double(), rank=2, top_k=1)
    layer.grow(), layer.grow()
    layer.router.data.normal_()
    w = layer.gate(X).weight[:, :1]  # of the block's two ranks
    assert near(w, (X @ layer.rows("router").T).softmax(-1).amax(-1, keepdim=True))


def test_residual_moe_is_low_rank_residuals_of_one_core():
    """W_e = W0 + residual_e: where all residuals are the same, no router matters."""
    layer = grown(LoRAMoE, top_k=2)
    A, B = torch.randn(2, 7).double(), torch.randn(2, 5).double()
    for name, rows in {"A": A, "B": B}.items():
        setattr(layer, f"frozen_{name}", rows.repeat(2, 1))
        getattr(layer, name).data = rows.clone()
    y = layer(X)
    assert near(y, lora_of(layer, A, B)(X))
    layer.router.data.normal_(std=9.0)
    assert near(layer(X), y)


@pytest.mark.parametrize("path", ["auto", "dense", "gather"])
def test_expert_weave_serves_a_batch_of_many_adapters(path):
    """Row i of a mixed batch is what its own LoRA answers; no other LoRA is read."""
    layer, label = grown(ToldLoRA), torch.arange(40) % 3
    layer.path = path
    with context(layer, label=label):
        y = layer(X)
    for i, (A, B) in enumerate(experts_of(layer)):
        assert near(y[label == i], lora_of(layer, A, B)(X)[label == i])
    layer.frozen_A.fill_(torch.nan)
    with context(layer, label=torch.full((40,), 2)):
        alone = layer(X)
    assert path == "dense" or torch.equal(alone[label == 2], y[label == 2])


def test_a_finer_grain_is_more_experts_of_fewer_ranks():
    """The same ranks, of which the same number speaks; only the router grows."""
    stored, speak = set(), set()
    for n in (1, 2, 4):
        layer = grown(LoRAMoE, rank=4, experts=n, top_k=2 * n, tasks=3)
        routers = layer.n_experts * 7
        stored.add(sum(layer.rows(name).numel() for name in ("A", "B", "router")) - routers)
        speak.add(int((dense_gate(layer, X) != 0).sum(-1).max()))
    assert stored == {12 * (7 + 5)} and speak == {8}


def test_moce_is_mocle_without_its_universal_expert():
    """The cluster's expert at weight 1: a temperature near 0."""
    layer = grown(MoCLE, clusters=3, tau=1e-12)
    cluster = torch.arange(40) % 9
    with context(layer, cluster=cluster):
        y, g = layer(X), dense_gate(layer, X)
    best = (layer.rows("C") @ layer.rows("router").T).argmax(-1)[cluster]
    for e, (A, B) in enumerate(experts_of(layer)):
        assert near(y[best == e], lora_of(layer, A, B)(X)[best == e])
    assert set(g.flatten().tolist()) == {0.0, 1.0}


def test_hydra_lora_is_one_key_matrix_and_a_dense_router_over_values():
    """Tian et al., arXiv 2404.19245; SPMTrack's TMoE is this beside a LoRA that is always on."""
    layer = grown(MoSLD, top_k=3, dropout=0.0).train()
    w = (X @ layer.rows("router").T).softmax(-1)
    B = layer.rows("B").unflatten(0, (3, 2))
    want = layer.base(X) + 2.0 * sum(w[:, e, None] * (X @ layer.A.T @ B[e]) for e in range(3))
    assert layer.scale == 2.0 and near(layer(X), want)
    # a gradient of the shared keys is the sum of what each expert alone would give them
    dA = torch.autograd.grad(layer(X).square().sum(), layer.A)[0]
    each = [layer.A.detach().clone().requires_grad_() for _ in range(3)]
    parts = (w[:, e, None] * (X @ each[e].T @ B[e]) for e in range(3))
    (layer.base(X) + 2.0 * sum(parts)).square().sum().backward()
    assert torch.allclose(dA, sum(A.grad for A in each), rtol=1e-12)


def test_tmoe_is_hydra_lora_beside_a_lora():
    """SPMTrack's: two adapters of one layer, whose updates add up."""
    hydra = grown(MoSLD, top_k=3, dropout=0.0)
    always = LoRA(hydra.base, rank=2)
    nn.init.normal_(always.B)
    both = hydra(X) + always(X) - hydra.base(X)
    w = (X @ hydra.rows("router").T).softmax(-1).repeat_interleave(2, -1)
    A, B = torch.cat([hydra.keys, always.A]), torch.cat([2.0 * hydra.rows("B"), always.B])
    g = torch.cat([w, torch.ones(40, 2).double()], -1)
    assert near(both, hydra.base(X) + (g * (X @ A.T)) @ B)  # the one equation, in one piece


def test_a_rank_of_mora_is_an_expert_of_the_finest_grain():
    """With scores of its own in place of a router's: E = R, at one temperature."""
    layer = grown(MoRA, top_k=4, tau=0.5, delta=-1.0)
    routed = LoRAMoE(layer.base, rank=2, experts=2, top_k=4)
    routed.grow(), routed.grow()
    x = X[:1]  # of one token, a router can say what the ranks' own scores do
    z = x @ layer.keys.T
    rows = {"A": layer.keys, "B": layer.rows("B"), "router": (z / z.norm() / 0.5).T @ x / (x @ x.T)}
    for name, values in rows.items():
        setattr(routed, f"frozen_{name}", values[:-2].detach().clone())
        getattr(routed, name).data = values[-2:].detach().clone()
    assert near(layer(x), routed(x))


def test_mola_is_more_experts_in_higher_layers():
    """Gao et al., arXiv 2402.08562: 2, 4, 6 and 8 experts, the top 2, from below to above."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(8)))
    for group, experts in enumerate((2, 4, 6, 8)):
        adapt(model, LoRAMoE, f"{2 * group}|{2 * group + 1}", rank=experts, experts=experts)
    layers = [layer for _, layer in adapters(model)]
    assert [layer.n_experts for layer in layers] == [2, 2, 4, 4, 6, 6, 8, 8]
    for layer in layers:  # whatever their number, two speak
        g = dense_gate(filled(layer), torch.randn(5, 8))
        assert g.shape == (5, layer.n_experts) and ((g > 0).sum(-1) == 2).all()
