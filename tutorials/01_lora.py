# %% [markdown]
# # Low rank: an update of few directions, and how a second task overwrites it
#
# A large layer can be changed by a small matrix. You will measure how accuracy depends on the rank,
# see what `minimoe.LoRA` computes, and see a second task overwrite the first. You need PyTorch and
# linear layers. It runs in well under a minute on a laptop.

# %%
import copy
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minimoe import LoRA
from minimoe.adapt import adapt, adapters, count, grow, load, parameters, save, survey, unwrap
from minimoe.continual.learn import AdapterLearner, pretrain, run_stream, score, task_seed, train
from minimoe.continual.metrics import acc, bwt, forgetting
from minimoe.continual.probe import interference
from minimoe.continual.streams import make
from minimoe.tools.exercise import exercise
from minimoe.tools.plots import COLOURS, MARKERS, heat_map

torch.set_num_threads(1)
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
plt.rcParams["figure.dpi"] = 80

# %% [markdown]
# ## A change, and its rank
#
# In continual learning tasks come one after another, and the data of old tasks do not come back.
# Such a sequence is a *stream*. The *backbone*, a network of three linear layers, was trained on
# the stream's base domain, upright digits of 8×8 pixels. Each of the two tasks reorders the pixels
# in its own way; there the backbone can only guess.

# %%
stream = make("permuted-digits", 2)
backbone = pretrain(stream, seed=0, device=device)
base, first, second = (task.to(device) for task in (stream.base, *stream.tasks))

with torch.no_grad():
    known, guessed = (score(backbone(task.x_test), task.y_test) for task in (base, first))
print(f"accuracy upright {known:.2f}, shuffled {guessed:.2f}")
assert known > 0.9
assert guessed < 0.3

