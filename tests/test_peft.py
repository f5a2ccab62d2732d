"""peft's folders: made by hand in the short tests, by the real peft in the long ones."""

import contextlib
import copy
import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minimoe import LoRA, LoRAMoE, MoRA
from minimoe.adapt import adapt, adapters, context, grow, load, save
from minimoe.peft import load_peft, save_peft
from minimoe.peft import write as writing
from minimoe.peft.config import ANEW, RETRAIN
from minimoe.schemes.ewc import EWC
from minimoe.schemes.meteora import MeteoRA
from minimoe.schemes.mocle import MoCLE
from minimoe.schemes.mosld import MoSLD

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SIZES = {"body.q": (7, 9), "body.v": (9, 6)}  # (D, O)
ABSENT = object()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"q": nn.Linear(7, 9), "v": nn.Linear(9, 6)})
        self.norm = nn.LayerNorm(6)
        self.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5))
        self.words = nn.Embedding(5, 6)
        self.tied = nn.Linear(6, 5, bias=False)
        self.tied.weight = self.words.weight
        self.eval()

    def forward(self, x):
        y = self.norm(self.body["v"](self.body["q"](x).tanh()))
        return torch.cat([self.head(y), self.tied(y)], -1)


def write(path, seed=0, ranks=3, extra=None, **fields):
    """A folder: fields that are ABSENT are left out; tensors of `extra` that are None, too."""
    generator = torch.Generator().manual_seed(seed)
    ranks = dict.fromkeys(SIZES, ranks) if isinstance(ranks, int) else ranks
    tensors = {}
    for name, r in ranks.items():
        D, O = SIZES[name]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(r, D, generator=generator)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(O, r, generator=generator)
    tensors |= extra or {}
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q", "v"]} | fields
    path.mkdir(parents=True, exist_ok=True)
    config = {name: value for name, value in config.items() if value is not ABSENT}
    (path / CONFIG).write_text(json.dumps(config))
    tensors = {name: t.contiguous() for name, t in tensors.items() if t is not None}
    save_file(tensors, path / TENSORS, {"format": "pt"})
    return path


def head(value=0.5):
    """The tensors of Net's head, as modules_to_save."""
    tensors = {f"{PREFIX}head.{k}": v.clone() for k, v in Net().head.state_dict().items()}
    return {k: v + value if v.is_floating_point() else v for k, v in tensors.items()}


def layer_oracle(path, name, x, base, s):
    """y = x W0ᵀ + b + s (x Aᵀ) Bᵀ, in float64."""
    t = {k: v.double().numpy() for k, v in load_file(path / TENSORS).items()}
    A, B = (t[f"{PREFIX}{name}.lora_{which}.weight"] for which in "AB")
    W0, b = (p.detach().double().numpy() for p in (base.weight, base.bias))
    return x @ W0.T + b + s * (x @ A.T) @ B.T


def snapshot(model):
    kinds = [(name, type(m)) for name, m in model.named_modules()]
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    return kinds, trains, {k: v.clone() for k, v in model.state_dict().items()}


def same(one, other):
    bits = all(torch.equal(one[2][k], other[2][k]) for k in one[2])
    return one[:2] == other[:2] and one[2].keys() == other[2].keys() and bits


# One folder


@pytest.mark.parametrize(
    ("fields", "ranks", "scales"),
    [
        ({}, 3, {"q": 2.0, "v": 2.0}),
        ({"lora_alpha": 1}, 3, {"q": 1 / 3, "v": 1 / 3}),
        ({"use_rslora": True, "lora_alpha": 2}, 3, {"q": 2 / 3**0.5, "v": 2 / 3**0.5}),
        # by hand: q has r 5 and alpha 6, v r 3 and alpha 1.5
        (
            {"rank_pattern": {"q": 5}, "alpha_pattern": {r"^body\.v": 1.5}},
            {"body.q": 5, "body.v": 3},
            {"q": 6 / 5, "v": 0.5},
        ),
        # the first key that matches counts; "y.q" is no end of body.q at a dot
        (
            {"rank_pattern": {"y.q": 9, "body.q": 2, "q": 4}, "alpha_pattern": {"[qv]": 8, "q": 1}},
            {"body.q": 2, "body.v": 3},
            {"q": 4.0, "v": 8 / 3},
        ),
        ({"target_modules": r".*\.[qv]"}, 3, {"q": 2.0, "v": 2.0}),
        ({"target_modules": ["body.q", "v"]}, 3, {"q": 2.0, "v": 2.0}),
        ({"target_modules": ["q", "v", "1"], "exclude_modules": r"head\.1"}, 3, {"q": 2, "v": 2}),
        ({"target_modules": ["q", "v"], "exclude_modules": ["v"]}, {"body.q": 3}, {"q": 2.0}),
    ],
)
def test_a_layer_is_its_formula(fields, ranks, scales, tmp_path):
    write(tmp_path, ranks=ranks, **fields)
    plain = Net()
    model = load_peft(Net(), tmp_path)
    assert {name for name, _ in adapters(model)} == {f"body.{name}" for name in scales}
    for name, s in scales.items():
        layer, x = model.body[name], torch.randn(11, SIZES[f"body.{name}"][0])
        assert type(layer) is LoRA and layer.scale == s
        expected = layer_oracle(tmp_path, f"body.{name}", x.double().numpy(), plain.body[name], s)
        np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=2e-5, atol=2e-5)


