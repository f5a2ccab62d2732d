# %% install
assert not missing

# %% template
assert "def gate" in template and "Claims(" in template

# %% birth
assert laws.hold(laws.zero_at_birth, MyGate).verdict == "held"

# %% first-try
assert torch.allclose(shares, torch.tensor([9 / 13, 4 / 13]))

# %% tried
assert [row.verdict for row in rows] == ["held", "held", "held", "broken", "broken"]
assert torch.finfo(torch.float16).max == 65504
big = torch.tensor([255.0, 256.0], dtype=torch.float16).square()
assert big.isfinite().tolist() == [True, False]
assert "float16: dx is not finite" in rows[4].evidence
layer, x = rows[4].case.layer(torch.float16), 30 * rows[4].case.x((64,))  # as the law does
x = x.half().requires_grad_()
z, y = layer.project(x, "A"), layer(x)
y.float().sum().backward()
small = z.detach()[~x.grad.isfinite()].abs().float()
assert y.isfinite().all() and len(small) and small.max() < 1 / 256
assert any(abs(v - 0.0004) < 0.00005 for v in small.tolist())
for size, finite in ((1 / 200, True), (1 / 300, False)):  # the gradient's end is 1 / 256
    z = torch.tensor([size], dtype=torch.float16, requires_grad=True)
    (z**2 / (z**2).sum()).backward()
    assert z.grad.isfinite().item() == finite

# %% broken
assert [row.verdict for row in rows] == ["held", "broken", "held", "held", "held"]
assert "sum to 1 -0.332" in rows[1].evidence

# %% case
assert layer.ranks > 1 and not torch.allclose(layer.gate(x).weight.sum(-1), torch.ones(1).double())
try:
    laws.simplex(row.case)
except laws.Broken as again:
    assert "sum to 1 -0.332" in str(again)
else:
    raise AssertionError("the law held")

# %% unseen
from minimoe.laws.case import cases
from minimoe.laws.check import claimed, drawn

assert all(row.verdict == "held" for row in rows)
claims = claimed(BySize, {})
assert claims == claimed(MoRA, {})
for law, wanted in laws.LAWS.items():  # a few cases each; `minimoe check` tries all
    if wanted(claims) and law not in (laws.compiles, laws.round_trips):
        row = drawn(law.__name__, law, cases(BySize, {}, claims), 3)
        assert row.verdict == "held", row

# %% same
seen = {scheme: laws.same(scheme, MoRA) for scheme in (SoftmaxFirst, BySize)}
steps = [next(r.law for r in each if r.verdict == "broken") for each in seen.values()]
assert steps == ["weights", "chosen"]
assert row.evidence.startswith("as if the choice is by size, not by sign")

# %% batch-mean
assert laws.hold(laws.granularity, BatchMean).verdict == "broken"

# %% alone
expected = (0.95, 0.8, 0.75, 0.58, 0.42, 0.28, 0)
assert all(abs(c - e) < 0.08 for c, e in zip(changed, expected, strict=True))

# %% all-laws
assert not [str(row) for row in rows if row.verdict == "broken"]
assert [row.law for row in rows if row.verdict == "not claimed"] == [
    "degenerates_to_lora",
    "merge_is_equal",
]

# %% command
expected = {"lora": 0.59, "mora": 0.92, "ridge": 0.95, "MyGate": 0.92}
assert all(abs(result[name].acc.mean - acc) < 0.03 for name, acc in expected.items())
assert abs(result["MyGate"].bwt.mean + 0.03) < 0.03 and result["mora"].bwt.mean > -0.03
assert result["MyGate"].bwt.mean < result["mora"].bwt.mean
assert result["ridge"].acc.mean > max(result[name].acc.mean for name in ("mora", "MyGate")) + 0.01
stored = [result[name].stored for name in ("ridge", "mora", "MyGate")]
assert stored == [48150, 15360, 15360] and result["ridge"].trainable == 0

# %% compared
assert below > 0.01 and apart < 0.03

# %% overstated
wanted = (laws.zero_at_birth, laws.support, laws.simplex, laws.any_shape, laws.granularity)
verdicts = {law.__name__: laws.hold(law, Overstated).verdict for law in wanted}
assert {name for name, verdict in verdicts.items() if verdict == "broken"} == {
    "simplex",
    "any_shape",
}

# %% ready
assert "b" in dict(ReadyGate(nn.Linear(4, 4), rank=2).named_parameters())
