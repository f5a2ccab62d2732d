# %% [markdown]
# # LoRA: a change of few directions, learned twice
#
# **Goals.** At the end you can
#
# 1. measure how few directions a learned change needs, and say what they cost;
# 2. write what LoRA adds to a layer as one matrix;
# 3. show, by an experiment, where the first thing that was learned is when a second one is.
#
# **Time.** 50 minutes in class, of which the computer needs half a minute; what is left of the
# exercises at home.
# **You need** PyTorch and linear layers; notebook 00 is a good start.

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

import torch
import torch.nn.functional as F
from torch import nn

from minimoe import LoRA
from minimoe.adapt import adapt, adapters, count, grow, parameters
from minimoe.continual.learn import score, train
from minimoe.continual.metrics import acc, bwt
from minimoe.continual.streams import make
from minimoe.lesson import claim, expect, figures, learn, predict, shipped
from minimoe.tools.exercise import exercise

torch.set_num_threads(1)
torch.manual_seed(0)

# %% picture alt="Five boxes in a row: x, z, s, g, y. z and y are marked as today's."
figures.equation(today="zy")

# %% [markdown]
# The steps of every notebook, from a layer's input x to its output y. Today s and g are left out:
# every part counts for every input, as if g were 1.

# %% [markdown]
# ## 1. Directions (8 min)
#
# A **stream** is a sequence of things to learn, one after another; each of them is a **task**. Here
# a task reorders the pixels of handwritten digits in its own way. The **backbone** is a network of
# three linear layers that was trained before, on upright digits.
#
# First we train all of its weights on task 1. Every layer then has a change Δ = W - W0, a matrix
# (O, D). `torch.linalg.svd` sorts it into directions, the largest first. The first r of them are
# the best matrix of **rank** r: a sum of r columns times rows.

# %% tuned
stream, backbone = make("permuted-digits", tasks=2, seed=0), shipped()
first, second = stream.tasks
tuned = copy.deepcopy(backbone)
weights = [tuned.get_submodule(name).weight for name in ("fc1", "fc2", "fc3")]
train(tuned, [w.requires_grad_() for w in weights], first, epochs=20, seed=0)

# %% directions


def first_directions(change, r):
    """The first r directions of a matrix."""
    U, S, V = torch.linalg.svd(change, full_matrices=False)
    return U[:, :r] * S[:r] @ V[:r]


@torch.no_grad()
def accuracy_at(r):
    model = copy.deepcopy(backbone)
    for name in ("fc1", "fc2", "fc3"):
        w, trained = (net.get_submodule(name).weight for net in (model, tuned))
        w += first_directions(trained - w, r)
    return score(model(first.x_test), first.y_test)


# %% [markdown]
# Every change has 64 directions or more. With all of them the network is the trained one, which has
# .98 of task 1 right. **Predict**: how many has it right with 8 of them in every layer?

# %% predict-1
with_eight = predict("accuracy on task 1 with 8 directions a layer", None)

# %% ranks alt="A line: accuracy on task 1 over the rank that is kept, from 0 to 64."
RANKS = [0, 1, 2, 4, 8, 16, 32, 64]
accuracies = [accuracy_at(r) for r in RANKS]
axes = "rank kept in each layer", "accuracy on task 1"
figures.lines(RANKS, {"": accuracies}, *axes, "A change cut to rank r")
with_eight.beside(accuracies[RANKS.index(8)])

# %% [markdown]
# With 0 directions it is the backbone, .06. With 2 it has .23, with 4 already .68, with 8 .96, with
# 64 .98.

# %% [markdown]
# ## 2. LoRA trains the product (10 min)
#
# A matrix of rank r is a product of two thin ones: r (D + O) numbers in place of D · O. LoRA
# ([2106.09685](https://arxiv.org/abs/2106.09685)) trains these two, and leaves W0 **frozen**: no
# step changes it. What they add to the output is the **update**:
#
#     z = x Aᵀ                        A (r, D): a row is a **key**, which reads the input
#     y = x W0ᵀ + scale · z B         B (r, O): a row is a **value**, which is added to the output
#
# (A key here is not attention's.) Keys start at random, values at zero.

# %% layer
layer = LoRA(nn.Linear(32, 24), rank=4, scale=0.5)  # D = 32, O = 24
x = torch.randn(100, 32)
apart = (layer(x) - layer.base(x)).abs().max().item()
claim("A new layer's output differs from the base layer's by 0", apart, apart == 0)
print(f"it trains {layer.A.numel() + layer.B.numel()} numbers; W0 has {layer.base.weight.numel()}")

# %% [markdown]
# **Write.** The whole update of a layer as one matrix (O, D), so that y = x (W0 + update)ᵀ + bias.
# `layer.rows("A")` and `layer.rows("B")` have all keys and values; `layer.scale` may be anything.
#
# <details><summary>Hint</summary>
# x goes through Aᵀ (D, R) first, then through B (R, O). The matrix that you return is transposed
# before x is multiplied with it.
# </details>


