"""Adapters in another library's models: each model × scheme × situation, right or not.

    python tests/models.py --out tutorials/results/models.md

A cell is computed by `outcome`. The models are transformers', small, from a config, at random; the
schemes have few ranks, of two tasks; all tensors are random, so that nothing is 0 or 1 by chance.
"""

import argparse
import copy
import functools
import re
import tempfile
import types
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor

from minimoe import LoRA, LoRAMoE, MoRA
from minimoe.adapt import (
    adapt,
    adapters,
    after_step,
    context,
    grow,
    load,
    load_state,
    parameters,
    save,
    state,
)
from minimoe.schemes.sema import SEMA
from minimoe.schemes.smora import SMoRA

SCHEMES = {
    "LoRA": (LoRA, {"rank": 4}),
    "LoRAMoE": (LoRAMoE, {"rank": 4, "experts": 2, "top_k": 2, "balance": 0.1}),
    "MoRA": (MoRA, {"rank": 4, "top_k": 3}),
    "SMoRA": (SMoRA, {"rank": 4, "top_k": 3, "rate": 0.01}),
    "SEMA": (SEMA, {"rank": 4, "width": 2}),
}
CHOOSING = ("LoRAMoE", "MoRA", "SMoRA")  # of their ranks, for each token


class Wrong(Exception):
    """What a cell found, where it is not what its reference says."""


def require(holds: bool, reason: str) -> None:
    if not holds:
        raise Wrong(reason)


# Models


@dataclass(frozen=True)
class Model:
    """A model of transformers, and what of it is adapted."""

    name: str  # in transformers
    config: dict[str, Any]
    dropout: str  # the config's names of it
    first: str  # targets of a first call of adapt
    second: str  # those of a second
    few: str  # those of a model of one block that is compiled, which takes seconds
    inputs: Callable[[], dict[str, Tensor]]  # and labels

    @property
    def targets(self) -> str:
        return f"{self.first}|{self.second}"


SAMPLES, TOKENS, WORDS, WIDTH = 3, 6, 50, 16
BLOCKS = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")


def ids(tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, WORDS, (SAMPLES, tokens))


def causal() -> dict[str, Tensor]:
    words = ids()
    return {"input_ids": words, "labels": words}


def pictures() -> Tensor:
    return torch.randn(SAMPLES, 3, 8, 8)  # four patches


def sounds() -> Tensor:
    return torch.randn(SAMPLES, 8, 2 * TOKENS)  # two frames a token


LLAMA = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "use_cache": False,
}
BERT = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_attention_heads": 2,
}
TEXT = BERT | {"vocab_size": WORDS, "max_position_embeddings": 32}
VISION = BERT | {"image_size": 8, "patch_size": 4}

