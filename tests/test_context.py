"""What a batch is given, and what its passes leave: the sum is right, or there is an error."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from layers import filled, grown
from torch import nn
from torch.utils.checkpoint import checkpoint

from minimoe import Adapter, LoRA, LoRAMoE, MoRA
from minimoe.adapt import WithContext, adapt, adapters, after_step, context, grow, parameters
from minimoe.schemes.ewc import EWC
from minimoe.schemes.flylora import FlyLoRA
from minimoe.schemes.lora_moe_plugin import LoRAMoEPlugin
from minimoe.schemes.meteora import MeteoRA
from minimoe.schemes.mocle import MoCLE
from minimoe.schemes.olora import OLoRA
from minimoe.schemes.sema import SEMA
from minimoe.schemes.smora import SMoRA

# schemes that leave a loss of a pass, one of the weights, or counts
LOSSES = {
    "lora_moe": (LoRAMoE, {"balance": 0.5, "top_k": 1}),
    "sema": (SEMA, {"width": 2}),
    "olora": (OLoRA, {}),
    "ewc": (EWC, {}),
}
OF_PASSES = ["lora_moe", "sema"]
COUNTS = {"smora": (SMoRA, {"top_k": 2}), "flylora": (FlyLoRA, {"top_k": 2})}


def network(name, tasks=2):
    """Two adapted layers, 6 to 8 and 8 to 6, in float64."""
    scheme, settings = (LOSSES | COUNTS)[name]
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)).double()
    adapt(net, scheme, r"0|2", rank=2, **settings)
    for _ in range(tasks - 1):
        grow(net)
    for _, layer in adapters(net):
        filled(layer)
    return net


def inputs(*calls):
    """x of a call: (3, 4, 6), the same for the same number."""
    return [
        torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(call))
        for call in calls
    ]


def losses_by_hand(net, *xs):
    """The losses of all layers and passes, from gates that were asked, and the penalties."""
    total = 0.0
    for x in xs:
        for _, layer in adapters(net):
            loss = layer.gate(x).loss
            total = total + (0.0 if loss is None else loss)
            x = layer(x).relu()
    for _, layer in adapters(net):
        penalty = layer.penalty()
        total = total + (0.0 if penalty is None else penalty)
    return total


def gradients(net, loss):
    return torch.autograd.grad(loss, parameters(net), materialize_grads=True)


def same(got, want):
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LoRAMoE|SEMA|OLoRA|EWC")
        yield


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize("name", LOSSES)
class TestLoss:
    def test_passes_of_a_batch_add_up_and_a_penalty_counts_once(self, name):
        net, xs = network(name), inputs(1, 2)
        with context(net) as batch:
            for x in xs:
                net(x)
        want = losses_by_hand(net, *xs)
        assert torch.isclose(batch.aux_loss, want, rtol=1e-12)
        same(gradients(net, batch.aux_loss), gradients(net, want))

    def test_a_batch_ends_with_its_with(self, name):
        net, (x, other) = network(name), inputs(1, 2)
        with context(net) as batch:
            net(x).sum().backward()
        first = batch.aux_loss.item()
        net(other)  # outside: leaves nothing
        with context(net) as later:
            net(other)
        assert batch.aux_loss.item() == first
        assert torch.isclose(later.aux_loss, losses_by_hand(net, other))
        with context(net) as nothing:
            pass
        penalties = losses_by_hand(net)
        assert nothing.aux_loss == penalties

    def test_a_skipped_layer_leaves_no_old_loss(self, name):
        net, (x, other) = network(name), inputs(1, 2)
        with context(net) as batch:
            (net(x).sum() + batch.aux_loss).backward()
        with context(net) as batch:
            y = net[0](other)
            (y.sum() + batch.aux_loss).backward()  # no graph is gone through a second time
        loss = net[0].gate(other).loss
        want = (0.0 if loss is None else loss) + losses_by_hand(net)
        assert torch.isclose(torch.as_tensor(batch.aux_loss), torch.as_tensor(want))

    def test_a_coefficient_of_0_and_growth_end_the_loss(self, name):
        net, (x,) = network(name), inputs(1)
        with context(net) as batch:
            (net(x).sum() + batch.aux_loss).backward()
        grow(net)
        for _, layer in adapters(net):
            for knob in ("balance", "orthogonality", "importance"):
                if hasattr(layer, knob):
                    setattr(layer, knob, 0.0)
        with context(net) as batch:
            (net(x).sum() + batch.aux_loss).backward()
        if name != "sema":
            assert batch.aux_loss == 0

    @pytest.mark.parametrize("scale", [1.0, 1024 / 3])
    def test_micro_batches_add_up_at_any_scale(self, name, scale):
        net, xs = network(name), inputs(1, 2, 3)
        for x in xs:
            with context(net) as batch:
                total = scale * (net(x).square().sum() + batch.aux_loss)
            total.backward()
        want = sum(net(x).square().sum() + losses_by_hand(net, x) for x in xs)
        got = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters(net)]
        same(got, [scale * g for g in gradients(net, want)])

    def test_two_models_at_once_do_not_mix(self, name):
        one, two, (x, other) = network(name), network(name), inputs(1, 2)
        with context(one) as first, context(two) as second:
            one(x)
            two(other)
            one(other)
        assert torch.isclose(first.aux_loss, losses_by_hand(one, x, other))
        assert torch.isclose(second.aux_loss, losses_by_hand(two, other))

    def test_a_batch_that_raised_leaves_nothing(self, name):
        net, (x,) = network(name), inputs(1)
        with pytest.raises(KeyError), context(net):
            net(x)
            raise KeyError
        assert all(layer.step.record is None for _, layer in adapters(net))
        with context(net) as batch:
            net(x)
        assert torch.isclose(batch.aux_loss, losses_by_hand(net, x))

    def test_evaluation_leaves_nothing_and_no_grad_the_number(self, name):
        net, (x,) = network(name), inputs(1)
        with context(net.eval()) as batch:
            net(x)
        assert batch.aux_loss == 0.0
        with context(net.train()) as batch, torch.no_grad():
            net(x)
            assert torch.isclose(batch.aux_loss, losses_by_hand(net, x))
        if name in OF_PASSES:
            with pytest.raises(RuntimeError, match=r"^0 \(.*made without gradients.*use_reentrant"):
                _ = batch.aux_loss

    def test_reading_changes_nothing(self, name):
        net, (x,) = network(name), inputs(1)
        with context(net) as batch:
            net(x)
            values = [batch.aux_loss.item() for _ in range(3)]
        assert len({*values, batch.aux_loss.item()}) == 1

    def test_an_inner_context_gives_what_it_leaves_to_the_outer(self, name):
        net, xs = network(name), inputs(1, 2)
        alone = losses_by_hand(net, xs[1])
        with context(net) as outer:
            net(xs[0])
            with context(net) as inner:
                net(xs[1])
            assert torch.isclose(inner.aux_loss, alone)
        assert torch.isclose(outer.aux_loss, losses_by_hand(net, *xs))

    def test_copies_made_meanwhile_are_of_no_batch(self, name):
        net, (x,) = network(name), inputs(1)
        with context(net) as batch:
            net(x)
            for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
                assert all(layer.step.record is None for _, layer in adapters(other))
                with context(other) as own:
                    other(x)
                assert torch.isclose(own.aux_loss, batch.aux_loss)

    def test_a_gate_that_is_asked_leaves_nothing(self, name):
        net, (x,) = network(name), inputs(1)
        before = copy.copy(net[0].step)
        with context(net) as batch:
            net[0].gate(x)
            assert batch.aux_loss == losses_by_hand(net)
        assert net[0].step == before

    @pytest.mark.parametrize("where", ["inside", "outside", "in another"])
    @pytest.mark.parametrize("passes", [1, 2])
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_checkpointed_loss_is_right_or_an_error(self, name, reentrant, passes, where):
        net, xs = network(name), inputs(*range(passes))
        want = sum(net(x).square().sum() for x in xs) + losses_by_hand(net, *xs)
        want = gradients(net, want)

        def run(x):
            x = x.requires_grad_()
            return checkpoint(net, x, use_reentrant=reentrant).square().sum()

        with context(net) as batch:
            total = sum(run(x) for x in xs)
            if reentrant and name in OF_PASSES:
                with pytest.raises(RuntimeError, match=r"^0 \(.*use_reentrant=False"):
                    _ = batch.aux_loss
                return
            total = total + batch.aux_loss
            if where == "inside":
                total.backward()
        if where == "outside":
            total.backward()
        if where == "in another":
            with context(net) as other:
                total.backward()
            assert other.aux_loss == losses_by_hand(net)
        same([p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters(net)], want)

    # torch's own tracer makes an instance of autograd.Function, and torch's own Function warns
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_a_compiled_model_leaves_the_same_in_one_graph(self, name):
        net, xs = network(name), inputs(1, 2, 3)
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        for x in xs:
            with context(net) as batch:
                total = compiled(x).square().sum() + batch.aux_loss
            want = net(x).square().sum() + losses_by_hand(net, x)
            same(gradients(net, total), gradients(net, want))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_the_private_call_that_tells_a_second_run_is_there():
    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            seen.append(torch._C._current_graph_task_id())
            return dx

    seen = [torch._C._current_graph_task_id()]
    Look.apply(torch.ones(1, requires_grad=True)).backward()
    assert seen[0] == -1 and seen[1] != -1


@pytest.mark.parametrize("name", [*LOSSES, *COUNTS])
def test_a_training_pass_outside_a_batch_says_so_once(name):
    net, (x,) = network(name), inputs(1)
    with pytest.warns(UserWarning, match=r"only inside `with context\(model\) as batch:`") as said:
        net(x)  # both layers
    assert len(said) == 1
    copy.deepcopy(net)(x)  # a warning would be an error
    net(x)
    with torch.no_grad():
        net[2](net[0](x))
    net.eval()(x)


def test_without_a_loss_nothing_is_said():
    for scheme in (LoRA, MoRA, LoRAMoE):
        grown(scheme)(torch.randn(3, 7, dtype=torch.float64))


@pytest.mark.parametrize("name", COUNTS)
class TestCounts:
    def biases(self, net):
        return torch.cat([layer.expert_bias for _, layer in adapters(net)])

    def test_micro_batches_move_biases_as_the_whole_batch_does(self, name):
        torch.manual_seed(3)
        net, x = network(name), torch.randn(20, 6, dtype=torch.float64)
        net[2].requires_grad_(False)
        whole = copy.deepcopy(net)
        with context(whole):
            whole(x)
        after_step(whole)
        for part in x.split(5):
            with context(net):
                net(part)
        after_step(net)
        assert torch.equal(self.biases(net), self.biases(whole))
        last = copy.deepcopy(network(name))
        assert not torch.equal(self.biases(net), self.biases(last))

    def test_both_calls_of_a_layer_count(self, name):
        layer, (x,) = network(name)[0], inputs(1)
        with context(layer):
            layer(x)
            layer(x[:2])
        assert layer.counts.sum() == 2 * 12 + 2 * 8 and layer.counts.dtype == torch.int64

    def test_a_batch_that_raised_counts_nothing(self, name):
        net, (x,) = network(name), inputs(1)
        with context(net):
            net(x)
        before = net[0].counts.clone()
        with pytest.raises(KeyError), context(net):
            net(x)
            raise KeyError
        assert torch.equal(net[0].counts, before)
        with context(net), pytest.raises(KeyError), context(net):
            net(x)
            raise KeyError
        assert torch.equal(net[0].counts, before)

    def test_a_step_inside_its_batch_is_a_step_too(self, name):
        net, (x,) = network(name), inputs(1)
        other = copy.deepcopy(net)
        with context(net):
            net(x)
            after_step(net)
        with context(other):
            other(x)
        after_step(other)
        assert torch.equal(self.biases(net), self.biases(other))
        assert net[0].counts is None

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_second_run_counts_nothing(self, name, reentrant):
        net, (x,) = network(name), inputs(1)
        with context(net):
            y = checkpoint(net, x.requires_grad_(), use_reentrant=reentrant)
            once = net[0].counts.clone()
            y.sum().backward()
        assert torch.equal(net[0].counts, once) and once.sum() == 24


class TestContextUnderCheckpointing:
    """The second run has the words of the first, whatever is open then."""

    def net(self):
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)).double()
        adapt(net, MoCLE, r"0|2", rank=2, clusters=4, tau=0.6)
        grow(net)
        for _, layer in adapters(net):
            filled(layer)
        return net

    def run(self, net, x, reentrant):
        return checkpoint(net, x.requires_grad_(), use_reentrant=reentrant).square().sum()

    def wanted(self, net, x, ids):
        with context(net, cluster=ids):
            return torch.autograd.grad(net(x).square().sum(), parameters(net))

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("where", ["inside", "outside", "in another"])
    def test_it_is_the_first_runs(self, where, reentrant):
        net, (x,) = self.net(), inputs(1)
        ids, others = torch.tensor([7, 0, 3]), torch.tensor([1, 5, 2])
        want = self.wanted(net, x, ids)
        assert not torch.allclose(want[0], self.wanted(net, x, others)[0])
        for _ in range(2):
            net.zero_grad()
            with context(net, cluster=ids):
                total = self.run(net, x, reentrant)
                if where == "inside":
                    total.backward()
            if where == "outside":
                total.backward()
            if where == "in another":
                with context(net, cluster=others):
                    total.backward()
            same([p.grad for p in parameters(net)], want)

    def test_two_contexts_before_one_backward_are_an_error(self):
        net, (x, y) = self.net(), inputs(1, 2)
        with context(net, cluster=torch.tensor([7, 0, 3])):
            one = self.run(net, x, False)
        with context(net, cluster=torch.tensor([1, 5, 2])):
            two = self.run(net, y, False)
        with pytest.raises(RuntimeError, match=r"^[02] \(MoCLE\): a checkpointed block runs again"):
            (one + two).backward()
        # and one backward for each is right, from then on
        net.zero_grad()
        ids = torch.tensor([7, 0, 3])
        with context(net, cluster=ids):
            self.run(net, x, False).backward()
        same([p.grad for p in parameters(net)], self.wanted(net, x, ids))

    @pytest.mark.parametrize("order", ["both", "first", "last"])
    def test_a_reentrant_checkpoint_knows_its_own(self, order):
        net, (x, y) = self.net(), inputs(1, 2)
        a, b, c = (torch.tensor(ids) for ids in ([7, 0, 3], [1, 5, 2], [4, 4, 4]))
        with context(net, cluster=a):
            one = self.run(net, x, True)
        with context(net, cluster=b):
            two = checkpoint(
                lambda x: self.run(net, x, True), y.requires_grad_(), use_reentrant=True
            )
        with context(net, cluster=c), torch.no_grad():
            net(x)
            net.eval()(x)
        with context(net.train(), cluster=c):
            net(x).sum()
            if order == "both":
                (one + two).backward()
            for part in {"both": (), "first": (one, two), "last": (two, one)}[order]:
                part.backward()
        both = zip(self.wanted(net, x, a), self.wanted(net, y, b), strict=True)
        same([p.grad for p in parameters(net)], [g + h for g, h in both])

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_context_inside_the_block_is_made_again(self, reentrant):
        net, (x, y) = self.net(), inputs(1, 2)
        told = WithContext(net, lambda x: {"cluster": (x[:, 0, 0] > 0).long() + 3})
        want = [
            a + b
            for a, b in zip(
                self.wanted(net, x, (x[:, 0, 0] > 0).long() + 3),
                self.wanted(net, y, (y[:, 0, 0] > 0).long() + 3),
                strict=True,
            )
        ]
        (self.run(told, x, reentrant) + self.run(told, y, reentrant)).backward()
        same([p.grad for p in parameters(net)], want)

    def test_without_checkpointing_two_contexts_are_right(self):
        net, (x, y) = self.net(), inputs(1, 2)
        a, b = torch.tensor([7, 0, 3]), torch.tensor([1, 5, 2])
        with context(net, cluster=a):
            one = net(x).square().sum()
        with context(net, cluster=b):
            two = net(y).square().sum()
        (one + two).backward()
        both = zip(self.wanted(net, x, a), self.wanted(net, y, b), strict=True)
        same([p.grad for p in parameters(net)], [g + h for g, h in both])

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_what_no_gate_has_asked_for_may_differ(self, reentrant):
        net, (x, y) = nn.Sequential(nn.Linear(6, 6).double()), inputs(1, 2)
        adapt(net, MoRA, "0", rank=2)
        filled(net[0])
        total = 0.0
        for x_, n in ((x, 2), (y, 3)):
            with context(net, mask=torch.arange(4) < n):
                total = total + self.run(net, x_, reentrant)
        total.backward()
        want = net(x).square().sum() + net(y).square().sum()
        same([p.grad for p in parameters(net)], torch.autograd.grad(want, parameters(net)))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_the_same_context_twice_is_right(self, reentrant):
        net, (x, y), ids = self.net(), inputs(1, 2), torch.tensor([7, 0, 3])
        total = 0.0
        for x_ in (x, y):
            with context(net, cluster=ids):
                total = total + self.run(net, x_, reentrant)
        total.backward()
        both = zip(self.wanted(net, x, ids), self.wanted(net, y, ids), strict=True)
        same([p.grad for p in parameters(net)], [g + h for g, h in both])

    def test_an_output_may_be_changed_in_place(self):
        net, (x,) = self.net(), inputs(1)
        with context(net, cluster=torch.tensor([7, 0, 3])):
            net[0](x).relu_().sum().backward()
        assert all(p.grad is not None for p in net[0].parameters() if p.requires_grad)


MASKED = {
    "lora_moe": (LoRAMoE, {"balance": 0.5, "top_k": 1}),
    "lora_moe_plugin": (LoRAMoEPlugin, {}),
    "meteora": (MeteoRA, {}),
    "sema": (SEMA, {"width": 2}),
    "smora": (SMoRA, {"top_k": 2}),
    "flylora": (FlyLoRA, {"top_k": 2}),
}


@pytest.mark.parametrize("name", MASKED)
class TestMask:
    """Padding is as if it were not there."""

    lengths = (4, 1, 3)

    def layer(self, name):
        scheme, settings = MASKED[name]
        return grown(scheme, D=6, O=6, **settings)

    def given(self, layer):
        return {"label": torch.tensor([0, 2, 1])} if layer.needs() else {}

    def alone(self, layer, x):
        """The loss and counts of the real tokens, by the formulas of one sample without padding."""
        losses, counts = [], 0
        for sample, n in enumerate(self.lengths):
            values = {k: v[sample : sample + 1] for k, v in self.given(layer).items()}
            with context(layer, **values):
                gate = layer.gate(x[sample : sample + 1, :n])
            losses.append(gate.loss)
            counts = counts if gate.counts is None else counts + gate.counts
        return losses, counts

    def tokens(self, left):
        x = torch.randn(3, 4, 6, dtype=torch.float64)
        mask = torch.arange(4) < torch.tensor(self.lengths).unsqueeze(1)
        if left:  # the same tokens, behind the padding
            return (
                torch.stack([row.roll(4 - n, 0) for row, n in zip(x, self.lengths, strict=True)]),
                mask.flip(1),
                x,
            )
        return x, mask, x

    @pytest.mark.parametrize("left", [False, True])
    @pytest.mark.parametrize("kind", [torch.bool, torch.int64])
    def test_losses_and_counts_are_those_of_the_tokens_alone(self, name, left, kind):
        layer = self.layer(name)
        x, mask, tokens = self.tokens(left)
        with context(layer, mask=mask.to(kind), **self.given(layer)) as batch:
            y = layer(x)
        padding = torch.where(mask.unsqueeze(-1), x, 100 * torch.randn_like(x))
        with context(layer, mask=mask.to(kind), **self.given(layer)) as other:
            y2 = layer(padding)
        torch.testing.assert_close(y[mask], y2[mask], rtol=1e-12, atol=1e-12)
        assert torch.isclose(torch.as_tensor(batch.aux_loss), torch.as_tensor(other.aux_loss))
        losses, counts = self.alone(layer, tokens)
        if name in ("smora", "flylora"):
            assert torch.equal(layer.counts, 2 * counts)
        if name == "sema":  # a mean over samples
            assert torch.isclose(batch.aux_loss, sum(losses) / 3)
        if name == "meteora":  # a mean over tokens
            each = sum(loss * n / 8 for loss, n in zip(losses, self.lengths, strict=True))
            assert torch.isclose(batch.aux_loss, each)
        if name == "lora_moe":  # all real tokens in one row
            with context(layer) as real:
                layer(x[mask])
            assert torch.isclose(batch.aux_loss, real.aux_loss)
        if name.startswith("lora_moe"):
            with context(layer, **self.given(layer)) as all_tokens:
                layer(padding)
            assert not torch.isclose(batch.aux_loss, all_tokens.aux_loss, rtol=1e-3)

    def test_a_sample_of_padding_alone_is_none(self, name):
        layer = self.layer(name)
        x, mask, _ = self.tokens(False)
        mask[1] = False
        with context(layer, mask=mask, **self.given(layer)) as batch:
            y = layer(x)
        two = {key: value[[0, 2]] for key, value in self.given(layer).items()}
        with context(layer, mask=mask[[0, 2]], **two) as other:
            y2 = layer(x[[0, 2]])
        assert torch.isclose(torch.as_tensor(batch.aux_loss), torch.as_tensor(other.aux_loss))
        torch.testing.assert_close(y[[0, 2]], y2, rtol=1e-12, atol=1e-12)
        with context(layer, mask=torch.zeros_like(mask), **self.given(layer)) as batch:
            layer(x)
        assert torch.as_tensor(batch.aux_loss) == 0

    @pytest.mark.parametrize("shape", [(3, 5), (4, 3), (2,), (3, 4, 6), (3, 1)])
    def test_a_mask_of_other_tokens_is_refused(self, name, shape):
        layer = self.layer(name)
        x = torch.randn(3, 4, 6, dtype=torch.float64)
        kind = type(layer).__name__
        allowed = r"\(3, 4, 6\): its first axes"
        with (
            pytest.raises(ValueError, match=rf"^{kind}: mask is \(.*\), allowed for x {allowed}$"),
            context(layer, mask=torch.ones(shape).bool(), **self.given(layer)),
        ):
            layer(x)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 3), ValueError, r"mask is torch.float32, allowed: bools, or integers that"),
        (torch.tensor([[0, 2]]), ValueError, r"mask is torch.int64, allowed: bools, or integers"),
        ([[1, 0]], TypeError, r"mask is of type list, allowed: a tensor"),
    ],
)
def test_what_is_no_mask_is_refused(mask, error, message):
    with pytest.raises(error, match=f"^{message}"), context(grown(LoRAMoE), mask=mask):
        pass


@pytest.mark.parametrize("value", [0.5, True, None, [0, 1], 1, "a"])
def test_a_value_that_is_no_tensor_is_refused(value):
    message = rf"^cluster is of type {type(value).__name__}, allowed: a tensor$"
    with pytest.raises(TypeError, match=message), context(grown("mocle"), cluster=value):
        pass


@pytest.mark.parametrize(
    ("name", "what", "value", "allowed"),
    [
        ("mocle", "cluster", torch.zeros(2), "integers"),
        ("mocle", "cluster", torch.zeros(2).bool(), "integers"),
        ("meteora", "label", torch.zeros(2, dtype=torch.float64), "integers"),
        ("mor1e", "embedding", torch.zeros(2, 3).long(), "floating-point numbers"),
    ],
)
def test_a_value_of_a_wrong_kind_is_refused(name, what, value, allowed):
    layer = grown(name)
    message = rf"^{type(layer).__name__}: {what} is of {value.dtype}, allowed: {allowed}$"
    with pytest.raises(ValueError, match=message), context(layer, **{what: value}):
        layer(torch.randn(2, 7, dtype=torch.float64))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int64])
def test_any_integers_are_an_index(kind):
    layer, x = grown("mocle"), torch.randn(2, 7, dtype=torch.float64)
    with context(layer, cluster=torch.tensor([3, 1])):
        want = layer(x)
    with context(layer, cluster=torch.tensor([3, 1], dtype=kind)):
        assert torch.equal(layer(x), want)


class TestSampleAxis:
    @pytest.mark.parametrize("scheme", ["sema", "mocle"])
    def test_tokens_first_is_told_or_read_from_torchs_layers(self, scheme):
        settings = {"sema": {"width": 2}, "mocle": {"clusters": 2}}[scheme]
        kind = {"sema": SEMA, "mocle": MoCLE}[scheme]
        nets = []
        for batch_first in (True, False):
            torch.manual_seed(0)
            block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
            net = adapt(nn.Sequential(block), kind, r".*linear[12]", rank=2, **settings)
            grow(net)
            for _, layer in adapters(net):
                assert layer.batch_first == batch_first
                filled(layer)
            nets.append(net)
        x, given = torch.randn(3, 5, 8), {"cluster": torch.tensor([0, 3, 1])}
        mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
        given = given if scheme == "mocle" else {"mask": mask}
        answers, losses = [], []
        for net, x_ in zip(nets, (x, x.transpose(0, 1)), strict=True):
            with context(net, **given) as batch:
                answers.append(net(x_))
            losses.append(torch.as_tensor(batch.aux_loss))
        torch.testing.assert_close(answers[0], answers[1].transpose(0, 1), rtol=0, atol=1e-5)
        torch.testing.assert_close(*losses)

    def test_it_can_be_told(self):
        net = nn.Sequential(nn.Linear(6, 6).double())
        adapt(net, SEMA, "0", batch_first=False, rank=2, width=2)
        grow(net)
        filled(net[0])
        x = torch.randn(5, 3, 6, dtype=torch.float64)
        net.eval()
        y = net(x)
        net[0].batch_first = True
        torch.testing.assert_close(y, net(x.transpose(0, 1)).transpose(0, 1))
        assert not torch.allclose(y, net(x))


class TestSixteenBits:
    """Sums and counts are in float32, whatever the layer's dtype."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "autocast"])
    @pytest.mark.parametrize("tokens", [33_000, 70_000])
    @pytest.mark.parametrize("name", [*MASKED, "olora", "ewc"])
    def test_many_tokens(self, name, tokens, dtype):
        scheme, settings = (MASKED | LOSSES)[name]
        layer = grown(scheme, D=6, O=6, dtype=torch.float32, **settings)
        x = torch.randn(tokens // 10, 10, 6)
        given = {"label": torch.arange(len(x)) % 3} if layer.needs() else {}
        with context(layer, **given) as batch:
            layer(x)
        want, counts = torch.as_tensor(batch.aux_loss), layer.counts
        after_step(layer)
        if dtype == "autocast":
            with torch.autocast("cpu", torch.float16), context(layer, **given) as batch:
                layer(x)
                got = torch.as_tensor(batch.aux_loss)
        else:
            layer.to(dtype)
            with context(layer, **given) as batch:
                layer(x.to(dtype))
            got = torch.as_tensor(batch.aux_loss)
        assert got.isfinite() and got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0.05, atol=1e-6)
        if counts is not None:
            assert counts.sum() == layer.counts.sum() == 2 * x.shape[:-1].numel()


