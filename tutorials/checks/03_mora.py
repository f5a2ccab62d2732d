# %% install
assert not missing

# %% z
assert z.tolist() == [2, -3, 6] and abs(z.norm().item() - 7) < 1e-5

# %% kept
assert kept.tolist() == [2, 0] and s.abs().topk(2).indices.tolist() == [2, 1]
assert torch.allclose(s, torch.tensor([2.0, -3.0, 6.0]) / 7)

# %% w
assert torch.allclose(w, torch.tensor([0.25, 0, 0.75]), atol=1e-5)
assert torch.allclose(g, torch.tensor([0, 0, 0.75]), atol=1e-5)

# %% layer
hand = MoRA(nn.Linear(3, 3), rank=3, top_k=2, tau=1 / (3 * log(4)), delta=0.2)
hand.A.data.copy_(torch.eye(3))
for training, want in ((True, (0.8, 0, 0.2)), (False, (0.8, 0, 0))):
    got = dense_gate(hand.train(training), torch.tensor([4.0, -8.0, 1.0]))
    assert torch.allclose(got, torch.tensor(want), atol=1e-5)
for training, weights, want in ((True, w, (4.0, 6.0)), (False, g, (2.0, 6.0))):
    assert torch.allclose(dense_gate(layer.train(training), x), weights, atol=1e-5)
    assert torch.allclose(layer(x), torch.tensor(want), atol=1e-4)
    assert torch.allclose(x + (weights * z) @ B, torch.tensor(want), atol=1e-4)
assert torch.equal(layer.keys, A) and torch.equal(layer.rows("B"), B)


# %% slips
def slip(
    x, delta, by=lambda s: s, norm=lambda z: z.norm(), tau=tau, most=lambda g: g, of=lambda s, w: s
):
    s = x @ A.T / norm(x @ A.T)
    kept, w = by(s).topk(2).indices, torch.zeros(3)
    w[kept] = (s[kept] / tau).softmax(-1)
    return x, most(w * (of(s, w) >= delta)), x @ A.T


def summed(x, g, z):
    return x + (g * z) @ B


mine = {
    "Kept by size": summed(*slip(x, 0.6, by=torch.abs)),
    "The norm is over": summed(*slip(x, 0.6, norm=lambda z: z.topk(2).values.norm())),
    "There is no norm": summed(*slip(x, 0.6, norm=lambda z: 1.0)),
    "The softmax is of z": x + ((z[kept] / tau).softmax(-1)[0] * (g > 0) * z) @ B,
    "τ is left": summed(*slip(x, 0.6, tau=1.0)),
    "s is multiplied": summed(*slip(x, 0.6, tau=1 / tau)),
    "The softmax is over all R": x + (((s / tau).softmax(-1) * (g > 0)) * z) @ B,
    "δ is left": summed(*slip(x, -1.0)),
    "Rescaled": summed(*slip(x, 0.6, most=lambda g: g / g.sum())),
    "Scores below δ are 0": x + (F.softmax(torch.tensor([0, -torch.inf, s[2] / tau]), -1) * z) @ B,
    "(g ⊙ z) B has": x + (g * s) @ B,
    "(g ⊙ z) B: z": x + g @ B,
    "x W0ᵀ": (g * z) @ B,
}
for (sentence, told), (start, got) in zip(SLIPS.items(), mine.items(), strict=True):
    assert sentence.startswith(start) and torch.allclose(told, got, atol=1e-3), sentence
on_tau, on_w, on_size = (
    summed(*slip(x, 0.5, of=lambda s, w: s / tau)),
    summed(*slip(x, 0.27, of=lambda s, w: w)),
    summed(*slip(-x, 0.27, of=lambda s, w: s.abs())),
)
for told, got in zip(MORE.values(), (on_tau, on_w, on_size), strict=True):
    assert torch.allclose(told, got, atol=1e-3)
for delta in (0.5, 0.6):
    assert torch.allclose(summed(*slip(x, delta)), torch.tensor([2.0, 6.0]), atol=1e-4)
assert summed(*slip(x, 0.6, of=lambda s, w: s / tau)).allclose(torch.tensor([2.0, 6.0]), atol=1e-4)
delta_first = x + ((s >= 0.5) * z) @ B  # one is left, with weight 1: as if rescaled after δ
assert torch.allclose(delta_first, mine["Rescaled"], atol=1e-4)
W0_other = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
wanted_other = (x @ W0_other.T, x @ W0_other, x)
for told, start in zip(([-1.0, 6.0], *OTHER_W0.values()), wanted_other, strict=True):
    assert torch.allclose(torch.as_tensor(told), start + (g * z) @ B, atol=1e-4)
