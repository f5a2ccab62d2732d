# %% [markdown]
# # MoRA: ranks that choose themselves by what they see
#
# One gate, followed with numbers that fit on paper: each line of code stands beside its equation
# in the paper (Lu et al., [2506.21035](https://arxiv.org/abs/2506.21035), eq. 5-8) and is held
# against `minimoe.MoRA`. Then what its three settings do, what growth does to old answers, and
# where the method wins and where it does not. Before this: 01 (LoRA) and 02 (LoRA-MoE). Half a
# minute on a laptop.

# %%
import copy
import inspect
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from minimoe import LoRA, MoRA, laws
from minimoe.adapt import adapt, grow, parameters
from minimoe.continual import streams
from minimoe.continual.baselines import ClassMean, Joint
from minimoe.continual.learn import AdapterLearner, pretrain, run_stream, score, train
from minimoe.continual.metrics import acc, bwt
from minimoe.continual.probe import Recorder, dense_gate
from minimoe.tools.exercise import exercise
from minimoe.tools.plots import COLOURS, MARKERS, heat_map

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)
torch.manual_seed(0)
plt.rcParams["figure.dpi"] = 80
wide = {"dtype": torch.float64, "device": device}

# %% [markdown]
# ## One layer by hand
#
# Rank $i$ is a pair: a key `A[i]`, which looks at the input, and a value `B[i]`, which is added to
# the output. In MoRA each rank is an expert of its own, and its dot product with the input,
# $z_i = x \cdot A_i$, also sets its weight. There is no router.
#
# The layer below has three ranks, the first two frozen, as if each had been learned by a task of
# its own. Width in and out is 2, and the frozen layer $W_0$ is the identity.

# %%
A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.5, -1.0]], **wide)  # keys (R, D)
B = torch.tensor([[4.0, 0.0], [5.0, 5.0], [0.0, 2.0]], **wide)  # values (R, O)


def by_hand(**settings):
    """A MoRA layer of one rank a task, after three tasks, that holds A and B."""
    base = nn.Linear(2, 2, bias=False, **wide)
    nn.init.eye_(base.weight)
    layer = MoRA(base, rank=1, **settings)
    layer.grow()
    layer.grow()
    with torch.no_grad():
        layer.frozen_A.copy_(A[:2])
        layer.A.copy_(A[2:])
        layer.frozen_B.copy_(B[:2])
        layer.B.copy_(B[2:])
    return layer


tau = 4 / (7 * math.log(3))  # .52, so that the weights below come out round
layer = by_hand(top_k=2, tau=tau, delta=0.5)
x = torch.tensor([2.0, -3.0], **wide)
print(layer)
assert layer.ranks == 3
assert torch.equal(layer.keys, A)

# %% [markdown]
# **What every rank sees.** $z = x A^T$, one number per rank:
# $1 \cdot 2$, then $1 \cdot (-3)$, then $1.5 \cdot 2 + 1 \cdot 3$.

# %%
z = x @ A.T
print("z    ", z.tolist())
assert z.tolist() == [2, -3, 6]

# %% [markdown]
# **Eq. 5: the score.** $s = z / \lVert z \rVert_2$, the norm being over all ranks, old and new.
# Here $\lVert z \rVert = \sqrt{4 + 9 + 36} = 7$.

# %%
norm = z.norm()
s = z / norm  # eq. 5
print("‖z‖  ", norm.item())
print("s    ", s.cpu().numpy().round(3), "= 2/7, -3/7, 6/7")
assert math.isclose(norm.item(), 7)
assert torch.allclose(s.norm(), torch.ones((), **wide))

# %% [markdown]
# **Eq. 6: keep the k largest.** By sign, not by size: with $k = 2$ rank 1 is out, though
# $|-3/7|$ is more than $2/7$.

# %%
kept = s.topk(2).indices  # eq. 6
print("kept ", kept.tolist())
assert kept.tolist() == [2, 0]
assert s.abs().topk(2).indices.tolist() == [2, 1]  # what size would have kept

# %% [markdown]
# **Eq. 7: the weights.** A softmax over the kept scores, sharpened by the temperature:
# $w = \mathrm{softmax}(s_{kept} / \tau)$. The two scores are $4/7$ apart, and $\tau$ is
# $4 / (7 \ln 3)$, so one weight is 3 times the other.

