"""Task-level routing against its oracle, numbers worked by hand, and what is its own."""

import math

import pytest
import torch
from layers import X, grown, lora_of
from oracle import blocks, softmax
from torch import nn

from minimoe import LoRA
from minimoe.adapt import context
from minimoe.continual.probe import dense_gate
from minimoe.rules import extract, merged
from minimoe.schemes.task_level import TaskLevel

SETTINGS = {"scale": 0.7, "width": 3}
UNCLAIMED = {"support", "degenerates_to_lora", "merge_is_equal"}  # laws
TASK_AGNOSTIC = {"W1"}


def expected(layer, x, rows, given):
    """An MLP of the task's embedding; shares among the experts that are no newer than it."""
    E, w = len(rows["c"]), []
    for task in given["label"]:
        if task == E:
            w.append([0.0] * E)
            continue
        u = rows["W1"] @ rows["c"][task]
        h = [value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in u]
        l = [sum(a * b for a, b in zip(row, h, strict=True)) for row in rows["router"]]
        w.append([*softmax(l[: task + 1]), *[0.0] * (E - task - 1)])
    return blocks(x, rows["W0"], rows["b"], rows["A"], rows["B"], w, layer.scale)


def STORED(D, O, R, r, E):
    return R * (D + O) + 2 * E * 3 + 9


def ACTIVE(D, O, R, r, E, k):
    return R * (D + O) + E * 3 + 9 + 3


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"^width is 0, allowed: 1 or more$"):
        TaskLevel(nn.Linear(7, 5), rank=2, width=0)


def labelled(layer, label, x=X):
    with context(layer, label=torch.full((len(x),), label)):
        return layer(x)


def weights(layer, label, x=X):
    """(T, E)"""
    with context(layer, label=torch.full((len(x),), label)):
        return dense_gate(layer, x)[:, :: layer.block]


def near(got, want):
    return torch.allclose(got, want, rtol=0, atol=1e-12)


class TestTaskLevel:
    def test_by_hand(self):
        # W1 c = 1, gelu(1) = Φ(1) = .8413: logits (ln 3, 0): shares (3/4, 1/4), of the last of two
        layer = TaskLevel(nn.Linear(1, 1).double(), rank=1, width=1)
        layer.grow()
        layer.eval()
        layer.c.data.fill_(2.0), layer.W1.data.fill_(0.5), layer.router.data.zero_()
        layer.frozen_router.fill_(math.log(3) / ((1 + math.erf(math.sqrt(0.5))) / 2))
        for label, w in enumerate(([1.0, 0.0], [0.75, 0.25], [0.0, 0.0])):
            assert near(
                weights(layer, label, torch.ones(1, 1).double()), torch.tensor([w]).double()
            )

    def test_weights_do_not_look_at_x(self):
        layer = grown("task_level")
        for label in range(3):
            w = weights(layer, label)
            assert torch.equal(w, w[:1].expand(40, 3))
            assert torch.equal(w, weights(layer, label, -3 * X))

    def test_tasks_weigh_otherwise(self):
        layer = grown("task_level", tasks=4)
        layer.frozen_c[:2] = layer.frozen_c[2]
        w = [weights(layer, label)[0] for label in range(4)]
        assert near(w[1][0] / w[1][1], w[2][0] / w[2][1])  # as one embedding has one MLP's logits
        assert not near(w[2][0] / w[2][1], w[3][0] / w[3][1])

    def test_a_task_sees_no_newer_expert(self):
        layer = grown("task_level")
        w = torch.stack([weights(layer, label)[0] for label in range(3)])
        assert torch.equal(w > 0, torch.ones(3, 3).tril() > 0)
        assert near(w.sum(-1), torch.ones(3).double())

    def test_one_task_alone_is_lora(self):
        layer = grown("task_level", tasks=1)
        assert near(labelled(layer, 0), lora_of(layer, layer.A, layer.B)(X))

    def test_a_task_not_learned_yet_has_the_base_layer(self):
        layer = grown("task_level").eval()
        assert torch.equal(labelled(layer, 3), layer.base(X))
        with pytest.raises(ValueError, match="label is 3, allowed: 0 to 2"):
            labelled(layer.train(), 3)

    def test_an_old_task_moves_by_W1_alone(self):
        layer = grown("task_level")
        before = [labelled(layer, label) for label in range(3)]
        layer.grow()
        for name in ("A", "B", "c", "router"):
            nn.init.normal_(getattr(layer, name))
        for label, y in enumerate(before):  # a larger product may round otherwise
            assert torch.allclose(labelled(layer, label), y, rtol=0, atol=1e-13)
        layer.W1.data += 0.1
        assert near(labelled(layer, 0), before[0])  # one expert: no other weight than 1
        assert not near(labelled(layer, 1), before[1])


def of_eighths(layer):
    """Sums and products of eighths are exact, in whatever order."""
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.copy_((8 * tensor).round() / 8)
    return layer, (8 * X).round() / 8


class TestCutOut:
    @pytest.mark.parametrize("path", ["plain", "dense", "gather"])
    def test_of_a_label_with_one_expert_equals_the_whole_bit_for_bit(self, path):
        layer, x = of_eighths(grown("task_level", scale=0.5).eval())
        layer.path = path
        layer.c.data.fill_(1.0), layer.W1.data.fill_(1.0)
        layer.frozen_router[0], layer.frozen_router[1] = 0.0, 500.0
        for label, e in {0: 0, 2: 1}.items():
            assert torch.equal(weights(layer, label), torch.eye(3).double()[[e] * 40])
            cut = extract(layer, e)
            assert type(cut) is LoRA and cut.ranks == 2
            assert torch.equal(cut(x), labelled(layer, label, x))

    def test_of_any_label_is_one_matrix(self):
        layer = grown("task_level").eval()
        for label in range(4):
            plain = merged(layer, weights(layer, label)[0])
            assert type(plain) is nn.Linear
            assert near(plain(X), labelled(layer, label))
