# %% [markdown]
# # Your own scheme: write a gate, hold it to the laws, see it in the table
#
# A routing scheme is a small class that states its gate. You write a gate from the template, find
# its two bugs with the laws, fix them, and train it on a stream beside LoRA, LoRA-MoE and MoRA.
# Then you see what more a scheme can state. A *law* is a property that every scheme must keep.
# Before this: 01 to 03, and the table of 04 helps. Under a minute on a laptop, most of it for the
# laws.

# %%
import inspect
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from minimoe import Adapter, Claims, Gate, LoRA, LoRAMoE, MoRA, laws
from minimoe.adapt import adapt, adapters, after_step, context, grow, state
from minimoe.continual import streams
from minimoe.continual.learn import AdapterLearner, pretrain, run_stream
from minimoe.continual.metrics import acc, bwt
from minimoe.continual.probe import PROBLEMS, dense_gate
from minimoe.roster import SCHEMES
from minimoe.schemes.mocle import MoCLE, MoCLELearner
from minimoe.schemes.mosld import MoSLD
from minimoe.schemes.olora import OLoRA
from minimoe.schemes.smora import SMoRA
from minimoe.tools.exercise import exercise
from minimoe.tools.load import load_class
from minimoe.tools.plots import COLOURS, curves

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)
torch.manual_seed(0)
plt.rcParams["figure.dpi"] = 80

# %% [markdown]
# ## The template
#
# `minimoe new-scheme my_gate` writes a file with the place where a gate goes:

# %%
with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, "-m", "minimoe", "new-scheme", "my_gate"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    print((Path(folder) / "my_gate.py").read_text(encoding="utf-8"))
    MyGate = load_class(Path(folder) / "my_gate.py", "MyGate", Adapter)  # a class of a file

# %% [markdown]
# As it comes, $g = 1$: dense LoRA under another name. With the same rows it gives the same output.

# %%
mine = MyGate(nn.Linear(16, 16), rank=4)
dense = LoRA(nn.Linear(16, 16), rank=4)
nn.init.normal_(mine.B)
dense.load_state_dict(mine.state_dict())
x = torch.randn(5, 16)
assert torch.allclose(mine(x), dense(x))
row = laws.hold(laws.zero_at_birth, MyGate)
print(row)
assert row.verdict == "held"

# %% [markdown]
# ## What a scheme states
#
# `Adapter` (`minimoe/adapter.py`) has the rest: it holds the frozen layer, freezes and adds rows,
# and computes
# $y = x W_0^T + \mathrm{scale} \cdot (g \odot z) B$. A scheme states
#
# | name | what it is | if not stated |
# |---|---|---|
# | `claims` | what it promises; the laws hold it to that | nothing is claimed |
# | `gate(x)` | `Gate(idx, weight, z)`: kept ranks (None: all), g, what they see | an error |
# | `active()` | how many parameters one token's output depends on | an error |
# | `fresh()` | the rows that a task adds, by name | keys `A` and values `B` |
# | `task_agnostic()` | parameters that belong to no task, which every task trains on | none |
# | `buffer_rows` | names of rows that no gradient trains | none |
# | `after_step()` | what it does when the optimiser has made a step | nothing |
# | `needs()` | the context it needs: what must be given of each sample beside $x$ | nothing |
# | `penalty()` | a loss of its weights alone | none |
#
# In training a gate may also return a loss, and counts of the ranks that it kept. It changes
# nothing: what is to be done between steps stands in `after_step`. The layer's sizes are
# `self.in_features` and `self.out_features`; `self.empty(n)` is room for n numbers, on its device.
#
# Who states what, of those that ship:

# %%
parts = ["claims", "gate", "active", "fresh", "task_agnostic", "buffer_rows", "after_step", "needs"]
parts += ["penalty"]
print(f"{'':18}", *parts)
for name, scheme in SCHEMES.items():
    classes = [cls for cls in scheme.__mro__ if issubclass(cls, Adapter) and cls is not Adapter]
    stated = {part for part in parts for cls in classes if part in vars(cls)}
    print(f"{name:18}", *(f"{'x' if part in stated else '':>{len(part)}}" for part in parts))
    assert {"claims", "gate", "active"} <= stated