def test_old_and_new_fields_without_a_value_are_accepted(tmp_path):
    none = dict.fromkeys(["eva_config", "layer_replication", "enable_lora", "of_tomorrow"])
    false = dict.fromkeys(["use_dora", "lora_bias", "merge_weights", "use_qalora"], False)
    inert = {"lora_dropout": 0.1, "megatron_core": "megatron.core", "task_type": "CAUSAL_LM"}
    empty = {"loftq_config": {}, "rank_pattern": None, "alpha_pattern": {}, "layers_pattern": ""}
    load_peft(Net(), write(tmp_path, **none, **false, **inert, **empty, qalora_group_size=16))


def test_what_trains_beside_is_loaded_and_trains(tmp_path):
    # peft adds "score" for a classifier, which this model lacks
    write(tmp_path, extra=head(), modules_to_save=["head", "score"])
    model = load_peft(Net(), tmp_path)
    for key, tensor in head().items():
        assert torch.equal(model.state_dict()[key.removeprefix(PREFIX)], tensor)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    beside = {f"head.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")}
    assert trains == beside | {f"{name}.{x}" for name in SIZES for x in "AB"}


def test_a_module_without_tensors_may_be_named_to_train(tmp_path):
    model = Net()
    model.drop = nn.Dropout()
    load_peft(model, write(tmp_path, modules_to_save=["drop"]))


def test_settings_of_adapt_reach_it(tmp_path, capsys):
    load_peft(Net(), write(tmp_path), MoRA, verbose=True, tau=0.5)
    assert capsys.readouterr().out.splitlines()[0] == "body.q: Linear -> MoRA"


def test_dtype(tmp_path):
    tensors = {
        k: v.bfloat16() for k, v in load_file(write(tmp_path / "a") / TENSORS).items()
    }  # exact in float32
    save_file(tensors, tmp_path / "a" / TENSORS)
    assert load_peft(Net(), tmp_path / "a").body.q.B.dtype == torch.float32
    model = load_peft(Net().bfloat16(), tmp_path / "a", dtype=torch.bfloat16)
    assert torch.equal(model.body.q.B, tensors[f"{PREFIX}body.q.lora_B.weight"].T)
    assert load_peft(Net().double(), tmp_path / "a").body.q.A.dtype == torch.float64


# Several folders


def tokens(D=7):
    return torch.randn(13, D, dtype=torch.float64)


def three(tmp_path, **changes):
    """Three folders with scales 2, 1/3 and 4."""
    alphas = enumerate([6, 1, 12])
    return [write(tmp_path / str(i), i, lora_alpha=a, **changes) for i, a in alphas]


def test_several_under_lora_are_their_sum(tmp_path):
    paths = three(tmp_path)
    x, plain = tokens(), Net().double()
    layer = load_peft(Net().double(), paths).body.q
    rest = [
        layer_oracle(p, "body.q", x.numpy(), plain.body.q, s)
        for p, s in zip(paths, (2, 1 / 3, 4), strict=True)
    ]
    base = plain.body.q(x).detach().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), sum(rest) - 2 * base, atol=1e-12)
    assert (layer.ranks, layer.rank, layer.scale) == (9, 3, 1.0)


@pytest.mark.parametrize("scheme", [LoRAMoE, MeteoRA])
def test_an_expert_is_a_folder(scheme, tmp_path):
    paths = three(tmp_path)
    x, plain = tokens(), Net().double()
    layer = load_peft(Net().double(), paths, scheme, top_k=1).body.q.eval()
    assert (layer.n_experts, len(layer.frozen_router), len(layer.router)) == (3, 2, 1)
    assert 0 < layer.rows("router").std() < 0.1
    for e, s in enumerate((2, 1 / 3, 4)):
        layer.frozen_router.zero_(), layer.router.data.zero_()
        w = x[0] / x[0].norm()
        (layer.frozen_router[e] if e < 2 else layer.router.data[0]).copy_(w)
        expected = layer_oracle(paths[e], "body.q", x[:1].numpy(), plain.body.q, s)
        np.testing.assert_allclose(layer(x[:1]).detach().numpy(), expected, atol=1e-12)


def test_experts_of_one_task_are_all_live(tmp_path):
    paths = [*three(tmp_path), write(tmp_path / "3", 3)]
    layer = load_peft(Net().double(), paths, LoRAMoE, experts=2, top_k=4).body.q
    assert (len(layer.frozen_B), len(layer.B), layer.n_experts) == (6, 6, 4)
    assert len(layer.frozen_router) == len(layer.router) == 2
    one_by_one = load_peft(Net().double(), paths, LoRAMoE, top_k=4).body.q
    assert torch.equal(layer.keys, one_by_one.keys)
    assert torch.equal(layer.rows("B"), one_by_one.rows("B"))


def test_mora_is_its_equations_on_ranks_of_all_folders(tmp_path):
    paths = [
        write(tmp_path / "a", 1, ranks=2, r=2, lora_alpha=4),
        write(tmp_path / "b", 2, ranks=4, r=4, lora_alpha=2),
    ]
    x, plain = tokens(), Net().double()
    layer = load_peft(Net().double(), paths, MoRA, top_k=3, tau=0.1).body.q.eval()
    assert (layer.ranks, layer.rank) == (6, 4)
    y = plain.body.q(x).detach().numpy()
    found = [load_file(path / TENSORS) for path in paths]
    A, B = (
        [f[f"{PREFIX}body.q.lora_{which}.weight"].double().numpy() for f in found] for which in "AB"
    )
    A, B = np.concatenate(A), np.concatenate([2 * B[0].T, 0.5 * B[1].T])
    for t, token in enumerate(x.numpy()):
        z = A @ token
        s = z / np.linalg.norm(z)
        kept = np.argsort(-s)[:3]
        w = np.exp(s[kept] / 0.1) / np.exp(s[kept] / 0.1).sum()
        y[t] += sum(w_i * z[i] * B[i] for w_i, i in zip(w * (s[kept] >= 0.2), kept, strict=True))
    np.testing.assert_allclose(layer(x).detach().numpy(), y, atol=1e-12)


