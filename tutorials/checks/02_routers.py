# %% install
assert not missing

# %% layer
with torch.no_grad():
    weight = dense_gate(layer, x).unflatten(-1, (3, 4))  # (N, experts, ranks)
    assert torch.equal(weight[..., 0], weight[..., 3])
    assert ((weight[..., 0] > 0).sum(-1) == 2).all()
    assert torch.allclose(weight[..., 0].sum(-1), torch.ones(len(x)))

# %% gradients
assert largest_gradient(LoRAMoE, 1) == 0 == largest_gradient(LoRAMoE, 2, experts=1)
assert min(largest_gradient(LoRAMoE, 2), largest_gradient(LoRAMoE, 3)) > 1e-3
assert largest_gradient(SoftmaxFirst, 1) > 1e-3

# %% newcomer
assert not layer.B.any() and layer.rows("router").shape == (4, 16)
assert abs(picks.float().mean() - 0.5) < 0.06 and abs(moved[picks].mean() - 0.36) < 0.04
assert most <= 1e-5 and (moved > 1e-5).float().mean() > picks.float().mean() - 0.02

# %% four
a = four.matrix
assert all(0.95 < learned < 0.985 for learned in a[1:].diagonal())
assert all(abs(m - w) < 0.08 for m, w in zip(a[4], (0.48, 0.87, 0.81, 0.97), strict=True))
assert abs(acc(a) - 0.78) < 0.04 and abs(bwt(a) + 0.25) < 0.06

# %% history
assert abs(history[:, 0] - torch.tensor([1, 0.59, 0.44, 0.34])).max() < 0.07
assert abs(history[3, 3] - 0.28) < 0.08

# %% shares
own = torch.tensor(four.mass[-1].diagonal())
assert abs(own - torch.tensor([0.34, 0.63, 0.63, 0.83])).max() < 0.08

# %% unchanged
assert apart == 0
short = learn(replace(stream, tasks=stream.tasks[:1]), LoRAMoE, rank=8, top_k=2, epochs=1).model
for (_, less), (_, all_of_it) in zip(adapters(short), adapters(after_1), strict=True):
    assert torch.equal(less.router, all_of_it.router) and not torch.equal(less.A, all_of_it.A)
assert lengths[0] < lengths[1:].min() / 1.5

# %% fc1
fc1 = logits[:, 0].mean(1)
assert abs(fc1.diagonal() - torch.tensor([0.07, 3.3, 3.1, 3.6])).max() < 0.4
assert (
    abs(fc1[0, 1:].max() + 0.44) < 0.15
    and abs(fc1[0, 1:].min() + 0.75) < 0.15
    and abs(fc1[0, 0]) < 0.15
)
assert abs(largest[0, 0] - 0.74) < 0.12

# %% largest
assert largest[1:, 0].min() > 0.97
assert abs(largest[0] - torch.tensor([0.74, 0.38, 0.14])).max() < 0.2
assert largest[1, 2] < 0.2 and abs(largest[2, 1] - 0.29) < 0.12
fc2, fc3 = logits[2, 1].mean(0), logits[1, 2].mean(0)
assert abs(fc3[0] + 0.1) < 0.15 and abs(fc3[1] + 1.6) < 0.5
assert abs(fc2[2] - 0.35) < 0.4 and abs(fc2[3] - 1.3) < 0.5

# %% repaired
for learned, end, later_hidden, _ in bars.values():
    assert abs(later_hidden - learned) < 0.006 and end <= learned + 0.006
assert abs(bars["task 1"][3] - bars["task 1"][0]) < 0.006
for j, want in ((2, 0.94), (3, 0.93), (4, 0.90)):
    assert abs(bars[f"task {j}"][3] - want) < 0.05
for (_, layer_now), (_, layer_then) in zip(adapters(told), adapters(four.model), strict=True):
    for name in ("A", "B", "router"):
        assert torch.equal(layer_now.rows(name), layer_then.rows(name))

# %% one-layer
assert max(one_layer[0]) < 0.9
assert all(abs(m - w) < 0.1 for m, w in zip(one_layer[0], (0.63, 0.69, 0.82), strict=True))
assert abs(one_layer[1][2] - 0.98) < 0.02 and abs(one_layer[2][1] - 0.97) < 0.03
assert max(one_layer[1][:2]) < 0.94 and max(one_layer[2][0], one_layer[2][2]) < 0.92
in_fc3 = (logits_of(four.model, stream.tasks[1].x_test)[2][:, :2]).softmax(-1).mean(0)
assert abs(in_fc3[0] - 0.76) < 0.08

# %% zeros
assert abs(first_row_alone[0] - 0.40) < 0.08 and first_row_alone[0] < bars["task 1"][2] - 0.4
opposite = accuracies_with(lambda W: -W)
assert all(abs(m - w) < 0.05 for m, w in zip(opposite, (0.1, 0.07, 0.07, 0.06), strict=True))
random_rows = [sum(accuracies_with(lambda W: 0.1 * torch.randn_like(W))) / 4 for _ in range(4)]
assert abs(sum(random_rows) / 4 - 0.3) < 0.1
from itertools import permutations

reordered = []  # other answers to exercise 3: orders that move every row
for order in permutations(range(4)):
    if all(row != place for place, row in enumerate(order)):
        reordered.append(sum(accuracies_with(lambda W, order=order: W[[*order]])) / 4)
assert len(reordered) == 9
assert abs(min(reordered) - 0.10) < 0.03 and abs(max(reordered) - 0.16) < 0.03

# %% pairs
assert abs(pairs.matrix[3, 0] - 0.74) < 0.08 and abs(four.matrix[3, 0] - 0.55) < 0.08
four_kept = learn(three, LoRAMoE, rank=8, top_k=4, experts=2).matrix
assert abs(four_kept[3, 0] - 0.85) < 0.08
assert all(layer.n_experts == 6 and layer.block == 4 for _, layer in adapters(pairs.model))

# %% compared
task_1 = [end[0] for end in ends.values()]
wanted = (0.55, 0.74, 0.20, 0.54, 0.51)
assert all(abs(m - w) < 0.08 for m, w in zip(task_1, wanted, strict=True))
assert abs(balanced.mass[3, 2, 2] - 0.50) < 0.06 and abs(four.mass[3, 2, 2] - 0.74) < 0.06
