# %% [markdown]
# # The first hour: from one matrix to MoRA, and its limits
#
# **Goals.** At the end you can
#
# 1. write three small functions: LoRA, and two ways to choose parts of it for each input;
# 2. say what each of them keeps when it learns one thing after another, and why;
# 3. say when none of them should be used.
#
# **Time.** 60 minutes in class, of which the computer needs about one. With 45, run section 4 and
# the rotated digits of section 8 without a discussion, and do section 9 at home.
#
# **You need** PyTorch as far as a training loop, and the matrix product. LoRA is not assumed.
#
# Write down a number wherever it says **Predict**, before you run on. A wrong one teaches most.

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
import torch
import torch.nn.functional as F
from torch import nn

from minimoe import LoRA
from minimoe.adapt import adapters, count
from minimoe.continual.closed import OwnRidge
from minimoe.continual.learn import run_stream, score
from minimoe.continual.metrics import acc, bwt
from minimoe.continual.probe import dense_gate
from minimoe.continual.streams import make
from minimoe.lesson import check, claim, figures, hint, learn, predict, scheme_of, shipped
from minimoe.tools.exercise import exercise

torch.set_num_threads(1)
torch.manual_seed(0)

# %% picture alt="Five boxes in a row: x, z, s, g, y. All but x are marked as today's."
figures.equation(today="zsgy")

# %% [markdown]
# An input x of a linear layer goes from left to right. Each box is a line of code that you write or
# compute by hand today; what the words below the boxes mean comes in its section.

# %% [markdown]
# ## 1. One thing after another (4 min)
#
# **Continual learning**: a model learns several things in turn, and should still do the first ones
# at the end. One of these things is a **task**. A **stream** is a sequence of tasks: when one is
# over, its data do not come back. At test nobody says which task an input is from.
#
# Our tasks are handwritten digits of 8×8 pixels. Each task reorders the pixels in its own way. The
# model is a **backbone**: a network of three linear layers that was trained before, on upright
# digits. Its weights W0 are **frozen**: no step of training changes them.

# %% stream alt="Two digits, 2 and 0, upright and as each of two tasks shows them."
stream = make("permuted-digits", tasks=2, seed=0)
figures.digits(stream)

# %% [markdown]
# The same two digits, a 2 and a 0, upright and in the two tasks. A reordered digit looks like noise
# to us, and, as the next cell prints, to the backbone as well.

# %% before
backbone = shipped()
first = stream.tasks[0]
for task in (stream.base, first):
    accuracy = score(backbone(task.x_test), task.y_test)
    print(f"{task.name}: the backbone has {accuracy:.2f} right; chance is .10")

# %% [markdown]
# ## 2. One LoRA, two tasks (6 min)
#
# LoRA trains a small **update** beside each layer, which is added to the layer's output, and leaves
# W0 as it is. The update is made of **ranks**. A rank is a pair of rows: its **key**, a row of A,
# is multiplied with the input; its **value**, a row of B, is added to the output as often as that
# product says. (Keys and values of attention are something else.) Eight ranks in each
# of the three layers are 5,120 numbers in all; their W0 are 32,768.
#
# We train these 8 ranks on task 1, and then the same 8 ranks on task 2.
#
# **Predict.** What is the accuracy on task 1 after that?

# %% predict-1
on_task_1 = predict("accuracy on task 1 after task 2", None)  # your number in place of None

# %% one alt="Accuracy matrix of one LoRA on two tasks, three rows and two columns."
one = learn(stream, LoRA, rank=8, grows=False)  # 20 passes over the data of each task
figures.accuracies(one.matrix)
on_task_1.beside(one.matrix[2, 0])

# %% [markdown]
# The picture is the **accuracy matrix**: a row after each task, a column for each task that is
# tested. Task 1 has .97 just after it was learned, and about .56 after task 2, which has .97.
#
# Two numbers sum it up. **ACC** is the mean of the last row. **BWT** (backward transfer) is the
# mean, over older tasks, of what they have at the end minus what they had just after they were
# learned. Where it is below 0, there is **forgetting**. Below, a **claim** is a sentence, the
# number that it rests on, and whether it holds in this run.