def test_meteoras_supervision_is_a_mean_over_layers():
    for n in (1, 2, 7):
        net = nn.Sequential(*[nn.Linear(6, 6) for _ in range(n)])
        adapt(net, MeteoRA, r"\d", rank=2, supervision=50.0)
        grow(net)
        for _, layer in adapters(net):
            layer.router.data.zero_()
            layer.frozen_router.zero_()  # the loss of a uniform router is ln 2
        with context(net, label=torch.zeros(3).long()) as batch:
            net(torch.randn(3, 6))
        assert math.isclose(batch.aux_loss.item(), 50 * math.log(2), rel_tol=1e-6)


@pytest.mark.parametrize(("scheme", "knob"), [(LoRAMoEPlugin, "balance"), (MeteoRA, "supervision")])
def test_without_a_loss_no_label_is_needed(scheme, knob):
    layer = scheme(nn.Linear(6, 6), rank=2, **{knob: 0.0})
    assert layer.needs() == {}
    layer(torch.randn(3, 6)).sum().backward()
    with context(layer) as batch:
        layer(torch.randn(3, 6))
    assert batch.aux_loss == 0.0


def test_a_gate_of_three_is_a_gate():
    class Plain(Adapter):
        def gate(self, x):
            return None, 0.5, self.project(x, "A")

    layer = Plain(nn.Linear(6, 6), rank=2)
    layer.B.data.normal_()
    x = torch.randn(3, 6)
    with context(layer) as batch:
        y = layer(x)
    assert batch.aux_loss == 0.0
    torch.testing.assert_close(y, layer.base(x) + 0.5 * x @ layer.A.T @ layer.B)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_loss_whose_second_run_has_another_context_is_an_error(checkpointed):
    layer = grown(LoRAMoE, D=6, O=6, balance=1.0, top_k=1)
    (x,), mask = inputs(1), torch.tensor([[1, 1, 0, 0]] * 3)
    with context(layer, mask=mask) as batch:
        checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        loss = batch.aux_loss
    with context(layer, mask=1 - mask):
        layer(x)
    if checkpointed:
        with pytest.raises(RuntimeError, match=r"^LoRAMoE: a checkpointed block runs again"):
            loss.backward()
    else:
        loss.backward()


def test_contexts_end_in_their_order():
    layer, (x,) = grown(LoRAMoE, D=6, O=6, balance=1.0, top_k=1), inputs(1)
    outer, inner = context(layer), context(layer)
    outer.__enter__()
    inside = inner.__enter__()
    with pytest.raises(RuntimeError, match="a context ends before one that was opened inside it"):
        outer.__exit__(None, None, None)
    layer(x)
    assert inside.aux_loss != 0.0
    inner.__exit__(None, None, None)
    assert layer.step.record is None


def test_what_a_replica_leaves_is_refused():
    layer = network("lora_moe")[0]
    with context(layer), pytest.raises(RuntimeError, match=r"replicas of nn\.DataParallel"):
        replica = layer._replicate_for_data_parallel()  # as nn.DataParallel does in each pass
        for name, parameter in layer._parameters.items():
            setattr(replica, name, parameter.detach())
        replica.base = layer.base
        replica(inputs(1)[0])