# %% exercise 1
def update_matrix(layer):
    raise NotImplementedError


# %%
with exercise("1"):
    for tasks, scale in ((1, 1.0), (3, 0.5)):
        trial = LoRA(nn.Linear(6, 6), rank=2, scale=scale)
        for task in range(tasks):
            if task:
                trial.grow()
            nn.init.normal_(trial.B)
        A, B, W0 = trial.rows("A"), trial.rows("B"), trial.base.weight
        slips = {
            "The scale is left out.": B.T @ A,
            "This is the transposed, (D, O).": scale * A.T @ B,
            "Older ranks are left out: layer.rows has all.": scale * trial.B.T @ trial.A,
            "W0 is in it: return what is added to W0.": W0 + scale * B.T @ A,
        }
        want = (trial(torch.eye(6)) - trial.base(torch.eye(6))).T  # column d: what input d adds
        expect(f"scale {scale}, {2 * tasks} ranks", update_matrix(trial), want, slips=slips)

# %% [markdown]
# **Write.** The largest rank at which LoRA trains at most a given share of a layer's D · O weights.
#
# <details><summary>Hint</summary>
# One rank is a row of A and a row of B: D + O numbers.
# </details>


# %% exercise 2
def largest_rank(D, O, share):
    raise NotImplementedError


# %%
with exercise("2"):
    for D, O, share in ((64, 64, 0.25), (128, 64, 0.5), (100, 300, 0.1), (768, 3072, 0.01)):
        rank, case = largest_rank(D, O, share), f"for {share:.0%} of a layer from {D} to {O}"
        trained = [count(LoRA(nn.Linear(D, O), rank=r))["trainable"] for r in (rank, rank + 1)]
        assert trained[0] <= share * D * O, f"rank {rank} is too much {case}"
        assert trained[1] > share * D * O, f"rank {rank} is not the largest {case}"

# %% [markdown]
# `adapt` puts a scheme into all layers of a model whose names match, and freezes all else.

# %% adapted
model = adapt(copy.deepcopy(backbone), LoRA, targets=r"fc\d", rank=8)
for name, adapter in adapters(model):
    print(f"{name}: {adapter.in_features} in, {adapter.out_features} out, rank {adapter.rank}")
print(count(model), "of", sum(w.numel() for w in backbone.parameters()))

# %% [markdown]
# ## 3. Two tasks on one update (8 min)
#
# The same 8 ranks in each layer learn task 1, and then task 2. The picture of it is an **accuracy
# matrix**: a row after each task, a column for each task that is tested. **ACC** is the mean of its
# last row. **BWT**, backward transfer, is what old tasks have at the end minus what they had just
# after they were learned; below 0 it is **forgetting**.

# %% one alt="Accuracy matrix of one LoRA on two tasks, three rows and two columns."
one = learn(stream, LoRA, rank=8, grows=False)
figures.accuracies(one.matrix)
print(f"ACC {acc(one.matrix):.2f}, BWT {bwt(one.matrix):.2f}")

# %% [markdown]
# Task 1 has .97 after it was learned and .56 at the end: BWT is -.42.
#
# How fast does it go? From a copy after task 1 we train on task 2 for fewer passes over its data.
# **Predict**: what is the accuracy on task 1 after 2 of the 20?

# %% predict-2
after_two = predict("accuracy on task 1 after 2 passes over task 2", None)

# %% path alt="Two lines: accuracy on tasks 1 and 2 over passes over task 2, from 0 to 20."
after_1 = learn(replace(stream, tasks=[first]), LoRA, rank=8).model
PASSES, path = [0, 1, 2, 3, 5, 10, 20], {"task 1": [], "task 2": []}
for passes in PASSES:
    model = copy.deepcopy(after_1)
    if passes:
        train(model, parameters(model), second, passes, seed=1001)
    with torch.no_grad():
        for task, line in zip((first, second), path.values(), strict=True):
            line.append(score(model(task.x_test), task.y_test))
axes = "passes over task 2", "accuracy"
figures.lines(PASSES, path, *axes, "while task 2 is learned")
after_two.beside(path["task 1"][2])

# %% [markdown]
# After one pass task 1 has fallen from .97 to .82, after two to .71, after 20 to .56. Task 2 has
# .87 after two passes: most is lost while most is learned.

# %% [markdown]
# ## 4. What has changed (3 min)
#
# The images of task 1 are the same, and so is the head that names digits. The layers' outputs for
# these images are not. How far they moved is the **drift**; here it is ‖y - y'‖ / ‖y'‖, where y is
# what the last layer gives now, and y' what it gave just after task 1.

# %% drift
with torch.no_grad():
    then, now = (net.features(first.x_test) for net in (after_1, one.model))
drift = ((now - then).norm() / then.norm()).item()
head = (one.model.classes - after_1.classes).abs().max().item()
claim("The last layer's output moved by more than .3 of its length", drift, drift > 0.3)
claim("The head moved by 0", head, head == 0)

# %% [markdown]
# ## 5. Grow (5 min)
#
# If overwriting is the cause, stop it. `grow` ends a task: the ranks are frozen, and new ones are
# added, with values 0. Those in training are **live**.

