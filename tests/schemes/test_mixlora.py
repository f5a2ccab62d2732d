"""MixLoRA against its oracle, and what is its own. (It takes an FFN's place, not a linear layer's,
and so is not in the roster.)"""

import copy

import numpy as np
import pytest
import torch
from layers import X, filled
from oracle import gradient, softmax
from torch import nn
from torch.utils.checkpoint import checkpoint

from minimoe import LoRA, LoRAMoE
from minimoe.adapt import adapters, context, count, grow, load, parameters, save, unwrap
from minimoe.schemes.mixlora import MixLoRA


def ffn(D=7, H=6, act=None):
    parts = nn.Linear(D, H), act or nn.ReLU(), nn.Linear(H, D)
    return nn.Sequential(*parts).double()


def grown(tasks=3, act=None, **settings):
    layer = MixLoRA(
        ffn(act=act), **{"rank": 2, "scale": 0.7, "top_k": 2, "balance": 0.0} | settings
    )
    for _ in range(tasks - 1):
        grow(layer)
    for _, adapter in adapters(layer):
        filled(adapter)
    return layer


def arrays(layer):
    found = {"W": layer.fc1.rows("router")}
    for n, part in (("1", layer.fc1), ("2", layer.fc2)):
        found |= {"A" + n: part.rows("A"), "B" + n: part.rows("B")}
        found |= {"W" + n: part.base.weight, "b" + n: part.base.bias}
    return {name: tensor.detach().numpy().copy() for name, tensor in found.items()}


def mixlora(x, rows, scale, k):
    """A mean of whole FFNs, each with its own ranks beside both linear layers."""
    W, E = rows["W"], len(rows["W"])
    r, y = len(rows["A1"]) // E, np.zeros_like(x)

    def linear(u, n, e):
        out = rows["W" + n] @ u + rows["b" + n]
        for i in range(e * r, (e + 1) * r):
            out = out + scale * (u @ rows["A" + n][i]) * rows["B" + n][i]
        return out

    for t in range(len(x)):
        l = [W[e] @ x[t] for e in range(E)]
        kept = sorted(range(E), key=lambda e: -l[e])[:k]
        for w, e in zip(softmax([l[e] for e in kept]), kept, strict=True):
            y[t] += w * linear(np.maximum(linear(x[t], "1", e), 0), "2", e)
    return y


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k is 0, allowed: 1 or more"),
        ({"balance": -1.0}, "balance is -1.0, allowed: 0 or more"),
        ({"rank": 7}, "rank is 7, allowed: 1 to 6 for this layer"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        MixLoRA(ffn(), **{"rank": 2} | settings)


@pytest.mark.parametrize("other", [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU())])
def test_what_is_no_ffn_is_named(other):
    with pytest.raises(TypeError, match=r"allowed: nn.Sequential of Linear, activation, Linear"):
        MixLoRA(other)


@pytest.mark.parametrize("k", [1, 2, 3, 9])
@pytest.mark.parametrize("tasks", [1, 3])
def test_output_and_every_gradient_equal_the_oracles(tasks, k):
    layer, points = grown(tasks, top_k=k), X[:6].numpy().copy()
    rows, dy = arrays(layer), torch.randn(6, 7, dtype=torch.float64)
    x = X[:6].clone().requires_grad_()
    learns = {"W": layer.fc1.router, "A1": layer.fc1.A, "B1": layer.fc1.B}
    learns |= {"A2": layer.fc2.A, "B2": layer.fc2.B}
    assert {id(p) for p in parameters(layer)} == {id(p) for p in learns.values()}

    def f():
        return mixlora(points, rows, 0.7, k)

    y = layer(x.view(2, 3, 7)).view(6, 7)
    np.testing.assert_allclose(y.detach(), f(), rtol=0, atol=1e-12)
    grads = torch.autograd.grad(y, [x, *learns.values()], dy)
    own = {name: rows[name][len(rows[name]) - len(p) :] for name, p in learns.items()}
    for (name, array), grad in zip({"x": points, **own}.items(), grads, strict=True):
        wanted = gradient(f, array, dy.numpy())
        np.testing.assert_allclose(grad, wanted, atol=1e-7, err_msg=name)


def test_one_expert_is_lora_on_both_layers():
    layer = grown(tasks=1)
    both = []
    for part in (layer.fc1, layer.fc2):
        lora = LoRA(part.base, rank=2, scale=0.7)
        lora.A.data, lora.B.data = part.A.data, part.B.data
        both.append(lora)
    want = both[1](torch.relu(both[0](X)))
    assert torch.allclose(layer(X), want, rtol=0, atol=1e-13)