def test_scales_that_agree_stay_the_layers_and_b_keeps_its_bits(tmp_path):
    paths = [write(tmp_path / str(i), i, lora_alpha=1) for i in range(2)]
    layer = load_peft(Net(), paths, MoRA).body.q
    B = [load_file(p / TENSORS)[f"{PREFIX}body.q.lora_B.weight"].T for p in paths]
    assert layer.scale == 1 / 3 and torch.equal(layer.rows("B"), torch.cat(B))


def test_a_loaded_mixture_grows_saves_and_loads(tmp_path):
    paths = three(tmp_path)
    one, other = (load_peft(Net(), paths, MoRA) for _ in range(2))
    grow(one)
    assert one.body.q.ranks == 12
    one.body.q.B.data.normal_()
    save(one, tmp_path / "mine")
    load(other, tmp_path / "mine")
    x = torch.randn(4, 7)
    assert torch.equal(one(x), other(x))


def test_routers_alone_can_be_trained_as_the_docstring_says(tmp_path):
    model = load_peft(Net(), three(tmp_path), MeteoRA, top_k=1)
    model.train()
    layers = [layer for _, layer in adapters(model)]
    routers = [r for layer in layers for r in (layer.frozen_router.requires_grad_(), layer.router)]
    label = torch.arange(30) % 3
    x = 3 * torch.eye(7)[label] + 0.1 * torch.randn(30, 7)
    before = model.body.q.rows("B").clone()
    for _ in range(25):
        with context(model, label=label) as batch:
            model(x)
        for router, slope in zip(
            routers, torch.autograd.grad(batch.aux_loss, routers), strict=True
        ):
            router.data -= 0.02 * slope
    picked = model.body.q.project(x, "router").argmax(-1)
    assert torch.equal(picked, label) and torch.equal(model.body.q.rows("B"), before)


# Folders that are refused


def tensors_of(path, **changes):
    """Tensors of a folder, some of them changed: None takes one away."""
    found = load_file(path / TENSORS) | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v.contiguous() for k, v in found.items() if v is not None}, path / TENSORS)


q_A, q_B = (f"{PREFIX}body.q.lora_{which}.weight" for which in "AB")
P, COUNT = PREFIX, f"{PREFIX}head.0.num_batches_tracked"
MISSPELT = {
    f"{P}body.k.lora_A.weight": torch.ones(3, 7),
    f"{P}body.k.lora_B.weight": torch.ones(9, 3),
}
WRONG_FIELDS = [
    ({"peft_type": ABSENT}, "peft_type is missing"),
    ({"peft_type": "LOHA"}, "peft_type: Input should be 'LORA'"),
    ({"r": ABSENT}, "r: "),
    ({"r": 0}, "r: "),
    ({"r": True}, "r: "),
    ({"lora_alpha": ABSENT}, "lora_alpha: "),
    ({"lora_alpha": "6"}, "lora_alpha: "),
    ({"lora_alpha": float("nan")}, "lora_alpha: "),
    ({"target_modules": None}, "target_modules: "),
    ({"target_modules": "(q"}, "unterminated"),
    ({"rank_pattern": {"q": 0}}, "rank_pattern.q: "),
    ({"alpha_pattern": {"q)": 1}}, "unbalanced"),
    ({"alpha_pattern": {"q": None}}, "alpha_pattern.q: "),
    ({"use_rslora": "yes"}, "use_rslora: "),
    ({"bias": "all"}, "bias: Input should be 'none'"),
    ({"bias": "lora_only"}, "bias: Input should be 'none'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights: Input should be True, False, 'gaussian'"),
    ({"use_dora": True}, "use_dora is true, allowed: no value"),
    ({"lora_bias": True}, "lora_bias is true"),
    ({"layers_to_transform": [0]}, "layers_to_transform is [0]"),
    ({"layers_to_transform": 0}, "layers_to_transform is 0"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is [1, 2]"),
    ({"target_parameters": ["experts.w"]}, 'target_parameters is ["experts.w"]'),
    ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]]"),
    ({"use_qalora": True}, "use_qalora is true"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is [1]"),
    ({"ensure_weight_tying": True}, "ensure_weight_tying is true"),
    ({"of_tomorrow": "x"}, 'of_tomorrow is "x", allowed: no value'),
]
WRONG_TENSORS = [
    ({}, {"a.b": torch.ones(1)}, "a.b lacks the prefix base_model.model."),
    ({}, {q_A.removeprefix(PREFIX): torch.ones(3, 7)}, "lacks the prefix"),
    ({}, {P + "body.q.lora_A.default.weight": torch.ones(3, 7)}, "default.weight is"),
    ({}, {P + "body.q.router.weight": torch.ones(3, 7)}, "is neither lora_A"),
    ({}, {P + "body.q.lora_magnitude_vector.weight": torch.ones(9)}, "magnitude_vector.weight is"),
    ({}, {P + "body.q.lora_B.bias": torch.ones(9)}, "body.q.lora_B.bias is neither"),
    ({}, {P + "words.lora_embedding_A": torch.ones(3, 5)}, "lora_embedding_A is neither"),
    ({}, {P + "words.weight": torch.ones(5, 6)}, "words.weight is neither"),
    ({}, {q_B: None}, "body.q.lora_B.weight is missing"),
    ({}, {q_A: None, q_B: None}, "body.q is named by target_modules, and has no tensors"),
    ({}, MISSPELT, "body.k is not in the model"),
    ({}, {q_A: torch.ones(4, 7)}, "allowed: ((3, 7), (9, 3))"),
    ({}, {q_A: torch.ones(3, 8)}, "allowed: ((3, 7), (9, 3))"),
    ({}, {q_B: torch.ones(3, 9)}, "allowed: ((3, 7), (9, 3))"),
    ({}, {q_A: torch.ones(3, 7, 1, 1)}, "allowed: ((3, 7), (9, 3))"),
    ({"r": 4}, {}, "allowed: ((4, 7), (9, 4))"),
    ({"rank_pattern": {"q": 2}}, {}, "allowed: ((2, 7), (9, 2))"),
    ({}, {q_A: torch.full((3, 7), float("nan"))}, "body.q.lora_A.weight holds nan"),
    ({}, {q_A: torch.ones(3, 7, dtype=torch.int32)}, "body.q is torch.int32"),
    ({"target_modules": ["q"]}, {}, "body.v is none that target_modules names"),
    ({"target_modules": ["ody.q", "v"]}, {}, "body.q is none that target_modules names"),
    ({"target_modules": "body"}, {}, "body.q is none that target_modules names"),
    ({"target_modules": "all-linear"}, {}, "body.q is none that target_modules names"),
    ({"target_modules": ["q", "v", "1"]}, {}, "head.1 is named by target_modules"),
    ({"target_modules": ["q", "v", "words"]}, {}, "words is named by target_modules"),
    ({"modules_to_save": ["head"]}, {}, "head.0.weight, of modules_to_save, is missing"),
    ({"modules_to_save": ["head"]}, {**head(), P + "head.1.bias": None}, "head.1.bias, of"),
    ({"modules_to_save": ["head"]}, {**head(), P + "head.1.bias": torch.ones(4)}, "(5,)"),
    ({"modules_to_save": ["head"]}, {**head(), COUNT: torch.ones(())}, "torch.int64"),
    ({"modules_to_save": ["body"]}, {}, "body.q is none that target_modules"),
    ({"modules_to_save": ["tied"]}, {P + "tied.weight": torch.ones(5, 6)}, "tied to words"),
]  # fmt: skip