# %% one-said
drop = one.matrix[1, 0] - one.matrix[2, 0]
claim("Task 1 fell by at least .2", drop, drop >= 0.2)
print(f"ACC {acc(one.matrix):.2f}, BWT {bwt(one.matrix):.2f}")

# %% [markdown]
# **Explain**, in one sentence, before you open this.
#
# <details><summary>An answer</summary>
# Task 2 trains the very numbers in which task 1 is stored, and nothing asks them to stay.
# </details>

# %% [markdown]
# ## 3. Write LoRA (8 min)
#
# With x (..., D), W0 (O, D), A (R, D), B (R, O), for R ranks:
#
#     z = x Aᵀ              one number for each rank
#     y = x W0ᵀ + z B       the frozen layer's output, plus the update
#
# Your function gets tensors and returns y. It is tried on small cases; then it is put into a layer
# and compared with `minimoe.LoRA`; and it must keep a few **laws**: what every such layer must do,
# such as that a new layer gives exactly what W0 alone gives.


# %% exercise 1
def lora(x, W0, A, B):
    raise NotImplementedError


# %%
with exercise("1"):
    check("lora", lora)

# %%
hint("lora")  # each call gives one hint more

# %% [markdown]
# **Predict.** A starts with random numbers, B with zeros. Which share of A's numbers does the first
# step of training change, from 0 (none) to 1 (all)?

# %% predict-2
share_of_A = predict("share of A that the first step changes", None)

# %% first-step
layer = scheme_of("lora", lora)(nn.Linear(32, 24), rank=4)
layer(torch.randn(100, 32)).square().mean().backward()
moved_A, moved_B = ((t.grad != 0).float().mean().item() for t in (layer.A, layer.B))
share_of_A.beside(moved_A)
claim("The share of B that the first step changes is 1", moved_B, moved_B == 1)

# %% [markdown]
# <details><summary>Why?</summary>
# The gradient of A has B as a factor, and B is 0. So the first step changes B alone; from the
# second on both learn. If A were 0 too, nothing would ever learn.
# </details>

# %% [markdown]
# ## 4. Freeze and grow (5 min)
#
# If training overwrites, do not overwrite. When a task ends, its 8 ranks are frozen, and 8 new ones
# are added, with B = 0. Only the new ones are **live**: they train.
#
# **Predict.** Task 1's ranks now keep every bit. What is the accuracy on task 1 after task 2?

# %% predict-3
when_frozen = predict("accuracy on task 1, its ranks frozen", None)

# %% grown alt="Accuracy matrix of a LoRA that grows, three rows and two columns."
grown = learn(stream, scheme_of("lora", lora), rank=8)
figures.accuracies(grown.matrix)
when_frozen.beside(grown.matrix[2, 0])

# %% [markdown]
# Task 1 falls from .97 to about .53, no better than before. An experiment finds the cause: set the
# values of the new ranks to 0, and test again.

# %% silence
with torch.no_grad():
    for _, layer in adapters(grown.model):
        layer.B.zero_()
back = score(grown.model(first.x_test), first.y_test)
claim("Task 1 has its accuracy again", back, abs(back - grown.matrix[1, 0]) < 0.01)

# %% [markdown]
# <details><summary>What does that show?</summary>
# Nothing of task 1 was overwritten. But all ranks are added for every input, so the new ones change
# the output for old inputs too. A frozen rank is safe; what it adds to is not.
# </details>

