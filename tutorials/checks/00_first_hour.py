# %% install
assert not missing

# %% before
assert accuracy < 0.15
assert score(backbone(stream.base.x_test), stream.base.y_test) > 0.95

# %% one
assert sum(a.A.numel() + a.B.numel() for _, a in adapters(one.model)) == 5120
assert sum(a.base.weight.numel() for _, a in adapters(one.model)) == 32768
assert all(abs(a - b) < 0.04 for a, b in zip(one.matrix[1:].diagonal(), (0.97, 0.97), strict=True))
assert abs(one.matrix[2, 0] - 0.56) < 0.06

# %% one-said
assert drop >= 0.2

# %% first-step
assert moved_A == 0 and moved_B == 1

# %% grown
assert abs(grown.matrix[2, 0] - 0.53) < 0.06
assert all(len(layer.frozen_A) == 8 == len(layer.A) for _, layer in adapters(grown.model))

# %% silence
assert abs(back - grown.matrix[1, 0]) < 0.01

# %% routed
assert abs(routed.mass[-1, 0, 0] - 0.44) < 0.08
assert abs(routed.mass[-1, 2, 2] - 0.74) < 0.08
assert (abs(routed.mass[-1].sum(1) - 1) < 1e-4).all()

# %% routed-said
assert abs(routed.matrix[3, 0] - 0.55) < 0.08 and abs(routed.matrix[3, 1] - 0.92) < 0.05
assert abs(acc(routed.matrix) - 0.81) < 0.04 and abs(bwt(routed.matrix) + 0.24) < 0.06

# %% kept
assert kept.tolist() == [2, 0]

# %% by-hand
from math import log

from minimoe import MoRA

hand = MoRA(nn.Linear(3, 3), rank=3, top_k=2, tau=4 / (7 * log(3)), delta=0.5)
hand.A.data.copy_(torch.eye(3))
assert torch.allclose(dense_gate(hand, z), torch.tensor(steps["w"]), atol=1e-6)
assert torch.allclose(dense_gate(hand.eval(), z), torch.tensor(steps["g, δ = .5"]), atol=1e-6)
assert torch.allclose(z / z.norm(), torch.tensor(steps["s"]))

# %% mora
assert abs(acc(mora.matrix) - 0.97) < 0.02 and abs(bwt(mora.matrix)) < 0.02
assert abs(acc(dense.matrix) - 0.60) < 0.06

# %% mora-said
assert own > 0.8
assert all(
    abs(a - b) < 0.05 for a, b in zip(mora.mass[-1].diagonal(), (0.95, 0.89, 0.95), strict=True)
)

# %% rotated
assert abs(acc(turned.matrix) - 0.75) < 0.05 and abs(bwt(turned.matrix) + 0.26) < 0.06
assert abs(turned.mass[-1, 0, 0] - 0.28) < 0.06 and abs(turned.mass[-1, 0, 4] - 0.23) < 0.06

# %% letter
assert apart <= 1e-5 and e[0].max() > 0

# %% compared
from minimoe.continual.closed import Ridge

assert [count(gate.model)["stored"] for gate in gates] == [15_360, 25_600]
assert [own.stored for own in small] == [6192, 10_320]
assert 1000 * 1001 / 2 + 10_000 == 510_500
assert abs(ridge[three.name] - 0.98) < 0.015 and abs(ridge[five.name] - 0.98) < 0.015
assert abs(acc(small[0].matrix) - 0.97) < 0.015 and abs(acc(small[1].matrix) - 0.96) < 0.015
ours = run_stream(lambda model, s: Ridge(model, s, M=1000), shipped(), three, seed=0, epochs=1)
assert abs(acc(ours.matrix) - ridge[three.name]) < 0.01

z = torch.tensor([4.0, -8.0, 1.0])
hand = MoRA(nn.Linear(3, 3), rank=3, top_k=2, tau=1 / (3 * log(4)), delta=0.2)
hand.A.data.copy_(torch.eye(3))
assert torch.allclose(dense_gate(hand, z), torch.tensor([0.8, 0, 0.2]), atol=1e-6)
assert torch.allclose(dense_gate(hand.eval(), z), torch.tensor([0.8, 0, 0]), atol=1e-6)