# %% [markdown]
# ## A gate of one's own
#
# MoRA's score is $s = z / \lVert z \rVert$, and $\sum_i s_i^2 = 1$: the squares are weights
# already, without a softmax and its temperature. So, an idea: keep the $k$ largest $|z|$, and let
#
# $$g_i = \frac{z_i^2}{\sum_{j\ \mathrm{kept}} z_j^2}$$
#
# Each rank's weight is its share of the energy. It claims: zero at birth; a token's output depends
# on no other token; at most `top_k` ranks speak; weights are 0 or more and sum to 1. A token reads
# every key, and the values of the kept.


# %%
class FirstTry(Adapter):
    claims = Claims(zero_at_birth=True, granularity="token", top_k=True, simplex=True)

    def __init__(self, base, rank=8, scale=1.0, top_k=8):
        self.top_k = top_k  # every argument is kept under its own name
        super().__init__(base, rank, scale)

    def gate(self, x):
        z = self.project(x, "A")  # (..., R)
        idx = z.abs().topk(self.kept).indices  # (..., k): top_k, or all if there are fewer
        z = z.gather(-1, idx)
        return Gate(idx, z**2 / (z**2).sum(-1, keepdim=True), z)

    def active(self):
        D, O = self.in_features, self.out_features
        return self.ranks * D + self.kept * O


layer = FirstTry(nn.Linear(16, 16), rank=4, top_k=2)
layer.grow()
print(layer)
g = dense_gate(layer, x)  # (5, R), 0 for those that are not kept
print(g.detach().numpy().round(2))
assert g.shape == (5, 8)
assert ((g > 0).sum(-1) == 2).all()
assert torch.allclose(g.sum(-1), torch.ones(5))

# %% [markdown]
# It looks right. `laws.hold` puts it to one law, on layers of drawn sizes:

# %%
tried = (laws.support, laws.simplex, laws.granularity, laws.zero_is_finite, laws.half_precision)
rows = [laws.hold(law, FirstTry) for law in tried]
for row in rows:
    print(row)
assert [row.verdict for row in rows] == ["held", "held", "held", "broken", "broken"]

# %% [markdown]
# Two mistakes, which no ordinary input shows. An input of zeros, such as padding, makes 0 / 0. And
# float16 ends at 65,504, so $z^2$ overflows from 256 on. Dividing before squaring mends both: $s$
# is in $[-1, 1]$.


# %%
class Energy(FirstTry):
    """The k loudest ranks, each weighing its share of the energy."""

    def gate(self, x):
        z = self.project(x, "A")
        idx = z.abs().topk(self.kept).indices
        z = z.gather(-1, idx)
        norm = z.norm(dim=-1, keepdim=True)
        s = z / norm.clamp_min(torch.finfo(norm.dtype).tiny)  # where z = 0, s = 0
        return Gate(idx, s.square(), z)


rows = laws.check(Energy)
print(laws.table({"Energy": rows}))
assert not [str(row) for row in rows if row.verdict == "broken"]
assert {row.law for row in rows if row.verdict == "not claimed"} == {
    "degenerates_to_lora",
    "merge_is_equal",
}

# %% [markdown]
# (One law pickles the layer. A class of a notebook pickles within its own kernel only: a scheme to
# keep belongs in a file.) In a project of one's own three lines are a test for each law, which
# `pytest` runs:
#
# ```python
# from minimoe.laws.testing import laws_of
# from my_gate import MyGate
#
# test_laws = laws_of(MyGate)
# ```
#
# ## Wrong on purpose
#
# What a law says when it catches something. First, a common order of steps: the softmax over all
# ranks, and then the top k of it. The weights of the kept sum to less than 1.


# %%
class SoftmaxFirst(MoRA):
    def gate(self, x):
        z = self.project(x, "A")
        s = z / z.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
        w, idx = (s / self.tau).softmax(-1).topk(self.kept)
        return Gate(idx, w, z.gather(-1, idx))


row = laws.hold(laws.simplex, SoftmaxFirst, tau=0.5)  # settings are keyword arguments
print("law      ", row.law)
print("verdict  ", row.verdict)
print("evidence ", row.evidence)
assert row.verdict == "broken"

# %% [markdown]
# The evidence ends with the smallest case that breaks the law. It is in `row.case`: the law raises
# again on it, and `case.layer()` and `case.x()` are what it was looked at with. From there it is
# ordinary debugging.

