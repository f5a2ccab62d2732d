# %% [markdown]
# # Text and clusters: what can be read off an input
#
# **Goals.** At the end you can
#
# 1. write a choice by the nearest mean, and make inputs for which it is a coin's toss;
# 2. compute bits per character, and name the method without training that comes first;
# 3. say what one character tells about its text, in the first layer and in the last.
#
# **Time.** 60 minutes at home, of which the computer needs about one.
# **You need** notebooks 00 to 03: LoRA, LoRA-MoE and MoRA are not explained again.

# %% install
from importlib.util import find_spec

from IPython import get_ipython

SOURCE = "minimoe-0.1.0-py3-none-any.whl"  # the teacher sets it: a wheel, or git+URL@TAG
NEEDED = "numpy matplotlib scikit-learn safetensors hypothesis joblib pydantic scipy tqdm "
NEEDED += "typing_extensions"
missing = [n for n in NEEDED.split() if find_spec(n.replace("scikit-learn", "sklearn")) is None]
if missing:  # none of these brings a torch with it
    get_ipython().run_line_magic("pip", f"install -q {' '.join(missing)}")
if find_spec("minimoe") is None:
    get_ipython().run_line_magic("pip", f"install -q --no-deps {SOURCE}")
print("torch is there" if find_spec("torch") else "get torch first: pytorch.org says how")

# %%
import copy
from dataclasses import replace
from functools import partial
from math import log, log2
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F

from minimoe import LoRA, LoRAMoE, MoRA
from minimoe.adapt import adapters
from minimoe.continual.baselines import Oracle, Trigram
from minimoe.continual.learn import AdapterLearner, Learner, pretrain, run_stream, score
from minimoe.continual.linear import in_subspace, least_squares, one_map, own_maps, to_mean
from minimoe.continual.probe import dense_gate
from minimoe.continual.streams import make
from minimoe.continual.texts import ALPHABET
from minimoe.lesson import claim, expect, figures, numbers, predict
from minimoe.tools.exercise import exercise

torch.set_num_threads(1)
torch.manual_seed(0)

# %% picture alt="Five boxes in a row: x, z, s, g, y. x and g are marked as today's."
figures.equation(today="xg")

# %% [markdown]
# The steps of every notebook, from a layer's input x to its output y. Today is about x: what is in
# it for g to choose by?

# %% [markdown]
# ## 1. Five clusters (5 min)
#
# A **stream** is a sequence of things to learn, one after another; each of them is a **task**. In
# this stream an input x has 128 numbers and an answer y has 64. Each of five tasks has
#
# - a cluster of inputs: x = m + noise, with a mean m of its own;
# - a linear map of its own from x to y.
#
# We measure the share of y that is explained: 1 if every answer is right, 0 for answering 0 always.
#
# **Predict.** Least squares finds the best single linear map for all five tasks together. Which
# share does it explain?

# %% predict-1
with_one = predict("share explained by one map for five tasks", None)

# %% one-map
five = make("clusters", tasks=5, seed=0)
with_one.beside(one_map(five))
print(f"each task's own map, told which: {own_maps(five):.2f}")

# %% [markdown]
# One map explains about 0. A map for each task, told which one to use, explains .99. **Explain**
# how that can be, in one sentence, before you open this.
#
# <details><summary>An answer</summary>
# The five maps are drawn so that their sum is 0: what one task wants of a direction of x, the
# others want the other way round, and the best compromise is to answer 0.
# </details>

# %% [markdown]
# ## 2. The nearest mean (8 min)
#
# So something must choose the map. A **gate** gives weights g that depend on the input. Here each
# task t has one weight, a mean m_t of its inputs, and a map W_t by least squares:
#
#     y = Σ_t g_t · x W_t

# %% gated-answers


def explained_with(gate):
    """The share explained, a mean over the five tasks."""
    means = torch.stack([task.x_train.mean(0) for task in five.tasks])
    maps = torch.stack([least_squares(task.x_train, task.y_train) for task in five.tasks])
    shares = []
    for x, y in (task.test for task in five.tasks):
        answers = torch.einsum("nt,nd,tdo->no", gate(x, means), x, maps)
        shares.append(score(answers, y))
    return mean(shares)