def refused(model, error, words, *args, **kwargs):
    before = snapshot(model)
    with pytest.raises(error, match=re.escape(words)) as found:
        load_peft(model, *args, **kwargs)
    assert "\n" not in str(found.value)
    assert same(before, snapshot(model))
    return str(found.value)


@pytest.mark.parametrize(("fields", "words"), WRONG_FIELDS, ids=[w for _, w in WRONG_FIELDS])
def test_a_wrong_config_is_refused(fields, words, tmp_path):
    message = refused(Net(), ValueError, words, write(tmp_path, **fields))
    assert message.startswith(str(tmp_path / CONFIG))
    unread = {"peft_type", "bias", "init_lora_weights"} & fields.keys() or "no value" in message
    mend = RETRAIN if unread else "write in what it was trained with"
    assert message.endswith(ANEW if "is missing" in words else mend)


@pytest.mark.parametrize(
    ("fields", "tensors", "words"), WRONG_TENSORS, ids=[w for *_, w in WRONG_TENSORS]
)
def test_wrong_tensors_are_refused(fields, tensors, words, tmp_path):
    message = refused(Net(), ValueError, words, write(tmp_path, extra=tensors, **fields))
    assert message.startswith(str(tmp_path / TENSORS)) and "; " in message


def test_no_folder_and_damaged_files(tmp_path):
    refused(Net(), FileNotFoundError, "no such file", tmp_path / "none")
    write(tmp_path / "many" / "first"), write(tmp_path / "many" / "second")
    refused(Net(), FileNotFoundError, "there are first, second", tmp_path / "many")
    good = write(tmp_path / "good")
    data, text = (good / TENSORS).read_bytes(), (good / CONFIG).read_bytes()
    for cut in (0, 7, 100, len(data) - 1):
        (good / TENSORS).write_bytes(data[:cut])
        refused(Net(), ValueError, "truncated, or no safetensors file", good)
    (good / TENSORS).write_bytes(data)
    for wrong in (text[:-2], b"[" * 9999, b"\xff", b""):
        (good / CONFIG).write_bytes(wrong)
        refused(Net(), ValueError, "truncated, or no JSON", good)
    (good / CONFIG).write_bytes(b"[1]")
    refused(Net(), ValueError, "peft_type is missing", good)
    (good / CONFIG).write_bytes(text)
    (good / TENSORS).unlink()
    refused(Net(), FileNotFoundError, f"{TENSORS}: no such file", good)
    (good / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    refused(Net(), ValueError, "adapter_model.bin: a pickle can run code", good)
    save_file({}, good / TENSORS)
    refused(Net(), ValueError, "holds no tensors", good)


def test_a_model_that_does_not_fit(tmp_path):
    path = write(tmp_path / "a")
    twice = Net()
    twice.again = twice.body["q"]
    refused(twice, ValueError, "body.q is in two places", path)
    adapted = adapt(Net(), LoRA, r"body\.q", rank=2)
    refused(adapted, ValueError, "body.q is adapted already", path)
    other = Net()
    other.body["q"] = nn.Conv1d(7, 9, 1)
    refused(other, ValueError, "body.q is a torch.nn.modules.conv.Conv1d", path)
    big = write(tmp_path / "b", ranks={"body.q": 8, "body.v": 3}, rank_pattern={"q": 8})
    refused(Net(), ValueError, "body.q (Linear): rank is 8, allowed: 1 to 7", big)
    refused(Net(), ValueError, "rank is 8, allowed: 1 to 7", [big, path], MoRA)
    head_alone = write(tmp_path / "c", ranks={}, extra=head(), modules_to_save=["head"])
    refused(Net(), ValueError, "named by target_modules, and has no tensors", head_alone)
    empty = Net()
    empty.head.to("meta")
    both = write(tmp_path / "d", extra=head(), modules_to_save=["head"])
    with pytest.raises(ValueError, match=r"head\.0\.weight is on the meta device"):
        load_peft(empty, both)


def test_a_tied_parameter_may_be_there_in_all_its_places(tmp_path):
    values = torch.randn(5, 6)
    there = {f"{PREFIX}{name}.weight": values.clone() for name in ("tied", "words")}
    model = load_peft(Net(), write(tmp_path, extra=there, modules_to_save=["tied", "words"]))
    assert model.tied.weight is model.words.weight and torch.equal(model.tied.weight, values)


def test_folders_that_do_not_fit_each_other(tmp_path):
    a = write(tmp_path / "a")
    b = write(tmp_path / "b", ranks=2, r=2)
    for scheme in (LoRAMoE, MeteoRA):
        words = f"body.q has 3 ranks in {a} and 2 in {b}, allowed: one rank"
        refused(Net(), ValueError, words, [a, b], scheme)
    c = write(tmp_path / "c", ranks={"body.q": 3}, target_modules=["q"])
    refused(Net(), ValueError, f"body.v has 3 ranks in {a} and 0 in {c}", [a, c], MoRA)
    d, e = (
        write(tmp_path / x, extra=head(i), modules_to_save=["head"]) for i, x in enumerate("de")
    )
    refused(Net(), ValueError, "head.0.bias, which trains beside, differs", [d, e])
    refused(Net(), ValueError, "head.0.bias, which trains beside, differs", [a, e])
    load_peft(Net(), [e, e])


def test_wrong_arguments(tmp_path):
    a = write(tmp_path)
    refused(Net(), ValueError, "scheme is EWC, allowed: LoRA, LoRAMoE, MoRA, MeteoRA", a, EWC)
    refused(Net(), ValueError, "folders is [], allowed: one or more", [])
    refused(Net(), ValueError, "rank is 2, allowed: what the folders say", a, rank=2)
    refused(Net(), ValueError, "scale is 2, allowed: what the folders say", a, scale=2)
    refused(Net(), ValueError, "experts is 2, allowed: divisors", [a] * 3, LoRAMoE, experts=2)
    refused(Net(), ValueError, "experts is 0, allowed: divisors", [a] * 3, LoRAMoE, experts=0)
    refused(Net(), ValueError, "body.q (Linear): tau is 0", a, MoRA, tau=0)
    refused(Net(), TypeError, "unexpected keyword argument 'tao'", a, MoRA, tao=1)


# Writing


def at_random(model):
    for _, layer in adapters(model):
        for name in ("A", "B", "frozen_A", "frozen_B"):
            getattr(layer, name, torch.empty(0)).data.normal_()
    return model


def read(path):
    return json.loads((path / CONFIG).read_text()), load_file(path / TENSORS)


def test_an_ungrown_lora_comes_back_bit_for_bit(tmp_path):
    write(tmp_path / "a", extra=head(), modules_to_save=["head"], use_rslora=True)
    model = load_peft(Net(), tmp_path / "a")
    save_peft(model, tmp_path / "new" / "b")
    (_, one), (config, other) = read(tmp_path / "a"), read(tmp_path / "new" / "b")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert config["lora_alpha"] / config["r"] == 6 / 3**0.5
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["fan_in_fan_out"] is False
    assert sorted(config["modules_to_save"]) == ["head.0", "head.1"]
    header = (tmp_path / "new" / "b" / TENSORS).read_bytes()[8:80]
    assert b'"__metadata__":{"format":"pt"}' in header
    assert sorted(os.listdir(tmp_path / "new" / "b")) == [CONFIG, TENSORS]
    again = load_peft(Net(), tmp_path / "new" / "b")
    x = torch.randn(4, 7)
    assert torch.equal(model(x), again(x))


@pytest.mark.parametrize("scheme", [LoRA, EWC])
def test_a_grown_lora_is_one_of_all_its_ranks(scheme, tmp_path):
    model = adapt(Net().double(), scheme, r"body\.q", rank=2, scale=0.7)
    adapt(model, scheme, r"body\.v", rank=1, scale=1.5)
    grow(model), grow(model)
    at_random(model)
    save_peft(model, tmp_path)
    config, tensors = read(tmp_path)
    assert config["rank_pattern"] == {"body.q": 6, "body.v": 3}
    assert config["alpha_pattern"] == {"body.q": pytest.approx(4.2), "body.v": 4.5}
    assert tensors[q_A].shape == (6, 7) and tensors[q_B].shape == (9, 6)
    again, x = load_peft(Net().double(), tmp_path), tokens()
    torch.testing.assert_close(again(x), model(x), rtol=1e-12, atol=1e-12)
    assert again.body.q.scale == pytest.approx(0.7, rel=4e-16)  # no alpha / 6 is .7


@pytest.mark.parametrize("scheme", [LoRAMoE, MoRA, MeteoRA, MoSLD])
def test_a_gate_is_lost_only_if_asked(scheme, tmp_path):
    model = adapt(Net().double(), LoRA, r"body\.q", rank=2)
    adapt(model, scheme, r"body\.v", rank=2, scale=0.5)
    grow(model)
    at_random(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"^body\.v is under {scheme.__name__}, whose gate peft"):
        save_peft(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    save_peft(model, tmp_path / "a", ungated=True)
    assert same(before, snapshot(model))
    layer, x = model.body.v, tokens(9)
    again = load_peft(Net().double(), tmp_path / "a").body.v
    y = layer.base(x) + 0.5 * (x @ layer.keys.T) @ layer.rows("B")
    torch.testing.assert_close(again(x), y, rtol=1e-12, atol=1e-12)


def test_names_that_end_alike_keep_their_own_ranks(tmp_path):
    model = nn.Sequential(nn.Linear(7, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    plain = copy.deepcopy(model)
    for name, rank in {r"0": 2, r"1\.0": 3}.items():
        adapt(model, LoRA, name, rank=rank)
    save_peft(at_random(model), tmp_path)
    again = load_peft(plain, tmp_path)
    assert {name: layer.rank for name, layer in adapters(again)} == {"0": 2, "1.0": 3}
    x = torch.randn(3, 7)
    assert torch.equal(model(x), again(x))


def test_a_module_whose_name_ends_like_one_that_trains_is_written_too(tmp_path):
    """peft takes modules_to_save by the end of a name, and looks for the tensors of all."""

    def made():
        model = Net()
        model.fore = nn.ModuleDict({"head": nn.Sequential(nn.Identity(), nn.Linear(2, 3))})
        return model

    save_peft(adapt(made(), LoRA, r"body\.[qv]", rank=2, train=r"head\.1"), tmp_path)
    config, tensors = read(tmp_path)
    assert config["modules_to_save"] == ["head.1"] and f"{P}fore.head.1.weight" in tensors
    load_peft(made(), tmp_path)


def test_what_a_folder_of_peft_cannot_hold(tmp_path):
    def says(model, words, error=ValueError):
        with pytest.raises(error, match=words):
            save_peft(model, tmp_path / "x", ungated=True)
        assert not (tmp_path / "x").exists()

    says(Net(), "adapters of the model is none")
    says(adapt(Net(), MoCLE, r"body\.q", rank=2), "under MoCLE, whose update is more than")
    other = type("Other", (LoRA,), {"claims": dataclasses.replace(LoRA.claims, equation=False)})
    says(adapt(Net(), other, r"body\.q", rank=2), "under Other, whose update is more than")
    says(LoRA(nn.Linear(4, 4), rank=2), "the layer is the whole model")
    twice = Net()
    twice.again = twice.body["q"]
    says(adapt(twice, LoRA, r"body\.q", rank=2), "body.q is in two places")
    merged = adapt(Net(), LoRA, r"body\.q", rank=2)
    merged.body.q.merge()
    says(merged, "merged", RuntimeError)
    own = Net()
    own.start = nn.Parameter(torch.ones(2))
    says(adapt(own, LoRA, r"body\.q", rank=2, train="start"), r"the model \(Net\) has a parameter")
    base = adapt(Net(), LoRA, r"body\.q", rank=2)
    base.body.q.base.bias.requires_grad_(True)
    says(base, "body.q")
    around = Net()
    around.body["w"] = nn.Linear(2, 2)
    around.body.register_parameter("own", nn.Parameter(torch.ones(2)))
    says(adapt(around, LoRA, r"body\.q", rank=2, train=r"body\.own"), "body.q has a name by which")
    held = Net()
    held.list = nn.ParameterList([torch.ones(2)])
    says(adapt(held, LoRA, r"body\.q", rank=2, train="list"), r"list \(ParameterList\)")
    axb = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(4, 4)}), "a_b": nn.Linear(4, 4)})
    adapt(axb, LoRA, r"a\.b", rank=2), adapt(axb, LoRA, "a_b", rank=3)
    says(axb, "a_b has a name by which peft takes it for another")


