# %% install
assert not missing

# %% tuned
with torch.no_grad():
    assert abs(score(tuned(first.x_test), first.y_test) - 0.98) < 0.02
assert not any(w.requires_grad for w in backbone.parameters())

# %% directions
change = (tuned.fc1.weight - backbone.fc1.weight).detach()
S = torch.linalg.svdvals(change)
missed = (change - first_directions(change, 8)).square().sum()
assert torch.allclose(missed, S[8:].square().sum(), rtol=1e-3)  # Eckart and Young: none misses less
assert torch.linalg.matrix_rank(first_directions(change, 8), rtol=1e-4) == 8

# %% ranks
expected = dict(zip(RANKS, (0.06, 0.24, 0.23, 0.68, 0.96, 0.97, 0.98, 0.98), strict=True))
assert all(abs(a - expected[r]) < 0.08 for r, a in zip(RANKS, accuracies, strict=True))

# %% layer
assert layer.A.any() and not layer.B.any() and not layer.base.weight.requires_grad
layer(x).square().mean().backward()
assert layer.B.grad.any() and not layer.A.grad.any() and layer.base.weight.grad is None

# %% adapted
assert count(model)["trainable"] == 5120 == 8 * ((64 + 128) + (128 + 128) + (128 + 64))
with torch.no_grad():
    assert torch.equal(model(first.x_test), backbone(first.x_test))
assert not model.classes.requires_grad

# %% one
assert one.matrix[1, 0] > 0.95 and one.matrix[2, 1] > 0.95 and abs(one.matrix[2, 0] - 0.56) < 0.06
assert abs(bwt(one.matrix) + 0.42) < 0.06

# %% path
assert abs(path["task 1"][0] - one.matrix[1, 0]) < 0.01
assert abs(path["task 1"][-1] - one.matrix[2, 0]) < 0.03
for got, want in zip(path["task 1"][:3], (0.97, 0.82, 0.71), strict=True):
    assert abs(got - want) < 0.06
assert abs(path["task 2"][2] - 0.87) < 0.06

# %% drift
assert drift > 0.3 and head == 0

# %% grow
assert count(bigger)["trainable"] == count(after_1)["trainable"]
assert count(bigger)["stored"] == 2 * count(after_1)["stored"]
with torch.no_grad():
    assert torch.allclose(bigger(first.x_test), after_1(first.x_test), atol=1e-5)

# %% grown
assert abs(grown.matrix[2, 0] - 0.53) < 0.06 and grown.matrix[2, 1] > 0.95
for (_, then), (_, now) in zip(adapters(after_1), adapters(grown.model), strict=True):
    assert torch.equal(now.frozen_A, then.A) and torch.equal(now.frozen_B, then.B)

# %% moved
assert off < 0.001 and moved.norm() > 0.3 * then(x1).norm() / 10

# %% silenced
assert abs(quiet[0] - grown.matrix[1, 0]) < 0.01 and quiet[1] < 0.12
assert torch.linalg.matrix_rank(F.layer_norm(first.x_train, (64,)), rtol=1e-3) > 50