# %%
case = row.case
try:
    laws.simplex(case)
except laws.Broken as error:
    print("again:", error)
else:
    raise AssertionError("the law held")
layer, x = case.layer(top_k=1), case.x()
print(layer)
with torch.no_grad():
    idx, w, z, *_ = layer.gate(x)
    print("what all ranks see", (x @ layer.keys.T).numpy().round(3))
    print("kept", idx.tolist(), "weight", w.numpy().round(3), "where 1 is claimed")
assert layer.ranks > 1
assert (w.sum(-1) < 1 - 1e-6).any()

# %% [markdown]
# A law says what is not true of the result. What should have been there instead it cannot know.
# Another implementation knows: `laws.same` gives both the same tensors, and compares them step by
# step. It names the first that differs, and what it looks as if.

# %%
rows = laws.same(SoftmaxFirst, MoRA)
for row in rows:
    if row.evidence != "not looked at":
        print(row)
assert [row.law for row in rows if row.verdict == "broken"] == ["weights"]

# %% [markdown]
# The same from a shell, for a class in a file: `minimoe check own.py:SoftmaxFirst --as mora`. A
# fused kernel, or a module that is none of ours, is held in this way too
# ([how](../.github/CONTRIBUTING.md#to-hold-an-implementation-to-a-scheme)).
#
# Second, a mean over the batch, which looks like harmless centring. It changes which ranks are
# kept, so a token's output depends on the rest of the batch. (For a single token, z minus its mean
# is 0, and the choice is arbitrary.)


# %%
class BatchMean(Energy):
    def gate(self, x):
        z = self.project(x, "A")
        centred = z - z.reshape(-1, self.ranks).mean(0)
        idx = centred.abs().topk(self.kept).indices
        z = z.gather(-1, idx)
        return Gate(idx, torch.softmax(z.abs(), -1), z)


row = laws.hold(laws.granularity, BatchMean)
print(row)
assert row.verdict == "broken"
torch.manual_seed(0)
layer = BatchMean(nn.Linear(16, 16), rank=8, top_k=2)
nn.init.normal_(layer.B)
batch = torch.randn(64, 16)
with torch.no_grad():
    together, alone = layer(batch), torch.cat([layer(token) for token in batch.split(1)])
changed = ((together - alone).norm(dim=-1) > 1e-3).double().mean().item()
print(f"{changed:.0%} of 64 tokens are answered otherwise when they come alone")
assert changed > 0.2

# %% [markdown]
# `tests/broken/` in the repository has more, each a mistake of a line or two.
#
# ## In the table
#
# `AdapterLearner` puts a scheme into each linear layer of a pretrained backbone and grows it
# between tasks; `run_stream` takes it through a stream. Three tasks of `permuted-digits`, one seed:

# %%
SEED, EPOCHS = 1, 6
stream = streams.make("permuted-digits", tasks=3, seed=SEED)
backbone = pretrain(stream, SEED, device)
contenders = {
    "lora": (LoRA, {"grows": False}),
    "lora_moe": (LoRAMoE, {"top_k": 3}),
    "mora": (MoRA, {"top_k": 8, "tau": 0.1, "delta": 0.2}),
    "energy": (Energy, {"top_k": 8}),
}
runs = {}
for name, (scheme, settings) in contenders.items():

    def make(model, stream, scheme=scheme, settings=settings):
        return AdapterLearner(model, scheme, rank=8, **settings)

    runs[name] = run_stream(make, backbone, stream, SEED, EPOCHS, device, name=name)

print(f"{'':9}{'ACC':>7}{'BWT':>7}{'read':>8}", *(f"{p:>13}" for p in PROBLEMS))
for name, run in runs.items():
    problems = [f"{measure(run.records):13.3f}" for measure in PROBLEMS.values()]
    scores = f"{acc(run.matrix):7.3f}{bwt(run.matrix):7.3f}{run.read:8,}"
    print(f"{name:9}{scores}", *problems)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