# %%
w = torch.zeros(3, **wide)
w[kept] = (s[kept] / tau).softmax(-1)  # eq. 7
print("w    ", w.cpu().numpy().round(3))
assert torch.allclose(w, torch.tensor([0.25, 0, 0.75], **wide))

# %% [markdown]
# **Eq. 8: the threshold.** In evaluation only, a kept rank with $s_i < \delta$ gets weight 0. The
# other weights are not rescaled: here they sum to .75. If all are 0, the output is the base
# layer's.

# %%
g = w * (s >= layer.delta)  # eq. 8
print("g    ", g.cpu().numpy().round(3))
assert torch.allclose(g, torch.tensor([0, 0, 0.75], **wide))

# %% [markdown]
# **The output.** $y = x W_0^T + \mathrm{scale} \cdot (g \odot z) B$. The raw $z$ is multiplied in,
# not $s$: doubling $z_i$ at the same weight doubles what rank $i$ adds.
#
# In training $y = (2, -3) + .25 \cdot 2 \cdot (4, 0) + .75 \cdot 6 \cdot (0, 2) = (4, 6)$, and in
# evaluation, without the first of the two ranks, $(2, 6)$. The package's layer says the same.

# %%
for mode, weights, answer in ((True, w, [4.0, 6.0]), (False, g, [2.0, 6.0])):
    layer.train(mode)
    y = x @ layer.base.weight.T + layer.scale * (weights * z) @ B
    print("training  " if mode else "evaluation", y.detach().cpu().numpy().round(6))
    assert torch.allclose(y, torch.tensor(answer, **wide))
    assert torch.allclose(layer(x), y)  # the package's forward pass
    idx, g_kept, z_kept, *_ = layer.gate(x)  # its gate: kept ranks, weights, what they see
    assert idx.tolist() == kept.tolist()
    assert torch.allclose(g_kept, weights[idx])
    assert torch.allclose(z_kept, z[idx])
    assert torch.allclose(dense_gate(layer, x), weights)  # the same, with zeros for the others

# %% [markdown]
# **The same in the package**, each line beside its equation. `project` gives $z = x A^T$ over all
# rows, `kept` is $k$, or R if there are fewer ranks. The other branch is the same in one pass,
# which pays in large layers (notebook 05).

# %%
lines = inspect.getsource(MoRA.gate)
print(lines)
assert all(f"# eq. {number}" in lines for number in (5, 6, 7, 8))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for i, key in enumerate(A.cpu().numpy()):
    left.annotate("", key, (0, 0), arrowprops={"arrowstyle": "-|>", "color": COLOURS[i], "lw": 2})
    left.text(*(key + 0.35 * key / np.hypot(*key)), f"A[{i}]", color=COLOURS[i], ha="center")
left.annotate("", (2, -3), (0, 0), arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 2})
left.text(2.25, -3, "x")
left.set(xlim=(-1.5, 3.5), ylim=(-3.4, 1.8), aspect="equal", xlabel="input 1", ylabel="input 2")
left.set_title("Key 2 points nearest to x", fontsize=10)
left.grid(alpha=0.3)
steps = {"s (eq. 5)": s, "w (eq. 7)": w, "g, δ = .5 (eq. 8)": g}
for i in range(3):
    heights = [step[i].item() for step in steps.values()]
    right.bar(np.arange(3) + 0.25 * (i - 1), heights, 0.22, color=COLOURS[i], label=f"rank {i}")
right.axhline(0, color="black", lw=0.8)
right.set_xticks(range(3), steps)
right.set(ylabel="score, weight", ylim=(-0.6, 1))
right.legend(loc="lower right", fontsize=8, frameon=False)
right.set_title("Sign decides who is kept, δ who speaks", fontsize=10)
plt.show()

# %% [markdown]
# ## tau and k: how many ranks share the weight
#
# The score does not depend on the length of $x$, only on where it points. In two dimensions that is
# one angle, so a gate is a set of curves. Below, the same three keys; a dotted line is the angle of
# a key.

# %%
angle = torch.arange(0, 360, 0.5, **wide)
circle = torch.stack([angle.deg2rad().cos(), angle.deg2rad().sin()], -1)  # (720, D)
key_angle = np.rad2deg(np.arctan2(*A.cpu().numpy().T[::-1])) % 360


