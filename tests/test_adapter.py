"""The skeleton: what a gate needs beyond x reaches it, and nothing else does."""

import copy
import math
import re

import pytest
import torch
from layers import arrays, calm, context_of, filled, grown, network, own, tokens_each
from torch import nn

from minimoe import LoRAMoE, MoRA
from minimoe.adapt import WithContext, adapt, adapters, context, grow
from minimoe.roster import SCHEMES
from minimoe.schemes.mocle import MoCLE

NEEDS = {  # every scheme of the roster that needs context: which
    name: next(iter(layer.needs()))
    for name in SCHEMES
    for layer in [grown(name, tasks=1).train()]
    if layer.needs()
}


class TestContext:
    """Context is of samples, which are the first axes of what a layer sees."""

    @pytest.mark.parametrize(
        ("samples", "tokens"),
        [((), ()), ((4,), ()), ((4,), (3,)), ((4,), (2, 3)), ((4, 2), (3,)), ((), (3,))],
    )
    @pytest.mark.parametrize("name", NEEDS)
    def test_every_token_gets_the_context_of_its_sample(self, name, samples, tokens):
        layer = calm(grown(name))
        x = torch.randn(*samples, *tokens, 7, dtype=torch.float64)
        given, flat = context_of(layer, *samples), x.reshape(-1, 7)
        each = tokens_each(given, samples, tokens)
        with context(layer, **given) as batch:
            y, aux = layer(x), batch.aux_loss
        with context(layer, **each):
            assert torch.allclose(y.reshape(-1, 5), layer(flat), rtol=0, atol=1e-12)
        if hasattr(own(name)[1], "AUX"):
            sample = [t // math.prod(tokens) for t in range(len(flat))]
            numbers = {"label": each["label"].tolist(), "sample": sample}
            wanted = own(name)[1].expected_aux(layer, flat.numpy(), arrays(layer), numbers)
            assert math.isclose(aux.item(), wanted, rel_tol=1e-9)

    @pytest.mark.parametrize("name", NEEDS)
    def test_what_is_missing_is_named(self, name):
        layer, what = grown(name), NEEDS[name]
        call = rf"with context\(model, {what}=...\): model\(x\)"
        message = f"^{type(layer).__name__} needs the {what}: {call}$"
        with pytest.raises(RuntimeError, match=message), context(layer, other=torch.zeros(2)):
            layer(torch.randn(2, 7, dtype=torch.float64))

    @pytest.mark.parametrize("name", ["lora_moe_plugin", "meteora"])
    def test_labels_are_for_training_only(self, name):
        layer = grown(name).eval()
        assert layer.needs() == {}
        assert layer(torch.randn(2, 7, dtype=torch.float64)).isfinite().all()

    @pytest.mark.parametrize(
        ("name", "given", "x", "allowed"),
        [
            ("mocle", (3,), (2, 4, 7), "its first axes"),
            ("mocle", (4,), (2, 4, 7), "its first axes"),
            ("mocle", (2, 4, 7), (2, 4, 7), "its first axes"),
            ("mocle", (1,), (7,), "its first axes"),
            ("lora_moe_plugin", (3,), (2, 7), "its first axes"),
            ("meteora", (2, 3), (2, 4, 7), "its first axes"),
            ("mor1e", (3, 3), (2, 4, 7), "its first axes, then 3"),
            ("mor1e", (2, 5), (2, 4, 7), "its first axes, then 3"),
            ("mor1e", (2,), (2, 4, 7), "its first axes, then 3"),
            ("mor1e", (), (2, 4, 7), "its first axes, then 3"),
        ],
    )
    def test_context_of_other_samples_is_refused(self, name, given, x, allowed):
        layer, what = grown(name), NEEDS[name]
        value = torch.zeros(given, dtype=torch.float64 if name == "mor1e" else torch.int64)
        kind = type(layer).__name__
        message = re.escape(f"{kind}: {what} is {given}, allowed for x {x}: {allowed}")
        with pytest.raises(ValueError, match=f"^{message}$"), context(layer, **{what: value}):
            layer(torch.zeros(x, dtype=torch.float64))

    @pytest.mark.parametrize(("name", "odd"), [("mocle", 6), ("mocle", -1), ("lora_moe_plugin", 3)])
    def test_an_index_out_of_range_is_named(self, name, odd):
        layer = grown(name)
        most = 5 if name == "mocle" else 2
        with (
            pytest.raises(ValueError, match=f"{NEEDS[name]} is {odd}, allowed: 0 to {most}$"),
            context(layer, **{NEEDS[name]: torch.tensor([0, odd])}),
        ):
            layer(torch.randn(2, 7, dtype=torch.float64))

    def test_inside_another_both_hold_and_the_inner_ends_first(self):
        net = nn.Sequential(grown("mocle", O=7), grown("mor1e"))
        x, e = torch.randn(2, 7, dtype=torch.float64), torch.randn(2, 3)
        first, second = torch.tensor([0, 3]), torch.tensor([5, 1])
        with context(net, cluster=first):
            with context(net, embedding=e):
                y = net(x)
                with context(net, cluster=second):
                    assert not torch.allclose(net(x), y)
                assert torch.equal(net(x), y)
            assert all(list(layer.context) == ["cluster"] for layer in net)
            with pytest.raises(RuntimeError, match="MoR1E needs the embedding"):
                net(x)
        assert all(layer.context == {} for layer in net)

    def test_no_context_is_left_after_an_exception(self):
        layer = grown("mocle")
        with pytest.raises(KeyError), context(layer, cluster=torch.tensor(1)):
            raise KeyError
        assert layer.context == {}

    def test_a_copy_made_meanwhile_was_not_given(self):
        layer = grown("mocle")
        with context(layer, cluster=torch.tensor(1)):
            other = copy.deepcopy(layer)
        assert layer.context == other.context == {}

    def test_a_model_that_knows_nothing_of_it_passes_it_on(self):
        block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        net = nn.Sequential(nn.Sequential(nn.Linear(6, 8), block), nn.LayerNorm(8))
        adapt(net, MoCLE, r".*linear[12]", rank=2, clusters=4, tau=0.6)
        grow(net)
        for _, layer in adapters(net):
            filled(layer)
        x, clusters = torch.randn(3, 5, 6), torch.tensor([7, 0, 3])
        with context(net, cluster=clusters):
            y = net(x)
        for sample, cluster, answer in zip(x, clusters, y, strict=True):
            with context(net, cluster=cluster.view(1)):
                alone = net(sample.view(1, 5, 6))
            assert torch.allclose(alone[0], answer, atol=1e-5)
        with context(net, cluster=clusters.roll(1)):
            assert not torch.allclose(net(x), y, atol=1e-2)

    def test_with_context_describes_every_input(self):
        net, x = network("mocle"), torch.randn(4, 6)
        described = WithContext(net, lambda x: {"cluster": (x[:, 0] > 0).long()})
        with context(net, cluster=(x[:, 0] > 0).long()):
            y = net(x)
        with context(net, cluster=(x[:, 0] < 0).long()):
            assert torch.equal(described(x), y)
            assert not torch.allclose(net(x), y)
        assert torch.equal(described(x), y)
        assert net.fc1.context == {}

    # torch's own tracer makes an instance of autograd.Function, and torch's own Function warns
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("name", NEEDS)
    def test_a_compiled_model_takes_it_as_an_input(self, name):
        net = network(name)
        for _, layer in adapters(net):
            calm(layer)
        x = torch.randn(4, 3, 6)
        torch.compiler.reset()
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        found = []
        with torch._dynamo.config.patch(error_on_recompile=True):
            for given in (context_of(net.fc1, 4), context_of(net.fc1, 4)):
                both = []
                for model in (compiled, net):
                    with context(net, **given) as batch:
                        y = model(x)
                        aux = torch.as_tensor(batch.aux_loss).view(1)
                    both.append(torch.cat([y.flatten(), aux]))
                assert torch.allclose(*both, atol=1e-5)
                found.append(both[0])
        # where a task adds one expert, each class sees it
        assert name == "mask_moe" or not torch.allclose(*found, atol=1e-3)


class Strays(LoRAMoE):
    """Its gate keeps an expert that there is not."""

    stray = 0

    def gate(self, x):
        ones = x.new_ones(*x.shape[:-1], 1)
        return self.gate_blocks(x, torch.full_like(ones, self.stray, dtype=torch.int64), ones)


class StrayRanks(MoRA):
    """Its gate keeps ranks that there are not."""

    stray = 0

    def gate(self, x):
        idx, weight, z, *_ = super().gate(x)
        return idx + self.stray, weight, z


@pytest.mark.parametrize("path", ["auto", "plain", "dense", "gather", "compact"])
@pytest.mark.parametrize("stray", [-1, 99, 10**8])
@pytest.mark.parametrize("scheme", [Strays, StrayRanks])
def test_a_gate_that_keeps_a_rank_that_is_not_there_is_named(scheme, stray, path):
    layer = scheme(nn.Linear(7, 5), rank=2, top_k=1)
    for _ in range(20):
        layer.grow()
    layer.path, layer.stray = path, stray
    if scheme is StrayRanks:
        layer.stray = -99 if stray < 0 else stray
    with pytest.raises(
        ValueError, match=r"idx holds -?\d+, allowed: 0 to 41, as there are 42 ranks"
    ):
        layer(torch.randn(2000, 7))
