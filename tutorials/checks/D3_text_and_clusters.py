# %% install
assert not missing

# %% one-map
assert len(five.tasks) == 5 and five.tasks[0].x_train.shape[1] == 128
assert five.tasks[0].y_train.shape[1] == 64
assert abs(one_map(five)) < 0.05 and abs(own_maps(five) - 0.99) < 0.005

# %% gated-answers
assert abs(own_maps(five, to_mean) - 0.99) < 0.005
assert (
    abs(explained_with(lambda x, m: F.one_hot(torch.cdist(x, m).argmin(1), 5).float()) - 0.99)
    < 0.005
)

# %% clusters
expected = (-0.61, -0.84, 0.04, 0.68, 0.86, 0.94, 0.985, 0.99, 0.99)
assert all(abs(mean(v) - e) < 0.006 for v, e in zip(by_seed.values(), expected, strict=True))
assert {len(v) for v in by_seed.values()} == {10}

# %% two-gates
assert named(to_mean, apart) > 0.99

# %% subspaces
expected = ((0.04, 0.47), (0.985, 0.14), (0.09, 1.0), (0.68, 0.04), (0.86, 0.45), (0.99, 1.0))
assert np.allclose(list(groups.values()), expected, atol=0.006)
subspaces = make("subspaces", tasks=8, seed=0)
assert subspaces.tasks[0].x_train.shape[1] == 64
assert all(torch.linalg.matrix_rank(t.x_train, rtol=1e-4) == 16 for t in subspaces.tasks)
assert abs(own_maps(subspaces, to_mean)) < 0.2
assert own_maps(subspaces, partial(in_subspace, m=16)) > 0.99

# %% texts
assert [task.name for task in (stream.base, *stream.tasks)] == ["English", "Python", "C++"]
assert stream.base.x_test.shape[1] == 64 and len(ALPHABET) == 96

# %% nothing
assert abs(log2(len(ALPHABET)) - 6.585) < 1e-3

# %% counts
assert np.allclose(before, (4.0, 5.1, 3.3), atol=0.25) and counted[2] < before[2] - 0.3
assert np.allclose(counted, (4.0, 6.2, 2.7), atol=0.25)

# %% lives
ends = {"counts": (3.05, 3.0, 2.9), "told": (3.5, 3.5, 4.2), "MoRA": (3.4, 3.8, 4.3)}
for name, bars in ends.items():
    b = bits[name]
    assert np.allclose((b[1, 0], b[2, 0], b[2, 1]), bars, atol=0.25), name
old, new = lives["MoRA"][0].model, lives["LoRA-MoE"][0].model
assert all(len(layer.frozen_A) == 8 == len(layer.A) for m in (old, new) for _, layer in adapters(m))
assert len(list(adapters(old))) == 4
assert np.allclose(bits["MoRA"][0], before[:2], atol=1e-4)  # zero at birth

# %% lives-said
assert ahead >= 0.2 and least >= 0.2
assert all(abs(lost[name] - 0.35) < 0.12 for name in ("LoRA", "LoRA-MoE", "MoRA"))
assert abs(lost["told"]) < 1e-3 and lost["counts"] <= 0

# %% shares
other = np.array(lives["LoRA-MoE"][1].records["mass"])[-1]
assert np.allclose(mass[:, 0], (0.45, 0.47), atol=0.1)
assert np.allclose(other[:, 0], (0.50, 0.47), atol=0.1)
assert abs(mass[0, 0] - mass[1, 0]) < 0.08 and abs(other[0, 0] - other[1, 0]) < 0.08

# %% letter
assert len(english) == len(more_english) == len(python) == 128
assert differ[LAYERS[0]] < 1e-5 and abs(differ[LAYERS[1]] - 0.05) < 0.15
assert abs(differ[LAYERS[-1]] - 0.45) < 0.2 and abs(alike - 0.3) < 0.2  # alike: of the last layer
pairs = on_e(LAYERS[-1], english, python).abs().sum(1) / 2
assert len(pairs) > 20 and pairs.min() < 0.1 and pairs.max() > 0.8
of_e = gates(LAYERS[1], english)[english == e]
assert of_e.mean(0).max() > 0.8  # one rank has nearly all
assert (LAYERS[0], LAYERS[-1]) == ("blocks.0.q", "blocks.1.fc1")

# %% groups
assert all(abs(k - 0.5) < 0.12 for k in by_kind) and all(0.05 < t < 0.25 for t in by_text)
assert max(left) < 0.08 and left[0] < 0.03
mixed = sources[torch.randperm(len(sources), generator=torch.Generator().manual_seed(0))]
assert far(averaged(g - g.mean(0), mixed)) < 0.025
capitals = [(kinds[sources == t] == list(KINDS).index("capital")).float().mean() for t in range(3)]
assert capitals[2] > capitals[0]

# %% ranks
names = list(KINDS)
for kind, most_of in {"space": 1.0, "underscore": 0.95, "line break": 0.60, "vowel": 0.40}.items():
    assert abs(shares[names.index(kind)].max() - most_of) < 0.2, kind

# %% turned
assert all(abs(points[0][0]) < 1e-6 for points in dials.values())  # the decoder again
assert np.ptp([points[0][1] for points in dials.values()]) < 1e-6
assert all(np.diff([p[0] for p in points]).min() > -1e-3 for points in dials.values())
assert abs(before[2] + dials["MoRA, scale"][-1][0] - 3.7) < 0.25

# %% dials
as_trained, with_two = turned("MoRA"), turned("MoRA", top_k=2)
assert np.allclose(as_trained, with_two, atol=0.01)
first_half, cost_then = np.array(dials["MoRA, δ"]).T
assert np.interp(as_trained[0] / 2, first_half, cost_then) > as_trained[1] + 0.2
half = turned("MoRA", scale=2.0)
assert half[0] < as_trained[0] / 2 and half[1] < as_trained[1] + 0.2
assert np.allclose([c[2] for c in costs.values()], (4.27, 4.15, 4.02), atol=0.2)
assert costs["MoRA, δ"][2] > costs["MoRA, scale"][2] + 0.03
