import copy

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
)
from minimoe.tools.files import read_tensors, write_tensors

SCHEMES = {
    "lora": (LoRA, {}),
    "lora_moe": (LoRAMoE, {"balance": 0.1}),
    "mora": (MoRA, {"top_k": 3, "tau": 0.5}),
}


@torch.no_grad()
def randomised(net):
    """All that the adapters have learned, at random values."""
    load_state(net, {name: torch.randn_like(tensor) for name, tensor in state(net).items()})


def model(scheme=MoRA, targets=r"\d\.fc[12]", tasks=1, **settings):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.out = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.out(self.fc2(self.fc1(x).relu()))

    net = nn.Sequential(Block(), Block())
    if scheme is not None:
        adapt(net, scheme, targets, rank=2, **settings)
        for _ in range(tasks - 1):
            grow(net)
        randomised(net)
    return net


def test_only_matching_layers_are_wrapped_and_only_adapters_learn():
    net = model(LoRA)
    assert [name for name, _ in adapters(net)] == ["0.fc1", "0.fc2", "1.fc1", "1.fc2"]
    learning = {name for name, p in net.named_parameters() if p.requires_grad}
    assert learning == {f"{b}.fc{i}.{n}" for b in (0, 1) for i in (1, 2) for n in "AB"}
    assert {id(p) for p in parameters(net)} == {id(p) for p in net.parameters() if p.requires_grad}


def test_counts_are_the_docstrings_formulas():
    # two blocks of a 6→9 and a 9→6 layer: D + O = 15 four times; O = 9, 6; D = 6, 9; r 2, R 6
    keys, values = 2 * (6 + 9), 2 * (9 + 6)
    assert count(model(LoRA, tasks=3)) == {
        "trainable": 2 * (keys + values),
        "stored": 6 * (keys + values),
        "read": 6 * (keys + values),
        "speaking": 6 * (keys + values),
    }
    assert count(model(MoRA, tasks=3, top_k=5)) == {
        "trainable": 2 * (keys + values),
        "stored": 6 * (keys + values),
        "read": 6 * keys + 5 * values,
        "speaking": 5 * (keys + values),
    }
    assert count(model(LoRAMoE, tasks=3, top_k=2)) == {
        "trainable": 2 * (keys + values) + keys,
        "stored": 6 * (keys + values) + 3 * keys,
        "read": 2 * 2 * (keys + values) + 3 * keys,
        "speaking": 2 * 2 * (keys + values),
    }


def test_a_layer_in_two_places_gets_one_adapter():
    shared = nn.Linear(4, 4)
    net = adapt(nn.Sequential(shared, nn.ReLU(), shared), LoRA, r"\d", rank=2)
    assert net[0] is net[2] and len(list(adapters(net))) == 1


@pytest.mark.parametrize("mask", [False, True])
def test_a_transformers_fused_path_does_not_skip_the_adapters(mask):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    net = nn.TransformerEncoder(layer, 2).eval()
    adapt(net, LoRA, r".*linear[12]", rank=2)
    randomised(net)
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        used = net(x, src_key_padding_mask=padding if mask else None)
    plain = net(x, src_key_padding_mask=padding if mask else None).detach()
    assert torch.allclose(used[~padding], plain[~padding], atol=1e-5)
    for _, adapter in adapters(net):
        adapter.B.data.zero_()
    assert not torch.allclose(used[~padding], net(x)[~padding], atol=1e-2)


@pytest.mark.parametrize(
    ("net", "targets", "message"),
    [
        (model(None), r"fc1", r"'fc1' matches no nn.Linear; there are: 0.fc1, 0.fc2, 0.out, 1.fc1"),
        (nn.ReLU(), r".*", "there are: none"),
        (model(), r"0\.fc1\.base", "matches 0.fc1.base, which is adapted already"),
        (
            nn.MultiheadAttention(4, 2),
            r"out_proj",
            "matches out_proj, which is read past any wrapper by nn.MultiheadAttention",
        ),
        (model(None), r"1\.out", "rank is 7, allowed: 1 to 6 for this layer"),
    ],
)
def test_targets_that_cannot_be_are_named_and_nothing_changes(net, targets, message):
    before = [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match=message):
        adapt(net, LoRA, targets, rank=7)
    assert [type(m) for m in net.modules()] == before