MODELS = {
    "Llama": Model(
        "LlamaForCausalLM",
        LLAMA,
        "attention_dropout",
        r".*self_attn\.._proj",
        r".*mlp\..*_proj",
        r".*(v|down)_proj",
        causal,
    ),
    "GPT-2": Model(
        "GPT2LMHeadModel",
        {
            "vocab_size": WORDS,
            "n_positions": 32,
            "n_embd": WIDTH,
            "n_head": 2,
            "use_cache": False,
        },
        "attn_pdrop resid_pdrop embd_pdrop",
        r".*attn\.c_.*",
        r".*mlp\.c_.*",
        r".*(attn\.c_attn|mlp\.c_fc)",
        causal,
    ),
    "BERT": Model(
        "BertForMaskedLM",
        TEXT,
        "hidden_dropout_prob attention_probs_dropout_prob",
        r".*attention\.(self|output)\.\w+",
        r".*layer\.\d\.(intermediate|output)\.dense",
        r".*(value|intermediate\.dense)",
        causal,
    ),
    "T5": Model(
        "T5ForConditionalGeneration",
        {
            "vocab_size": WORDS,
            "d_model": WIDTH,
            "d_kv": 8,
            "d_ff": 24,
            "num_heads": 2,
            "use_cache": False,
            "decoder_start_token_id": 0,
        },
        "dropout_rate",
        r".*Attention\.[qkvo]",
        r".*DenseReluDense\.w[io]",
        r".*(SelfAttention\.v|wo)",
        lambda: {"input_ids": ids(), "labels": ids(5)},
    ),
    "ViT": Model(
        "ViTForImageClassification",
        VISION | {"num_labels": 3},
        "hidden_dropout_prob attention_probs_dropout_prob",
        r".*attention\.._proj",
        r".*mlp\.fc\d",
        r".*(v_proj|fc2)",
        lambda: {"pixel_values": pictures(), "labels": torch.tensor([2, 0, 1])},
    ),
    "CLIP": Model(
        "CLIPModel",
        {
            "text_config": TEXT | {"eos_token_id": 1},
            "vision_config": VISION,
            "projection_dim": 8,
        },
        "attention_dropout",
        r".*self_attn\.\w+_proj",
        r".*mlp\.fc\d",
        r".*(v_proj|fc2)",
        lambda: {"input_ids": ids(), "pixel_values": pictures(), "return_loss": True},
    ),
    "Whisper": Model(
        "WhisperForConditionalGeneration",
        {
            "vocab_size": WORDS,
            "d_model": WIDTH,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "num_mel_bins": 8,
            "max_source_positions": TOKENS,
            "max_target_positions": 16,
            "use_cache": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        "dropout attention_dropout activation_dropout",
        r".*_attn\.\w+_proj",
        r".*layers\.\d\.fc\d",
        r".*(encoder_attn\.v_proj|fc2)",
        lambda: {"input_features": sounds(), "labels": ids(5)},
    ),
    "Mixtral": Model(
        "MixtralForCausalLM",
        LLAMA | {"num_local_experts": 4, "experts_implementation": "batched_mm"},  # also in float64
        "attention_dropout",
        r".*self_attn\.[qk]_proj",
        r".*self_attn\.[vo]_proj",
        r".*[qv]_proj",
        causal,
    ),
}


def plain(
    name: str, dtype: torch.dtype = torch.float64, dropout: float = 0.0, blocks: int = 2, seed=0
):
    """A model, in training mode, whose tensors are all at random, its activations near 1."""
    torch.manual_seed(seed)
    model = MODELS[name]
    kind = getattr(transformers, model.name)
    changed = dict.fromkeys(BLOCKS, blocks) | dict.fromkeys(model.dropout.split(), dropout)
    net = kind(kind.config_class(**_with(model.config, changed))).to(dtype).train()
    if net.loss_type is None:
        net.loss_type = "ForCausalLM"  # what it means, and warns of
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=WIDTH**-0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return net


def _with(config: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """A config, or those of a model's two towers, with some values changed."""
    if "text_config" in config:
        towers = {k: _with(v, changed) for k, v in config.items() if isinstance(v, dict)}
        return config | towers
    return config | changed


def inputs(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    torch.manual_seed(1)
    made = MODELS[name].inputs()
    floats = (k for k, v in made.items() if isinstance(v, Tensor) and v.is_floating_point())
    return made | {key: made[key].to(dtype) for key in floats}


def adapted(net, scheme: str, targets: str, tasks: int = 2, **settings):
    """The model with adapters that have grown, their tensors at random."""
    kind, own = SCHEMES[scheme]
    adapt(net, kind, targets, **own | settings)
    for _ in range(tasks - 1):
        grow(net)
    return at_random(net)


def at_random(net):
    """The model, all that it has learned at random."""
    torch.manual_seed(2)
    ranks = [layer.ranks for _, layer in adapters(net)]
    load_state(net, {k: 0.1 * torch.randn_like(v) for k, v in state(net).items()})
    require([layer.ranks for _, layer in adapters(net)] == ranks, "load_state changed the ranks")
    return net


def tensors(output: Any) -> list[Tensor]:
    """All of a model's output, in its order."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [t for part in parts if part is not None for t in tensors(part)]


def same(got: list[Tensor], want: list[Tensor], what: str) -> None:
    require(len(got) == len(want), f"{what}: {len(got)} tensors, not {len(want)}")
    for one, other in zip(got, want, strict=True):
        require(torch.equal(one, other), f"{what} differ by {_most(one, other):.1e}")


def close(got: list[Tensor], want: list[Tensor], what: str, tolerance: float = 1e-9) -> None:
    require(len(got) == len(want), f"{what}: {len(got)} tensors, not {len(want)}")
    for one, other in zip(got, want, strict=True):
        off = _most(one, other)
        require(off <= tolerance * (1 + other.abs().max()), f"{what} differ by {off:.1e}")


def _most(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape or one.dtype != other.dtype:
        return torch.inf
    return (one - other).abs().nan_to_num(torch.inf).max().item() if one.numel() else 0.0


@torch.no_grad()
def matter(net, given: dict[str, Any], bound: float = 0.0) -> None:
    """That the adapters move the outputs, by far more than a bound on what may be off."""
    without = copy.deepcopy(net)
    for _, layer in adapters(without):
        layer.scale = 0.0
    with context(net), context(without):
        moved = distance(tensors(without(**given)), tensors(net(**given)))
    require(moved > 2 * bound, f"the adapters move the outputs by {moved:.1e} only")


def off(got: Tensor, want: Tensor, size: Tensor | None = None) -> Tensor:
    """‖got - want‖ / ‖want‖, or / size, of each token."""
    size = want.norm(dim=-1) if size is None else size
    return ((got.detach().to(want.dtype) - want).norm(dim=-1) / size).flatten()


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """How much a token is off, at the median of those of all outputs."""
    both = [(a, b.detach()) for a, b in zip(got, want, strict=True) if b.ndim]
    return torch.cat([off(a, b) for a, b in both]).median().item()


def step(net, run, given: dict[str, Any], inside: bool = False):
    """Outputs, aux_loss, counts, and the gradients of the model's loss and the auxiliary loss, from
    a backward pass after the batch, or inside."""
    net.zero_grad()
    forget(net)
    with context(net) as batch:
        output = run(**given)
        aux = torch.as_tensor(batch.aux_loss)
        loss = output.loss + aux
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    none = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    require(not none, f"no gradient of {none}")
    return types.SimpleNamespace(
        outputs=[t.detach() for t in tensors(output)],
        aux=aux.detach(),
        counts=counts_of(net),
        grads=[p.grad.clone() for p in parameters(net)],
    )


def counts_of(net) -> list[Tensor]:
    return [layer.counts for _, layer in adapters(net) if layer.counts is not None]


def forget(net) -> None:
    """The counts of the steps before, without what a scheme does with them."""
    for _, layer in adapters(net):
        layer.end_step()


def equal_steps(got, want, tolerance: float = 1e-9) -> None:
    close(got.outputs, want.outputs, "outputs", tolerance)
    close([got.aux], [want.aux], "auxiliary losses", tolerance)
    same(got.counts, want.counts, "counts")
    close(got.grads, want.grads, "gradients", tolerance)


# Situations: each is a function of a model's name and a scheme's, which raises if a cell is not
# right.


@torch.no_grad()
def eval_first(name: str, scheme: str) -> None:
    """Reference: the plain model in eval(), at birth; then one adapted in train()."""
    targets, given, (kind, settings) = MODELS[name].targets, inputs(name), SCHEMES[scheme]
    want = tensors(plain(name, dropout=0.5).eval()(**given))
    net = adapt(plain(name, dropout=0.5).eval(), kind, targets, **settings)
    require(not any(module.training for module in net.modules()), "a module is in training mode")
    same(tensors(net(**given)), want, "outputs at birth")
    other = adapted(plain(name, dropout=0.5), scheme, targets)
    with tempfile.TemporaryDirectory() as folder:
        save(other, f"{folder}/a")
        load(net, f"{folder}/a")
    with context(other):
        noisy = tensors(other(**given))
    want = tensors(other.eval()(**given))
    require(distance(noisy, want) > 0.01, "dropout does nothing in training either")
    for _ in range(2):
        same(tensors(net(**given)), want, "outputs after loading")
    matter(net, given)
    if scheme == "MoRA":
        for _, layer in adapters(net):
            layer.delta = -1.0
        moved = max(map(_most, tensors(net(**given)), want))
        require(moved > 1e-3, "delta does nothing")


@contextmanager
def watched(net):
    """{name of an adapter: its (x, y) of each pass}, of the passes inside."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name, _ in adapters(net)}

    def keep(name, layer, args, y):
        seen[name].append((args[0].detach(), y.detach()))

    hooks = [layer.register_forward_hook(partial(keep, name)) for name, layer in adapters(net)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def in_16_bits(name: str, net, exact, bound: float, share: float, whole: float) -> None:
    """Compare a step of net with exact, the same model in float32.

    Layer by layer, on the same x, so that no earlier choice matters: a share of all tokens is off
    by less than a bound, relative to the base's part and the adapter's; so are the auxiliary loss
    and counts. Then the outputs: the median token is off by less than `whole`, since a token for
    which a layer chose otherwise moves, and all that attend to it.
    """
    dtype = next(iter(net.parameters())).dtype
    half = torch.autocast("cpu", torch.float16) if dtype == torch.float32 else nullcontext()
    with watched(net) as seen, half:
        got = step(net, net, inputs(name, dtype))
    tokens, aux, counts = layer_by_layer(seen, exact)
    agree = (tokens < bound).float().mean().item()
    require(agree >= share, f"{agree:.3f} of the layers' tokens agree")
    require(bool(got.aux.isfinite()), "the auxiliary loss is not finite")
    close([got.aux.float()], [aux], "auxiliary losses", bound)
    for one, other in zip(got.counts, counts, strict=True):
        moved = (one - other).abs().sum() / other.sum()
        require(moved <= 2 * (1 - share), f"{moved:.3f} of the counts moved")
    for grad in got.grads:
        require(grad.dtype == torch.float32, f"a gradient is in {grad.dtype}")
        require(bool(grad.isfinite().all()), "a gradient is not finite")
    given = inputs(name, torch.float32)
    with torch.no_grad(), context(exact):
        moved = distance(got.outputs, tensors(exact(**given)))
    require(moved < whole, f"the outputs are off by {moved:.4f}")
    matter(exact, given, whole)


@torch.no_grad()
def layer_by_layer(seen, exact) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(how much each token of each layer is off, aux_loss, counts) on the x that were seen."""
    parts, layers = [], dict(adapters(exact))
    forget(exact)
    with context(exact) as batch:
        for key, passes in seen.items():
            for x, y in passes:
                base, want = layers[key].base(x.float()), layers[key](x.float())
                size = base.norm(dim=-1) + (want - base).norm(dim=-1)
                parts.append(off(y, want, size))
        aux = torch.as_tensor(batch.aux_loss)
    return torch.cat(parts), aux, counts_of(exact)


def bf16_base(name: str, scheme: str) -> None:
    """Reference: in float32, the same weights, rounded to bfloat16."""
    net = plain(name, torch.float32).bfloat16()
    exact = copy.deepcopy(net).float()
    for each in (net, exact):
        adapted(each, scheme, MODELS[name].targets)
    for key, tensor in state(net).items():
        require(tensor.dtype == torch.float32, f"{key} is in {tensor.dtype}")
    in_16_bits(name, net, exact, bound=2**-7, share=1.0, whole=0.025)
    for _, layer in adapters(net):
        require(layer.base.weight.dtype == torch.bfloat16, "the base is no longer in bfloat16")


def fp16_autocast(name: str, scheme: str) -> None:
    """Reference: the same model in float32, without autocast."""
    net = adapted(plain(name, torch.float32), scheme, MODELS[name].targets)
    share = 0.98 if scheme in CHOOSING else 1.0  # of nearly equal ranks it may take the other
    in_16_bits(name, net, copy.deepcopy(net), bound=2**-9, share=share, whole=0.005)


def checkpointed(reentrant: bool, name: str, scheme: str) -> None:
    """Reference: the same step without checkpointing."""
    net, given = adapted(plain(name), scheme, MODELS[name].targets), inputs(name)
    net.enable_input_require_grads()
    want = step(net, net, given)
    enable = getattr(net, "activation_checkpointing_enable", net.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    begun = []
    for _, layer in adapters(net):
        layer.register_forward_pre_hook(lambda layer, args: begun.append(layer.name))
    for inside in (False, True):
        begun.clear()
        equal_steps(step(net, net, given, inside), want)
        twice = sorted(2 * [name for name, _ in adapters(net)])
        require(sorted(begun) == twice, "not all layers ran twice")
    matter(net, given)


def compiled(name: str, scheme: str) -> None:
    """Reference: the same steps without compiling."""
    net, given = adapted(plain(name, blocks=1), scheme, MODELS[name].few), inputs(name)
    want = step(net, net, given)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    run = torch.compile(net, backend="aot_eager")
    for _ in range(2):
        equal_steps(step(net, run, given), want)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.compiler.reset()
    require(graphs == 1, f"{graphs} graphs")
    matter(net, given)


def two_calls(name: str, scheme: str) -> None:
    """Reference: in each layer x W0ᵀ + scale · (g ⊙ z) B, summed here; and for all outputs and
    gradients, the calls in the other order."""
    model, given, (kind, settings) = MODELS[name], inputs(name), SCHEMES[scheme]
    calls = [(kind, model.first, settings), (LoRA, model.second, {"rank": 3, "scale": 2.0})]
    nets = []
    for order in (calls, calls[::-1]):
        net = plain(name)
        for which, targets, own in order:
            adapt(net, which, targets, **own)
        both_learn(net)
        grow(net)
        both_learn(at_random(net))
        nets.append(net)
    net, other = nets
    kinds = {(type(layer).__name__, layer.rank) for _, layer in adapters(net)}
    require(kinds == {(scheme, 4), ("LoRA", 3)}, f"the layers are {kinds}")
    with watched(net) as seen:
        got = step(net, net, given)
    for key, layer in adapters(net):
        for x, y in seen[key]:
            close([y], [by_equation(layer, x)], f"outputs of {key}")
    equal_steps(got, step(other, other, given))
    matter(net, given)


def both_learn(net) -> None:
    learn = {id(p) for _, layer in adapters(net) for p in layer.parameters(recurse=False)}
    require(learn == {id(p) for p in parameters(net)}, "parameters() are not the adapters'")


@torch.no_grad()
def by_equation(layer, x: Tensor) -> Tensor:
    idx, g, z, *_ = layer.gate(x)
    said = g * z if idx is None else torch.zeros(*x.shape[:-1], layer.ranks).to(x)
    if idx is not None:
        said.scatter_(-1, idx, g * z)
    W0 = layer.base.weight.T if type(layer.base).__name__ == "Conv1D" else layer.base.weight
    return F.linear(x, W0, layer.base.bias) + layer.scale * said @ layer.rows("B")


# Padding. One mask fits layers that see the same tokens: a part of a model.


@dataclass(frozen=True)
class Part:
    """Layers of a model that see the same tokens, or a model all of whose layers do not."""

    model: str
    targets: str = r".*"  # of the model's
    tokens: str = "input_ids"  # the model's arguments for them, their mask and positions; where it
    mask: str = "attention_mask"  # takes none, each token attends to all
    positions: str = "position_ids"
    output: str = "logits"  # what of its output is of these tokens
    others: Callable[[], dict[str, Tensor]] = dict  # its other arguments
    length: int = TOKENS

    def arguments(self, mask: Tensor) -> dict[str, Tensor]:
        """For samples whose real tokens are where mask (SAMPLES, length) is 1."""
        places = {self.mask: mask, self.positions: (mask.cumsum(-1) - 1).clamp_min(0)}
        return {key: value for key, value in places.items() if key}


ENCODER = r"(model\.)?encoder\..*|.*(EncDecAttention\.[kv]|encoder_attn\.[kv]_proj)"
DECODER = r"(model\.)?decoder\..*(?<!EncDecAttention\.[kv])(?<!encoder_attn\.[kv]_proj)"
PATCHES = {"tokens": "", "mask": "", "positions": "", "output": ""}
OF_DECODER = {"tokens": "decoder_input_ids", "mask": "decoder_attention_mask"}
T5_ENCODER = {
    "positions": "",
    "output": "encoder_last_hidden_state",
    "others": lambda: {"decoder_input_ids": ids(5)},
}
CLIP_TEXT = {
    "output": "text_model_output.last_hidden_state",
    "others": lambda: {"pixel_values": pictures()},
}
WHISPER_ENCODER = PATCHES | {
    "others": lambda: {"input_features": sounds(), "decoder_input_ids": ids(5)}
}

PARTS = {
    "Llama": Part("Llama"),
    "GPT-2": Part("GPT-2"),
    "BERT": Part("BERT"),
    "T5": Part("T5", **T5_ENCODER),
    "T5 encoder": Part("T5", ENCODER, **T5_ENCODER),
    "T5 decoder": Part(
        "T5", DECODER, **OF_DECODER, positions="", others=lambda: {"input_ids": ids(5)}
    ),
    "ViT": Part("ViT", **PATCHES, others=lambda: {"pixel_values": pictures()}, length=5),
    "CLIP": Part("CLIP", **CLIP_TEXT),
    "CLIP text": Part("CLIP", r"text_model\..*", **CLIP_TEXT),
    "CLIP vision": Part(
        "CLIP",
        r"vision_model\..*",
        **PATCHES,
        others=lambda: {"input_ids": ids(), "pixel_values": pictures()},
        length=5,
    ),
    "Whisper": Part("Whisper", **WHISPER_ENCODER),
    "Whisper encoder": Part("Whisper", ENCODER, **WHISPER_ENCODER),
    "Whisper decoder": Part(
        "Whisper",
        DECODER,
        **OF_DECODER,
        positions="decoder_position_ids",
        others=lambda: {"input_features": sounds()},
    ),
    "Mixtral": Part("Mixtral"),
}


def padded(left: bool, name: str, scheme: str) -> None:
    """Reference: the gates asked about each sample's real tokens, as they are without padding (in
    the models that attend to all: as they are); the outputs without padding, and with another."""
    part = PARTS[name]
    targets = f"(?=({part.targets})$)({MODELS[part.model].targets})"
    net = adapted(plain(part.model), scheme, targets)
    torch.manual_seed(3)
    mask = (torch.arange(part.length) < torch.tensor([[part.length], [2], [4]])).long()
    mask = mask.flip(1) if left else mask
    given = part.others()
    given |= {key: value.double() for key, value in given.items() if value.is_floating_point()}
    given |= {part.tokens: ids()} if part.tokens else {}
    got = masked(net, part, given, mask, mask)
    tokens, outputs = alone(net, part, given, mask, got)
    aux, counts = by_hand(net, scheme, tokens)
    unmasked = masked(net, part, given, mask, torch.ones_like(mask))
    deaf = all(map(torch.equal, (got.aux, *got.counts), (unmasked.aux, *unmasked.counts)))
    require(deaf == (scheme in ("LoRA", "MoRA")), "the mask does nothing here")
    if part.tokens:
        words = given[part.tokens]
        given |= {part.tokens: torch.where(mask.bool(), words, ids())}
    for one in (got, masked(net, part, given, mask, mask)):
        close([one.aux], [aux], "auxiliary losses", 1e-6)
        same(one.counts, counts, "counts")
        if part.tokens:
            close([one.output[mask.bool()]], [outputs], "outputs of real tokens", 1e-6)


def masked(net, part: Part, given: dict[str, Tensor], mask: Tensor, told: Tensor):
    """A pass of samples that the model's own mask says are padded, and what context is told."""
    forget(net)
    with watched(net) as seen, context(net, mask=told) as batch:
        output = net(**given, **part.arguments(mask))
        aux = torch.as_tensor(batch.aux_loss, dtype=torch.float64).detach()
    counts = counts_of(net)
    for key, layer in adapters(net):
        for x, y in seen[key]:
            noise_is_nothing(layer, x, y, told)
    output = functools.reduce(getattr, part.output.split("."), output) if part.output else None
    return types.SimpleNamespace(seen=seen, aux=aux, counts=counts, output=output)


def noise_is_nothing(layer, x: Tensor, y: Tensor, mask: Tensor) -> None:
    """That what a layer sees at padding changes none of its other outputs."""
    if x.shape[:2] == mask.shape:
        real = mask.bool()
        noisy = torch.where(real.unsqueeze(-1), x, 100 * torch.randn_like(x))
        with context(layer, mask=mask):
            close(
                [layer(noisy)[real]], [y[real]], f"with noise as padding, outputs of {layer.name}"
            )


def alone(net, part: Part, given: dict[str, Tensor], mask: Tensor, got):
    """({layer: what it sees of each sample's real tokens}, the outputs at all of them)."""
    tokens, outputs = {key: [] for key in got.seen}, []
    for i, real in enumerate(mask.bool()):
        seen = {key: [(x[i : i + 1], y) for x, y in passes] for key, passes in got.seen.items()}
        if part.tokens:
            one = {key: value[i : i + 1] for key, value in given.items()}
            one[part.tokens] = one[part.tokens][:, real]
            with watched(net) as seen, context(net):
                output = net(**one)
            outputs.append(functools.reduce(getattr, part.output.split("."), output)[0])
        for key, ((x, _),) in seen.items():
            whole = part.tokens or x.shape[1] != len(real)
            tokens[key].append(x if whole else x[:, real])
    return tokens, torch.cat(outputs) if outputs else None


def by_hand(net, scheme: str, tokens: dict[str, list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """aux_loss and counts of all layers: SEMA's a mean over samples, others' over all tokens."""
    aux, counts = torch.zeros((), dtype=torch.float64), []
    for key, layer in adapters(net):
        groups = tokens[key] if scheme == "SEMA" else [torch.cat(tokens[key], 1)]
        gates = [layer.gate(x) for x in groups]
        aux += sum(gate.loss.detach() for gate in gates if gate.loss is not None) / len(gates)
        counts += [gate.counts for gate in gates if gate.counts is not None]
    return aux, counts


def grown_and_reloaded(name: str, scheme: str) -> None:
    """Reference: the model that was saved; for a plain model that reads its file, the plain one."""
    targets, given = MODELS[name].targets, inputs(name, torch.float32)
    (kind, settings), before = SCHEMES[scheme], plain(name, torch.float32)

    def fresh(seed: int = 0):
        return adapt(plain(name, torch.float32, seed=seed), kind, targets, **settings).eval()

    net = fresh().train()
    trained(net, given)
    grow(net)
    at_random(net).eval()
    want = tensors(net(**given))
    matter(net, given)
    own = dict(before.state_dict())
    for key, tensor in own.items():
        same([net.state_dict()[key]], [tensor], f"{key} after training")
    with tempfile.TemporaryDirectory() as folder:
        save(net, f"{folder}/adapters")
        other = fresh()
        load(other, f"{folder}/adapters")
        same(tensors(other(**given)), want, "outputs after load")
        other = fresh(seed=5)
        other.load_state_dict(net.state_dict(), strict=True)
        same(tensors(other(**given)), want, "outputs after load_state_dict")
        for own_names in (True, False):
            net.save_pretrained(f"{folder}/model", save_original_format=not own_names)
            if own_names:
                other = fresh(seed=5)
                other.load_state_dict(pretrained_file(net, f"{folder}/model"), strict=True)
                same(tensors(other(**given)), want, "outputs after save_pretrained")
            read, said = type(before).from_pretrained(f"{folder}/model", output_loading_info=True)
            require(not said["missing_keys"], f"from_pretrained misses {said['missing_keys']}")
            for key, tensor in own.items():
                same([read.state_dict()[key]], [tensor], f"{key} after from_pretrained")


def trained(net, given: dict[str, Any]) -> None:
    """One step of an optimiser."""
    optimiser = torch.optim.SGD(parameters(net), lr=0.1)
    step(net, net, given)
    optimiser.step()
    after_step(net)


def pretrained_file(net, folder: str) -> dict[str, Tensor]:
    """The tensors that save_pretrained has written, which names one of tied weights only."""
    written = load_file(f"{folder}/model.safetensors")
    tied = {key: source for key, source in net.all_tied_weights_keys.items() if key not in written}
    return written | {key: written[source] for key, source in tied.items()}


# Outcomes

SITUATIONS: dict[str, Callable[[str, str], None]] = {
    "eval() first": eval_first,
    "bf16 base": bf16_base,
    "fp16 autocast": fp16_autocast,
    "checkpointing non-reentrant": partial(checkpointed, False),
    "checkpointing reentrant": partial(checkpointed, True),
    "compile": compiled,
    "two adapt calls": two_calls,
    "padded batch left": partial(padded, True),
    "padded batch right": partial(padded, False),
    "grown and reloaded": grown_and_reloaded,
}


def rows(situation: str) -> list[str]:
    """The models of a situation, or their parts."""
    return list(PARTS if situation.startswith("padded") else MODELS)


@functools.cache
def outcome(model: str, scheme: str, situation: str) -> str:
    """ "right"; "error: " and the message, which names a layer; or "wrong: " and why."""
    with torch.random.fork_rng():
        try:
            SITUATIONS[situation](model, scheme)
        except Wrong as wrong:
            return f"wrong: {wrong}"
        except Exception as error:
            word = "error" if names_a_layer(str(error), model) else "wrong: " + type(error).__name__
            return f"{word}: {error}"
    return "right"


def names_a_layer(message: str, model: str) -> bool:
    """Whether it is one line, about a layer of the model by name."""
    name, _, _ = message.partition(" (")
    names = dict(plain(PARTS[model].model).named_modules())
    return bool(name in names and re.match(r" \(\w+\): ", message[len(name) :])) and (
        "\n" not in message
    )


def table(situation: str) -> str:
    lines = [f"| | {' | '.join(SCHEMES)} |", "|---" * (1 + len(SCHEMES)) + "|"]
    for model in rows(situation):
        words = [outcome(model, scheme, situation).partition(":")[0] for scheme in SCHEMES]
        lines.append(f"| {model} | {' | '.join(words)} |")
    return "\n".join(lines)


def page() -> str:
    parts = [f"## {situation}\n\n{table(situation)}\n" for situation in SITUATIONS]
    return INTRODUCTION.format(torch=torch.__version__.partition("+")[0]) + "\n".join(parts)


def words(text: str) -> dict[tuple[str, str, str], str]:
    """{(model, scheme, situation): word} of a page."""
    found = {}
    for part in text.split("\n## ")[1:]:
        situation, *lines = part.splitlines()
        cells = [[c.strip() for c in x.split("|")[1:-1]] for x in lines if x.startswith("|")]
        for model, *row in cells[2:]:
            found |= {
                (model, scheme, situation): word
                for scheme, word in zip(cells[0][1:], row, strict=True)
            }
    return found


INTRODUCTION = f"""# In other libraries' models

`python tests/models.py --out tutorials/results/models.md`

Small models of transformers {transformers.__version__}, on a CPU with torch {{torch}}, whose linear
layers are adapted and all of whose tensors are at random. right: equal to a reference, to rounding;
`tests/models.py` states the reference of each situation. error: an exception, in one line that
names the layer. wrong: anything else. The errors are of two kinds: reentrant checkpointing makes an
auxiliary loss without gradients; and one mask does not fit a model whose layers see different
tokens, so that encoder and decoder, or text and vision, have to be adapted apart. In models that
take no mask (ViT, CLIP vision, Whisper encoder) some of the tokens are masked for the gates alone.
Mixtral's experts are parameters of three axes, which cannot be adapted; its attention is.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the page here, too")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    text = page()
    print(text, end="")
    if out:
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