def test_a_kill_or_a_full_disk_at_any_moment(tmp_path, monkeypatch):
    """Each call that puts something in place or takes it away fails in its turn."""
    old, new = (at_random(adapt(Net(), LoRA, r"body\.[qv]", rank=r)) for r in (2, 3))
    x, outcomes, calls = torch.randn(4, 7), [], 0
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink

    def counted(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls -= 1
            if calls < 0:
                raise OSError("no space left")
            return real(*args, **kwargs)

        return call

    def of_config(path, **kwargs):
        return (counted(unlink) if path.name == CONFIG else unlink)(path, **kwargs)

    for stop in range(12):
        path = tmp_path / str(stop)
        save_peft(old, path)
        (path / "README.md").write_text("mine")
        calls = stop
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", counted(fsync))
            patch.setattr(os, "replace", counted(replace))
            patch.setattr(Path, "unlink", of_config)
            with contextlib.suppress(OSError):
                save_peft(new, path)
        try:
            y = load_peft(Net(), path)(x)
            outcomes += [name for name, m in {"old": old, "new": new}.items() if m(x).equal(y)]
        except FileNotFoundError as error:
            assert str(error) == f"{path / CONFIG}: no such file"
            outcomes += ["none"]
        assert set(os.listdir(path)) <= {"README.md", CONFIG, TENSORS}
        save_peft(new, path)  # goes on where it stopped
        assert torch.equal(load_peft(Net(), path)(x), new(x))
        assert sorted(os.listdir(path)) == ["README.md", CONFIG, TENSORS]
    # two drafts, each: fsync, replace, fsync of the folder; then the old config goes; the new
    # tensors and the new config are put in place; fsync of the folder
    assert outcomes == ["old"] * 7 + ["none"] * 2 + ["new"] * 3


def test_the_same_config_is_written_once(tmp_path, monkeypatch):
    model = at_random(adapt(Net(), LoRA, r"body\.[qv]", rank=2))
    save_peft(model, tmp_path)
    at_random(model)
    (tmp_path / f"{TENSORS}.new").write_text("what a kill left")
    written = []
    real = writing.write_atomic
    monkeypatch.setattr(writing, "write_atomic", lambda p, d: (written.append(p.name), real(p, d)))
    save_peft(model, tmp_path)
    assert written == [TENSORS] and sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS]
    x = torch.randn(4, 7)
    assert torch.equal(load_peft(Net(), tmp_path)(x), model(x))


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_read_only_file_is_kept(name, tmp_path, monkeypatch):
    model = at_random(adapt(Net(), LoRA, r"body\.[qv]", rank=2))
    save_peft(model, tmp_path)
    before = (tmp_path / TENSORS).read_bytes()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != name)
    grow(model)
    with pytest.raises(PermissionError, match=f"{name} is read-only"):
        save_peft(model, tmp_path)
    assert (tmp_path / TENSORS).read_bytes() == before


