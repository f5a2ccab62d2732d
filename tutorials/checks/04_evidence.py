# %% install
assert not missing

# %% measures
found = [f(a) for f in (acc, bwt, forgetting, fwt, transfer, average)]
assert np.allclose(found, (0.70, -0.15, 0.20, 0.15, 0.20, 5.1 / 9), atol=1e-12)
from minimoe.continual.metrics import avalanche_forgetting, mammoth_forgetting

assert abs(avalanche_forgetting(a) + bwt(a)) < 1e-12 and abs(mammoth_forgetting(a) - 0.2) < 1e-12

# %% patterns
want = {
    "keeps": (0.9, 0, 0),
    "just learned": (0.26, -0.8, 0.8),
    "throughout .1": (0.1, 0, 0),
    "late": (0.5, 0.2, -0.2),
}
assert groups.keys() == want.keys()
assert all(np.allclose(groups[name], want[name], atol=1e-9) for name in want)

# %% means
assert at_once.numel() == 640
assert abs(np.mean([task.float().mean() for task in right]) - 0.906) < 0.01
assert torch.equal(h, torch.cat([task.x_train for task in split.tasks])) and len(y) == len(h)

# %% first-question
from minimoe.schemes.alone import TrainedAlone

for name, said in {
    "lora": (None, None, 0.21, None),
    "mora": (0.95, 0.74, 0.38, 0.45),
    "aoe": (None, None, None, 0.78),
    "input_domain_aware": (0.97, 0.96, None, 0.94),
    "own_ridge": (None, None, None, 0.14),
    "own_subspace": (None, None, None, 1.00),
}.items():
    for s, number in zip(STREAMS, said, strict=True):
        assert number is None or abs(means[s][name] - number) <= 0.0051, (name, s)
contenders = [
    name
    for name, scheme in SCHEMES.items()
    if not ROSTER[name].privileged
    and name in means["permuted-digits"]
    and not issubclass(scheme, TrainedAlone)
]
assert len(contenders) == 33 and set(TRAINED) < set(contenders)
for s, number in zip(STREAMS[:3], (0.97, 0.96, 0.98), strict=True):
    closed = max(("own_ridge", "ridge"), key=lambda name, s=s: means[s][name])
    assert abs(means[s][closed] - number) <= 0.0051
    level = abs(means[s]["input_domain_aware"] - means[s][closed]) < 0.005
    assert level == (s != "split-digits")
    for name in contenders:
        both = zip(atlas[s][closed]["acc"], atlas[s][name]["acc"], strict=False)
        assert name == "input_domain_aware" or all(own > other for own, other in both), (s, name)
there = [name for name in contenders if name in means["subspaces"]]
assert sorted(there, key=lambda name: -means["subspaces"][name])[:3] == [
    "input_domain_aware",
    "aoe",
    "mora",
]
lost = [means["subspaces"][name] for name in ("alone", "own_ridge", "lora_moe")]
assert max(lost) < 0.2 < means["subspaces"]["mora"] < 0.5 < means["subspaces"]["own_subspace"]
assert 2 * means["split-digits"]["lora"] < 0.45 < means["split-digits"]["class_mean"]
assert {len(row["acc"]) for s in STREAMS for row in atlas[s].values()} == {5, 10}
subspaces = make("subspaces", seed=0)
for task in subspaces.tasks:
    assert task.x_train.mean(0).norm() < 0.1 * task.x_train.norm(dim=1).mean()

# %% memory
assert atlas["rotated-digits"]["own_ridge"]["stored"] == 10_320
assert atlas["rotated-digits"]["mora"]["stored"] == 25_600
assert abs(means["rotated-digits"]["replay_80"] - 0.87) <= 0.0051

# %% roster
assert set(kinds) == {"scheme", "atlas", "baseline", "privileged"} and kinds["scheme"] == 3
assert ROSTER["joint"].privileged and ROSTER["oracle"].privileged and "mora" in SCHEMES