def routed(part, router):
    """LoRA-MoE on one of its layers, with the same experts and this router."""
    moe = LoRAMoE(part.base, rank=2, scale=0.7, top_k=2)
    moe.grow(), moe.grow()
    with torch.no_grad():
        for name, rows in {"A": part.rows("A"), "B": part.rows("B"), "router": router}.items():
            getattr(moe, f"frozen_{name}").copy_(rows[: -len(getattr(moe, name))])
            getattr(moe, name).copy_(rows[-len(getattr(moe, name)) :])
    return moe


@pytest.mark.parametrize("act", [nn.Identity(), nn.ReLU()])
def test_a_gate_on_ffns_is_one_on_a_layer_only_where_nothing_stands_between(act):
    layer = grown(act=act)
    for rows in (layer.fc2.B.data, layer.fc2.frozen_B):
        rows.zero_()  # LoRAs on the first layer alone
    want = layer.fc2.base(act(routed(layer.fc1, layer.fc1.rows("router"))(X)))
    same = torch.allclose(layer(X), want, rtol=0, atol=1e-12)
    assert same == isinstance(act, nn.Identity)


def test_a_fresh_one_is_the_ffn_but_for_rounding_and_can_learn():
    layer = MixLoRA(ffn(), rank=2, balance=0.0)
    want = layer.fc2.base(torch.relu(layer.fc1.base(X)))
    for _ in range(3):
        assert torch.allclose(layer(X), want, rtol=0, atol=1e-14)
        layer(X).sum().backward()
        assert layer.fc1.B.grad.any() and layer.fc2.B.grad.any()
        grow(layer)


def test_the_loss_is_the_papers_by_hand():
    # Two experts, logits (ln 3, 0) for two tokens and (0, ln 3) for one: f = (2, 1) / 3 and
    # P = (3/4 + 3/4 + 1/4, 1/4 + 1/4 + 3/4) / 3 = (7, 5) / 12: 2 (14 + 5) / 36 = 19 / 18
    layer = MixLoRA(ffn(2, 2), rank=1, balance=0.5)
    grow(layer)
    layer.fc1.frozen_router, layer.fc1.router.data = torch.eye(2).double().split(1)
    x = np.log(3) * torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    for training, want in ((True, 0.5 * 19 / 18), (False, 0.0)):
        with context(layer.train(training)) as batch:
            layer(x)
        assert torch.as_tensor(batch.aux_loss).item() == pytest.approx(want)
    with context(layer.train()) as batch:  # one token each: balanced, and 1
        layer(x[1:])
    assert batch.aux_loss.item() == pytest.approx(0.5)
    with context(layer, mask=torch.tensor([0, 1, 1])) as batch:
        layer(x)
    assert batch.aux_loss.item() == pytest.approx(0.5)


def test_old_experts_keep_every_bit_and_a_file_brings_all_back(tmp_path):
    layer = grown(balance=0.1)
    before = {n: t.clone() for n, t in layer.state_dict().items() if "frozen" in n}
    optimiser = torch.optim.AdamW(parameters(layer), lr=0.1)
    for _ in range(3):
        with context(layer) as batch:
            (layer(X).square().mean() + batch.aux_loss).backward()
        optimiser.step()
    state = layer.state_dict()
    assert len(before) == 5 and all(torch.equal(state[n], t) for n, t in before.items())
    save(layer, tmp_path / "a.safetensors")
    other = MixLoRA(nn.Sequential(layer.fc1.base, nn.ReLU(), layer.fc2.base), 2, 0.7)
    load(other, tmp_path / "a.safetensors")
    assert torch.equal(other.eval()(X), layer.eval()(X))


def test_unwrapped_it_is_the_ffn_and_trains_nothing():
    layer = grown()
    want = layer.fc2.base(torch.relu(layer.fc1.base(X)))
    assert unwrap(layer) is layer and not parameters(layer)
    assert torch.equal(layer(X), want)


@pytest.mark.parametrize("tasks", [1, 3])
def test_counts_are_the_docstrings(tasks):
    k, ranks = min(2, tasks), 2 * (2 * 7 + 2 * 6)
    counts = count(grown(tasks))
    assert counts["stored"] == tasks * (ranks + 7) and counts["read"] == tasks * 7 + k * ranks
    assert counts["speaking"] == k * ranks


def test_a_checkpointed_pass_has_the_same_gradients_and_the_next_one_too():
    plain = grown(balance=0.5).train()
    layer = copy.deepcopy(plain)  # has had no pass yet, that is: no labels of one before
    x, mask = torch.randn(4, 5, 7, dtype=torch.float64), torch.arange(5).expand(4, 5) < 3

    def gradients(layer, run):
        with context(layer, mask=mask) as batch:
            y = run(layer)
            loss = y.square().mean() + batch.aux_loss
        return torch.autograd.grad(loss, parameters(layer))

    wanted = gradients(plain, lambda plain: plain(x))
    for _ in range(2):
        found = gradients(layer, lambda layer: checkpoint(layer, x, use_reentrant=False))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