def test_alpha_gives_the_scale_back():
    for r in (1, 2, 3, 5, 7, 12, 64):
        for alpha in (1, 2, 16, 32, 5):
            assert writing._alpha(alpha / r, r) == alpha
            assert isinstance(writing._alpha(alpha / r, r), int)
    assert writing._alpha(2 / 3**0.5, 3) / 3 == 2 / 3**0.5


# The real peft. Every kind of folder that it writes is right, or refused


def fill(model):
    """Adapters and heads as if they were trained."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name or p.requires_grad:
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.data += (0.2 * noise).to(p.dtype)
    return model.eval()


def llama(dtype=torch.float32, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **changes)
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(dtype=torch.float32):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16)
    return GPT2LMHeadModel(config).to(dtype).eval()


def bert(dtype=torch.float32):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    config = BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=16, num_labels=3)
    return BertForSequenceClassification(config).to(dtype).eval()


def plain(dtype=torch.float32):
    return Net().to(dtype)


def outputs(model):
    """Of a batch of word ids, or of vectors for a model that takes no ids."""
    name = type(getattr(model, "base_model", model)).__name__
    inner = model.base_model.model if name == "LoraModel" else model
    torch.manual_seed(5)
    with torch.no_grad():
        if isinstance(inner, Net):
            return model(torch.randn(9, 7, dtype=inner.norm.weight.dtype))
        return model(input_ids=torch.randint(0, 50, (3, 8))).logits


EXACT = 0.0  # scale is a power of 2
ORDER = 5e-6  # and so it is with these odd sizes, but for the order in which a processor sums
KINDS = {
    # what it is: (model, LoraConfig's arguments, error allowed or the line that refuses it)
    "plain": (llama, {"target_modules": ["q_proj", "v_proj"]}, EXACT),
    "alpha": (llama, {"lora_alpha": 32, "target_modules": ["q_proj", "down_proj"]}, EXACT),
    "alpha / r no power of 2": (llama, {"lora_alpha": 12, "target_modules": ["q_proj"]}, 1e-6),
    "dropout": (llama, {"lora_dropout": 0.1, "target_modules": ["q_proj"]}, EXACT),
    "rank_pattern": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r"layers\.1\..*q_proj": 2}},
        EXACT,
    ),
    "alpha_pattern": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 4, "1.*q_proj": 64}},
        EXACT,
    ),
    "rslora": (llama, {"use_rslora": True, "r": 16, "target_modules": ["q_proj"]}, EXACT),
    "rslora, r 8": (llama, {"use_rslora": True, "target_modules": ["q_proj"]}, 1e-6),
    "regex": (llama, {"target_modules": r".*layers\.1\.(self_attn|mlp)\.(q|up)_proj"}, EXACT),
    "all-linear": (llama, {"target_modules": "all-linear"}, EXACT),
    "exclude_modules": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0.*"},
        EXACT,
    ),
    "modules_to_save": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        EXACT,
    ),
    "a head by task type": (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}, EXACT),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, EXACT),
    "a module of one's own": (
        plain,
        {"r": 4, "target_modules": ["q", "v"], "modules_to_save": ["head"]},
        ORDER,
    ),
    "gaussian": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}, EXACT),
    "orthogonal": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}, EXACT),
    "dora": (llama, {"target_modules": ["q_proj"], "use_dora": True}, "use_dora is true"),
    "lora_bias": (plain, {"target_modules": ["q"], "lora_bias": True}, "lora_bias is true"),
    "bias all": (bert, {"target_modules": ["query"], "bias": "all"}, "bias: Input should be"),
    "bias lora_only": (bert, {"target_modules": ["query"], "bias": "lora_only"}, "bias: Input"),
    "pissa": (
        llama,
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
        "init_lora_weights: Input should be",
    ),
    "layers_to_transform": (
        llama,
        {"target_modules": ["q_proj"], "layers_to_transform": [0]},
        "layers_to_transform is [0]",
    ),
    "tokens": (
        llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        "trainable_token_indices is [1, 2]",
    ),
    "target_parameters": (
        llama,
        {"target_modules": ["v_proj"], "target_parameters": ["mlp.gate_proj.weight"]},
        'target_parameters is ["mlp.gate_proj.weight"]',
    ),
    "embedding": (llama, {"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
}


@pytest.fixture
def peft(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("peft")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_folder_is_right_or_refused(kind, tmp_path, peft):
    make, fields, expected = KINDS[kind]
    config = peft.LoraConfig(**{"r": 8, "lora_alpha": 16} | fields)
    theirs = fill(peft.get_peft_model(make(), config))
    theirs.save_pretrained(tmp_path / "a")
    if isinstance(expected, str):
        refused(make(), ValueError, expected, tmp_path / "a")
        return
    ours = load_peft(make(), tmp_path / "a")
    save_peft(ours, tmp_path / "b")
    back = peft.PeftModel.from_pretrained(make(), tmp_path / "b").eval()
    y = outputs(theirs)
    assert (outputs(make()) - y).abs().max() > 1e-3
    assert (outputs(ours) - y).abs().max() <= expected
    assert torch.equal(outputs(back), y)
    assert read(tmp_path / "b")[0]["fan_in_fan_out"] == (make is gpt2)
    one, other = (load_file(tmp_path / x / TENSORS) for x in "ab")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert same(snapshot(load_peft(make(), tmp_path / "b")), snapshot(ours))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_of_the_real_peft(dtype, tmp_path, peft):
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    theirs = fill(peft.get_peft_model(llama(dtype), config))
    theirs.save_pretrained(tmp_path)
    ours, y = load_peft(llama(dtype), tmp_path), outputs(theirs)
    assert ours.model.layers[0].self_attn.q_proj.B.dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    if dtype == torch.float64:
        assert torch.equal(outputs(ours), y)
    else:  # peft adds in float32, and rounds once
        assert 0 < (outputs(ours) - y).abs().max() < 0.02
        narrow = peft.get_peft_model(llama(dtype), config, autocast_adapter_dtype=False)
        fill(narrow).save_pretrained(tmp_path / "narrow")
        ours = load_peft(llama(dtype), tmp_path / "narrow", dtype=dtype)
        assert torch.equal(outputs(ours), outputs(narrow))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_several_adapters_of_the_real_peft(tmp_path, peft):
    one, other = (peft.LoraConfig(r=4, lora_alpha=a, target_modules=["q", "v"]) for a in (4, 16))
    theirs = peft.get_peft_model(plain(), one)
    theirs.add_adapter("other", other)
    fill(theirs).save_pretrained(tmp_path)
    for name, folder in {"default": tmp_path, "other": tmp_path / "other"}.items():
        theirs.set_adapter(name)
        near = {"rtol": 0, "atol": ORDER}
        torch.testing.assert_close(outputs(load_peft(plain(), folder)), outputs(theirs), **near)
        one = load_peft(plain(), folder, LoRAMoE).eval()  # one expert has weight 1
        torch.testing.assert_close(outputs(one), outputs(theirs), **near)
    theirs.base_model.set_adapter(["default", "other"])
    both = load_peft(plain(), [tmp_path, tmp_path / "other"])
    torch.testing.assert_close(outputs(both), outputs(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [llama, gpt2, bert, plain])
def test_the_real_peft_reads_what_has_grown(make, tmp_path, peft):
    model, targets = make(), {llama: ".*(q|v)_proj", gpt2: ".*c_(attn|proj)", bert: ".*query"}
    train = {llama: r".*\.norm", bert: "classifier", plain: "head"}
    adapt(model, LoRA, targets.get(make, r"body\.[qv]"), rank=2, scale=0.3, train=train.get(make))
    for _ in range(2):
        grow(model)
    fill(at_random(model))
    save_peft(model, tmp_path)
    back = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    y, scale = outputs(model), outputs(model).abs().max()
    assert (outputs(make()) - y).abs().max() > 1e-3
    assert (outputs(back) - y).abs().max() <= 5e-6 * scale
    back.save_pretrained(tmp_path / "theirs")
    one, other = load_file(tmp_path / TENSORS), load_file(tmp_path / "theirs" / TENSORS)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_real_peft_agrees_on_every_name(tmp_path, peft):
    """Ranks and scales of names that end alike, in both directions."""
    model = nn.Sequential(nn.Linear(7, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    base = copy.deepcopy(model)
    for name, rank in {r"0": 2, r"1\.0": 3}.items():
        adapt(model, LoRA, name, rank=rank, scale=2 / rank)
    save_peft(at_random(model), tmp_path)
    back = peft.PeftModel.from_pretrained(base, tmp_path)
    x = torch.randn(5, 7)
    torch.testing.assert_close(back(x), model(x))


@pytest.mark.slow
def test_every_field_of_peft_is_known(tmp_path, peft):
    """Of all fields that this peft writes, those without a value are accepted."""
    written = peft.LoraConfig(target_modules=["q", "v"], r=3, lora_alpha=6)
    written.save_pretrained(tmp_path / "theirs")
    fields = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    load_peft(Net(), write(tmp_path / "a", **fields))