@torch.no_grad()
def curves_of(axes, layer):
    """One gate's weights as x goes round."""
    g = dense_gate(layer, circle).cpu().numpy()
    for i in range(3):
        axes.plot(angle.cpu(), g[:, i], color=COLOURS[i], label=f"rank {i}", lw=2)
        axes.axvline(key_angle[i], color=COLOURS[i], ls=":", lw=1.2)
    axes.set(xlim=(0, 360), ylim=(-0.02, 1.02))
    axes.set_xticks([0, 90, 180, 270, 360])


panels = ((3, 0.02), (3, 0.2), (3, 10), (1, 0.2))
figure, grid = plt.subplots(1, 4, figsize=(8, 2.5), sharey=True, layout="constrained")
for axes, (k, value) in zip(grid, panels, strict=True):
    curves_of(axes, by_hand(top_k=k, tau=value).train())
    axes.set_title(f"k = {k}, τ = {value}", fontsize=10)
grid[2].legend(fontsize=8, loc="upper right", frameon=False)
grid[0].set_ylabel("weight w")
figure.supxlabel("angle of x in degrees", fontsize=10)
plt.show()

# %% [markdown]
# A small $\tau$ lets one rank take all, a large one makes all alike. With $k = 1$ the one kept
# weight is always 1, whatever it saw.

# %%
with torch.no_grad():
    sharp, flat, one = (
        dense_gate(by_hand(top_k=k, tau=t).train(), circle)
        for k, t in ((3, 0.02), (3, 10), (1, 0.2))
    )
decided = (sharp.max(-1).values > 0.95).double().mean().item()
print(f"τ = .02: one rank has more than .95 of the weight at {decided:.0%} of all angles")
assert decided > 0.8
assert (flat - 1 / 3).abs().max() < 0.05
assert torch.equal(one.sort(-1).values, torch.tensor([0.0, 0, 1], **wide).expand(720, 3))

# %% [markdown]
# Keys are not normalised. Of two keys that point the way $x$ does, the longer one has the larger
# score. So a rank can win by being long:

# %%
longer = by_hand(top_k=1)
with torch.no_grad():
    longer.frozen_A[0] *= 10
probe = torch.tensor([1.0, 1.5], **wide)  # z = (1, 1.5, 0): rank 1 sees most
print("winner", layer.gate(probe).idx[0].item(), "and with A[0] ten times as long:", end=" ")
print(longer.gate(probe).idx[0].item())
assert layer.gate(probe).idx[0] == 1
assert longer.gate(probe).idx[0] == 0

# %% [markdown]
# ## delta: when no rank gets weight
#
# On the left, the sum of weights in evaluation, for every angle of $x$ and every $\delta$: where it
# is 0 the layer is $W_0$ alone. The score is signed, so an input that every key points away from
# ($z_i < 0$ for all $i$) gets no rank at $\delta = 0$ already.
#
# On the right, what one $\delta$ means as ranks are added. As $\lVert s \rVert = 1$, the largest of
# many scores is small: for random keys and inputs it falls roughly as $\sqrt{2 \ln R / R}$. At the
# paper's $\delta = .2$ nearly every random input keeps a rank among up to 64 random ones, and
# hardly one does among 512.

# %%
deltas = torch.linspace(-1.05, 1.05, 105).tolist()
with torch.no_grad():
    total = np.stack(
        [
            dense_gate(by_hand(top_k=2, tau=0.2, delta=d).eval(), circle).sum(-1).cpu()
            for d in deltas
        ]
    )
    sizes, scores, silent = [8, 16, 32, 64, 128, 256, 512, 1024], [], []
    x64 = torch.randn(500, 64, device=device)
    random = MoRA(nn.Linear(64, 64, device=device), rank=8, top_k=8, tau=0.1, delta=0.2).eval()
    for R in sizes:
        while random.ranks < R:
            random.grow()
        z64 = x64 @ random.keys.T
        scores.append((z64 / z64.norm(dim=-1, keepdim=True)).max(-1).values.mean().item())
        silent.append((dense_gate(random, x64).sum(-1) == 0).double().mean().item())
