# %% install
assert not missing

# %% by-hand
p_now = torch.tensor([0.4, 0.2, 0.4, 0.0])
nan = float("nan")  # nothing to say there
drift, undecided_now = 1 / 2, ((1 / p_now.square().sum() - 1) / 2).item()
records = {  # [i, j]: i tasks learned, on the inputs of task j; as a Recorder writes it
    "drift": [[nan, nan], [0, nan], [drift, 0]],
    "learned": [[nan, nan], [0.4, nan], [0.4, 0.4]],
    "said": [[[nan, nan]] * 2, [[1, nan], [nan, nan]], [[0.7, 0.3], [0, 1]]],
    "undecided": [[nan, nan], [1, nan], [undecided_now, 0]],
    "turnover": [[nan, nan], [0, nan], [0.3, 0]],
    "alike": [nan, nan, probe.alike(A, B, old=1).item()],
    "chance": [nan, nan, 0.3],
}
five = (0.5, 0.3, 0.5, 0.3, undecided_now / 2, 0.3)  # of PROBLEMS, in their order
for (name, measure), want in zip(probe.PROBLEMS.items(), five, strict=True):
    assert abs(measure(records) - want) < 1e-6, name

# %% of-three
assert abs((1 / 0.36 - 1) / 2 - 0.89) < 0.002

# %% runs
for name, want in {"LoRA": -0.61, "LoRA, grown": -0.42, "LoRA-MoE": -0.33, "MoRA": 0}.items():
    assert abs(bwt(runs[name].matrix) - want) < 0.08, name
by_bwt = sorted(runs, key=lambda name: bwt(runs[name].matrix))
assert (
    by_bwt == sorted(runs, key=lambda name: -probe.interference(runs[name].records)) == [*SCHEMES]
)
assert abs(probe.interference(runs["LoRA"].records) - 1.42) < 0.12
assert probe.instability(runs["LoRA"].records) == probe.ambiguity(runs["LoRA"].records) == 0
from minimoe.continual.learn import LEARNING_RATE
from minimoe.roster import entry_on

told_there = {"lora": ("LoRA", -0.47), "lora_moe": ("LoRA-MoE", -0.27)}  # in notebook 04
for name, (say, there) in told_there.items():
    assert entry_on(name, "permuted-digits").lr == 1e-3 and LEARNING_RATE == 3e-3
    scheme, settings_ = SCHEMES[say]
    as_there = run_stream(
        lambda m, s, k=scheme, w=settings_: AdapterLearner(m, k, rank=8, **w),
        shipped(),
        permuted,
        seed=0,
        epochs=8,
        how={"lr": 1e-3},
    )
    assert abs(bwt(as_there.matrix) - there) < 0.08, (name, bwt(as_there.matrix))
nothing = probe.intrusion(runs["LoRA"].records)
assert nothing != nothing  # nan

# %% five
said = {
    "interference": (0.99, 0.73, 0.15),
    "intrusion": (0.41, 0.35, 0.03),
    "redundancy": (0.03, 0.03, 0.05),
    "ambiguity": (1, 0.54, 0.17),
    "instability": (0.41, 0.35, 0.06),
}
for name, want in said.items():
    for got, number in zip(heights[name], want, strict=True):
        assert abs(got - number) < (0.02 if name == "redundancy" else 0.08), name
assert abs(heights["ambiguity"][0] - 1) < 1e-6
assert max(heights["redundancy"]) == heights["redundancy"][2]
assert abs(probe.redundancy_chance(runs["MoRA"].records) - 0.02) < 0.005
for run in list(runs.values())[1:]:
    assert probe.intrusion(run.records) <= probe.instability(run.records) + 1e-6

# %% looks
assert recorder.records["drift"][1, 0] == 0
assert 0 < drifts[0] < 0.08 and drifts[0] < drifts[1] < 0.3
assert torch.equal(model.fc1.frozen_A, model.fc1.keys[:8])

# %% reach
for got, want in zip(reach, (0.55, 0.74, 0.87, 0.95, 1.0), strict=True):
    assert abs(got - want) < 0.01