matrices = {name: np.array([run.matrix]) for name, run in runs.items()}  # (seeds, J + 1, J)
curves(left, matrices, thick={"energy"})
left.legend(fontsize=8, loc="lower left", ncols=2, frameon=False)
left.set_ylabel("mean accuracy, tasks seen")
left.set_title("Energy keeps what it learns, nearly as MoRA does", fontsize=10)
growing = ["lora_moe", "mora", "energy"]  # the others have no ranks of tasks to tell apart
shown = ["interference", "intrusion", "ambiguity", "instability"]
for i, name in enumerate(growing):
    heights = [PROBLEMS[problem](runs[name].records) for problem in shown]
    place = list(runs).index(name)
    right.bar(np.arange(4) + 0.25 * (i - 1), heights, 0.22, color=COLOURS[place], label=name)
right.set_xticks(range(4), shown, fontsize=8)
right.set(ylabel="as defined in probe.py", ylim=(0, 1))
right.legend(fontsize=8, frameon=False, ncols=3, loc="upper left")
right.set_title("Its routing is less decided than MoRA's", fontsize=10)
plt.show()

# %% [markdown]
# On this stream the gate comes near MoRA, with neither temperature nor threshold to set, and well
# above one LoRA for all. It is less decided: a square sharpens less than this softmax, and old
# inputs give the newer ranks more weight. One seed and three tasks say no more than that;
# `minimoe compare --schemes mora my_gate.py:MyGate` goes on from here, with a class in a file, and
# `minimoe/studies/` is where finer questions are put.

# %%
measured = {name: {p: PROBLEMS[p](run.records) for p in shown} for name, run in runs.items()}
accuracy = {name: acc(run.matrix) for name, run in runs.items()}
assert accuracy["energy"] > accuracy["lora"] + 0.15
assert abs(accuracy["energy"] - accuracy["mora"]) < 0.1
assert measured["energy"]["ambiguity"] > measured["mora"]["ambiguity"] + 0.1
assert measured["energy"]["intrusion"] > measured["mora"]["intrusion"] + 0.03
assert runs["energy"].read == runs["mora"].read

# %% [markdown]
# ## What a gate needs beyond x
#
# MoCLE chooses an expert by the cluster that a sample is in, which the layer cannot see. That is
# *context*. The scheme states in `needs()` which context it needs; its gate asks for it with
# `self.given("cluster", x)`; and who calls the model gives it, inside `context(model, ...)`, to all
# its adapters.

# %%
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 10))
adapt(model, MoCLE, targets=r"0|2", rank=4, clusters=3)
grow(model)  # a second task: three clusters more
for _, layer in adapters(model):
    nn.init.normal_(layer.frozen_B)
    nn.init.normal_(layer.B)
print("needs", model[0].needs())
assert model[0].needs() == {"cluster": range(6)}

samples = torch.randn(4, 20, 32)  # 4 samples of 20 tokens
with torch.no_grad(), context(model, cluster=torch.tensor([0, 1, 4, 5])):  # one for each sample
    y = model(samples)
with torch.no_grad(), context(model, cluster=torch.tensor([0, 1, 4, 2])):  # the last one differs
    other = model(samples)
assert y.shape == (4, 20, 10)
assert torch.equal(y[:3], other[:3])
assert not torch.allclose(y[3], other[3])

for values in ({}, {"cluster": torch.tensor([0, 1, 4, 6])}):
    try:
        with context(model, **values):
            model(samples)
    except (RuntimeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}")
    else:
        raise AssertionError("no error")

# %% [markdown]
# In a stream the learner gives it: `AdapterLearner.context(x)` returns the context of inputs $x$.
# MoCLE's learner, in the scheme's own file, looks for the nearest cluster centre. The laws give
# every scheme the context that it needs, drawn from each sample itself, so they need no help.

# %%
print(inspect.getsource(MoCLELearner.context))
row = laws.hold(laws.granularity, MoCLE)
print(row)
assert row.verdict == "held"

# %% [markdown]
# ## Parameters of no task, rows that are buffers
#
# `fresh` names the rows that a task adds: live ones, and `frozen_` ones behind them.
# `task_agnostic` names what all tasks train on. In MoSLD all experts share their keys: there is no
# `frozen_A`, and a growth step leaves `A` where it is.

# %%
layer = MoSLD(nn.Linear(16, 16), rank=4)
keys = layer.A
layer.grow()
print({name: tuple(t.shape) for name, t in state(layer).items()})  # of what is learned
assert layer.A is keys  # the same parameter
assert "frozen_A" not in state(layer)
assert layer.frozen_B.shape == layer.B.shape == (4, 16)
assert layer.keys.shape == (8, 16)  # once for each expert