print("share of random inputs that are silent, by R:", dict(zip(sizes, silent, strict=True)))
assert (total[0] > 0.999).all()  # below -1, delta never prunes
assert (total[-1] == 0).all()  # above 1, always: s is at most 1
away = (circle @ A.T).max(-1).values.cpu().numpy() < 0
at_0 = (
    dense_gate(by_hand(top_k=2, tau=0.2, delta=0.0).eval(), circle).detach().sum(-1).cpu().numpy()
)
assert 0 < away.mean() < 0.5
assert (at_0[away] == 0).all()
assert max(silent[:4]) < 0.1
assert min(silent[-2:]) > 0.95
assert scores == sorted(scores, reverse=True)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
shade = left.imshow(
    total, origin="lower", extent=(0, 360, deltas[0], deltas[-1]), aspect="auto", cmap="cividis"
)
figure.colorbar(shade, ax=left, label="Σ g in evaluation")
left.set(xlabel="angle of x in degrees", ylabel="δ", xticks=[0, 90, 180, 270, 360])
left.set_title("Where δ silences the layer (dark)", fontsize=10)
right.plot(sizes, scores, color=COLOURS[0], marker=MARKERS[0], label="largest s, mean")
right.plot(sizes, silent, color=COLOURS[2], marker=MARKERS[1], label="share silent at δ = .2")
right.axhline(0.2, color="black", lw=0.8, ls="--")
right.set_xscale("log", base=2)
right.set_xticks(sizes, sizes)
right.set(xlabel="random ranks in all, R", ylabel="score, share", ylim=(-0.03, 1.03))
right.legend(fontsize=8, loc="upper left", frameon=False)
right.set_title("The same δ prunes more among more ranks", fontsize=10)
plt.show()

# %% [markdown]
# Move the three settings, where `ipywidgets` is installed and the notebook is running:

# %%
try:
    from ipywidgets import interact
except ImportError:
    print("for the sliders: pip install ipywidgets")
else:

    @interact(tau=(0.02, 1.0, 0.02), top_k=(1, 3), delta=(-1.0, 1.0, 0.05))
    def turn(tau=0.2, top_k=2, delta=0.2):
        axes = plt.figure(figsize=(5, 2), layout="constrained").subplots()
        curves_of(axes, by_hand(top_k=top_k, tau=tau, delta=delta).eval())
        axes.set(xlabel="angle of x in degrees", ylabel="g in evaluation")
        plt.show()


# %% [markdown]
# ## What follows from the equations
#
# **Length does not count, sign does.** $cx$ has the weights of $x$ for every $c > 0$, and $-x$ has
# others.

# %%
layer.train()
assert torch.allclose(dense_gate(layer, 1000 * x), w)
print("x", layer.gate(x).idx.tolist(), " -x", layer.gate(-x).idx.tolist())
assert layer.gate(-x).idx.tolist() == [1, 0]  # z = (-2, 3, -6): by sign, ranks 1 and 0

# %% [markdown]
# **LoRA is inside.** With all ranks kept and $\tau \to \infty$ every weight is $1/R$, and the layer
# is dense LoRA with its scale divided by $R$.

# %%
everyone = by_hand(top_k=3, tau=1e12).train()
lora = LoRA(copy.deepcopy(everyone.base), rank=1, scale=1 / 3)
lora.load_state_dict(everyone.state_dict())
drawn = torch.randn(100, 2, **wide)
assert torch.allclose(everyone(drawn), lora(drawn))
# for any sizes, drawn ones: the package's own law of it
row = laws.hold(laws.degenerates_to_lora, MoRA)
print(row)
assert row.verdict == "held"

# %% [markdown]
# **Who gets a gradient.** A rank that is not kept has weight 0, so its value has a gradient of
# exactly 0. Its key does get one, because $z_j$ is part of $\lVert z \rVert$, and so of the scores
# of the kept,
#
# $$\frac{\partial s_i}{\partial z_j} = -\frac{s_i s_j}{\lVert z \rVert} \quad (i \ne j).$$
#
# With `detach_gate=True` the weights are constants in the backward pass, and the key's is 0 too.
# That is another method, not a cheaper way to the same gradient; it is this package's, not the
# paper's.

# %%
torch.manual_seed(0)
token = torch.randn(1, 64, **wide)
gradients = {}
for detach in (False, True):
    torch.manual_seed(1)
    big = MoRA(nn.Linear(64, 64, **wide), rank=16, top_k=4, tau=0.1, detach_gate=detach)
    nn.init.normal_(big.B)
    chosen = torch.zeros(16, dtype=torch.bool, device=device)
    chosen[big.gate(token).idx] = True
    big(token).square().sum().backward()
    gradients[detach] = (big.A.grad.norm(dim=-1), big.B.grad.norm(dim=-1))
    assert (big.B.grad[~chosen] == 0).all()
    assert (big.B.grad[chosen].norm(dim=-1) > 0).all()