assert abs(known["zero_shot"].mean - 0.26) < 0.01
assert known["lora"].limit and not known["mora"].limit

# %% learned
for n, reachable_, acc_ in (
    ("lora", 0.75, -0.16),
    ("lora_grown", 1.00, 0.92),
    ("lora_moe", 0.98, 0.88),
    ("mora", 0.98, 0.93),
):
    assert abs(stored[n]["reachable"] - reachable_) < 0.0051
    assert abs(stored[n]["acc"] - acc_) < 0.0051
parts = {
    "lora": (0.25, 1.16, -0.25),
    "lora_grown": (0, 0.08, 0.01),
    "lora_moe": (0.02, 0.10, 0),
    "mora": (0.02, 0, 0.06),
}
for n, want in parts.items():
    lost = -stored[n]["bwt"] * 4 / 5
    got = (1 - stored[n]["reachable"], lost, stored[n]["reachable"] - stored[n]["acc"] - lost)
    assert abs(sum(got) - (1 - stored[n]["acc"])) < 1e-9
    assert all(abs(g - w) < 0.0051 for g, w in zip(got, want, strict=True)), n
assert abs(stored["lora"]["acc"] - stored["lora"]["bwt"] * 4 / 5 - 1) < 0.01  # each was learned

# %% who
assert exact == [16, 4]
alone = MoRA(nn.Linear(64, 64), rank=16, top_k=1, tau=0.1)  # k = 1: its weight is 1 whatever z is
nn.init.normal_(alone.B)
alone(torch.randn(64)).square().sum().backward()
assert alone.A.grad.any(-1).sum() == 1

# %% detached
assert detached == [4, 4]

# %% rotated
for run, want in zip(moras, ((0.74, -0.25), (0.82, -0.16)), strict=True):
    assert abs(acc(run.matrix) - want[0]) < 0.05 and abs(bwt(run.matrix) - want[1]) < 0.06
assert bwt(moras[1].matrix) > bwt(moras[0].matrix) + 0.02

# %% ten-seeds
from pathlib import Path

from minimoe.tools.results import StudyResult

means = {name: sum(row) / len(row) for name, row in rows.items()}
for got, want in zip(means.values(), (0.74, 0.84, 0.45, 0.42), strict=True):
    assert abs(got - want) < 0.0051
assert {len(row) for row in rows.values()} == {10}
assert all(0.3 < value < 1 for row in rows.values() for value in row)
if Path("findings/why.json").exists():  # where it is built
    why = StudyResult.read("findings/why.json")
    (harms,) = [c for c in why.claims if c.claim.startswith("The gradient through the gate helps")]
    assert harms.number == 4 and len(harms.comparisons) == 4
    assert all(one.high < 0 for one in harms.comparisons)

# %% needs
assert layer.needs() == {"cluster": range(6)}

# %% rows
assert live == ["B", "router", "A"] and SMoRA.buffer_rows == ("expert_bias",)
assert [p is balanced.expert_bias for p in parameters(balanced)] == [False] * 3
assert balanced.counts is None and set(balanced.expert_bias.tolist()) <= {
    v.item() for v in torch.tensor([0.01, -0.01, 0.0])
}

# %% losses
assert moved < 1e-6 and losses[0] > 0 and ortho.penalty() < 1e-6

# %% broken
assert bwt(broken.matrix) == 0 and abs(acc(broken.matrix) - 0.36) < 0.04
assert probe.interference(broken.records) == probe.instability(broken.records) == 0
guessed = chosen_by(lambda x, means: torch.cdist(x, means).argmin(-1))
assert abs(acc(guessed.matrix) - 0.95) < 0.02 and abs(bwt(guessed.matrix)) < 0.01
for name, want in {"mora": 0.74, "alone": 0.95, "own_ridge": 0.96}.items():
    ten = atlas["rotated-digits"][name]["acc"]
    assert len(ten) == 10 and abs(sum(ten) / 10 - want) < 0.0051, name
assert sum(task.x_test.shape[1] for task in rotated.tasks) == 320