# %% compared
ran = {name: row.acc.mean for name, row in result.schemes.items()}
back = {name: row.bwt.mean for name, row in result.schemes.items()}
for name, number in {"own_ridge": 0.97, "oracle": 0.96, "joint": 0.96, "mora": 0.95}.items():
    assert abs(ran[name] - number) < 0.02, name
assert abs(ran["lora_moe"] - 0.73) < 0.06 and abs(ran["lora"] - 0.60) < 0.06
assert abs(back["lora"] + 0.47) < 0.08 and abs(back["mora"]) < 0.02
assert abs(back["class_mean"] + 0.16) < 0.03 and result.schemes["class_mean"].trainable == 0
assert ran["lora"] < ran["lora_moe"] < ran["mora"] and abs(back["oracle"]) < 0.01

# %% oracle
assert abs(told[0] - 0.96) < 0.02 and abs(told[1] - 0.06) < 0.06

# %% references
assert 0 < means["permuted-digits"]["joint"] - means["permuted-digits"]["mora"] < 0.02
assert means["permuted-digits"]["own_ridge"] > means["permuted-digits"]["joint"]
gap = means["rotated-digits"]["joint"] - means["rotated-digits"]["mora"]
assert gap > 0.15 and abs(gap - 0.22) <= 0.0051
assert abs(means["subspaces"]["joint"] - 0.48) <= 0.0051 and means["subspaces"]["oracle"] > 0.99
assert len(make("subspaces", tasks=8).tasks) == 8

# %% seeds
assert all(len(values) == 10 for values in row.values())
assert abs(np.mean(row["lora"]) - 0.21) <= 0.0051 and abs(np.mean(row["lora_moe"]) - 0.24) <= 0.0051
assert abs(min(row["lora_moe"]) - 0.17) <= 0.0051 and abs(max(row["lora_moe"]) - 0.34) <= 0.0051

# %% swapped
assert free.shape == (55, 5) and np.allclose(turned, (0.35, 0.51, 0.40), rtol=0, atol=0.0051)
by_seed = [np.mean((d > 0) != (five > 0), 0, where=abs(five) < 0.03)]
assert np.min(by_seed) > 0.25
assert np.allclose(four[:, 0], d[:, 1:].mean(1), atol=1e-12)

# %% paired
effects = [c.effect for c in held.values()]
assert np.allclose(effects, (0.157, 0.015, 0.031, 0.004), atol=0.00051)
verdicts = [c.verdict for c in held.values()]
assert verdicts == ["supported", "supported", "inconclusive", "inconclusive"]
assert (held["lora_moe - lora"].above() < 0).sum() == 4
ranges = [atlas["permuted-digits"][name]["acc"] for name in ("mora", "ridge")]
assert min(ranges[0]) < max(ranges[1])
assert Comparison("one seed", [0.99], [0.01]).verdict == "inconclusive"
from scipy.special import stdtrit

assert abs(stdtrit(4, 0.975) - 2.776) < 1e-3 and abs(stdtrit(9, 0.975) - 2.262) < 1e-3

# %% matters
assert Comparison("", x, y, matters=0.02).verdict == "refuted"

# %% picked
assert abs(best["reported"][4] - 0.725) < 0.001 and abs(best["reported"][5] - 0.73) < 0.001
assert abs(best["on new seeds"][4] - 0.70) < 0.002

# %% tie
assert jump > 1

# %% exercise 5
of_split = {name: np.mean(r["acc"]) for name, r in atlas["split-digits"].items()}
no_step = {n for n in of_split if ROSTER[n].scheme is None and n not in ("head_only", "joint")}
above = "ridge own_subspace lda ridge_features lda_features own_ridge class_mean"
assert {n for n in no_step if of_split[n] > 0.70} == set(above.split())
assert abs(of_split["class_mean"] - 0.73) <= 0.0051 and abs(of_split["ridge"] - 0.98) <= 0.0051
d = np.array([0.04, 0.05, 0.03, 0.04, 0.04])
assert abs(d.mean() - 0.04) < 1e-9 and abs(d.std(ddof=1) - 0.007) < 0.001
assert abs(2.776 * d.std(ddof=1) / 5**0.5 - 0.009) < 0.0005