keys, values = gradients[False]
assert (keys[~chosen] > 0).all()
ratio = (keys[~chosen].mean() / keys[chosen].mean()).item()
print(f"key gradients, not kept to kept: {ratio:.3f}; with a detached gate:", end=" ")
print(gradients[True][0][~chosen].max().item())
assert ratio < 0.5
assert (gradients[True][0][~chosen] == 0).all()

# %%
figure, grid = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True, layout="constrained")
order = torch.argsort(chosen.int(), descending=True).cpu()
places = np.arange(1, 17)
for axes, i in zip(grid, (1, 0), strict=True):
    for detach, style in ((False, 0), (True, 2)):
        axes.plot(
            places,
            (gradients[detach][i] / gradients[False][i].max()).cpu()[order],
            ls="",
            marker=MARKERS[style],
            color=COLOURS[style],
            ms=5 if detach else 9,
            mfc=COLOURS[style] if detach else "none",
            label="detached gate" if detach else "exact",
        )
    axes.axvline(4.5, color="black", lw=0.8, ls="--")
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set(xlabel="rank: 4 that are kept, then 12 that are not", ylim=(-3e-4, 2))
    axes.set_xticks([1, 4, 8, 12, 16])
    axes.set_yticks([0, 1e-3, 1e-2, 1e-1, 1], ["0", ".001", ".01", ".1", "1"])
grid[0].set_ylabel("length of gradient ÷ largest")
grid[0].set_title("Values: 0 for all that are not kept", fontsize=10)
grid[1].set_title("Keys: small, and not 0 unless detached", fontsize=10)
grid[0].legend(fontsize=8, loc="upper right", frameon=False)
plt.show()

# %% [markdown]
# ## A new task: growth moves old answers
#
# When a task ends, `grow` freezes all ranks and adds fresh ones, whose values are 0. The frozen
# ones keep every bit. But the fresh keys enter $\lVert z \rVert$ and compete for the $k$ places, so
# old inputs get other weights before any fresh rank has learned anything. This drift is part of the
# method and needs no training. For keys and inputs drawn at random it is large:

# %%
torch.manual_seed(0)
untrained = MoRA(nn.Linear(64, 64, **wide), rank=8, top_k=8, tau=0.1)
nn.init.normal_(untrained.B)
drawn = torch.randn(500, 64, **wide)
with torch.no_grad():
    update = untrained(drawn) - untrained.base(drawn)
    untrained.grow()
    update_grown = untrained(drawn) - untrained.base(drawn)
    moved = ((update_grown - update).norm(dim=-1) / update.norm(dim=-1)).mean().item()
print(f"growth moves the update of random ranks by {moved:.0%} of its length")
assert torch.equal(untrained.frozen_A, untrained.keys[:8])
assert (untrained.B == 0).all()
assert 0.15 < moved < 0.9

# %% [markdown]
# Trained keys score higher on their own inputs than new keys do, and then growing changes little.
# Below, a small network of three layers learns a task (digits with permuted pixels), grows, and
# learns a second one; `Recorder` looks at the first task's inputs each time. Its drift is how far a
# layer's output has moved, in units of the update that the first task taught it; its turnover, the
# share of the update that comes from other ranks than before.

# %%
SEED, EPOCHS = 1, 6
settings = {"rank": 8, "top_k": 8, "tau": 0.1, "delta": 0.2}
stream = streams.make("permuted-digits", tasks=5, seed=SEED)
backbone = pretrain(stream, SEED, device)
first, second = (task.to(device) for task in stream.tasks[:2])

torch.manual_seed(SEED)
model = adapt(copy.deepcopy(backbone), MoRA, targets=r"fc\d", **settings)
probes = first.x_test[:64]
recorder = Recorder([probes] * 3)  # three looks at the same inputs
recorder.record(model)
train(model, parameters(model), first, EPOCHS, SEED)
learned_keys, learned_values = model.fc1.A.detach().clone(), model.fc1.B.detach().clone()
recorder.record(model)


@torch.no_grad()
def accuracy(task):
    return score(model.eval()(task.x_test), task.y_test)