# %% [markdown]
# **Write.** A gate by the nearest mean: x (N, D) and means (T, D) give g (N, T), where g is 1 for
# the task whose mean is nearest to x, and 0 for all others. It is three lines.
#
# <details><summary>Hint 1</summary>
# `torch.cdist(x, means)` has all distances, (N, T).
# </details>
#
# <details><summary>Hint 2</summary>
# `F.one_hot(which, T)` puts a 1 in place `which`, and 0 in the others. Return floats.
# </details>


# %% exercise 1
def mean_gate(x, means):
    raise NotImplementedError


# %%
with exercise("1"):
    means = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 9.0]])
    for point, want in (((-1, -2), 0), ((1, 1), 0), ((3, 2), 1), ((1, 6), 2)):
        x = torch.tensor([point], dtype=torch.float32)
        d, products = torch.cdist(x, means), x @ means.T
        one = partial(F.one_hot, num_classes=3)
        slips = {
            "the index of the nearest mean, where its weight is asked for.": d.argmin(-1),
            "the largest product with x: a long mean is chosen too often.": one(
                products.argmax(-1)
            ),
            "the farthest mean has the weight.": one(d.argmax(-1)),
            "each mean chose a row of x: choose over the means, dim -1.": one(d.argmin(0)),
            "a softmax: all have some weight, and one should have all.": (-d).softmax(-1),
            "the weights lie across: (T, N) in place of (N, T).": one(d.argmin(-1)).T,
        }
        case = f"x = {point}, means (0, 0), (4, 0), (0, 9)"
        expect(case, mean_gate(x, means), one(torch.tensor([want])), slips=slips)
    both = mean_gate(torch.tensor([[5.0, 1.0], [0.0, 1.0]]), means)
    expect("x of two rows: (5, 1), (0, 1)", both, torch.tensor([[0, 1, 0], [1, 0, 0]]))
    print(f"with your gate the five maps explain {explained_with(mean_gate):.2f}")

# %% [markdown]
# The package's own gate by the mean gives .99 too. Nothing was trained, and nothing can be lost:
# a new task adds a mean and a map.
#
# Now the trained ones, in turn, 8 **ranks** a task (a rank is a row of A and one of B). Ten seeds
# of each learner are stored with the package, each at its tuned settings. **Predict**: which share
# does MoRA explain at the end?

# %% predict-2
of_mora = predict("share explained by MoRA after five clusters", None)

# %% clusters alt="A row for each of nine learners: a tick for each of ten seeds, and their mean."
stored = numbers("atlas")["clusters"]
ROWS = {
    "one LoRA": "lora",
    "LoRA that grows": "lora_grown",
    "one ridge, 300 features": "ridge",
    "LoRA-MoE": "lora_moe",
    "MoRA": "mora",
    "MoRA, detached": "mora_detached",
    "own ridge, by mean": "own_ridge",
    "LoRAs alone, by mean": "alone",
    "LoRAs, told which": "oracle",
}
by_seed = {name: stored[row]["acc"] for name, row in ROWS.items()}
figures.spread(by_seed, "share explained", "five clusters, ten seeds", (-1.2, 1.0))
of_mora.beside(mean(by_seed["MoRA"]))

# %% [markdown]
# What chooses by the mean comes first: LoRAs that were trained alone have .99, as if they were told
# the task, and ridge regressions .98. MoRA has .86, and .94 if no gradient runs through its gate
# (detached). LoRA-MoE has .68. Whoever has no gate has about 0, or less: ridge .04, one
# LoRA -.61, a LoRA that grows -.84. So a gate decides here; but the plainest gate is enough.

# %% [markdown]
# ## 3. Two tasks with one mean (8 min)
#
# `named` says how often a gate names the right one of two tasks. It sees half of each task's
# inputs, and is tested on the rest. `to_mean` is the gate of section 2. `in_subspace` takes each
# task's m leading directions U_t, and chooses by the energy of x in them, ‖U_tᵀ x‖².