# %% [markdown]
# ## 5. A choice that is learned (8 min)
#
# Each input should use only the ranks that were trained on inputs like it. A **gate** gives every
# rank a weight g that depends on the input:
#
#     y = x W0ᵀ + (g ⊙ z) B
#
# Here the r ranks of one task share one weight: together they are an **expert**. A **router** is a
# matrix W (E, D) with a row for each of E experts, trained together with them, by the loss alone:
#
#     l = x Wᵀ                       one logit per expert
#     keep the k largest l           all others get weight 0
#     w = softmax of the kept l      they sum to 1
#     g = w, r times each            (..., E · r): first r times w of expert 0, and so on
#
# Return g. Useful: `l.topk(k)`, `torch.zeros_like(l).scatter(-1, where, what)`,
# `w.repeat_interleave(r, -1)`.


# %% exercise 2
def router_gate(x, W, r, k):
    raise NotImplementedError


# %%
with exercise("2"):
    check("router_gate", router_gate)

# %% [markdown]
# Stuck? `hint("router_gate")`. Now three tasks, an expert for each, and k = 2.
#
# **Predict.** After task 3, which share of the gate's weight do inputs of task 1 give to the expert
# that was trained on them?

# %% predict-4
to_own = predict("share of task 1's inputs for their own expert", None)

# %% routed alt="Shares of the router's weight: inputs of three tasks down, ranks of three across."
three = make("permuted-digits", tasks=3, seed=0)
routed = learn(three, scheme_of("router_gate", router_gate), rank=8, top_k=2)
figures.shares(routed.mass[-1])
to_own.beside(routed.mass[-1, 0, 0])

# %% [markdown]
# Each row sums to 1. Inputs of task 1 give their own expert about .44, those of task 3, the last
# one, about .74. The experts themselves did not change a bit.

# %% routed-said alt="Accuracy matrix of the router on three tasks, four rows and three columns."
figures.accuracies(routed.matrix)
print(f"ACC {acc(routed.matrix):.2f}, BWT {bwt(routed.matrix):.2f}")

# %% [markdown]
# Task 1 falls from .97 to about .55, task 2 from .98 to .92: ACC .81, BWT -.24. **Explain** it.
#
# <details><summary>An answer</summary>
# What is lost is the choice. A new row of W is trained on the new task only; which logit it gives
# to older inputs, nobody trains. Where it is large, it takes weight from the expert that they need.
# </details>

# %% [markdown]
# ## 6. MoRA, by hand and in code (11 min)
#
# MoRA ([2506.21035](https://arxiv.org/abs/2506.21035)) has no router. Each rank is an expert of its
# own, and z, which is there anyway, makes the **score** s:
#
#     s = z / ‖z‖                    the norm is over all R ranks               (eq. 5)
#     keep the k largest s                                                      (eq. 6)
#     w = softmax of the kept s / τ  one weight per kept rank; they sum to 1    (eq. 7)
#     g = w, but 0 where s < δ       in evaluation only                         (eq. 8)
#
# τ is the **temperature**: the smaller, the sharper is the softmax. δ is the **threshold**.
#
# By hand: z = (2, -3, 6) has the norm √(4 + 9 + 36) = 7, so s = (2/7, -3/7, 6/7). Let k = 2.
#
# **Predict.** Rank 2 is kept. Which is the other one: 0 or 1?

# %% predict-5
other = predict("the other rank that is kept", None)

# %% kept
z = torch.tensor([2.0, -3.0, 6.0])
kept = (z / z.norm()).topk(2).indices
other.beside(kept[1].item())

# %% [markdown]
# Of the two, 2/7 is larger than -3/7: the sign decides, not the size. The two kept scores are 4/7
# apart. With τ = 4 / (7 ln 3) that is ln 3 after the division, so one weight is three times the
# other.

# %% by-hand alt="Bars for three ranks: s, w and g."
steps = {"s": (2 / 7, -3 / 7, 6 / 7), "w": (0.25, 0, 0.75), "g, δ = .5": (0, 0, 0.75)}
figures.bars(steps, ["rank 0", "rank 1", "rank 2"], "z = (2, -3, 6), by hand")

# %% [markdown]
# s is .29, -.43 and .86; w is .25, 0 and .75. In evaluation δ = .5 removes rank 0, as .29 < .5. The
# weights left, 0, 0 and .75, are not rescaled.
#
# Now for any z (..., R). δ is `None` in training. `F.normalize(z, dim=-1)` is z / ‖z‖, and 0 where
# z is 0.