before = accuracy(first)
grow(model)
recorder.record(model)
grown = accuracy(first)
assert torch.equal(model.fc1.frozen_A, learned_keys)
train(model, parameters(model), second, EPOCHS, SEED + 1)
recorder.record(model)
after = accuracy(first)
assert torch.equal(model.fc1.frozen_A, learned_keys)  # bit for bit, also after training
assert torch.equal(model.fc1.frozen_B, learned_values)

drift = recorder.records["drift"][1:, 0].tolist()
turnover = recorder.records["turnover"][1:, 0].tolist()
fresh = recorder.records["mass"][3, 0, 1].item()  # of the ranks grown between looks 1 and 2
newcomers = recorder.records["mass"][2, 0, 1].item()
names = ("learning it", "growth alone", "the next task")
for name, d, t, a in zip(names, drift, turnover, (before, grown, after), strict=True):
    print(f"after {name:14} drift {d:.3f}  said by others {t:.3f}  accuracy on task 1 {a:.3f}")
print(f"old inputs' weight on the fresh ranks: {newcomers:.4f}, once these are trained {fresh:.4f}")
assert drift[0] == 0
assert 0 < drift[1] < 0.1
assert drift[1] < drift[2] < 0.3
assert 0 < newcomers < 0.05
assert before > 0.8
assert abs(grown - before) < 0.05
assert after > before - 0.15

# %% [markdown]
# So growth alone changes a trained layer's outputs, but not by much, and the accuracy hardly
# changes. Learning the next task moves them further, though no frozen rank changes: the trained new
# ranks win some weight from old inputs.
#
# ## A, B, C, and A again
#
# The stream `repeat` shows three tasks, then the first again. The layers are not told. At the end,
# which ranks have the weight for the last task's inputs? `records["mass"][i, j, t]` of a run is the
# share of gate weight that inputs of task j give to the ranks of task t once i tasks are learned.

# %%
repeat = streams.make("repeat", tasks=4, seed=SEED)
assert torch.equal(repeat.tasks[0].x_test, repeat.tasks[-1].x_test)
assert torch.equal(repeat.base.x_train, stream.base.x_train)  # so the same backbone serves


def mora(model, stream):
    return AdapterLearner(model, MoRA, **settings)


again = run_stream(mora, backbone, repeat, SEED, EPOCHS, device)
mass = np.array(again.records["mass"])  # (J + 1, J, J)
print("inputs of A, by the task that learned the ranks:", mass[-1, -1].round(3))
print("accuracy on A:", [round(row[0], 3) for row in again.matrix])
assert np.allclose(mass[-1].sum(-1), 1)
assert mass[-1, -1, 0] > 0.6
assert mass[-1, -1].argmax() == 0
assert mass[-1, -1, 0] > mass[-1, -1, 3] + 0.3

# %%
figure, grid = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
labels = ["A", "B", "C", "A again"]
shade = heat_map(grid[0], mass[-1], "Old ranks of A fire again")
grid[0].set_xticks(range(4), labels)
grid[0].set_yticks(range(4), labels)
grid[0].set(xlabel="ranks of task", ylabel="inputs of task")
figure.colorbar(shade, ax=grid[0], label="share of gate weight")
bottom = np.zeros(4)
for t in range(4):
    part = np.nan_to_num(mass[1:, 0, t])
    grid[1].bar(range(1, 5), part, 0.6, bottom=bottom, color=COLOURS[t], label=labels[t])
    bottom += part
grid[1].set(xlabel="tasks learned", ylabel="share, inputs of A", xticks=range(1, 5), ylim=(0, 1))
grid[1].legend(title="ranks of", fontsize=8, bbox_to_anchor=(1, 1), frameon=False)
grid[1].set_title("They had never lost A", fontsize=10)
plt.show()

# %% [markdown]
# The ranks that learned A take most of the weight when it comes back, though fresh ranks were grown
# for it. The task was not named: the scores of their keys suffice. (This is claim 2 of the
# [findings](findings/findings.md), which holds there over five seeds.)
#
# ## Five tasks, beside LoRA
#
# One dense LoRA, which every task trains on, and MoRA, both with 8 ranks a task. Row i of a matrix
# is after i tasks, column j is the accuracy on task j in per cent; a learner that forgets has a
# bright diagonal and a dark triangle below it.

# %%


def lora(model, stream):
    return AdapterLearner(model, LoRA, grows=False, rank=8)