# %% two-gates


def named(nearness, tasks):
    """The share of inputs (2, N, D) whose task is named."""
    seen, new = tasks.chunk(2, dim=1)
    near = torch.stack([nearness(new.flatten(0, 1), one) for one in seen])  # (2, 2 · N/2)
    truth = torch.arange(2).repeat_interleave(new.shape[1])
    return (near.argmax(0) == truth).float().mean().item()


apart = torch.randn(2, 400, 8) + 4 * torch.eye(8)[:2].unsqueeze(1)  # means 4 e_1 and 4 e_2
print(f"two clusters: the gate by the mean names {named(to_mean, apart):.2f}")

# %% [markdown]
# **Break.** Make N inputs for each of two tasks, (2, N, D), D even, so that the gate by the mean
# names at most .65 of them, where a coin has .50, and yet `in_subspace` with m = D / 2 names at
# least .95. Keep them random.
#
# <details><summary>Hint 1</summary>
# Inputs around 0 in both tasks have one mean. They must differ in something else.
# </details>
#
# <details><summary>Hint 2</summary>
# Let task 1 fill the first half of the D numbers, and task 2 the second half.
# </details>


# %% exercise 2
def one_mean(N, D):
    raise NotImplementedError


# %%
with exercise("2"):
    for N, D in ((400, 8), (600, 20)):
        tasks, case = one_mean(N, D), f"N = {N}, D = {D}"
        shape = tuple(tasks.shape) if torch.is_tensor(tasks) else tasks
        slips = {"the two tasks come first: (2, N, D).": (N, 2, D)}
        expect(f"the shape for {case}", shape, (2, N, D), slips=slips)
        by_mean, by_energy = named(to_mean, tasks), named(partial(in_subspace, m=D // 2), tasks)
        moved = (tasks.mean(1)[0] - tasks.mean(1)[1]).norm() / tasks.std()
        wrong = f"{case}: the gate by the mean names {by_mean:.2f}, the means are {moved:.2f} apart"
        assert by_mean <= 0.65, wrong
        wrong = f"{case}: the other gate names {by_energy:.2f}: both tasks fill the same directions"
        assert by_energy >= 0.95, wrong
        assert len(tasks.flatten(0, 1).unique(dim=0)) == 2 * N, f"{case}: inputs are repeated"

# %% [markdown]
# The package has such a stream: `subspaces`, eight linear maps, on inputs around 0 that fill 16 of
# 64 dimensions each. **Predict**: which share do own maps explain there, chosen by the mean?

# %% predict-3
on_subspaces = predict("share explained on subspaces, own maps by mean", None)

# %% subspaces alt="Bars for six learners: share explained on clusters and on subspaces."
ROWS = {
    "one ridge": "ridge",
    "own ridge,\nby mean": "own_ridge",
    "own map,\nby energy": "own_subspace",
    "LoRA-MoE": "lora_moe",
    "MoRA": "mora",
    "LoRAs,\ntold which": "oracle",
}
streams = [numbers("atlas")[name] for name in ("clusters", "subspaces")]
groups = {name: [mean(s[row]["acc"]) for s in streams] for name, row in ROWS.items()}
figures.bars(groups, ["clusters", "subspaces"], "share explained, ten seeds")
on_subspaces.beside(groups["own ridge,\nby mean"][1])

# %% [markdown]
# On subspaces the choice by the mean falls from .98 to .14. That by energy has 1.00, and on
# clusters .09: each gate is good for what it reads. MoRA has .45, less than one ridge for all
# (.47), and LoRA-MoE .04. **Explain**: why does LoRA-MoE's **router**, a matrix with a row for each
# **expert** (here the ranks of one task), fare as badly as the mean?
#
# <details><summary>An answer</summary>
# Its logits are linear in x, so those of -x are those of x with the other sign. But -x is as likely
# as x in every task. What names the task is a square, and a linear logit has none.
# </details>

# %% [markdown]
# ## 4. Bits per character (8 min)
#
# Now an input that tells less. The stream `texts` is made of files of your Python: English, which
# is its documentation, then Python's library, then torch's C++ headers, the code without comments.
# A **token** is one of the vectors that a layer reads; here it stands for one character of 96: the
# printable ones of ASCII, and the line break. A model reads 64 of them in a row and gives, after
# each, a probability to every character that may come next.

# %% texts
stream = make("texts", tasks=2, seed=0)
stream = replace(stream, pretraining={**stream.pretraining, "epochs": 3})  # not 5, to save time
for task in (stream.base, *stream.tasks):
    text = "".join(ALPHABET[c] for c in task.x_test[1])
    print(f"{task.name:8} {task.x_train.numel():7,} characters, as {text[:50]!r}")

# %% [markdown]
# If the character that came had the probability p, it costs -log₂ p bits: 0 if the model was sure
# of it, 1 at p = ½, 3 at p = ⅛. Bits per character are the mean of that. Fewer are better.
#
# **Predict.** How many bits does a model need that knows nothing, and gives 96 characters the same
# probability?

# %% predict-4
of_nothing = predict("bits per character of a model that knows nothing", None)

# %% nothing
of_nothing.beside(log2(len(ALPHABET)))

# %% [markdown]
# **Write.** Bits per character: logits (N, C), from which a softmax makes probabilities, and the
# characters that came, y (N,), give one number. By hand first: of four characters with
# probabilities ½, ¼, ⅛, ⅛, the first came, and then the third. (1 and 3 bits: the mean is 2.)
#
# <details><summary>Hint 1</summary>
# `logits.log_softmax(-1)` has ln p for every character; pick those that came.
# </details>
#
# <details><summary>Hint 2</summary>
# `ln_p[torch.arange(len(y)), y]` picks them; log₂ p = ln p / ln 2.
# </details>


# %% exercise 3
def bits_per_character(logits, y):
    raise NotImplementedError


# %%
with exercise("3"):
    four = torch.tensor([0.5, 0.25, 0.125, 0.125])
    for came, moved, more in (((0, 2), 0, 0), ((1, 1, 0), 1, 0), ((3,), 0, 5), ((0, 0, 3), 1, -2)):
        rows = torch.stack([four.roll(n * moved) for n in range(len(came))])
        y = torch.tensor(came)
        p = rows[range(len(y)), y]
        want = -p.log2().mean().item()
        slips = {
            "the natural logarithm: divide by ln 2.": -p.log().mean(),
            "the minus is missing.": -want,
            "the bits of each are asked for as their mean, one number.": -p.log2(),
            "the sum over characters, not their mean.": want * len(came),
            "the logarithm of a mean: take the mean of the logarithms.": -p.mean().log2(),
            "a softmax is missing: logits are no logarithms of p.": want - more / log(2),
            "each row is held against every y: row n goes with y[n].": -rows[:, y].log2().mean(),
            "the bits that the model expects: count the one that came.": four @ -four.log2(),
        }
        logits = rows.log() + more  # a softmax does not see what is added
        case = f"p = (1/2, 1/4, 1/8, 1/8){', moved on by one in each row' * moved}; {came} came"
        expect(f"{case}; logits ln p + {more}", bits_per_character(logits, y), want, slips=slips)

# %% [markdown]
# ## 5. Counts first (4 min)
#
# The **backbone**, which is trained first and then **frozen** (no later step changes it), is a
# decoder of two transformer blocks. We train it on English. Beside it stands a **baseline**, a
# simple method to be beaten before a result is believed: `Trigram` counts how often a character
# came after these two. It trains nothing.
#
# **Predict.** After English the decoder needs about 3.3 bits on pages of it that it has not seen.
# How many do the counts need?

# %% predict-5
of_counts = predict("bits per character of counts of three characters", None)

# %% counts
decoder = pretrain(stream, seed=0, targets=r"blocks\.\d\.(q|fc1)")  # what adapters will wrap
all_three = replace(stream, tasks=[*stream.tasks, stream.base])  # Python, C++, English
before = -np.array(Learner(decoder).row(all_three, 0))
counted = -np.array(Trigram(decoder, stream).row(all_three, 0))
of_counts.beside(counted[2])
print(f"{sum(w.numel() for w in decoder.parameters()):,} weights; bits per character:")
print("         " + "  ".join(task.name for task in all_three.tasks))
print("decoder ", before.round(2))
print("counts  ", counted.round(2))

# %% [markdown]
# The counts need about 2.7 on English and the decoder 3.3, though it was trained for 3 passes only.
# Neither knows Python yet: 4.0 and 4.0. On C++ the decoder needs 5.1, the counts 6.2, nearly as
# much as one that knows nothing.

# %% [markdown]
# ## 6. Two texts in turn (7 min)
#
# Now Python, and then C++, by adapters of 8 ranks in four layers. LoRA trains the same ranks
# throughout. LoRA-MoE and MoRA freeze theirs and grow 8 more; MoRA has a **scale**, a factor on all
# that its ranks add, of 4, as its weights sum to 1 over eight ranks where LoRA's are 1 each. *Told*
# is a LoRA for each text, which is told, also at test, which one to use. The counts go on counting.
#
# **Predict.** The decoder needs 4.0 bits for Python. MoRA learns Python, then C++. How many bits
# does it need for Python then?

# %% predict-6
at_the_end = predict("bits that MoRA needs for Python at the end", None)


# %% in-turn
def in_turn(make):
    """The learner at the end of the stream, and its run."""
    learners = []

    def keep(model, stream):
        learners.append(make(model, stream))
        return learners[0]

    how = {"lr": 5e-3, "batch": 32}
    run = run_stream(keep, decoder, stream, seed=0, epochs=3, how=how)
    return learners[0], run


MORA = {"rank": 8, "top_k": 8, "tau": 0.03, "delta": 0.2, "scale": 4.0}
MAKE = {
    "counts": Trigram,
    "told": lambda model, stream: Oracle(model, rank=8),
    "LoRA": lambda model, stream: AdapterLearner(model, LoRA, grows=False, rank=8),
    "LoRA-MoE": lambda model, stream: AdapterLearner(model, LoRAMoE, rank=8, top_k=2),
    "MoRA": lambda model, stream: AdapterLearner(model, MoRA, **MORA),
}

# %% lives alt="Bars for five learners: bits for Python just after it and at the end, and for C++."
lives = {name: in_turn(make) for name, make in MAKE.items()}
bits = {name: -np.array(run.matrix) for name, (_, run) in lives.items()}
names = ["Python, just learned", "Python, at the end", "C++, at the end"]
figures.bars({n: (b[1, 0], b[2, 0], b[2, 1]) for n, b in bits.items()}, names, "bits per character")
at_the_end.beside(bits["MoRA"][2, 0])

# %% [markdown]
# The counts come first, with 3.0 and 2.9 bits at the end: below every adapter, and below the one
# that is told (3.5 and 4.2). So this stream ranks nobody: adapters this small, on a decoder this
# small, are no way to these texts. What it shows is **forgetting**, that an old task is worse at
# the end than it was: MoRA goes from 3.4 to 3.8 bits on Python. (All of this is one seed, and the
# texts are files of your install: yours may differ a little.)

# %% lives-said
ahead = min(b[2].min() for name, b in bits.items() if name != "counts") - bits["counts"][2].max()
claim("At the end the counts' higher bar is .2 bits or more below all others", ahead, ahead >= 0.2)
lost = {name: b[2, 0] - b[1, 0] for name, b in bits.items()}
least = min(lost[name] for name in ("LoRA", "LoRA-MoE", "MoRA"))
claim("Each of LoRA, LoRA-MoE and MoRA loses at least .2 bits of Python", least, least >= 0.2)
print("lost:", ", ".join(f"{name} {x:.2f}" for name, x in lost.items()))

# %% [markdown]
# **Explain.** Somebody says: so MoRA forgets. What do the other bars answer?
#
# <details><summary>An answer</summary>
# LoRA and LoRA-MoE lose as much: all three between .3 and .4 bits. LoRA's ranks are overwritten;
# those of the other two are the same bit for bit, and the text is lost all the same. Told which
# ranks to use, nothing is lost. So what is missing is the choice, and it is not MoRA's alone.
# </details>
#
# **Predict.** At the end, which share of MoRA's weight do characters of Python give to the ranks
# that were trained on Python?

# %% predict-7
to_own = predict("share of weight of Python's characters for Python's ranks", None)

# %% shares alt="Shares of MoRA's weight: inputs of two texts down, ranks of the two across."
mass = np.array(lives["MoRA"][1].records["mass"])[-1]
figures.matrix(mass, "share of weight, MoRA", ["Python", "C++"], ["Python's ranks", "C++'s ranks"])
to_own.beside(mass[0, 0])

# %% [markdown]
# Python gives its own ranks .45, C++ gives them .47: the two rows are much the same. LoRA-MoE's are
# .50 and .47. A gate that told the texts apart would have 1 on the diagonal.

# %% [markdown]
# ## 7. One letter (7 min)
#
# What does a gate see? In the first layer (`blocks.0.q`, which makes the queries of the first
# block) a token is its character and its place, nothing else. In the last (`blocks.1.fc1`)
# attention has added what came before. Take an e in English and an e in Python at the same place,
# such as the last letters of *they sat in a tree* and *roots = parse.tree*.
#
# **Predict** how much of the gate's weight differs between the two, from 0 (none) to 1 (all), as a
# mean over many such pairs: in the first layer, and in the last.

# %% predict-8
in_first = predict("share of weight that differs for e in the first layer", None)

# %% predict-9
in_last = predict("share of weight that differs for e in the last layer", None)

# %% gates
mora = lives["MoRA"][0].model
LAYERS = [name for name, _ in adapters(mora)]


@torch.no_grad()
def gates(layer, ids):
    """Each rank's share of a layer's weight for characters ids (N, T): (N, T, R)."""
    adapter, inputs = dict(adapters(mora))[layer], []
    hook = adapter.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    mora(ids)
    hook.remove()
    g = dense_gate(adapter, inputs[0])
    return g / g.sum(-1, keepdim=True).clamp_min(1e-30)


def far(difference):
    """The share of weight that would have to move: a mean over characters."""
    return (difference.abs().sum(1) / 2).mean().item()


# %% letter
english, more_english = all_three.tasks[2].x_test.chunk(2)  # 128 pieces each
python, e = all_three.tasks[0].x_test[:128], ALPHABET.index("e")


def on_e(layer, one, other):
    """For each e that two pieces have at the same place, from 8 on: how the gates differ."""
    both = (one == e) & (other == e) & (torch.arange(64) >= 8)
    return (gates(layer, one) - gates(layer, other))[both]


differ = {layer: far(on_e(layer, english, python)) for layer in LAYERS}
for layer, apart in differ.items():
    alike = far(on_e(layer, english, more_english))
    print(f"{layer:14} English with Python {apart:.2f}, English with English {alike:.2f}")
in_first.beside(differ[LAYERS[0]])
in_last.beside(differ[LAYERS[-1]])

# %% [markdown]
# In the first layer exactly 0: the same character at the same place is the same input, and a gate
# is a function of its input. In `blocks.0.fc1` attention has been added, and yet it is only about
# .05: one rank has nearly all the weight of an e there, whatever came before. In the last about .45
# of the weight differs. (One pair would tell little: in the last layer they go from below .1 to
# above .8.) So a gate can tell two e's apart there. But is it the *text* that it tells? Two e's of
# English differ by about .3 too. We take 64 pieces of each text, group their characters by text
# (English, Python, C++) or by kind, and ask how far, in share of weight, the mean gate of a group
# is from the mean of all.

# %% kinds
KINDS = {
    "line break": "\n",
    "space": " ",
    "vowel": "aeiou",
    "consonant": "bcdfghjklmnpqrstvwxyz",
    "capital": "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "digit": "0123456789",
    "underscore": "_",
    "bracket": "()[]{}<>",
}
KINDS["other"] = "".join(c for c in ALPHABET if c not in "".join(KINDS.values()))
kind_of = torch.tensor([[c in kind for kind in KINDS.values()] for c in ALPHABET]).int().argmax(1)
read = torch.cat([task.x_test[:64] for task in all_three.tasks])  # (3 · 64, 64)
characters = read.flatten()
kinds, sources = kind_of[characters], torch.arange(3).repeat_interleave(64 * 64)

# %% groups


def averaged(g, groups):
    """The gate of each character (N, R) replaced by the mean of its group's."""
    sums = g.new_zeros(96, g.shape[1]).index_add(0, groups, g)
    return (sums / groups.bincount(minlength=96).clamp_min(1).unsqueeze(1))[groups]


by_kind, by_text, left = [], [], []
for layer in LAYERS:
    g = gates(layer, read).flatten(0, 1)
    by_kind.append(far(averaged(g - g.mean(0), kinds)))
    by_text.append(far(averaged(g - g.mean(0), sources)))
    left.append(far(averaged(g - averaged(g, characters), sources)))
    print(f"{layer:14} kind {by_kind[-1]:.2f}, text {by_text[-1]:.2f}, left {left[-1]:.2f}")

# %% [markdown]
# By kind about .5 in every layer, by text .1 to .2. Even that is mostly the characters themselves,
# as C++ has more capitals than English. *Left* is what remains of the difference by text when the
# mean gate of each character is taken off: at most .05, where groups at random have .01. So the
# last layer's gate sees some letters before this one, and hardly the text.
#
# Which ranks are these? The next picture has, of the first layer, the five that some kind of
# character gives most weight.

# %% ranks alt="Shares of weight in the first layer: nine kinds of character, five ranks."
g = gates(LAYERS[0], read).flatten(0, 1)
shares = torch.stack([g[kinds == k].mean(0) for k in range(len(KINDS))]).numpy()
most = np.argsort(-shares.max(0))[:5]
most = most[np.argsort(shares[:, most].argmax(0), kind="stable")]
labels = [f"{stream.tasks[i // 8].name} {i % 8 + 1}" for i in most]
figures.matrix(shares[:, most], f"share of weight, {LAYERS[0]}", list(KINDS), labels)

# %% [markdown]
# One rank has all the weight of spaces (1.00), another that of underscores (.95), others the
# largest part of line breaks (.60) and of vowels (.40), whichever text is read. The ranks have
# divided the characters among themselves, and not the texts: in the first layer nothing else is
# there to divide.

# %% [markdown]
# ## 8. Two dials (8 min)
#
# English was never trained on again, and it has moved, from 3.3 bits to 3.7 under MoRA. Two dials
# can be turned after training. MoRA's **threshold** δ: a rank whose **score** (its product with the
# input, divided by the norm of all ranks' products) is below δ gets weight 0. And the scale, which
# LoRA has as well. At δ above 1, or scale 0, the model is the decoder again.
#
# We turn both **on the same MoRA**, and beside it LoRA's scale. Each dial goes from the decoder
# (English has not moved) to the model as trained. What do the two texts cost on the way?
#
# **Predict.** Where English has moved by .2 bits, about half: how many bits does δ cost the texts
# more than the scale does? (Below 0: fewer.)

# %% predict-10
delta_more = predict("bits that delta costs more than the scale", None)

# %% turned


def turned(name, **setting):
    """(bits that English has moved, mean bits of the two texts) of a copy with that setting."""
    learner = copy.deepcopy(lives[name][0])
    for _, layer in adapters(learner.model):
        for dial, number in setting.items():
            setattr(layer, dial, number)
    python, cpp, english = -np.array(learner.row(all_three, 2))
    return english - before[2], (python + cpp) / 2


steps = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
dials = {
    "MoRA, δ": [turned("MoRA", delta=d) for d in (1.01, 0.8, 0.7, 0.6, 0.5, 0.4, 0.2)],
    "MoRA, scale": [turned("MoRA", scale=4 * s) for s in steps],
    "LoRA, scale": [turned("LoRA", scale=s) for s in steps],
}

# %% dials alt="Three lines: bits for the two texts over the bits that English has moved."
MOVED = [0.0, 0.1, 0.2, 0.3, 0.4]
costs = {name: np.interp(MOVED, *np.array(points).T) for name, points in dials.items()}
axes = "bits that English has moved", "mean bits, two texts"
figures.lines(MOVED, costs, *axes, "dials turned after training", (3.7, 4.6))
delta_more.beside(costs["MoRA, δ"][2] - costs["MoRA, scale"][2])

# %% [markdown]
# Lower is better. On one and the same MoRA, where English has moved by .2 bits, the texts cost
# 4.27 bits with δ and 4.15 with the scale. A score says how well a rank fits a character, and
# English has the same characters as code; so δ takes ranks from English and from the two texts at
# once. LoRA, with its scale, costs 4.02: that is another model, and one seed.
#
# **Write.** An open one. MoRA has three dials that can be turned after training: `delta` (.2),
# `top_k` (8) and `scale` (4). Find a setting of one or more, a dict, by which English moves less
# than half as far as it did, and the two texts cost at most .2 bits more than at the end of the
# stream.
#
# <details><summary>Hint</summary>
# `turned("MoRA", delta=0.3, scale=3.0)` tries one. The picture says which dial to begin with.
# </details>


# %% exercise 4
def setting():
    raise NotImplementedError


# %%
with exercise("4"):
    mine, (start, cost) = setting(), turned("MoRA")
    if not isinstance(mine, dict):
        expect("the setting", mine, 'a dict, such as {"scale": 3.0}')
    others = sorted(set(mine) - {"delta", "scale", "top_k"})
    expect("names that are none of delta, scale and top_k", others, [])
    moved, now = turned("MoRA", **mine)
    print(f"English moved {moved:.2f} (it was {start:.2f}), the texts cost {now - cost:+.2f} bits")
    assert moved < start / 2, f"English moves by {moved:.2f}, allowed: less than {start / 2:.2f}"
    assert now < cost + 0.2, f"the texts cost {now - cost:.2f} bits more, allowed: .2"

# %% [markdown]
# <details><summary>What each dial does alone</summary>
# The scale is enough: at about 2. `top_k` hardly matters: with τ = .03 few ranks have all the
# weight, and 2 in place of 8 move both numbers by less than .01 bits. With δ alone it does not work
# here: where English has moved less than half as far, the texts cost more than .2 bits.
# </details>

# %% [markdown]
# ## 9. Exit ticket (5 min)
#
# **Summary.** A gate can tell what is in its input, and no more. Where every input lies near its
# task's mean, the nearest mean is enough and comes first. Where the tasks have one mean, that gate
# fails, and one by energy does not. A character in the first layer does not say which text it is
# from: the three adapters here, which are not told, forget (one seed), and MoRA's ranks divide the
# characters instead of the texts. Counts of three characters come first on these texts.
#
# **1.** On clusters one linear map explains 0. Does that show that the stream needs a trained gate?
#
# <details><summary>Answer</summary>
# No. It shows that it needs some gate. The nearest mean trains nothing and has .99; MoRA has .86.
# </details>
#
# **2.** Can a gate in the first layer tell an e in English from an e in code, at the same place?
# Can one in the last?
#
# <details><summary>Answer</summary>
# In the first no: both are the same input. In the last the two gates differ, as some letters before
# are in the input; but over whole texts hardly anything of that is left.
# </details>
#
# **3.** MoRA loses .33 bits of Python. Which two other numbers do you want before you blame it?
#
# <details><summary>Answer</summary>
# What the other adapters lose (as much), and what one loses that is told the text (nothing). And
# before all of these, what counts need: less than any of them.
# </details>