# %% exercise 3
def mora_gate(z, k, tau, delta):
    raise NotImplementedError


# %%
with exercise("3"):
    check("mora_gate", mora_gate)

# %% [markdown]
# Stuck? `hint("mora_gate")`.

# %% [markdown]
# ## 7. The three tasks once more (5 min)
#
# The same stream, the same ranks, your last function as the gate, with k = 8, τ = .1, δ = .2.
#
# **Predict.** The router had ACC .81. What is the ACC now?

# %% predict-6
again = predict("ACC of MoRA on three tasks", None)

# %% mora alt="Mean accuracy after each of three tasks, a line each for LoRA, router and MoRA."
MyMoRA = scheme_of("mora_gate", mora_gate)
mora = learn(three, MyMoRA, rank=8, top_k=8, tau=0.1, delta=0.2)
dense = learn(three, LoRA, rank=8, grows=False)
figures.curves({"LoRA": dense.matrix, "router": routed.matrix, "MoRA": mora.matrix})
again.beside(acc(mora.matrix))

# %% [markdown]
# After three tasks MoRA has about .97, the router .81, the one LoRA of section 2 about .60. MoRA's
# BWT is about 0. The next picture is the one of section 5 again, for MoRA.

# %% mora-said alt="Shares of MoRA's weight: inputs of three tasks down, ranks of three across."
figures.shares(mora.mass[-1])
own = mora.mass[-1].diagonal().min()
claim("Inputs of each task give their own ranks more than .8", own, own > 0.8)

# %% [markdown]
# Inputs of task 1 give .95 to their own ranks, of the others .89 and .95. **Explain**: why can new
# ranks not take them away?
#
# <details><summary>An answer</summary>
# The choice rests on the keys of the ranks themselves, and these are frozen with them: there is no
# other part that could be lost. A new key takes weight only where its product with an old input is
# large, and here it seldom is.
# </details>

# %% [markdown]
# ## 8. Three questions to that result (8 min)
#
# **Do inputs of two tasks look alike?** Five tasks turn the digits further and further, to 36°,
# 72°, and so on to 180°. **Predict** MoRA's ACC, then run.

# %% predict-7
on_turned = predict("ACC of MoRA on five rotations", None)

# %% rotated alt="Shares of MoRA's weight on rotated digits: inputs of five tasks, ranks of five."
five = make("rotated-digits", tasks=5, seed=0)
turned = learn(five, MyMoRA, rank=8, top_k=8, tau=0.1, delta=0.2)
figures.shares(turned.mass[-1])
on_turned.beside(acc(turned.matrix))
print(f"BWT {bwt(turned.matrix):.2f}; task 1 at the end: {turned.matrix[-1, 0]:.2f}")

# %% [markdown]
# ACC is about .75, BWT -.26. Inputs of task 1 give their own ranks about .28 of the weight, and
# those of task 5, where a digit stands on its head, about .23. A gate reads the task off the input,
# and here inputs of different tasks are similar.
#
# **Does the gate see enough to tell?** A **token** is a piece of a text, here a letter. In the
# first layer of a language model a gate sees a single one. Take the last e of *tree* in English and
# in code, at the same place.

# %% letter
letters = torch.randn(128, 32)  # what stands for each letter, as in an embedding
texts = ("they sat in a tree", "roots = parse.tree")
gate = MyMoRA(nn.Linear(32, 32), rank=8, top_k=4, tau=0.1)
e = [dense_gate(gate, letters[[ord(c) for c in text]])[-1] for text in texts]
apart = (e[0] - e[1]).abs().max().item()
claim("The gate for e differs in the two texts by at most 1e-5", apart, apart <= 1e-5)