assert torch.allclose(summed(*slip(x, 0.27)), torch.tensor([4.0, 6.0]), atol=1e-4)
assert torch.allclose(summed(*slip(-x, 0.27)), torch.tensor([9.969, 14.969]), atol=1e-3)

# %% source
source_lines = inspect.getsource(MoRA.gate)
assert all(f"# eq. {number}" in source_lines for number in (5, 6, 7, 8))
assert source_lines.count("else:") == 1
assert source_lines.index("eq. 6") < source_lines.index("eq. 5")

# %% tau
for name, of_rank_2 in {"τ = 0.02": 1, "τ = 0.2": 0.94, "τ = 1": 0.54, "τ = 100": 0.33}.items():
    assert abs(groups[name][2] - of_rank_2) < 0.006, name
assert all(abs(value - 1 / 3) < 0.006 for value in groups["τ = 100"])
for t in (0.02, 1, 100):
    assert dense_gate(three_ranks(top_k=1, tau=t), x).tolist() == [0, 0, 1]

# %% inside
assert apart <= 1e-5 and moved <= 1e-5
unbounded = three_ranks(top_k=3, tau=1e9, delta=-1).eval()
below = three_ranks(top_k=3, tau=1e9, delta=0.2).eval()
assert torch.allclose(unbounded(x), lora(x), atol=1e-5)
assert not torch.allclose(below(x), lora(x), atol=0.1)
assert layer.gate(x).idx.tolist() == [2, 0] and layer.gate(-x).idx.tolist() == [1, 0]

# %% long
assert abs(before - 1 / 8) < 0.05 and abs(after - 0.45) < 0.05
with torch.no_grad():
    long_z = eight(inputs) is not None and inputs @ eight.A.T
    above = long_z[:, 0] > 0
    assert abs(above.float().mean() - 0.5) < 0.05
    assert (long_z.argmax(-1) == 0)[above].float().mean() > 0.8
    assert (long_z.argmin(-1) == 0)[~above].float().mean() > 0.8

# %% many
found = dict(zip(SIZES, zip(*lines.values(), strict=True), strict=True))
for R, largest in ((8, 0.51), (64, 0.29), (512, 0.13)):
    assert abs(found[R][0] - largest) < 0.02
    assert 0.6 < largest / (2 * log(R) / R) ** 0.5 < 1.2
assert max(found[R][1] for R in (8, 16, 32, 64)) < 0.1
assert min(found[R][1] for R in (512, 1024)) > 0.99

# %% moved
for seed in range(3):
    torch.manual_seed(seed)
    layer_drawn = MoRA(nn.Linear(64, 64), **settings)
    nn.init.normal_(layer_drawn.B)
    assert 0.35 < drift_of_growth(layer_drawn, inputs) < 0.55
torch.manual_seed(0)

# %% trained
assert 0.02 < drift_of_growth(after_1.fc1, x1) < 0.035
drifts = [drift_of_growth(after_1.fc1, x1, seed) for seed in range(20)]
assert abs(min(drifts) - 0.016) < 0.004 and abs(max(drifts) - 0.031) < 0.004
assert abs(then - 0.94) < 0.02 and abs(now - 0.94) < 0.02
assert torch.equal(grown.fc1.frozen_A, after_1.fc1.A)
with torch.no_grad():
    new_ranks = dense_gate(grown.fc1, x1)[:, 8:].sum(-1).mean()
    largest_own = F.normalize(x1 @ after_1.fc1.keys.T, dim=-1).max(-1).values
    assert new_ranks < 0.02 and largest_own.mean() > 0.55

# %% take
one_long, least = taken(grown, lambda old: 1000 * old.mean(0), first.x_train)
with torch.no_grad():
    assert abs(score(one_long(first.x_test), first.y_test) - 0.06) < 0.02
    assert abs(score(shipped()(first.x_test), first.y_test) - 0.06) < 0.02
assert all(z_least > 0 and w_least > 0.9 for z_least, w_least in least)
for name, layer_taken in adapters(one_long):
    same = grown.get_submodule(name)
    assert not layer_taken.B.any() and torch.equal(layer_taken.frozen_A, same.frozen_A)
    assert torch.equal(layer_taken.frozen_B, same.frozen_B)
assert abs(grown.fc1.A.norm(dim=-1).mean() - 0.6) < 0.06
for of_mean in (lambda m: m, lambda m: F.normalize(m, dim=-1)):  # length is needed
    _, short = taken(grown, lambda old, of_mean=of_mean: of_mean(old.mean(0)), first.x_train)
    assert all(z_least > 0 and w_least < 0.5 for z_least, w_least in short)