def test_a_misspelt_setting_is_refused():
    with pytest.raises(TypeError, match="topk"):
        adapt(model(None), MoRA, r".*", topk=3)


def test_auxiliary_losses_add_up():
    net = model(LoRAMoE, balance=0.25)
    with context(net) as batch:
        assert batch.aux_loss == 0.0
        net(torch.randn(8, 6))
    # one expert each: f = P = 1, so four layers at .25
    assert torch.isclose(batch.aux_loss, torch.tensor(1.0))


@pytest.mark.parametrize("name", SCHEMES)
def test_adapters_alone_are_saved_and_load_into_a_fresh_model_after_grow(name, tmp_path):
    scheme, settings = SCHEMES[name]
    net, fresh = model(None), model(None)
    fresh.load_state_dict(net.state_dict())
    adapt(net, scheme, r"\d\.fc[12]", rank=2, **settings)
    adapt(fresh, scheme, r"\d\.fc[12]", rank=2, **settings)
    for _ in range(2):
        grow(net)
    randomised(net)
    save(net, tmp_path / "a.safetensors")
    load(fresh, tmp_path / "a.safetensors")
    x = torch.randn(7, 6)
    y = net.eval()(x)
    assert torch.equal(fresh.eval()(x), y)
    grow(net)
    load(net, tmp_path / "a.safetensors")  # back to before the growing
    assert torch.equal(net(x), y)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_that_do_not_fit_change_nothing(tmp_path):
    net = model(MoRA, tasks=2)
    path, good = tmp_path / "a.safetensors", tmp_path / "good"
    save(net, path)
    save(net, good)
    before = copy.deepcopy(state(net))

    def refused(message, target=net, at=path, error=ValueError):
        with pytest.raises(error, match=message):
            load(target, at)

    refused("no such file", at=tmp_path / "b", error=FileNotFoundError)
    refused("0.fc1 is .*'tau': 0.01.* there, .*'tau': 0.2.* here", model(MoRA, tau=0.2))
    refused(r"0.fc1 is \['MoRA', .* there, \['LoRA', .* here", model(LoRA))
    refused("1.fc2 is .* there, not adapted here", model(MoRA, r"0\.fc.|1\.fc1"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    refused("changed or cut short since it was written")
    path.write_bytes(whole[:100])
    refused("truncated, or no safetensors file")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("changed or cut short since it was written.*; save writes it anew")
    path.write_bytes(b"not a tensor in sight")
    refused("truncated, or no safetensors file")
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, path)
    refused("not written by minimoe, or by one before files had checksums")
    write_tensors(path, "checkpoint", {"x": torch.ones(1)}, {"run": 1})
    refused("holds 'checkpoint', allowed here: adapters")
    write_tensors(path, "adapters", {"x": torch.ones(1)}, {"run": 1})
    refused("holds no adapters")
    for odd in (5, {}, [1], "a"):
        write_tensors(path, "adapters", state(net), {"adapters": {}, "beside": odd})
        refused("not adapted there")
        facts = read_tensors(good, "adapters", mend="")[1]
        write_tensors(path, "adapters", state(net), facts | {"beside": odd})
        refused("what trains beside the adapters is .*, allowed: names")
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(net).items())


def test_tensors_that_do_not_fit_change_nothing():
    net = model(MoRA, tasks=2)
    good, before = state(net), copy.deepcopy(state(net))
    with pytest.raises(ValueError, match=r"1.fc2.B is missing"):
        load_state(net, {k: v for k, v in good.items() if k != "1.fc2.B"})
    with pytest.raises(ValueError, match=r"z is not an adapter of this model"):
        load_state(net, good | {"z": torch.ones(1)})
    with pytest.raises(ValueError, match=r"1.fc2.A is \(3, 9\)"):
        load_state(net, good | {"1.fc2.A": torch.ones(3, 9)})
    with pytest.raises(ValueError, match=r"1.fc2 holds tensors of different numbers of tasks"):
        load_state(net, good | {"1.fc2.frozen_A": torch.ones(8, 9)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(net).items())


def test_saving_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no adapters"):
        save(model(None), tmp_path / "a")
    assert not list(tmp_path.iterdir())