# %% [markdown]
# The same letter at the same place is the same input, so the gate is the same, whatever the task.
#
# **What does the simplest method get?** Ridge regression on 1,000 random features of the pixels.
# Its sums G and C run over all tasks, so nothing is forgotten, and no step of training is made.
# **Predict** its ACC on the three tasks of section 7.

# %% predict-8
simple = predict("ACC of ridge regression on three tasks", None)


# %% ridge
def closed_form(stream, M=1000):
    P = torch.randn(M, 65, generator=torch.Generator().manual_seed(0)) / 8
    G, C = torch.eye(M), torch.zeros(M, 10)

    def features(x):
        return F.relu(F.pad(F.layer_norm(x, (64,)), (0, 1), value=1.0) @ P.T)

    for task in stream.tasks:
        h = features(task.x_train)
        G, C = G + h.T @ h, C + h.T @ F.one_hot(task.y_train, 10).float()
    W = torch.linalg.solve(G, C)
    return [score(features(task.x_test) @ W, task.y_test) for task in stream.tasks]


ridge = {stream.name: sum(closed_form(stream)) / len(stream.tasks) for stream in (three, five)}
simple.beside(ridge[three.name])

# %% compared alt="Bars: ACC of MoRA and of two ridge regressions, on two streams."
streams, gates = (three, five), (mora, turned)
small = [run_stream(OwnRidge, backbone, stream, seed=0, epochs=1) for stream in streams]
groups = {
    f"{len(s.tasks)} tasks,\n{s.name}": (acc(gate.matrix), ridge[s.name], acc(own.matrix))
    for s, gate, own in zip(streams, gates, small, strict=True)
}
figures.bars(groups, ["MoRA", "one ridge", "a ridge\nfor each task"], "ACC")
for s, gate, own in zip(streams, gates, small, strict=True):
    print(f"{s.name}: MoRA stores {count(gate.model)['stored']:,}, the small ones {own.stored:,}")

# %% [markdown]
# One ridge regression has about .98 on the three tasks, beside MoRA's .97, and .98 on the five,
# beside .75; but it keeps 510,500 numbers, MoRA 15,360 and 25,600. (A random matrix P is not
# counted: a seed makes it again.) A small one for each task, picked by the nearest mean of the
# inputs, keeps 6,192 and 10,320, and has about .97 and .96. So these digits need no trained gate.
# Its case has to be made where no closed form fits. A simple method to be beaten is a **baseline**:
# run these two before you believe a result.

# %% [markdown]
# ## 9. Exit ticket (5 min)
#
# **Summary.** LoRA adds ranks to a frozen layer. Trained in turn, it overwrites; frozen and grown,
# it still adds new ranks to old inputs. A router keeps its experts and loses the choice. MoRA keeps
# what LoRA and a router lose, reads the task off the input, and so fails where inputs look alike;
# where a closed form fits, that wins.
#
# **1.** z = (4, -8, 1), k = 2, τ = 1 / (3 ln 4), δ = .2. What is g in training, and in evaluation?
#
# <details><summary>Answer</summary>
# ‖z‖ = 9, s = (4/9, -8/9, 1/9). Ranks 0 and 2 are kept, 1/3 apart: ln 4 after the division, so the
# weights are .8 and .2. Training: (.8, 0, .2). Evaluation: 1/9 < .2, so (.8, 0, 0).
# </details>
#
# **2.** A method has BWT 0 and ACC .10 on ten digits. Is it good?
#
# <details><summary>Answer</summary>
# No. It never learned: .10 is chance, and who learns nothing forgets nothing.
# </details>
#
# **3.** Old ranks are bit for bit the same, and an old task fell. Name a cause, and an experiment.
#
# <details><summary>Answer</summary>
# New ranks are added for old inputs (LoRA), or take weight from old ones (router). Set the new
# values to 0, or force the old weights, and test again.
# </details>
#
# **At home.** Change one line of `mora_gate`, such as its norm, predict what becomes of ACC in
# section 7, and run it with `adapter_of` of `minimoe.lesson`. Next: notebook 01, with the ranks of
# LoRA in detail.