# %% again
assert abs(again.mass[-1, -1, 0] - 0.89) < 0.05 and abs(again.mass[-1, -1, 3] - 0.09) < 0.05
assert abs(again.mass[-1, 0] - again.mass[-1, 3]).max() < 1e-6

# %% closed
assert abs(closed["permuted", OwnRidge] - 0.97) < 0.02
assert abs(closed["rotated", OwnRidge] - 0.96) < 0.02
assert abs(closed["permuted", ClassMean] - 0.30) < 0.03
assert abs(closed["rotated", ClassMean] - 0.39) < 0.03

# %% five
ends = {name: acc(run.matrix) for name, run in runs.items()}
assert abs(ends["LoRA, p"] - 0.46) < 0.05 and abs(ends["LoRA, r"] - 0.45) < 0.05
assert abs(ends["MoRA, p"] - 0.93) < 0.025 and abs(ends["MoRA, r"] - 0.74) < 0.04

# %% turned
turned = runs["MoRA, r"]
assert abs(turned.mass[-1, 0, 0] - 0.36) < 0.06 and abs(turned.mass[-1, 0, 4] - 0.25) < 0.06
assert abs(turned.matrix[1, 0] - 0.94) < 0.02 and abs(turned.matrix[5, 0] - 0.60) < 0.08

# %% alike
found_cosines = {}
for name, stream in streams.items():
    read, net = [], runs["MoRA, p"].model
    hook = net.fc1.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
    for task in stream.tasks:
        net(task.x_test)
    hook.remove()
    each_mean = F.normalize(torch.stack([one.mean(0) for one in read]), dim=-1)
    found_cosines[name] = (each_mean @ each_mean.T).detach()
assert abs(found_cosines["rotated"][0, 1:] - cosines[0, 1:]).max() < 1e-4
assert abs(found_cosines["rotated"][0, 1] - 0.60) < 0.02
assert abs(found_cosines["rotated"][0, 4] - 0.54) < 0.02
assert found_cosines["permuted"].fill_diagonal_(0).max() < 0.24
assert [task.name for task in streams["rotated"].tasks][::4] == ["36°", "180°"]

# %% atlas
from minimoe.adapt import count

expected = {
    "permuted-digits": (0.97, None, 0.95),
    "rotated-digits": (0.96, None, 0.74),
    "split-digits": (0.79, 0.73, 0.38),
}
for name, row in expected.items():
    for got, want in zip(groups[name], row, strict=True):
        assert want is None or abs(got - want) <= 0.0051
    assert all(len(atlas[name][one]["acc"]) == 10 for one in ("own_ridge", "mora", "lora"))
    stored = [atlas[name][one]["stored"] for one in ("own_ridge", "mora")]
    assert stored == [10_320, 25_600]
assert count(runs["MoRA, p"].model)["stored"] == 25_600

# %% above
assert all(pairs) and len(pairs) == 40
worlds = atlas["digit-worlds"]
assert abs(mean(worlds["own_ridge"]["acc"]) - 0.92) <= 0.0051
assert abs(mean(worlds["mora"]["acc"]) - 0.74) <= 0.0051
for name, want in zip((*groups, "digit-worlds"), (0.50, 0.45, 0.21, 0.34), strict=True):
    both = [atlas[name][learner]["acc"] for learner in ("lora", "mora")]
    assert abs(mean(both[0]) - want) <= 0.0051
    assert all(lora < mora for lora, mora in zip(*both, strict=True))

for name, want in {"own_ridge": 0.14, "mora": 0.45, "own_subspace": 1.00}.items():
    values = atlas["subspaces"][name]["acc"]
    assert len(values) == 10 and abs(mean(values) - want) <= 0.0051
subspace_means = [task.x_train.mean(0).norm() for task in make("subspaces", seed=0).tasks]
assert max(subspace_means) < 0.5

after_60 = F.normalize(torch.tensor([2.0, -3.0, 60.0]), dim=0)
assert abs(after_60[2] - after_60[0] - 0.96) < 0.006 and after_60[1] < after_60[0]

# %% drawn
with torch.no_grad():
    upright = F.layer_norm(five.base.x_test, (64,))
    of_upright, of_task = (
        F.normalize(inputs @ after_1.fc1.keys.T, dim=-1).max(-1).values for inputs in (upright, x1)
    )
assert abs(of_upright.max() - 0.85) < 0.05 and abs(of_task.min() - 0.45) < 0.08
assert abs(8**-0.5 - 0.35) < 0.01