def joint(model, stream):
    return Joint(model, stream, rank=8)  # 8 ranks a task, all tasks at once


makers = {"lora": lora, "mora": mora, "class_mean": ClassMean, "joint": joint}


def matrices_of(names, stream):
    """The accuracy matrix of each learner."""
    return {
        name: np.array(run_stream(makers[name], backbone, stream, SEED, EPOCHS, device).matrix)
        for name in names
    }


permuted = matrices_of(makers, stream)
figure, grid = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
for axes, name in zip(grid, ("lora", "mora"), strict=True):
    matrix = permuted[name]
    shade = heat_map(axes, matrix, f"{name}: ACC {acc(matrix):.2f}, BWT {bwt(matrix):+.2f}")
    axes.set_xlabel("accuracy on task")
grid[0].set_ylabel("tasks learned")
figure.colorbar(shade, ax=list(grid), label="accuracy")
plt.show()
assert acc(permuted["mora"]) > acc(permuted["lora"]) + 0.2
assert bwt(permuted["mora"]) > bwt(permuted["lora"]) + 0.3
assert np.diag(permuted["lora"][1:]).mean() > 0.85  # LoRA learns each task, and loses it

# %% [markdown]
# ## Where it does not win
#
# Three streams, the same backbone and settings. `class_mean` trains nothing: a digit is named after
# the nearest mean of frozen features. `joint` is one LoRA trained on all tasks at once, which a
# stream does not allow.
#
# - `permuted-digits`: tasks share their images and labels, and differ in where each pixel is. MoRA
#   comes close to `joint`.
# - `rotated-digits`: neighbouring tasks look alike. Keys of a new task score high on inputs of an
#   old one, and MoRA forgets far more.
# - `split-digits`: each task shows two classes and never the others. MoRA is below `class_mean`,
#   which learned nothing by gradient.

# %%
rotated = matrices_of(makers, streams.make("rotated-digits", tasks=5, seed=SEED))
split = matrices_of(makers, streams.make("split-digits", tasks=5, seed=SEED))
results = {"permuted-digits": permuted, "rotated-digits": rotated, "split-digits": split}
print(f"{'ACC':16}", *(f"{name:>10}" for name in makers), f"{'BWT of mora':>13}")
for name, matrices in results.items():
    finals = [f"{acc(matrix):10.3f}" for matrix in matrices.values()]
    print(f"{name:16}", *finals, f"{bwt(matrices['mora']):13.3f}")
assert acc(permuted["mora"]) > acc(permuted["joint"]) - 0.1
assert acc(rotated["mora"]) < acc(rotated["joint"]) - 0.1
assert bwt(rotated["mora"]) < bwt(permuted["mora"]) - 0.08
assert acc(split["mora"]) < acc(split["class_mean"]) - 0.1
assert acc(split["mora"]) < acc(split["joint"]) - 0.1

figure, axes = plt.subplots(figsize=(8, 2.8), layout="constrained")
for i, name in enumerate(makers):
    heights = [acc(matrices[name]) for matrices in results.values()]
    axes.bar(np.arange(3) + 0.2 * (i - 1.5), heights, 0.17, color=COLOURS[i], label=name)
axes.set_xticks(range(3), results)
axes.set(ylabel="final mean accuracy (ACC)", ylim=(0, 1))
axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
axes.set_title("MoRA nears joint training on one stream of three", fontsize=10)
plt.show()

# %% [markdown]
# On `rotated-digits` the same layer forgets less if the weights are held constant in the backward
# pass. This is one run; the study `why` has ten seeds of it, in the
# [findings](findings/findings.md).

# %%


def detached_mora(model, stream):
    return AdapterLearner(model, MoRA, detach_gate=True, **settings)


makers["mora, detached"] = detached_mora
detached = matrices_of(["mora, detached"], streams.make("rotated-digits", tasks=5, seed=SEED))
detached = detached["mora, detached"]
print(f"rotated-digits, BWT: exact {bwt(rotated['mora']):.3f}, detached {bwt(detached):.3f}")
assert bwt(detached) > bwt(rotated["mora"])
assert acc(detached) > acc(rotated["mora"])