# %% [markdown]
# `buffer_rows` names rows that a task adds and no gradient trains. SMoRA's biases are such:
# `after_step` lowers that of a rank that was chosen more often than the mean since the last step,
# and raises the others', by `rate`. A batch begins and ends with `context`: inside, the counts that
# a gate returns are kept in `layer.counts`, and they add up over batches until `after_step`.

# %%
torch.manual_seed(0)
layer = SMoRA(nn.Linear(16, 16), rank=4, top_k=1, rate=0.01).train()
trained = [name for name, p in layer.named_parameters() if p.requires_grad]
print("buffers", SMoRA.buffer_rows, " trained", trained)
for _ in range(2):  # two batches in one step
    with context(layer):
        layer(torch.randn(101, 16))
counts = layer.counts
after_step(layer)  # `train` in continual/learn.py calls it after every step
bias = layer.expert_bias
print("chosen", counts.tolist(), " biases", [round(b, 3) for b in bias.tolist()])
assert counts.sum() == 2 * 101 and layer.counts is None
assert "expert_bias" not in trained
assert torch.allclose(bias, 0.01 * (counts.float().mean() - counts).sign())
assert (bias < 0).any() and (bias > 0).any()

# %% [markdown]
# ## A loss of its own
#
# In training a gate may return a loss, as `Gate(idx, weight, z, loss)`. Inside
# `with context(model) as batch:` each adapter keeps what its passes leave. `batch.aux_loss` is the
# sum over all adapters, and `learn.train` adds it to the task's loss. A training pass outside
# leaves nothing, and the layer warns once. With `context(model, mask=...)` padding does not count.
#
# LoRA-MoE's balance loss, over its coefficient, is 1 where the router spreads tokens evenly over
# $E$ experts; if one expert wins every token with all of the weight, it is $E / k$.

# %%
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 10))
adapt(model, LoRAMoE, targets=r"0|2", rank=4, top_k=2, balance=0.01)
for _ in range(3):
    grow(model)  # four experts
model.train()
x = torch.randn(256, 32) + 1
with context(model) as batch:
    model(x)
    aux_loss = batch.aux_loss
aux_loss.backward()
assert model[2].router.grad.norm() > 0
assert model[2].A.grad is None  # in its own layer, the loss trains the router alone

with torch.no_grad():  # a gate changes nothing, so it may be asked at any time
    losses = [model[0].gate(x).loss, model[2].gate(model[:2](x)).loss]
assert torch.allclose(aux_loss, sum(losses))
even = losses[0].item() / 0.01

with context(model, mask=torch.arange(300) < 256) as batch:  # 1 where a token counts
    model(torch.cat([x, torch.zeros(44, 32)]))
assert torch.allclose(batch.aux_loss, aux_loss)

with torch.no_grad():
    model[0].frozen_router[0] = 1.0  # x has a mean of 1: this row wins every token
    uneven = model[0].gate(x).loss.item() / 0.01
print(f"balance loss ÷ coefficient: {even:.3f} as drawn, {uneven:.3f} where one expert takes all")
assert abs(even - 1) < 0.4
assert abs(uneven - 4 / 2) < 0.01

# %% [markdown]
# A loss of the weights alone is `penalty()`. It is part of `batch.aux_loss`, once in a batch. In
# O-LoRA it is 0 if the new keys are orthogonal to the old ones.

# %%
layer = OLoRA(nn.Linear(16, 16), rank=4)
layer.grow()
with context(layer) as batch:
    layer(torch.randn(5, 16))
    layer(torch.randn(5, 16))
print(f"penalty {layer.penalty().item():.3f}")
assert torch.equal(batch.aux_loss, layer.penalty())  # once, though there were two passes

# %% [markdown]
# ## Exercises
#
# **1.** Fill in the gate of `Loudest`: keep the `top_k` ranks with the largest $|z|$ (all, if
# there are fewer), and weigh them with the softmax of $|z|$ over the kept. It returns
# `Gate(idx, g, z)`, each (..., k). The check is the laws', and a look at which ranks are kept.