# %% grow
bigger = copy.deepcopy(after_1)
grow(bigger)
print("after task 1:", count(after_1))
print("grown:       ", count(bigger))

# %% [markdown]
# **Predict.** The ranks of task 1 keep every bit. What is its accuracy after task 2?

# %% predict-3
with_growth = predict("accuracy on task 1, its ranks frozen", None)

# %% grown alt="Accuracy matrix of a LoRA that grows, three rows and two columns."
grown = learn(stream, LoRA, rank=8)
figures.accuracies(grown.matrix)
with_growth.beside(grown.matrix[2, 0])

# %% [markdown]
# From .97 to .53. The first layer reads the image itself, so there all that has moved is what the
# new ranks add, scale · (x A_newᵀ) B_new. The next cell holds the one against the other.

# %% moved
x1 = F.layer_norm(first.x_test, (64,))  # what the first layer reads
then, now = after_1.fc1, grown.model.fc1
with torch.no_grad():
    moved, added = now(x1) - then(x1), now.scale * (x1 @ now.A.T) @ now.B
off = ((moved - added).norm() / moved.norm()).item()
claim("What moved differs from what the new ranks add by at most .001", off, off < 0.001)

# %% [markdown]
# ## 6. An experiment (10 min)
#
# So take away what the new ranks add: set their values to 0.

# %% silenced alt="Bars for four states of the model: accuracy on task 1 and on task 2."
silenced = copy.deepcopy(grown.model)
with torch.no_grad():
    for _, adapter in adapters(silenced):
        adapter.B.zero_()
    quiet = [score(silenced(task.x_test), task.y_test) for task in (first, second)]
states = {
    "after\ntask 1": grown.matrix[1],
    "one LoRA,\nafter task 2": one.matrix[2],
    "grown,\nafter task 2": grown.matrix[2],
    "grown, new\nvalues 0": quiet,
}
figures.bars(states, ["task 1", "task 2"], "accuracy")

# %% [markdown]
# With the new values at 0, task 1 has its .97 again, and task 2 the .06 that it had before.
# **Explain**, in one sentence, before you open this.
#
# <details><summary>An answer</summary>
# No old weight was changed; but every rank is added for every input, so the new ranks change the
# output for the old task's inputs too.
# </details>
#
# **Write, and then break.** A new rank does not change the output for x if x · A_new = 0. Given
# keys (r, D) and old inputs (N, D), N < D, return keys of the same shape whose product with every
# old input is 0, and which still differ. (`old.pinverse() @ old` projects on the span of the old
# inputs.) Then give it more old inputs than D: what is left of the keys?
#
# <details><summary>Hint</summary>
# Each key is the sum of its part in the span of the old inputs and the rest. Which part is 0 to
# every old input?
# </details>


# %% exercise 3
def untouched(keys, old):
    raise NotImplementedError


# %%
with exercise("3"):
    trial, (old, new) = LoRA(nn.Linear(32, 24), rank=4), torch.randn(2, 12, 32)
    nn.init.normal_(trial.B)
    with torch.no_grad():
        knew, unknown = trial(old), trial(new)
        trial.grow()
        trial.A.copy_(untouched(trial.A.clone(), old))
        nn.init.normal_(trial.B)  # whatever a second task will have learned
        away = (trial(old) - knew).abs().max().item()
        assert away < 1e-3, f"the second task changes an old input's output by {away:.2g}"
        assert (trial(new) - unknown).abs().max() > 0.1, "outputs of new inputs should change"
        assert torch.linalg.matrix_rank(trial.A, rtol=1e-4) == 4, "the four keys should differ"

# %% [markdown]
# The images of task 1 span nearly all 64 dimensions, so few keys are free of them. A scheme that
# keeps new keys orthogonal to the old keys, which are few, is in `minimoe/schemes/olora.py`.

# %% [markdown]
# ## 7. Exit ticket (5 min)
#
# **Summary.** A change of a layer has few directions that count, and LoRA trains as many as you pay
# for. Trained on a second task, the same ranks lose the first. With frozen ranks and new ones the
# first task is lost all the same, though no bit of it is: all ranks are added for every input. A
# **gate** gives each rank a weight that depends on the input; the next notebooks are about gates.
# How to merge, save and take out adapters is in [HOWTO](HOWTO.md).
#
# **1.** Which of A and B does the first step of training change, and why?
#
# <details><summary>Answer</summary>
# B. The gradient of A is a product with B, and B is 0.
# </details>
#
# **2.** A layer has D = 64 and O = 128. What does rank 8 cost, in numbers and in per cent of W0?
#
# <details><summary>Answer</summary>
# 8 · (64 + 128) = 1,536; W0 has 8,192: 19 %.
# </details>
#
# **3.** After growth, old rows are the same to the last bit. Why is the drift above 0?
#
# <details><summary>Answer</summary>
# The output is a sum over old and new ranks, and the new ones are added for old inputs too.
# </details>