figure, axes = plt.subplots(1, 6, figsize=(8, 1.8), layout="constrained")
for i, ax in enumerate(axes):
    task = (base, first, second)[i // 2]
    ax.imshow(task.x_test[i % 2].view(8, 8).cpu().numpy(), cmap="gray")
    ax.set_title(f"{task.name}: {task.y_test[i % 2]}", fontsize=9)
    ax.axis("off")

# %% [markdown]
# Train every weight of the three layers on the first task. Each layer then has a change
# $\Delta = W - W_0$, of shape (O, D). Its singular value decomposition sorts it into directions,
# largest first: $\Delta = \sum_i \sigma_i\, u_i v_i^\top$. Cutting the sum after r terms gives the
# best matrix of rank r, and what it misses is known (Eckart and Young):
# $\|\Delta - \Delta_r\|^2 = \sum_{i>r} \sigma_i^2$.

# %%
LAYERS = ("fc1", "fc2", "fc3")
tuned = copy.deepcopy(backbone)
weights = [tuned.get_submodule(name).weight.requires_grad_(True) for name in LAYERS]
train(tuned, weights, first, epochs=20, seed=0)

changes = {
    name: (tuned.get_submodule(name).weight - backbone.get_submodule(name).weight).detach()
    for name in LAYERS
}
r = 8
for change in changes.values():
    U, S, V = torch.linalg.svd(change, full_matrices=False)
    cut = U[:, :r] * S[:r] @ V[:r]  # the first r terms of the sum
    missed = (change - cut).square().sum()
    assert torch.allclose(missed, S[r:].square().sum(), rtol=1e-3)
    assert torch.linalg.matrix_rank(cut, rtol=1e-4) == r
    other = cut + 0.01 * torch.randn_like(U[:, :r]) @ torch.randn_like(V[:r])
    assert (change - (U[:, :r] @ U[:, :r].T @ other)).square().sum() > missed  # rank r, and worse

# %% [markdown]
# A matrix of rank r is a product of an (O, r) and an (r, D) matrix: r (D + O) numbers in place of
# D · O. How many directions does the first task need? Keep r of them in every layer, throw the
# rest of the change away, and test.

# %%
RANKS = [0, 1, 2, 4, 8, 16, 32, 64]
accuracies, costs = [], []
for r in RANKS:
    model = copy.deepcopy(backbone)
    for name, change in changes.items():
        U, S, V = torch.linalg.svd(change, full_matrices=False)
        model.get_submodule(name).weight += U[:, :r] * S[:r] @ V[:r]
    with torch.no_grad():
        accuracies.append(score(model(first.x_test), first.y_test))
    costs.append(sum(r * sum(change.shape) for change in changes.values()))
full = sum(change.numel() for change in changes.values())

figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained")
missing, noise = [], {"a random matrix": torch.randn(changes["fc2"].shape)}
for i, (name, change) in enumerate((changes | noise).items()):
    S = torch.linalg.svdvals(change).cpu()
    missing.append(1 - S.square().cumsum(0) / S.square().sum())
    style = {"color": COLOURS[i], "marker": MARKERS[i], "markevery": 8, "ms": 5}
    left.plot(range(65), torch.cat([torch.ones(1), missing[i]])[:65], label=name, **style)
left.axvline(8, color="grey", lw=1, ls=":")
left.set(
    xlabel="rank r kept", ylabel="share of ‖Δ‖² missed", title="A learned change has few directions"
)
left.legend(fontsize=8)
right.plot(range(len(RANKS)), accuracies, color=COLOURS[0], marker=MARKERS[0])
right.set_xticks(
    range(len(RANKS)), [f"{r}\n{c / full:.0%}" for r, c in zip(RANKS, costs, strict=True)]
)
right.set(xlabel="rank kept; its numbers, in % of the weights", ylim=(0, 1.03))
right.set(ylabel="accuracy on task 1", title="Eight directions nearly do")
right.grid(alpha=0.3)

assert all(share[7] < 0.5 for share in missing[:3])  # at r = 8 a change misses little,
assert missing[3][7] > 0.6  # a random matrix most of itself
kept = dict(zip(RANKS, accuracies, strict=True))
assert kept[8] > kept[64] - 0.15  # rank 8 is near the whole change
assert kept[1] < kept[8] - 0.3  # and rank 1 is not
assert costs[RANKS.index(8)] < full / 6
assert costs[RANKS.index(64)] > full  # at full rank the product costs more than the matrix

# %% [markdown]
# ## LoRA: learn the product, not the matrix
#
# LoRA (Hu et al., arXiv 2106.09685) never makes the full change. It trains the two factors, and
# freezes W0. Rank i is a pair: a key `A[i]`, which
# reads the input, and a value `B[i]`, which it adds to the output.
#
# $$z = x A^\top \qquad y = x W_0^\top + \mathrm{scale} \cdot z B$$
#
# `minimoe.LoRA` wraps an `nn.Linear`. Keys start at random and values at zero, so a new layer gives
# exactly the base layer's output, bit for bit.

# %%
linear = nn.Linear(32, 24)  # D = 32 in, O = 24 out
layer = LoRA(linear, rank=4, scale=0.5)
x = torch.randn(100, 32)
assert layer.A.shape == (4, 32)  # keys
assert layer.B.shape == (4, 24)  # values
assert layer.A.any()
assert not layer.B.any()
assert torch.equal(layer(x), linear(x))  # born at zero change
assert not linear.weight.requires_grad  # and the base is frozen
print(layer)

# %% [markdown]
# In the first step only B changes. With dy the gradient that arrives at y,
#
# $$\frac{\partial L}{\partial B} = \mathrm{scale} \cdot z^\top dy \qquad
# \frac{\partial L}{\partial A} = \mathrm{scale} \cdot (dy\, B^\top)^\top x$$
#
# and the second is zero because B is. If A were zero too, nothing would ever move.

# %%
target = torch.randn(100, 24)
y = layer(x)
y.retain_grad()
(y - target).square().mean().backward()
assert torch.allclose(layer.B.grad, 0.5 * (x @ layer.A.T).T @ y.grad, atol=1e-6)
assert layer.B.grad.any()
assert not layer.A.grad.any()  # exactly zero
assert linear.weight.grad is None

optimiser = torch.optim.SGD(layer.parameters(), lr=1.0)
optimiser.step()  # B moves
optimiser.zero_grad()
(layer(x) - target).square().mean().backward()
assert layer.A.grad.any()  # from the second step on, both learn

# %% [markdown]
# After some training the equation still holds. To see the update as one matrix, apply the layer and
# its base to the identity matrix, and subtract. Row d of the difference is the effect of input d.
# Its rank is at most r, however long the layer trains.

# %%
for _ in range(200):
    optimiser.step()
    optimiser.zero_grad()
    (layer(x) - target).square().mean().backward()

with torch.no_grad():
    z = x @ layer.A.T
    y = x @ linear.weight.T + linear.bias + 0.5 * z @ layer.B
    assert torch.allclose(layer(x), y, atol=1e-5)
    eye = torch.eye(32)
    update = (layer(eye) - linear(eye)).T  # (O, D), as a weight
assert torch.linalg.matrix_rank(update, rtol=1e-4) <= 4
assert torch.linalg.matrix_rank(linear.weight) == 24

figure, axes = plt.subplots(1, 5, figsize=(8.5, 2), sharey=True, layout="constrained")
with torch.no_grad():
    terms = {f"rank {i}": 0.5 * torch.outer(layer.B[i], layer.A[i]) for i in range(4)}
    assert torch.allclose(sum(terms.values()), update, atol=1e-5)
most = max(term.abs().max() for term in terms.values())
shown = terms | {"the update, their sum": update}
for ax, (name, matrix) in zip(axes, shown.items(), strict=True):
    ax.imshow(matrix.numpy(), cmap="cividis", vmin=-most, vmax=most)
    ax.set_title(name, fontsize=9)
    ax.set_xlabel("input", fontsize=9)
    ax.tick_params(labelsize=7)
axes[0].set_ylabel("output", fontsize=9)
figure.suptitle("224 numbers stand for 768: each term is a column times a row", fontsize=11)
assert layer.A.numel() + layer.B.numel() == 4 * (32 + 24) == 224
assert update.numel() == 32 * 24 == 768

# %% [markdown]
# ## Merge and unmerge
#
# One matrix does the same: add the update to W0, and the layer costs what it cost without LoRA.
# `merge` does that and keeps W0; `unmerge` puts it back bit for bit. While merged, a layer can be
# used, but not trained or grown: trying raises an error.

# %%
before, W0 = layer(x).detach(), linear.weight.clone()
layer.merge()
assert torch.allclose(layer(x), before, atol=1e-5)  # the same answers, up to rounding
assert torch.allclose(linear.weight - W0, update, atol=1e-5)
try:
    layer.grow()
except RuntimeError as error:
    print(f"RuntimeError: {error}")
layer.unmerge()
assert torch.equal(linear.weight, W0)
assert torch.equal(layer(x), before)

# %% [markdown]
# ## In a model
#
# `adapt` wraps every `nn.Linear` whose name matches a pattern, freezes all else, and leaves the
# model's answers as they are. `survey` says beforehand what a pattern matches, and of the rest why
# it cannot be wrapped. `count` says what it costs, `parameters` is what an optimiser gets.

# %%
chosen, left_out = survey(backbone, r"fc\d|classes")
print(list(chosen), left_out)
assert list(chosen) == ["fc1", "fc2", "fc3"] and list(left_out) == ["classes"]

model = adapt(copy.deepcopy(backbone), LoRA, targets=r"fc\d", rank=8)
for name, adapter in adapters(model):
    D, O = adapter.in_features, adapter.out_features
    print(f"{name}: {D:3} in, {O:3} out, {8 * (D + O):,} of {D * O:,} numbers train")
print(count(model))
assert [name for name, _ in adapters(model)] == ["fc1", "fc2", "fc3"]
assert count(model)["trainable"] == 8 * ((64 + 128) + (128 + 128) + (128 + 64)) == 5120
assert sum(w.numel() for w in parameters(model)) == 5120
assert all(w.requires_grad for w in parameters(model))
assert not model.classes.requires_grad  # the head, a frozen vector for each digit
with torch.no_grad():
    assert torch.equal(model(first.x_test), backbone(first.x_test))

# %% [markdown]
# ## Two tasks on one update
#
# `run_stream` takes a copy of the backbone through the stream: learn task 1, test on all tasks,
# learn task 2, test again. `AdapterLearner` is the backbone with a scheme on its three layers; with
# `grows=False` both tasks train the same eight ranks. `done` is called after each task, and keeps
# a copy of the model here.
#
# The result, a `Run`, holds an accuracy matrix: row i after i tasks, column j the accuracy on
# task j.


# %%
def run_lora(grows):
    """The result of run_stream, and a copy of the model after each task."""
    learners, copies = [], []

    def learner(model, stream):
        learners.append(AdapterLearner(model, LoRA, grows=grows, rank=8))
        return learners[0]

    def keep(tasks):
        copies.append(copy.deepcopy(learners[0].model))

    result = run_stream(learner, backbone, stream, seed=0, epochs=20, device=device, done=keep)
    return result, copies


one, (one_after_1, one_after_2) = run_lora(grows=False)
a = np.array(one.matrix)
print(f"ACC {acc(a):.2f}, BWT {bwt(a):.2f}, forgetting {forgetting(a):.2f}")
assert a.shape == (3, 2)
assert a[1, 0] > 0.9 and a[2, 1] > 0.9  # each task is learned in its turn
assert a[2, 0] < a[1, 0] - 0.2  # and the first is lost
assert np.isclose(bwt(a), a[2, 0] - a[1, 0])  # backward transfer: the change on old tasks
assert np.isclose(forgetting(a), a[1, 0] - a[2, 0])
assert np.isclose(acc(a), a[2].mean())

# %% [markdown]
# How fast does it go? From the copy after task 1, train on task 2 for fewer epochs, on the same
# batches.

# %%
EPOCHS, tests, path = (0, 1, 2, 3, 5, 10, 20), (first, second), []
for epochs in EPOCHS:
    model = copy.deepcopy(one_after_1)
    if epochs:
        train(model, parameters(model), second, epochs, seed=task_seed(0, 1))
    with torch.no_grad():
        path.append([score(model(task.x_test), task.y_test) for task in tests])
path = np.array(path)

figure, (left, right) = plt.subplots(
    1, 2, figsize=(8, 3), width_ratios=[2, 3], layout="constrained"
)
shade = heat_map(left, a, "Accuracy in %: task 1 is lost")
left.set(xlabel="tested on task", ylabel="tasks learned")
for j, name in enumerate(("task 1", "task 2")):
    style = {"color": COLOURS[j], "marker": MARKERS[j], "ms": 4}
    right.plot(EPOCHS, path[:, j], label=name, **style)
right.set(xlabel="epochs of task 2", ylabel="accuracy", ylim=(0, 1.03))
right.set_title("As task 2 is learned", fontsize=9)
right.set_xticks(range(0, 21, 5))
right.legend(loc="lower right", fontsize=8)
right.grid(alpha=0.3)
assert path[0, 0] > 0.9
assert path[2, 0] < path[0, 0] - 0.1  # two epochs suffice to see it
assert path[-1, 0] < path[0, 0] - 0.2
assert path[-1, 1] > 0.9

# %% [markdown]
# ## Where it went
#
# The images of task 1 have not changed and neither has the head. The layers' outputs for them have.
# `records["drift"]` of the run is how far: ‖y − y′‖ / ‖u′‖, y′ being the layer's output just after
# the task was learned and u′ the LoRA's part of it, each summed over inputs, and a mean over
# layers. At 1, learning the next task has moved as much as learning this one had. `interference` is
# its mean over old tasks. The picture shows the last layer's outputs for three digits of task 1, in
# the plane of the three digits' class vectors.

# %%
drift = np.array(one.records["drift"])
print(f"drift of the layers' outputs for task 1: {drift[2, 0]:.2f} of what was learned")
assert torch.equal(one_after_2.classes, backbone.classes)  # the head
assert drift[1, 0] == 0  # just learned
assert np.isclose(interference(one.records), drift[2, 0])
assert drift[2, 0] > 0.3

digits = (1, 3, 7)
C = backbone.classes[list(digits)]
plane = torch.linalg.svd(C - C.mean(0)).Vh[:2].T  # three points span a plane: (64, 2)
figure, axes = plt.subplots(1, 2, figsize=(8, 3.3), sharex=True, sharey=True, layout="constrained")
for ax, model, when in zip(axes, (one_after_1, one_after_2), ("task 1", "task 2"), strict=True):
    with torch.no_grad():
        spots = (model.features(first.x_test) @ plane).cpu()
        right_here = score(model(first.x_test), first.y_test)
    for i, digit in enumerate(digits):
        here = spots[(first.y_test == digit).cpu()]
        style = {"color": COLOURS[i], "marker": MARKERS[i], "s": 16, "alpha": 0.7}
        ax.scatter(here[:, 0], here[:, 1], label=f"digit {digit}", **style)
    ax.set_title(f"Task 1's images after {when}: {right_here:.0%} right", fontsize=10)
    ax.set_xlabel("features, first direction")
axes[0].set_ylabel("features, second direction", fontsize=10)
figure.legend(
    *axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9, frameon=False
)
for ax in axes:
    ax.grid(alpha=0.3)

# %% [markdown]
# ## Grow: keep the old ranks
#
# If overwriting is the trouble, do not overwrite. `grow` says that a task has ended: it moves the
# live rows `A`, `B` to the buffers `frozen_A`, `frozen_B`, and makes fresh live ones. The fresh
# values are zero, so nothing changes yet.

# %%
with torch.no_grad():
    before, old_A = layer(x), layer.A.detach().clone()
    layer.grow()
    assert torch.equal(layer.frozen_A, old_A)
    assert not layer.frozen_A.requires_grad
    assert not layer.B.any()
    assert layer.ranks == 8
    assert torch.allclose(layer(x), before, atol=1e-6)
assert {name for name, _ in layer.named_parameters(recurse=False)} == {"A", "B"}

bigger = copy.deepcopy(one_after_1)
grow(bigger)  # every adapter of a model
print(count(one_after_1))
print(count(bigger))
assert count(bigger)["trainable"] == count(one_after_1)["trainable"]
assert count(bigger)["stored"] == count(bigger)["read"] == 2 * count(one_after_1)["stored"]

# %% [markdown]
# The same two tasks, with eight ranks each. The first task's rows stay as they are, bit for bit.
# The first task is lost all the same.

# %%
grown, (grown_after_1, grown_after_2) = run_lora(grows=True)
a_grown = np.array(grown.matrix)
print(f"accuracy on task 1: after it {a_grown[1, 0]:.2f}, after task 2 {a_grown[2, 0]:.2f}")
for (_, then), (_, now) in zip(adapters(grown_after_1), adapters(grown_after_2), strict=True):
    assert torch.equal(now.frozen_A, then.A)
    assert torch.equal(now.frozen_B, then.B)
    assert now.ranks == 2 * then.ranks == 16
assert a_grown[2, 1] > 0.9
assert a_grown[2, 0] < a_grown[1, 0] - 0.2
assert grown.stored == 2 * grown.trainable

# %% [markdown]
# No old weight has changed. But every rank is added for every input, so the new ranks also change
# the output for the old task's inputs, in a direction that was learned for others. In the first
# layer, whose input is the image, the whole move is the new ranks' term of the equation:
#
# $$y_\text{now} - y_\text{then} = \mathrm{scale} \cdot (x A_\text{new}^\top)\, B_\text{new}$$

# %%
with torch.no_grad():
    x1, x2 = (F.layer_norm(task.x_test, (64,)) for task in tests)  # what fc1 reads
    then, now = grown_after_1.fc1, grown_after_2.fc1
    moved = now(x1) - then(x1)
    assert torch.allclose(moved, now.scale * (x1 @ now.A.T) @ now.B, atol=1e-4)
    z1, z2 = (x @ now.A.T for x in (x1, x2))
    strength = (z1.norm(dim=-1).mean() / z2.norm(dim=-1).mean()).item()
    span = torch.linalg.matrix_rank(F.layer_norm(first.x_train, (64,)), rtol=1e-3).item()
print(f"the new keys answer task 1's images {strength:.2f} times as strongly as task 2's")
print(f"task 1's images span {span} of 64 dimensions: few directions are free of them")
assert strength > 0.3
assert span > 50

# %% [markdown]
# So set the values of the new ranks to zero. Task 1 is fully restored, and task 2 is lost.

# %%
silenced = copy.deepcopy(grown_after_2)
with torch.no_grad():
    for _, adapter in adapters(silenced):
        adapter.B.zero_()
    quiet = [score(silenced(task.x_test), task.y_test) for task in tests]

rows = {
    "after task 1": a_grown[1],
    "after task 2,\none LoRA": a[2],
    "after task 2,\ngrown": a_grown[2],
    "grown, new\nranks silenced": quiet,
}
figure, ax = plt.subplots(figsize=(8, 3), layout="constrained")
for j in range(2):
    at = np.arange(len(rows)) + 0.36 * (j - 0.5)
    bars = ax.bar(
        at, [row[j] for row in rows.values()], 0.34, color=COLOURS[j], label=f"task {j + 1}"
    )
    ax.bar_label(bars, fmt="{:.2f}", fontsize=8)
ax.set_xticks(range(len(rows)), rows)
ax.set(ylabel="accuracy", ylim=(0, 1.12), title="Task 1 is not gone: the new ranks talk over it")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
assert abs(quiet[0] - a_grown[1, 0]) < 0.01
assert quiet[1] < 0.4

# %% [markdown]
# Each input should use only the ranks that were trained on inputs like it. A *gate* gives each rank
# a weight that depends on the input. The next notebooks are about gates.
#
# ## Save and load
#
# `save` writes the adapters alone, here about a third of the backbone's size. `load` puts them into
# a model that is adapted in the same way, grown or not, and refuses any other.

# %%
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "adapters.safetensors"
    save(grown_after_2, file)
    share = file.stat().st_size / sum(4 * w.numel() for w in backbone.parameters())
    again = adapt(copy.deepcopy(backbone), LoRA, targets=r"fc\d", rank=8)
    load(again, file)
    other = adapt(copy.deepcopy(backbone), LoRA, targets=r"fc\d", rank=4)
    try:
        load(other, file)
    except ValueError as error:
        print(f"ValueError: {str(error).partition(': ')[2]}")
with torch.no_grad():
    assert torch.equal(again(second.x_test), grown_after_2(second.x_test))
print(f"the file is {share:.0%} of the backbone's size")
assert 0.2 < share < 0.4

# %% [markdown]
# `unwrap` is the way back to a plain model: each update is merged into its layer's weight, and the
# adapters are gone.

# %%
plain = unwrap(copy.deepcopy(grown_after_2))
print(plain)
assert not list(adapters(plain)) and type(plain.fc1) is nn.Linear
with torch.no_grad():
    assert torch.allclose(plain(second.x_test), grown_after_2(second.x_test), atol=1e-4)

# %% [markdown]
# ## Exercises
#
# **1. One matrix.** Write the update of a LoRA layer as one matrix (O, D), from its rows. The layer
# may have grown, and its scale may be anything. Added to W0 it must give the layer's answers.


# %% exercise 1
def update_matrix(layer):
    return torch.zeros_like(layer.base.weight)  # replace: use layer.rows("A"), layer.rows("B")


# %%
with exercise("1"):
    for tasks, scale in ((1, 1.0), (3, 0.5)):
        trial = LoRA(nn.Linear(20, 20), rank=3, scale=scale)
        for task in range(tasks):
            if task:
                trial.grow()
            nn.init.normal_(trial.B)
        matrix, inputs = update_matrix(trial), torch.randn(50, 20)
        assert matrix.shape == trial.base.weight.shape, f"its shape is {tuple(matrix.shape)}"
        mine = F.linear(inputs, trial.base.weight + matrix, trial.base.bias)
        wrong = f"with scale {scale} and {tasks} task(s), the answers are not the layer's"
        assert torch.allclose(mine, trial(inputs), atol=1e-3), wrong

# %% [markdown]
# **2. What a rank costs.** Give the largest rank at which LoRA trains at most a given share of a
# layer's D · O weights.


# %% exercise 2
def largest_rank(D, O, share):
    return 1  # replace


# %%
with exercise("2"):
    for D, O, share in ((64, 64, 0.25), (128, 64, 0.5), (100, 300, 0.1), (768, 3072, 0.01)):
        rank = largest_rank(D, O, share)
        fits = []
        for tried in (rank, rank + 1):
            trial = adapt(nn.Sequential(nn.Linear(D, O)), LoRA, targets="0", rank=tried)
            fits.append(count(trial)["trainable"] <= share * D * O)
        case = f"for {share:.0%} of a layer from {D} to {O}"
        assert fits[0], f"rank {rank} is too much {case}"
        assert not fits[1], f"rank {rank} is not the largest {case}"

# %% [markdown]
# **3. Keys that old inputs do not touch.** A new rank does not change the output for x if x · A_new
# = 0. Given keys (r, D) and some old inputs (N, D) with N < D, return keys of the same shape whose
# dot product with every old input is zero, and which still tell new inputs apart. (The matrix
# `old.pinverse() @ old` projects on the span of the old inputs.)


# %% exercise 3
def untouched(keys, old):
    return keys  # replace


# %%
with exercise("3"):
    trial = LoRA(nn.Linear(32, 24), rank=4)
    nn.init.normal_(trial.B)
    old, new = torch.randn(2, 12, 32)
    with torch.no_grad():
        knew, unknown = trial(old), trial(new)
        trial.grow()
        trial.A.copy_(untouched(trial.A.clone(), old))
        nn.init.normal_(trial.B)  # whatever the second task will have learned
        away = (trial(old) - knew).abs().max().item()
        assert away < 1e-3, f"the second task moves an old input's outputs by {away:.2g}"
        assert (trial(new) - unknown).abs().max() > 0.1, "new inputs should be moved"
        assert torch.linalg.matrix_rank(trial.A, rtol=1e-4) == 4, "the four keys should differ"

# %% [markdown]
# In `minimoe/schemes/olora.py` is a scheme that keeps new keys orthogonal to the old keys, which
# are few, in place of the old inputs, which span nearly everything.