# %% exercise 1
class Loudest(Adapter):
    claims = Claims(zero_at_birth=True, granularity="token", top_k=True, simplex=True)

    def __init__(self, base, rank=8, scale=1.0, top_k=8):
        self.top_k = top_k
        super().__init__(base, rank, scale)

    def gate(self, x):
        raise NotImplementedError

    def active(self):
        D, O = self.in_features, self.out_features
        return self.ranks * D + self.kept * O


# %%
with exercise("1"):
    wanted = (laws.support, laws.simplex, laws.granularity, laws.equation, laws.zero_is_finite)
    for law in wanted:
        row = laws.hold(law, Loudest)
        assert row.verdict == "held", row
    layer = Loudest(nn.Linear(16, 16), rank=8, top_k=3)
    tokens = torch.randn(50, 16)
    seen, weights = (tokens @ layer.keys.T).abs(), dense_gate(layer, tokens)
    kept = weights > 0
    silent, spoken = seen.where(~kept, 0).amax(-1), seen.where(kept, 99).amin(-1)
    assert (silent <= spoken).all(), "a rank that is not kept has a larger |z| than one that is"
    ratio = (weights / weights.amax(-1, keepdim=True)).log()
    off = (ratio - (seen - seen.amax(-1, keepdim=True)))[kept].abs().max()
    assert off < 1e-4, "weights are not in the ratios that a softmax of |z| gives"

# %% [markdown]
# **2.** `Hearsay` below claims too much: two of its claims are not true of its gate. Hold it to the
# laws, read the evidence, and correct the two claims in `Honest` (`help(Claims)` says what there is
# to claim). Correct, not drop: a law that is no longer claimed does not count.


# %%
class Hearsay(Adapter):
    claims = Claims(zero_at_birth=True, granularity="token", top_k=True, simplex=True)

    def __init__(self, base, rank=8, scale=1.0, top_k=8):
        self.top_k = top_k
        super().__init__(base, rank, scale)

    def gate(self, x):
        z = self.project(x, "A")  # (..., R)
        score = z.abs()
        if x.ndim > 2:  # (samples, tokens, D)
            score = score + score.mean(-2, keepdim=True)
        top, idx = score.topk(self.kept)
        return Gate(idx, top.shape[-1] * top.softmax(-1), z.gather(-1, idx))

    def active(self):
        D, O = self.in_features, self.out_features
        return self.ranks * D + self.kept * O


# %% exercise 2
class Honest(Hearsay):
    claims = Claims(zero_at_birth=True, granularity="token", top_k=True, simplex=True)


# %%
with exercise("2"):
    assert Honest.gate is Hearsay.gate, "correct the claims, not the gate"
    wanted = (laws.zero_at_birth, laws.support, laws.simplex, laws.any_shape, laws.granularity)
    for law in wanted:
        row = laws.hold(law, Honest)
        assert row.verdict == "held", row

# %% [markdown]
# **3.** `Ready` adds a row of its own: `b`, one number per rank, how ready the rank is to speak.
# Write its `active()`: how many parameters the output for one token depends on, of $R$ ranks in all
# and $k$ kept. (Which numbers could change who is kept? Which of those of a rank that is not kept
# are never looked at?)


# %%
class ReadyGate(Adapter):
    claims = Claims(zero_at_birth=True, granularity="token", top_k=True, simplex=True)

    def __init__(self, base, rank=8, scale=1.0, top_k=8):
        self.top_k = top_k
        super().__init__(base, rank, scale)

    def fresh(self):
        rows = super().fresh()
        return rows | {"b": self.empty(self.rank).zero_()}

    def gate(self, x):
        z = self.project(x, "A")
        top, idx = (z + self.rows("b")).topk(self.kept)
        return Gate(idx, top.softmax(-1), z.gather(-1, idx))


# %% exercise 3
class Ready(ReadyGate):
    def active(self):
        D, O = self.in_features, self.out_features
        return self.ranks * (D + O)


# %%
with exercise("3"):
    row = laws.hold(laws.active_is_read, Ready)
    assert row.verdict == "held", row
    few, all_kept = (Ready(nn.Linear(4, 4), rank=2, top_k=k).active() for k in (8, 2))
    assert few == all_kept, "with fewer ranks than top_k, it counts values that are not there"
