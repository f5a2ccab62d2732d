"""Many adapters in one batch are the same adapters one by one."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

from minimoe import LoRA, LoRAMoE, MoRA
from minimoe.adapt import (
    adapt,
    adapters,
    context,
    count,
    grow,
    load,
    load_state,
    parameters,
    save,
    state,
    unwrap,
)
from minimoe.many import Many, load_many
from minimoe.schemes.mocle import MoCLE
from minimoe.schemes.sema import SEMA

ADAPTERS = {  # scheme, layers, tasks, settings; of different ranks
    "anna": (LoRA, "fc1|fc2", 1, {"rank": 3, "scale": 0.7}),
    "ben": (MoRA, "fc1|fc2", 3, {"rank": 2, "top_k": 2, "tau": 0.5}),
    "carl": (LoRAMoE, "fc2", 2, {"rank": 4, "top_k": 1}),
    "dora": (LoRA, "fc1", 2, {"rank": 1}),
}
NAMES = list(ADAPTERS)
IDS = torch.tensor([3, 0, -1, 1, 2, 0, 3, 1, 1])  # not sorted, and one sequence by the base alone


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(7, 11), nn.Linear(11, 5)

    def forward(self, x):
        return self.fc2(self.fc1(x).tanh())


def plain(dtype=torch.float64):
    torch.manual_seed(1)
    return Net().to(dtype).eval()


def made(folder, adapters, model=plain, **more):
    """({name: file}, {name: a model with this adapter alone})."""
    files, alone = {}, {}
    for name, (scheme, layers, tasks, settings) in adapters.items():
        net = adapt(model(), scheme, layers, **settings, **more)
        for _ in range(tasks - 1):
            grow(net)
        load_state(net, {key: torch.randn_like(rows) for key, rows in state(net).items()})
        files[name], alone[name] = folder / f"{name}.safetensors", net
        save(net, files[name])
    return files, alone


def one_by_one(ids, x, alone, samples=0, **given):
    """Each sequence on its own, by the model with its adapter alone; -1: by the plain one."""
    ys = []
    for b, i in enumerate(ids.tolist()):
        net = plain(x.dtype) if i < 0 else list(alone.values())[i]
        with context(net, **{name: value[b : b + 1] for name, value in given.items()}):
            ys.append(net(x.narrow(samples, b, 1)))
    return torch.cat(ys, samples)


def in_one_batch(net, ids, x, **given):
    with context(net, adapter=ids, **given):
        return net(x)


@pytest.mark.parametrize("shape", [(9, 4, 7), (9, 7), (9, 2, 3, 7)])
def test_one_batch_is_one_by_one(shape, tmp_path):
    files, alone = made(tmp_path, ADAPTERS)
    net = plain()
    assert load_many(net, files) == {"anna": 0, "ben": 1, "carl": 2, "dora": 3}
    for ids in (IDS, IDS.sort()[0], IDS.int(), IDS.clamp_max(-1)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        one, many = one_by_one(ids, x, alone), in_one_batch(net, ids, x)
        assert torch.allclose(one, many, rtol=0, atol=1e-13)
        dy = torch.randn_like(one)
        mine, theirs = (torch.autograd.grad(y, x, dy)[0] for y in (many, one))
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-13)


def test_one_batch_is_the_equation(tmp_path):
    files, alone = made(
        tmp_path, {n: (LoRA, "fc1", 2, {"rank": r}) for n, r in (("a", 2), ("b", 3))}
    )
    net = plain()
    load_many(net, files)
    ids, x = torch.tensor([1, 0, -1, 1]), torch.randn(4, 7, dtype=torch.float64)
    W0, b = (p.detach().numpy() for p in (net.fc1.base.weight, net.fc1.base.bias))
    y = np.zeros((4, 11))
    for row, i in enumerate(ids.tolist()):
        y[row] = W0 @ x[row].numpy() + b
        if i >= 0:
            A, B = (list(alone.values())[i].fc1.rows(n).detach().numpy() for n in "AB")
            for r in range(len(A)):
                y[row] += (x[row].numpy() @ A[r]) * B[r]
    with context(net, adapter=ids):
        assert np.allclose(net.fc1(x).detach().numpy(), y, rtol=0, atol=1e-13)


def test_all_rows_by_one_adapter_are_its_own_model_bit_for_bit(tmp_path):
    model = lambda: plain(torch.float32)  # noqa: E731
    files, alone = made(tmp_path, ADAPTERS, model)
    net, x = model(), torch.randn(6, 5, 7)
    for name, i in load_many(net, files).items():
        assert torch.equal(in_one_batch(net, torch.full((6,), i), x), alone[name](x))
    assert torch.equal(in_one_batch(net, torch.full((6,), -1), x), model()(x))


def test_the_base_runs_once_and_an_adapter_without_rows_not_at_all(tmp_path, monkeypatch):
    net, ran = plain(), []
    load_many(net, made(tmp_path, ADAPTERS)[0])
    net.fc1.base.register_forward_hook(lambda layer, args, y: ran.append(("base", len(y))))
    for name, adapter in net.fc1.many.items():
        if adapter is not None:
            update = adapter.update
            monkeypatch.setattr(
                adapter,
                "update",
                lambda x, name=name, update=update: ran.append((name, len(x))) or update(x),
            )
    in_one_batch(net, torch.tensor([3, 0, 3, -1, 3, 2]), torch.randn(6, 2, 7).double())
    assert ran == [("base", 6), ("anna", 1), ("dora", 3)]
    assert net.fc1.many["carl"] is None


def test_no_rows_at_all(tmp_path):
    net = plain()
    load_many(net, made(tmp_path, ADAPTERS)[0])
    y = in_one_batch(net, torch.zeros(0, dtype=torch.int64), torch.randn(0, 3, 7).double())
    assert y.shape == (0, 3, 5)


def test_samples_on_the_axis_before_the_last(tmp_path):
    files, alone = made(tmp_path, ADAPTERS, batch_first=False)
    net = plain()
    load_many(net, files)
    for shape in ((4, 9, 7), (2, 3, 9, 7)):
        x = torch.randn(shape).double()
        one = one_by_one(IDS, x, alone, samples=-2)
        assert torch.allclose(one, in_one_batch(net, IDS, x), rtol=0, atol=1e-13)
    other = made(tmp_path, {"eve": ADAPTERS["anna"]})[0]
    net = plain()
    with pytest.raises(ValueError, match=r"fc1: batch_first is \{False, True\}, allowed: the same"):
        load_many(net, files | other)


def test_other_context_is_cut_to_each_adapters_sequences(tmp_path):
    both = {"a": (MoCLE, "fc1", 3, {"rank": 2, "clusters": 3}), "b": (SEMA, "fc1", 1, {"rank": 2})}
    files, alone = made(tmp_path, both)
    net = plain()
    load_many(net, files, schemes=(MoCLE, SEMA))
    ids, x = torch.tensor([0, 1, 0, -1, 1]), torch.randn(5, 4, 7).double()
    given = {"cluster": torch.tensor([2, 0, 1, 0, 2]), "mask": torch.rand(5, 4) > 0.3}
    one = one_by_one(ids, x, alone, **given)
    assert torch.allclose(one, in_one_batch(net, ids, x, **given), rtol=0, atol=1e-13)
    swapped = given | {"cluster": given["cluster"].roll(1)}
    assert not torch.allclose(one, in_one_batch(net, ids, x, **swapped), atol=1e-3)
    for name, wrong in {"cluster": torch.zeros(6).long(), "mask": torch.ones(6, 4).bool()}.items():
        with pytest.raises(ValueError, match=rf"{name} is \(6.*\), allowed: \(5,\), then more"):
            in_one_batch(net, ids, x, **given | {name: wrong})


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (None, RuntimeError, r"fc1 (Many) needs the adapter: with context(model, adapter=ids)"),
        ([0, 2], ValueError, "fc1 (Many): adapter is 2, allowed: 0 (anna), 1 (ben), -1 (none)"),
        ([-2, 0], ValueError, "fc1 (Many): adapter is -2, allowed: 0 (anna), 1 (ben), -1 (none)"),
        ([0, 1, 1], ValueError, "adapter is (3,), allowed: (2,), then more axes or none"),
        ([[0], [1]], ValueError, "adapter is (2, 1) of torch.int64, allowed: (2,) of int32 or"),
        ([0.0, 1.0], ValueError, "adapter is (2,) of torch.float32, allowed: (2,) of int32 or"),
        ([True, True], ValueError, "adapter is (2,) of torch.bool, allowed: (2,) of int32 or"),
    ],
)
def test_ids_that_cannot_be_are_named(ids, error, message, tmp_path):
    net, x = plain(), torch.randn(2, 3, 7).double()
    load_many(net, made(tmp_path, {name: ADAPTERS[name] for name in ("anna", "ben")})[0])
    with pytest.raises(error, match=re.escape(message)):
        net(x) if ids is None else in_one_batch(net, torch.tensor(ids), x)


def test_it_is_for_use_only(tmp_path):
    net = plain()
    load_many(net, made(tmp_path, ADAPTERS)[0])
    assert parameters(net) == [] and count(net) == dict.fromkeys(
        ("trainable", "stored", "read", "speaking"), 0
    )
    assert "anna, ben, carl, dora" in repr(net)
    with pytest.raises(RuntimeError, match=r"fc1 cannot grow: fc1 .* is for use only"):
        grow(net)
    for write in (save, load):
        with pytest.raises(RuntimeError, match=r"fc1 .* holds what other files hold: unwrap"):
            write(net, tmp_path / "anna.safetensors")
    with pytest.raises(
        RuntimeError, match=re.escape("fc1 (Many) is for use only: call model.eval")
    ):
        in_one_batch(net.train(), IDS, torch.randn(9, 7).double())


@pytest.mark.slow
def test_unwrap_gives_the_plain_model(tmp_path):
    net, x = plain(), torch.randn(3, 7).double()
    before, y = [type(m) for m in net.modules()], net(x)
    hook = net.fc1.register_forward_hook(lambda layer, args, y: y + 1)
    load_many(net, made(tmp_path, ADAPTERS)[0])
    with context(net, adapter=torch.tensor([-1, -1, -1])):
        assert not torch.equal(net(x), y)  # the layer's hook is the wrapped one's
    unwrap(net)
    hook.remove()
    assert [type(m) for m in net.modules()] == before and torch.equal(net(x), y)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_go_where_the_model_goes(dtype, tmp_path):
    files, alone = made(tmp_path, ADAPTERS)
    net = plain()
    load_many(net, files)
    net = copy.deepcopy(net).to(dtype)
    assert {p.dtype for a in net.fc1.many.values() if a for p in a.parameters()} == {dtype}
    x = torch.randn(9, 3, 7, dtype=dtype)
    one = one_by_one(IDS, x, {name: model.to(dtype) for name, model in alone.items()})
    assert torch.allclose(one, in_one_batch(net, IDS, x), rtol=0, atol=64 * torch.finfo(dtype).eps)


def test_what_cannot_be_loaded_is_named_and_nothing_changes(tmp_path):
    files, _ = made(tmp_path, ADAPTERS)
    head = adapt(plain(), LoRA, "fc1", train="fc2", rank=2)
    save(head, tmp_path / "head.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(files["anna"].read_bytes()[:-1])
    wide = adapt(nn.Sequential(nn.Linear(7, 9)), LoRA, "0", rank=2)
    save(wide, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=re.escape("files is {}, allowed: one or more")):
        load_many(plain(), {})
    with pytest.raises(ValueError, match="fc1 is adapted already: unwrap the model first"):
        load_many(head, files)
    for bad, schemes, error, message in (
        (files["ben"], (LoRA,), ValueError, "ben.safetensors: the scheme is MoRA, allowed: LoRA"),
        (tmp_path / "head.safetensors", (LoRA,), ValueError, "fc2.bias trains beside the adapters"),
        (tmp_path / "cut.safetensors", (LoRA,), ValueError, "changed or cut short"),
        (
            tmp_path / "wide.safetensors",
            (LoRA,),
            ValueError,
            "matches no nn.Linear; there are: fc1",
        ),
        (tmp_path / "none.safetensors", (LoRA,), FileNotFoundError, "no such file"),
    ):
        net = plain()
        net.fc2.bias.requires_grad = False
        with pytest.raises(error, match=message):
            load_many(net, {"anna": files["anna"], "bad": bad}, schemes)
        assert not list(adapters(net)) and not any(isinstance(m, Many) for m in net.modules())
        trains = {name for name, p in net.named_parameters() if p.requires_grad}
        assert trains == {"fc1.weight", "fc1.bias", "fc2.weight"}


@pytest.mark.slow
def test_generate_answers_each_prompt_by_its_own_adapter(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}

    def llama():
        torch.manual_seed(2)
        config = transformers.LlamaConfig(**small, **heads, eos_token_id=None, pad_token_id=0)
        return transformers.LlamaForCausalLM(config).eval()

    every = {
        "anna": (LoRA, r".*(q|v)_proj", 1, {"rank": 3}),
        "ben": (MoRA, r".*(q|v|down)_proj", 2, {"rank": 2, "top_k": 2, "tau": 0.5}),
        "carl": (LoRAMoE, r".*v_proj", 2, {"rank": 2}),
        "dora": (LoRA, r".*mlp.*", 1, {"rank": 1}),
    }
    files, alone = made(tmp_path, every, llama)
    net = llama()
    ids = load_many(net, files)
    prompts, asked = torch.randint(50, (4, 6)), ["carl", "anna", "dora", "ben"]
    which = torch.tensor([ids[name] for name in asked])
    words = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
    for beams in (1, 3):
        options = words | {"num_beams": beams, "output_logits": True}
        with context(net, adapter=which.repeat_interleave(beams)):
            together = net.generate(prompts, **options)
        for b, name in enumerate(asked):
            single = alone[name].generate(prompts[b : b + 1], **options)
            assert torch.equal(together.sequences[b], single.sequences[0])
            for one, many in zip(single.logits, together.logits, strict=True):
                if beams == 1:
                    assert torch.allclose(one, many[b : b + 1], atol=1e-5)
    assert len({tuple(row) for row in together.sequences[:, 6:].tolist()}) == 4
    message = re.escape("adapter is (4,), allowed: (12,)")
    with pytest.raises(ValueError, match=message), context(net, adapter=which):
        net.generate(prompts, **words, num_beams=3)
