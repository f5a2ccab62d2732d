"""Adapters in models as they come: in eval(), with shared or computed weights, in 16 bits, with
hooks, with owners that read a weight, and with other libraries' writers."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from layers import context_of, filled, own
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from minimoe import LoRA, LoRAMoE, MoRA
from minimoe.adapt import (
    adapt,
    adapters,
    after_step,
    context,
    count,
    grow,
    load,
    load_state,
    parameters,
    save,
    state,
    survey,
    unwrap,
)
from minimoe.roster import SCHEMES
from minimoe.schemes.evomoe import EvoMoE
from minimoe.schemes.mask_moe import MaskMoE
from minimoe.schemes.mosld import MoSLD
from minimoe.schemes.smora import SMoRA


def net(**settings):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8, **settings), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 6, **settings)
    )


def at_random(model):
    load_state(model, {k: 0.3 * torch.randn_like(v) for k, v in state(model).items()})
    return model


def snapshot(model):
    """Types, tensors and what trains."""
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    tensors = {name: p.clone() for name, p in [*model.named_parameters(), *model.named_buffers()]}
    return kinds, tensors, {name: p.requires_grad for name, p in model.named_parameters()}


def unchanged(model, before):
    kinds, tensors, trains = snapshot(model)
    same = all(torch.equal(tensors[name], tensor) for name, tensor in before[1].items())
    return (
        kinds == before[0] and trains == before[2] and same and tensors.keys() == before[1].keys()
    )


class TestWhatIsTakenOver:
    @pytest.mark.parametrize("name", SCHEMES)
    def test_a_model_in_eval_stays_in_eval(self, name, tmp_path):
        scheme, _, settings = own(name)
        trained = adapt(net(), scheme, r"0|3", rank=2, **settings)
        grow(trained)
        for _, layer in adapters(trained):
            filled(layer)
        save(trained, tmp_path / "a")
        fresh = adapt(net().eval(), scheme, r"0|3", rank=2, **settings)
        load(fresh, tmp_path / "a")
        assert not any(module.training for module in fresh.modules())
        x = torch.randn(4, 6)
        given = context_of(fresh[0], 4)
        with context(trained.eval(), **given):
            want = trained(x)
        with context(fresh, **given):
            assert torch.equal(fresh(x), want)

    def test_each_layers_own_mode(self):
        model = net()
        model[0].eval()
        adapt(model, MoRA, r"0|3", rank=2)
        assert not model[0].training and model[3].training

    def test_sizes_weight_and_bias_answer(self):
        model = adapt(net(), LoRA, "0", rank=2)
        layer = model[0]
        assert (layer.in_features, layer.out_features) == (6, 8)
        assert layer.weight is layer.base.weight and layer.bias is layer.base.bias

    def test_hooks_see_the_adapted_layer_and_come_back(self):
        model, seen = net(), []
        handle = model[0].register_forward_hook(lambda layer, args, y: seen.append(y))
        double = model[0].register_forward_pre_hook(lambda layer, args: (2 * args[0],))
        before = copy.deepcopy(model)
        at_random(adapt(model, LoRA, "0", rank=2))
        x = torch.randn(4, 6)
        model(x)
        torch.testing.assert_close(seen[-1], F.linear(2 * x, *_merged(model[0])))
        handle.remove()
        model(x)
        assert len(seen) == 1
        unwrap(model, merge=False)
        torch.testing.assert_close(model[0](x), before[0](x))
        double.remove()
        torch.testing.assert_close(model[0](x), F.linear(x, model[0].weight, model[0].bias))

    def test_a_backward_hook_sees_the_adapted_layers_gradient(self):
        model, seen = net().eval(), []
        model[3].register_full_backward_hook(lambda layer, dx, dy: seen.append(dx[0]))
        at_random(adapt(model, LoRA, r"0|3", rank=2))
        model(torch.randn(4, 6)).sum().backward()
        torch.testing.assert_close(seen[0], torch.ones(4, 6) @ _merged(model[3])[0])


def _merged(layer):
    """W and b of a LoRA, by the equation."""
    update = layer.scale * layer.rows("B").T @ layer.keys
    return layer.base.weight + update, layer.base.bias


def test_layers_are_made_in_the_models_order():
    torch.manual_seed(1)
    model = adapt(net(), LoRA, "0|3", rank=2)
    keys = [layer.A.clone() for _, layer in adapters(model)]
    torch.manual_seed(0)
    plain = net()
    assert torch.equal(LoRA(plain[0], rank=2).A, keys[0])
    assert torch.equal(LoRA(plain[3], rank=2).A, keys[1])


class TestSecondCall:
    def test_both_calls_adapters_train(self):
        model = adapt(net(), MoRA, "0", rank=2)
        adapt(model, LoRA, "3", rank=4, scale=2.0)
        assert [(n, type(a).__name__, a.rank) for n, a in adapters(model)] == [
            ("0", "MoRA", 2),
            ("3", "LoRA", 4),
        ]
        assert {id(p) for p in parameters(model)} == {
            id(p) for i in (0, 3) for p in (model[i].A, model[i].B)
        }
        assert count(model)["trainable"] == 2 * 14 + 4 * 14
        at_random(model)
        model.eval()
        x = torch.randn(4, 6)
        want = F.linear(model[0](x).relu(), *_merged(model[3]))
        torch.testing.assert_close(model(x), want)
        grow(model)
        assert [a.ranks for _, a in adapters(model)] == [4, 8]

    def test_what_it_matches_must_not_be_adapted_already(self):
        model = adapt(net(), MoRA, "0", rank=2)
        with pytest.raises(ValueError, match=r"matches 0\.base, which is adapted already"):
            adapt(model, LoRA, r".*", rank=2)

    def test_modules_inside_a_scheme_of_ones_own_go_on_training(self):
        class Own(LoRA):
            def __init__(self, base, rank=2, scale=1.0):
                super().__init__(base, rank, scale)
                self.inner = nn.Linear(self.in_features, 1)

        model = adapt(net(), Own, "0")
        adapt(model, LoRA, "3", rank=2)
        assert model[0].inner.weight.requires_grad and not model[0].base.weight.requires_grad
        assert "0.inner.weight" in state(model)

    def test_a_computed_weight_without_a_bias_is_wrapped(self):
        model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6, bias=False)))
        adapt(model, LoRA, "0", rank=2)(torch.randn(3, 6))


class TestHead:
    """train=: what learns beside the adapters."""

    def model(self, train=r"head"):
        torch.manual_seed(0)
        model = nn.Sequential()
        model.add_module("body", nn.Linear(6, 6))
        model.add_module("norm", nn.BatchNorm1d(6))
        model.add_module("head", nn.Linear(6, 3))
        return adapt(model, LoRA, "body", train=train, rank=2)

    def test_it_trains_and_is_counted(self):
        model = self.model()
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        assert names == {"body.A", "body.B", "head.weight", "head.bias"}
        assert len(parameters(model)) == 4
        assert count(model)["trainable"] == 2 * 12 + 21
        assert count(model)["stored"] == count(model)["read"] == 2 * 12 + 21

    def test_a_second_call_keeps_it(self):
        model = self.model()
        model = copy.deepcopy(model)
        model.add_module("more", nn.Linear(3, 3))
        adapt(model, LoRA, "more", rank=2)
        assert model.head.weight.requires_grad and not model.norm.weight.requires_grad

    @pytest.mark.parametrize("train", [r"head", r"head|norm", r"head\.weight"])
    def test_it_is_saved_with_its_buffers(self, train, tmp_path):
        model, fresh = self.model(train), self.model(train)
        optimiser = torch.optim.SGD(parameters(model), lr=0.5)
        for _ in range(3):
            optimiser.zero_grad()
            model(torch.randn(5, 6)).square().sum().backward()
            optimiser.step()
        if "norm" not in train:
            fresh.norm.load_state_dict(model.norm.state_dict())  # the model's own, and moves
        save(model.requires_grad_(False), tmp_path / "a")
        load(fresh, tmp_path / "a")
        x = torch.randn(5, 6)
        assert torch.equal(fresh.eval()(x), model.eval()(x))

    def test_a_head_here_and_none_there_is_refused(self, tmp_path):
        model, other = self.model(), self.model(None)
        before = snapshot(other)
        save(model, tmp_path / "a")
        with pytest.raises(
            ValueError, match=r"head.bias trains beside the adapters there, and not"
        ):
            load(other, tmp_path / "a")
        assert unchanged(other, before)
        save(other, tmp_path / "b")
        with pytest.raises(ValueError, match=r"head.bias trains beside the adapters here, and not"):
            load(model, tmp_path / "b")

    @pytest.mark.parametrize(
        ("train", "message"),
        [
            ("heads", "train 'heads' matches no parameter; there are: body, norm, head"),
            ("body", "train 'body' matches body.weight, of a layer that is adapted"),
        ],
    )
    def test_what_cannot_be_is_named_and_nothing_changes(self, train, message):
        model = nn.Sequential()
        for name, size in (("body", 6), ("norm", 6), ("head", 3)):
            model.add_module(name, nn.Linear(6, size))
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            adapt(model, LoRA, "body", train=train, rank=2)
        assert unchanged(model, before)


class TestAllOrNothing:
    def test_a_layer_that_does_not_fit_is_named(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        before = snapshot(model)
        message = r"^1 \(Linear\): rank is 4, allowed: 1 to 2 for this layer$"
        with pytest.raises(ValueError, match=message):
            adapt(model, LoRA, r"\d", rank=4)
        assert unchanged(model, before)

    def test_a_misspelt_setting_changes_nothing(self):
        model = net()
        before = snapshot(model)
        with pytest.raises(TypeError, match="topk"):
            adapt(model, MoRA, "0|3", topk=3)
        assert unchanged(model, before)

    def test_a_scheme_that_fails_at_the_second_layer(self):
        class Fails(LoRA):
            def fresh(self):
                if self.in_features == 8:
                    raise RuntimeError("no")
                return super().fresh()

        model = net()
        before = snapshot(model)
        with pytest.raises(RuntimeError, match=r"^no\nin 3 \(Linear\)$"):
            adapt(model, Fails, "0|3", rank=2)
        assert unchanged(model, before)

    def test_growth_of_a_model_with_a_merged_layer(self):
        model = at_random(adapt(net(), LoRA, "0|3", rank=2))
        before = snapshot(model)
        model[3].merge()
        with pytest.raises(
            RuntimeError, match=r"^3 cannot grow: 3 \(LoRA\) is merged: call unmerge"
        ):
            grow(model)
        model[3].unmerge()
        assert unchanged(model, before)
        optimiser = torch.optim.SGD(parameters(model), lr=1.0)  # not outgrown after all
        optimiser.step()

    def test_growth_that_fails_half_way(self):
        class Fails(LoRA):
            fails = False

            def fresh(self):
                rows = super().fresh()
                if self.fails:
                    raise ZeroDivisionError("no")
                return rows

        model = at_random(adapt(net(), Fails, "0|3", rank=2))
        before = snapshot(model)
        model[3].fails = True
        with pytest.raises(RuntimeError, match=r"^3 cannot grow: no; no layer has grown$"):
            grow(model)
        assert unchanged(model, before)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.body(self.embed(ids)))


def _pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": spectral_norm,
    "pruned": _pruned,
}


class TestMerging:
    def test_unwrap_gives_the_plain_model_merged(self):
        model = at_random(adapt(net().eval(), LoRA, "0|3", rank=2))
        kinds = [type(module) for module in net().modules()]
        x = torch.randn(4, 6)
        want = model(x)
        assert unwrap(model) is model
        assert [type(module) for module in model.modules()] == kinds
        assert model.state_dict().keys() == net().state_dict().keys()
        torch.testing.assert_close(model(x), want)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    @pytest.mark.parametrize("scheme", [LoRA, MoRA])
    def test_unwrap_without_merging_gives_the_model_as_it_was(self, scheme):
        plain = net().eval()
        model = at_random(adapt(copy.deepcopy(plain), scheme, "0|3", rank=2))
        if scheme is LoRA:
            model[0].merge()
        unwrap(model, merge=scheme is MoRA)
        x = torch.randn(4, 6)
        assert torch.equal(model(x), plain(x))

    def test_a_shared_layers_hooks_come_back_too(self):
        shared, seen = nn.Linear(6, 6), []
        shared.register_forward_hook(lambda layer, args, y: seen.append(y))
        model = nn.Sequential(shared, nn.ReLU(), shared)
        unwrap(at_random(adapt(model, LoRA, "0|2", rank=2)))
        assert model[0] is model[2] is shared
        model(torch.randn(4, 6))
        assert len(seen) == 2

    def test_it_can_be_adapted_again(self):
        model = unwrap(at_random(adapt(net(), LoRA, "0|3", rank=2)))
        adapt(model, MoRA, "0|3", rank=2)
        assert len(list(adapters(model))) == 2

    def test_transformers_are_as_fast_as_before_afterwards(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        model = nn.TransformerEncoder(layer, 2).eval()
        before = [(m.activation_relu_or_gelu) for m in model.layers], model.use_nested_tensor
        unwrap(adapt(model, LoRA, r".*linear[12]", rank=2))
        after = [(m.activation_relu_or_gelu) for m in model.layers], model.use_nested_tensor
        assert after == before

    def test_a_tied_weight_is_refused_and_nothing_moves(self):
        model = at_random(adapt(Tied(), LoRA, "body|head", rank=2))
        before = snapshot(model)
        message = r"^head \(LoRA\) cannot be merged: its weight is also embed.weight$"
        for call in (lambda: unwrap(model), model.head.merge):
            with pytest.raises(RuntimeError, match=message):
                call()
        assert unchanged(model, before)
        model.body.merge()  # which shares nothing

    def test_a_weight_tied_later_is_refused_by_unwrap(self):
        model = at_random(adapt(net(), LoRA, "0|3", rank=2))
        model.other = nn.Linear(6, 8)
        model.other.weight = model[0].base.weight
        with pytest.raises(RuntimeError, match=r"^0 \(LoRA\) cannot be merged: .* other.weight$"):
            unwrap(model)

    @pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
    @pytest.mark.parametrize("kind", [*COMPUTED, "old weight_norm"])
    def test_a_computed_weight_learns_and_is_not_merged(self, kind):
        model = net().eval()
        (COMPUTED | {"old weight_norm": weight_norm})[kind](model[0])
        x = torch.randn(4, 6)
        plain, first = model(x), model[0](x)
        adapt(model, LoRA, "0|3", rank=2)
        torch.testing.assert_close(model(x), plain)
        at_random(model)
        y = model(x)
        torch.testing.assert_close(model[0](x), first + x @ model[0].A.T @ model[0].B)
        before = snapshot(model)
        message = r"^0 \(LoRA\) cannot be merged: its weight is computed"
        for call in (lambda: unwrap(model), model[0].merge):
            with pytest.raises(RuntimeError, match=message):
                call()
        assert unchanged(model, before) and torch.equal(model(x), y)
        unwrap(model, merge=False)
        torch.testing.assert_close(model(x), plain)

    def test_a_subclass_that_does_more_is_not_merged(self):
        class Scaled(nn.Linear):
            def forward(self, x):
                return 3 * super().forward(x)

        model = at_random(adapt(nn.Sequential(Scaled(6, 8)), LoRA, "0", rank=2))
        x = torch.randn(4, 6)
        base = model[0].base
        want = 3 * F.linear(x, base.weight, base.bias) + x @ model[0].A.T @ model[0].B
        torch.testing.assert_close(model(x), want)
        message = r"^0 \(LoRA\) cannot be merged: Scaled does more than nn.Linear$"
        with pytest.raises(RuntimeError, match=message):
            unwrap(model)

    def test_nothing_is_loaded_into_a_merged_layer(self):
        model = at_random(adapt(net(), LoRA, "0|3", rank=2))
        tensors, ours = model.state_dict(), state(model)
        model[0].merge()
        before = snapshot(model)
        for call in (
            lambda: model.load_state_dict(tensors),
            lambda: load_state(model, ours),
            lambda: model.state_dict(),
            lambda: state(model),
        ):
            with pytest.raises(
                RuntimeError, match=r"^0 \(LoRA\) is merged: call unmerge\(\) first"
            ):
                call()
        assert unchanged(model, before)

    def test_16_bits_are_merged_to_rounding(self):
        model = at_random(adapt(net(dtype=torch.bfloat16).eval(), LoRA, "0|3", rank=2))
        x = torch.randn(4, 6).bfloat16()
        want = model(x)
        unwrap(model)
        assert model[0].weight.dtype == torch.bfloat16
        torch.testing.assert_close(model(x), want, rtol=0.05, atol=0.05)


class Owner(nn.Module):
    """A block that calls its layer, reads its weight, or both."""

    def __init__(self, how):
        super().__init__()
        self.fc, self.how = nn.Linear(6, 6), how
        self.layers = nn.ModuleList([nn.Linear(6, 6)])
        self.net = nn.Sequential(nn.Linear(6, 6))

    def forward(self, x):
        match self.how:
            case "reads, then calls":
                return self.fc(x.to(self.fc.weight.dtype)) + self.fc.bias
            case "calls, then reads":
                return self.fc(x) * self.fc.weight.norm()
            case "uses":
                return F.linear(x, self.fc.weight, self.fc.bias)
            case "uses one of a list":
                return F.linear(x, self.layers[0].weight)
            case "uses one of a net":
                return x @ self.net[0].weight
            case "skips":
                return x


class TestOwners:
    @pytest.mark.parametrize("how", ["reads, then calls", "calls, then reads", "skips"])
    @pytest.mark.parametrize("training", [True, False])
    def test_one_that_calls_the_layer_is_served(self, how, training):
        model = nn.Sequential(Owner(how)).train(training)
        x = torch.randn(4, 6)
        want = model(x)
        adapt(model, LoRA, r"0\.(fc|layers\.0|net\.0)", rank=2)
        for _ in range(2):
            assert torch.equal(model(x), want)
        at_random(model)
        assert torch.equal(model(x), want) == (how == "skips")

    @pytest.mark.parametrize(
        ("how", "name"),
        [
            ("uses", "0.fc"),
            ("uses one of a list", "0.layers.0"),
            ("uses one of a net", "0.net.0"),
        ],
    )
    @pytest.mark.parametrize("copied", [False, True])
    def test_one_that_uses_the_weight_alone_is_an_error(self, how, name, copied):
        model = adapt(nn.Sequential(Owner(how)), LoRA, r"0\.(fc|layers\.0|net\.0)", rank=2)
        model = copy.deepcopy(model) if copied else model
        message = rf"^{re.escape(name)} \(LoRA\): Owner uses its weight and does not call it"
        for _ in range(2):
            with pytest.raises(RuntimeError, match=message):
                model(torch.randn(4, 6))

    def test_reading_a_weight_outside_is_no_error(self):
        model = adapt(net(), LoRA, "0|3", rank=2)
        assert model[0].weight.norm() > 0
        model(torch.randn(4, 6))
        assert model[0].weight.norm() > 0


class TestSurvey:
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.conv = nn.Conv2d(1, 1, 1)
            self.lstm = nn.LSTM(6, 6)
            self.attention = nn.MultiheadAttention(6, 2)
            self.lazy = nn.LazyLinear(6)
            with torch.device("meta"):
                self.meta = nn.Linear(6, 6)
            self.experts = nn.Parameter(torch.zeros(2, 6, 6))

    def test_what_matches_and_cannot_be_has_a_reason(self, capsys):
        model = self.Odd()
        targets = r"(?!attention\.).+"  # but for its out_proj, for which the pattern is refused
        past = "read past any wrapper by nn.MultiheadAttention"
        assert survey(model, r".*out_proj") == ({}, {"attention.out_proj": past})
        chosen, left_out = survey(model, targets)
        assert list(chosen) == ["fc"]
        allowed = "allowed: nn.Linear, transformers' Conv1D"
        assert left_out == {
            "conv": f"a torch.nn.modules.conv.Conv2d, {allowed}",
            "lstm": f"a torch.nn.modules.rnn.LSTM, {allowed}",
            "attention": f"a torch.nn.modules.activation.MultiheadAttention, {allowed}",
            "lazy": "a torch.nn.modules.linear.LazyLinear without weights yet: call the model once "
            "first",
            "meta": "a torch.nn.modules.linear.Linear on the meta device: load its weights first",
            "experts": "a parameter of a Odd, and no layer",
        } | {k: v for k, v in left_out.items() if k.partition(".")[2]}
        adapt(model, LoRA, targets, rank=2, verbose=True)
        said = capsys.readouterr().out.splitlines()
        assert said[0] == "fc: Linear -> LoRA"
        assert f"conv: left out, a torch.nn.modules.conv.Conv2d, {allowed}" in said

    def test_where_none_can_be_the_reasons_are_named(self):
        message = (
            "targets '0' matches no nn.Linear: 0 is a torch.nn.modules.conv.Conv2d, allowed: "
            "nn.Linear, transformers' Conv1D"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            adapt(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(2, 2)), LoRA, "0", rank=1)

    @pytest.mark.filterwarnings("ignore:.*(q|Q)uanti")
    def test_a_quantised_layer_is_refused_by_name(self):
        quantised = torch.ao.nn.quantized.dynamic.Linear(6, 6)
        with pytest.raises(ValueError, match=r"0 is a torch\.ao\.nn\.quantized\.dynamic"):
            adapt(nn.Sequential(quantised), LoRA, "0", rank=2)
        with pytest.raises(
            TypeError, match=r"^base is Linear \(torch.ao.nn.quantized.*\), allowed"
        ):
            LoRA(quantised, rank=2)


# MoR1E's w2 stands behind a factor of 100
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_16_bit_base_trains_without_autocast(name, dtype):
    scheme, _, settings = own(name)
    model = adapt(net(dtype=dtype), scheme, "0|3", rank=2, **settings)
    for _ in range(2):
        optimiser = torch.optim.AdamW(parameters(model), lr=1e-2)
        for _ in range(5):
            x = torch.randn(8, 6).to(dtype)
            with context(model, **context_of(model[0], 8)) as batch:
                y = model(x)
                total = y.float().square().mean() + batch.aux_loss
            assert y.dtype == dtype
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            after_step(model)
        grow(model)
    for _, layer in adapters(model):
        assert layer.base.weight.dtype == dtype
        for key, tensor in {**layer._parameters, **layer._buffers}.items():
            if tensor is not None and tensor.is_floating_point():
                assert (tensor.dtype == torch.float32 and tensor.isfinite().all()) or "sigma" in key


class TestDtype:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_it_can_be_chosen_and_stays_when_the_adapter_grows(self, dtype):
        model = adapt(net(), SMoRA, "0|3", rank=2, dtype=dtype)
        grow(model)
        for _, layer in adapters(model):
            assert layer.base.weight.dtype == torch.float32
            assert {t.dtype for t in (layer.A, layer.frozen_B, layer.expert_bias)} == {dtype}
        with context(model):
            assert model(torch.randn(3, 6)).dtype == torch.float32

    @pytest.mark.parametrize("scheme", [MaskMoE, EvoMoE])
    def test_counts_and_masks_are_no_numbers_to_round(self, scheme):
        model = adapt(net(), scheme, "0|3", rank=2, dtype=torch.bfloat16)
        grow(model)
        buffers = [t for _, layer in adapters(model) for t in layer._buffers.values()]
        kinds = {t.dtype for t in buffers if t is not None}
        assert kinds - {torch.bfloat16} == {torch.bool if scheme is MaskMoE else torch.int64}
        with context(model, **context_of(model[0], 3)):
            assert model(torch.randn(3, 6)).isfinite().all()

    def test_what_is_no_dtype_for_it_is_refused(self):
        with pytest.raises(ValueError, match=r"^dtype is torch.int8, allowed: a floating-point"):
            adapt(net(), LoRA, "0", rank=2, dtype=torch.int8)


class TestOutgrown:
    def test_an_optimiser_made_before_growth_is_refused(self):
        model = adapt(net(), LoRA, "0|3", rank=2)
        optimiser = torch.optim.AdamW(parameters(model), lr=1e-2)
        model(torch.randn(3, 6)).sum().backward()
        optimiser.step()
        grow(model)
        message = r"^0 \(LoRA\) has grown since this AdamW was made.*make a new optimiser"
        with pytest.raises(RuntimeError, match=message):
            optimiser.step()
        optimiser.add_param_group({"params": parameters(model)})
        optimiser.step()
        torch.optim.SGD(parameters(model), lr=1.0).step()

    def test_a_model_that_is_gone_is_no_matter(self):
        model = adapt(net(), LoRA, "0|3", rank=2)
        optimiser = torch.optim.AdamW(parameters(model), lr=1e-2)
        grow(model)
        del model
        optimiser.step()

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_data_parallel_wrappers(self, tmp_path):
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        dist.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
        try:
            model = adapt(net(), LoRA, "0|3", rank=2)
            wrapped = DistributedDataParallel(model)
            wrapped(torch.randn(3, 6)).sum().backward()
            with pytest.raises(RuntimeError, match=r"^the model is wrapped by DistributedDataPara"):
                grow(wrapped)
            with pytest.raises(RuntimeError, match=r"^1 is wrapped by DistributedDataParallel"):
                grow(nn.Sequential(nn.ReLU(), wrapped))
            grow(model)
            message = r"^0 \(LoRA\) has grown since this DistributedDataParallel was made"
            with pytest.raises(RuntimeError, match=message):
                wrapped(torch.randn(3, 6))
            wrapped.eval()(torch.randn(3, 6))
            DistributedDataParallel(model.train())(torch.randn(3, 6)).sum().backward()

            from torch.distributed.fsdp import fully_shard

            fully_shard(model)
            with pytest.raises(RuntimeError, match=r"is wrapped by FSDP"):
                grow(model)
            with pytest.raises(RuntimeError, match=r"^0 \(LoRA\) is sharded by FSDP"):
                model[0].grow()
        finally:
            dist.destroy_process_group()


class TestWriters:
    """Files that others write bring back the same model."""

    def grown(self, scheme=LoRAMoE, tasks=3):
        model = adapt(net().eval(), scheme, "0|3", rank=2)
        for _ in range(tasks - 1):
            grow(model)
        for _, layer in adapters(model):
            filled(layer)
        return model

    def same(self, model, other):
        x = torch.randn(4, 6)
        return torch.equal(model(x), other.eval()(x))

    @pytest.mark.parametrize("tasks", [1, 3])
    @pytest.mark.parametrize("scheme", [LoRAMoE, MoSLD, SMoRA])
    def test_a_state_dict(self, scheme, tasks, tmp_path):
        model, fresh = self.grown(scheme, tasks), self.grown(scheme, 1)
        torch.save(model.state_dict(), tmp_path / "a")
        fresh.load_state_dict(torch.load(tmp_path / "a", weights_only=True))
        assert self.same(model, fresh)
        back = self.grown(scheme, 2)
        back.load_state_dict(self.grown(scheme, 1).state_dict())
        assert all(a.ranks == 2 for _, a in adapters(back))

    @pytest.mark.parametrize("tasks", [1, 3])
    def test_safetensors_model_functions(self, tasks, tmp_path):
        from safetensors.torch import load_model, save_model

        model, fresh = self.grown(tasks=tasks), self.grown(tasks=1)
        save_model(model, tmp_path / "a")
        load_model(fresh, tmp_path / "a")
        assert self.same(model, fresh)

    @pytest.mark.parametrize("tasks", [1, 3])
    def test_accelerates_states(self, tasks, tmp_path):
        accelerate = pytest.importorskip("accelerate")
        model, fresh = self.grown(tasks=tasks), self.grown(tasks=1)
        want = copy.deepcopy(model)
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.prepare(model)
        accelerator.save_state(tmp_path)
        accelerator = accelerate.Accelerator(cpu=True)
        fresh = accelerator.prepare(fresh)
        accelerator.load_state(tmp_path)
        assert self.same(want, fresh)

    def test_the_base_keeps_its_names_and_nothing_is_empty(self):
        tensors = self.grown(tasks=1).state_dict()
        assert net().state_dict().keys() <= tensors.keys()
        assert all(t.numel() for t in tensors.values())
        plain = net()
        missing = plain.load_state_dict(tensors, strict=False).missing_keys
        assert not missing and torch.equal(plain[0].weight, tensors["0.weight"])

    def test_a_file_of_the_older_names_loads(self):
        model, fresh = self.grown(), self.grown(tasks=1)
        old = {
            re.sub(r"^(\d)\.(weight|bias)$", r"\1.base.\2", k): v
            for k, v in model.state_dict().items()
        }
        fresh.load_state_dict(old)
        assert self.same(model, fresh)

    def test_a_state_dict_with_a_strange_or_missing_name_is_refused(self):
        tensors = self.grown().state_dict()
        for wrong in (
            tensors | {"0.odd": torch.ones(1)},
            {k: v for k, v in tensors.items() if k != "0.A"},
        ):
            with pytest.raises(RuntimeError, match=r"0\.(odd|A)"):
                self.grown().load_state_dict(wrong)

    def test_state_is_a_copy(self):
        model = self.grown()
        best, x = state(model), torch.randn(4, 6)
        want = model(x)
        with torch.no_grad():
            for p in parameters(model):
                p.add_(1.0)
        assert not torch.equal(model(x), want)
        load_state(model, best)
        assert torch.equal(model(x), want)

    @pytest.mark.filterwarnings("ignore:.*jit.script_method:DeprecationWarning")
    @pytest.mark.parametrize("wrap", ["compiled", "compiled inside", "data parallel", "both"])
    def test_a_wrapped_model_is_saved_as_the_plain_one(self, wrap, tmp_path):
        model = self.grown()
        plain = copy.deepcopy(model)
        if wrap == "compiled inside":
            model = nn.Sequential(torch.compile(model[0]), *model[1:])
        if wrap in ("compiled", "both"):
            model = torch.compile(model)
        if wrap in ("data parallel", "both"):
            model = nn.DataParallel(model)
        assert [name for name, _ in adapters(model)] == ["0", "3"]
        save(model, tmp_path / "a")
        fresh = self.grown(tasks=1)
        load(fresh, tmp_path / "a")
        assert self.same(plain, fresh)
        load(model, tmp_path / "a")

    def test_settings_that_are_numbers_of_another_kind(self, tmp_path):
        import numpy as np

        class Own(LoRA):
            def __init__(self, base, rank=2, scale=1.0, pair=(1, 2), odd=float("nan")):
                super().__init__(base, rank, scale)
                self.pair, self.odd = pair, odd

        for scale in (np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5]), np.float64(0.5)):
            model = adapt(net(), Own, "0", rank=np.int64(2), scale=scale)
            save(model, tmp_path / "a")
            load(adapt(net(), Own, "0", rank=2, scale=0.5), tmp_path / "a")
            with pytest.raises(ValueError, match=r"'scale': 0\.5"):
                load(adapt(net(), Own, "0", rank=2, scale=0.25), tmp_path / "a")

    def test_a_setting_that_a_file_cannot_hold_is_named(self, tmp_path):
        model = adapt(net(), LoRA, "0", rank=2, scale=1.0)
        model[0].scale = print
        with pytest.raises(ValueError, match=r"^0: scale is a builtin_function_or_method, which a"):
            save(model, tmp_path / "a")
        assert not list(tmp_path.iterdir())


class TestOdd:
    """Kinds that were found by trying."""

    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 6)
            self.net = nn.Sequential(self.fc1, nn.ReLU(), self.fc2)
            self.plain = [self.fc1]

        def forward(self, x, past=False):
            return self.plain[0](x) if past else self.net(x)

    def test_a_layer_under_two_names_is_wrapped_under_both(self):
        model = at_random(adapt(self.Alias(), LoRA, "fc1", rank=2))
        assert model.fc1 is model.net[0] and isinstance(model.fc1, LoRA)
        x = torch.randn(4, 6)
        want = model(x)
        unwrap(model)
        assert model.fc1 is model.net[0] and isinstance(model.fc1, nn.Linear)
        torch.testing.assert_close(model(x), want)

    def test_a_layer_called_past_its_adapter_is_an_error(self):
        model = adapt(self.Alias(), LoRA, "fc1", rank=2)
        model.fc1.base(torch.randn(4, 6))  # by hand: no matter
        with pytest.raises(
            RuntimeError, match=r"^fc1 \(LoRA\): Alias uses its weight and does not"
        ):
            model(torch.randn(4, 6), past=True)

    def test_one_layer_gets_one_adapter_whatever_the_module_that_is_adapted(self):
        shared = nn.Linear(6, 6)
        model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared))
        adapt(model[0], LoRA, "0", rank=2)
        with pytest.raises(
            ValueError, match=r"^targets '0' matches 0, which is adapted under another name"
        ):
            adapt(model[1], LoRA, "0", rank=2)

    @pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
    @pytest.mark.parametrize(
        ("make", "remove"),
        [
            (weight_norm, torch.nn.utils.remove_weight_norm),
            (spectral_norm, torch.nn.utils.remove_spectral_norm),
            (_pruned, lambda layer: prune.remove(layer, "weight")),
        ],
    )
    def test_a_computed_weights_hooks_are_there_after_unwrap(self, make, remove):
        model = nn.Sequential(make(nn.Linear(6, 6)))
        unwrap(adapt(model, LoRA, "0", rank=2), merge=False)
        remove(model[0])
        assert not model[0]._forward_pre_hooks

    @pytest.mark.parametrize("name", ["mosld", "mocle", "mor1e", "lora"])
    def test_an_old_optimiser_is_refused_also_where_some_rows_are_shared(self, name):
        scheme, _, settings = own(name)
        model = adapt(net(), scheme, "0|3", rank=2, **settings)
        optimiser = torch.optim.AdamW(parameters(model), lr=1e-2)
        grow(model)
        with pytest.raises(RuntimeError, match=r"has grown since this AdamW was made.*its (A|B)"):
            optimiser.step()
        optimiser.add_param_group({"params": [model[0].A] if name == "lora" else [model[0].B]})
        with pytest.raises(RuntimeError, match=r"has grown since this AdamW was made"):
            optimiser.step()
        pickle.dumps(optimiser)

    def test_a_head_that_is_adapted_later_is_frozen(self):
        model = adapt(net(), LoRA, "0", train="3", rank=2)
        adapt(model, LoRA, "3", rank=2)
        assert not any(p.requires_grad for p in model[3].base.parameters())
        assert count(model)["trainable"] == count(model)["stored"] == 2 * 28

    @pytest.mark.parametrize(
        "head",
        [
            lambda: nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3)),
            lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 3))),
        ],
    )
    def test_all_buffers_of_a_head_are_saved(self, head, tmp_path):
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(
                adapt(nn.Sequential(nn.Linear(6, 6), head()), LoRA, "0", train="1", rank=2)
            )
        model, fresh = models
        for _ in range(3):
            model(torch.randn(5, 6))
        save(model, tmp_path / "a")
        load(fresh, tmp_path / "a")
        x = torch.randn(5, 6)
        assert torch.equal(fresh.eval()(x), model.eval()(x))

    def test_a_bias_that_was_let_go_is_saved(self, tmp_path):
        models = []
        for _ in range(2):
            models.append(adapt(net().eval(), LoRA, "0|3", rank=2))
            models[-1][0].bias.requires_grad_(True)
        models[0][0].bias.data.add_(1.0)
        save(models[0], tmp_path / "a")
        load(models[1], tmp_path / "a")
        assert torch.equal(models[0][0].bias, models[1][0].bias)

    def test_names_that_clash_are_refused(self):
        class Own(nn.Linear):
            def __init__(self):
                super().__init__(6, 6)
                self.A = nn.Parameter(torch.zeros(1))
                self.scale = 3.0

        model = nn.Sequential(Own())
        before = snapshot(model)
        message = r"^0 \(Own\): the layer has a A and a scale of its own, as its adapter has$"
        with pytest.raises(ValueError, match=message):
            adapt(model, LoRA, "0", rank=2)
        assert unchanged(model, before)

    def test_what_a_layer_has_beyond_linear_is_asked_of_it(self):
        class Own(nn.Linear):
            kind = "own"

        model = adapt(nn.Sequential(Own(6, 6)), LoRA, "0", rank=2)
        assert model[0].kind == "own" and copy.deepcopy(model)[0].kind == "own"
        with pytest.raises(AttributeError, match="nothing"):
            _ = model[0].nothing

    def test_a_weight_is_not_set_past_the_adapter(self):
        model = adapt(Tied(), LoRA, "head", rank=2)
        model.head.weight = model.embed.weight  # tied already
        with pytest.raises(
            RuntimeError, match=r"^head \(LoRA\) is adapted, and its weight cannot be"
        ):
            model.head.weight = nn.Parameter(torch.zeros(9, 6))

    def test_a_blocks_attention_says_where_samples_are(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.attn, self.mlp = nn.MultiheadAttention(8, 2), nn.Sequential(nn.Linear(8, 8))

        model = adapt(Block(), LoRA, r"mlp\.0", rank=2)
        assert not model.mlp[0].batch_first

    def test_four_axes_with_samples_last(self):
        layer = adapt(nn.Sequential(nn.Linear(6, 6)), LoRA, "0", rank=2, batch_first=False)[0]
        x = torch.randn(2, 3, 4, 6)
        first = layer.samples_first(x)
        assert first.shape == (4, 2, 3, 6) and torch.equal(layer.samples_first(first, back=True), x)

    def test_the_mode_inside_a_layer_stays(self):
        layer = parametrizations.spectral_norm(nn.Linear(6, 6))
        layer.parametrizations.eval()
        model = adapt(nn.Sequential(layer), LoRA, "0", rank=2)
        assert model[0].training and not model[0].base.parametrizations.training

    def test_complex_weights_are_refused(self):
        with pytest.raises(TypeError, match=r"^base is of torch.complex64, allowed: real numbers"):
            LoRA(nn.Linear(6, 6, dtype=torch.complex64), rank=2)

    def test_counts_end_where_a_state_is_loaded(self):
        model = adapt(net(), SMoRA, "0|3", rank=2, top_k=1)
        with context(model):
            model(torch.randn(4, 6))
        load_state(model, state(model))
        assert model[0].counts is None

    def test_a_layer_by_itself_is_saved(self, tmp_path):
        layer, fresh = (LoRA(nn.Linear(6, 6), rank=2) for _ in range(2))
        layer.B.data.normal_()
        save(layer, tmp_path / "a")
        load(fresh, tmp_path / "a")
        assert torch.equal(layer.B, fresh.B)

    def test_a_tied_models_file_loads(self, tmp_path):
        from safetensors.torch import load_model, save_model

        model, fresh = (adapt(Tied(), LoRA, "body|head", rank=2).eval() for _ in range(2))
        at_random(model)
        save_model(model, tmp_path / "a")
        load_model(fresh, tmp_path / "a")
        ids = torch.tensor([1, 5])
        assert torch.equal(model(ids), fresh(ids))

    def test_linears_keyword_works(self):
        model = adapt(net(), LoRA, "0", rank=2)
        x = torch.randn(4, 6)
        assert torch.equal(model[0](input=x), model[0](x))

    def test_2_is_2(self, tmp_path):
        save(adapt(net(), LoRA, "0", rank=2, scale=2), tmp_path / "a")
        load(adapt(net(), LoRA, "0", rank=2, scale=2.0), tmp_path / "a")
        with pytest.raises(ValueError, match="batch_first"):
            load(adapt(net(), LoRA, "0", rank=2, scale=2.0, batch_first=False), tmp_path / "a")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"top_k": 2.5}, r"0 \(Linear\): top_k is 2.5, allowed: a whole number"),
            ({"rank": 2.5}, r"0 \(Linear\): rank is 2.5, allowed: a whole number"),
            ({"scale": float("nan")}, r"0 \(Linear\): scale is nan, allowed: a number"),
        ],
    )
    def test_settings_that_are_no_numbers_for_it(self, settings, message):
        with pytest.raises(ValueError, match=f"^{message}$"):
            adapt(net(), MoRA, "0", **{"rank": 2} | settings)

    def test_an_update_of_ones_own_may_be_needed_by_its_gradient(self):
        class Own(LoRA):
            def update(self, x):
                return super().update(x).tanh()

        model = at_random(adapt(net(), Own, "0|3", rank=2))
        model(torch.randn(4, 6)).sum().backward()