# %% [markdown]
# These are single runs, with fewer epochs than `minimoe compare` has. Whether MoRA beats a router,
# and at what equal cost, is not a question for one seed: the [findings](findings/findings.md) have
# five, and a verdict on each of the paper's claims. Not all of them hold on these toys.
#
# ## Exercises
#
# **1.** A layer's ranks see $z = (4, -8, 1)$. With $k = 2$, $\tau = 1 / (3 \ln 4)$ and
# $\delta = .2$: what are the three weights in training, and what in evaluation? Work them out on
# paper and write six numbers.

# %% exercise 1
w_training = [None, None, None]
w_evaluation = [None, None, None]

# %%
seer = MoRA(nn.Linear(3, 3, **wide), rank=3, top_k=2, tau=1 / (3 * math.log(4)), delta=0.2)
with torch.no_grad():
    seer.A.copy_(torch.eye(3))  # so z is x
with exercise("1"):
    seen = torch.tensor([4.0, -8.0, 1.0], **wide)
    for mode, mine in ((True, w_training), (False, w_evaluation)):
        words = "training" if mode else "evaluation"
        assert None not in mine, f"the weights in {words} are missing"
        there = dense_gate(seer.train(mode), seen)
        off = (there - torch.tensor(mine, **wide)).abs().max().item()
        assert off < 2e-3, f"in {words} a weight is off by {off:.2f}"

# %% [markdown]
# **2.** A layer's `delta` may silence it for inputs of no task. Write `window(layer, task, alien)`,
# which returns two numbers, `low` and `high`: in evaluation, every input in `alien` is silent
# exactly if `delta` is above `low`, and every input in `task` still speaks exactly if `delta` is at
# most `high`. Use the score of eq. 5, with `layer.keys`.

# %% exercise 2


def window(layer, task, alien):
    """(low, high), as Python floats."""
    return 0.0, 1.0


# %%


def drawn_case(seed):
    """A layer of 40 ranks, inputs near one of its keys, and inputs of noise."""
    torch.manual_seed(seed)
    layer = MoRA(nn.Linear(64, 64, **wide), rank=8, top_k=8, tau=0.1).eval()
    for _ in range(4):
        layer.grow()
    ours = layer.keys[torch.randint(40, (30,))].detach()
    ours = ours + 0.03 * torch.randn(30, 64, **wide)
    return layer, ours, torch.randn(30, 64, **wide)


def speaks(layer, x, delta):
    """Which inputs get any weight at this delta."""
    layer.delta = delta
    return dense_gate(layer, x).sum(-1) > 0


with exercise("2"):
    for seed in (0, 1, 2):
        layer, ours, alien = drawn_case(seed)
        low, high = window(layer, ours, alien)
        assert not speaks(layer, alien, low + 1e-6).any(), "an alien speaks just above low"
        assert speaks(layer, alien, low - 1e-6).any(), "low is too high"
        assert speaks(layer, ours, high - 1e-6).all(), "a task input is silent just below high"
        assert not speaks(layer, ours, high + 1e-6).all(), "high is too low"

# %% [markdown]
# **3.** A layer has 4 keys in 8 dimensions and serves the inputs `old` (20, 8). Find one more key
# that has the largest score for each of the inputs `new` (5, 8), and for none of `old`. (What does
# a key see of inputs that it is orthogonal to? The span of `old` has 5 dimensions.)

# %% exercise 3


def new_key(old, new):
    """A key (8,)."""
    return new.mean(0)


# %%


def drawn_inputs(seed):
    """A layer of 4 ranks, the inputs that it serves, and new ones that share much with them."""
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(8, 8, **wide)).Q
    layer = MoRA(nn.Linear(8, 8, **wide), rank=4, top_k=1)
    with torch.no_grad():
        layer.A.copy_(basis[:4])
    old = torch.randn(20, 4, **wide).abs() @ basis[:4]
    old = old + 0.5 * torch.randn(20, 1, **wide) * basis[4]
    new = torch.randn(5, 4, **wide).abs() @ basis[:4] + basis[5] + 0.1 * torch.randn(5, 8, **wide)
    return layer, old, new


with exercise("3"):
    for seed in (0, 1, 2):
        layer, old, new = drawn_inputs(seed)
        key = new_key(old, new)
        winner = layer.gate(old).idx
        layer.grow()
        with torch.no_grad():
            layer.A.zero_()
            layer.A[0] = key
        assert torch.equal(layer.gate(old).idx, winner), "an old input has another winner"
        wins = (layer.gate(new).idx == 4).double().mean().item()
        assert wins == 1, f"the new key wins {wins:.0%} of the new inputs"
