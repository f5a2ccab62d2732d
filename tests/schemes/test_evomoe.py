"""EvoMoE's gate against its oracle, numbers worked by hand, and what is its own."""

import math

import pytest
import torch
from layers import X, grown
from oracle import blocks, softmax
from torch import nn

from minimoe.schemes.evomoe import EvoMoE

SETTINGS = {"scale": 0.7, "steps": 10, "threshold": 0.2}
UNCLAIMED = {"support", "simplex", "degenerates_to_lora", "merge_is_equal"}  # laws


def expected(layer, x, rows, given):
    """Nie et al., 2112.14397: shares at a temperature, 0 where they are small. Without noise."""
    done = min(rows["steps_done"][-1] / layer.steps, 1.0)
    tau, W, w = layer.start + done * (layer.end - layer.start), rows["router"], []
    for u in x:
        p = softmax([W[e] @ u / tau for e in range(len(W))])
        w.append([share if share > layer.threshold else 0.0 for share in p])
    return blocks(x, rows["W0"], rows["b"], rows["A"], rows["B"], w, layer.scale)


def STORED(D, O, R, r, E):
    return R * (D + O) + E * D + E


def ACTIVE(D, O, R, r, E, k):
    return R * (D + O) + E * D


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0.0}, "start is 0.0, allowed: above 0"),
        ({"end": 0.0}, "end is 0.0, allowed: above 0"),
        ({"steps": 0}, "steps is 0, allowed: 1 or more"),
        ({"threshold": 1.0}, "threshold is 1.0, allowed: 0 to below 1"),
        ({"noise": -1.0}, "noise is -1.0, allowed: 0 or more"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        EvoMoE(nn.Linear(7, 5), **{"rank": 2} | settings)


class TestEvoMoE:
    def test_by_hand(self):
        # tau from 2 to 1 in 2 steps: 2, 1.5, 1. Logits (ln 9, 0) at tau 2: (3/4, 1/4); at tau 1
        # (.9, .1), of which .1 is not above .2
        layer = EvoMoE(nn.Linear(1, 1).double(), 1, end=1.0, steps=2, threshold=0.2, noise=0.0)
        layer.grow()
        layer.frozen_router.fill_(math.log(9))
        layer.router.data.zero_()
        x, seen = torch.ones(1, dtype=torch.float64), []
        for _ in range(4):
            seen.append(layer.gate(x).weight.tolist())
            layer.after_step()
        both = torch.tensor([9 ** (1 / 1.5), 1.0])
        wanted = [[0.75, 0.25], (both / both.sum() * torch.tensor([1, 0])).tolist()]
        wanted += [[0.9, 0.0], [0.9, 0.0]]
        assert torch.allclose(torch.tensor(seen), torch.tensor(wanted))
        layer.grow()  # a new task, a new schedule
        assert layer.steps_done.tolist() == [0] and layer.frozen_steps_done.tolist() == [0, 4]

    def test_dense_at_first_sparse_at_last_and_what_is_cut_off_is_small(self):
        layer = grown("evomoe", tasks=5, threshold=0.01, end=1e-3).eval()
        speak = []
        for done in (0, 5, 9, 10):
            layer.steps_done.fill_(done)
            w = layer.gate(X).weight[:, ::2]
            total = w.sum(-1)
            assert total.max() <= 1 + 1e-12 and total.min() >= 1 - 5 * 0.01
            speak.append((w > 0).sum(-1).double().mean().item())
        assert speak == sorted(speak, reverse=True) and speak[0] > 3 and speak[-1] == 1

    def test_noise_is_gumbels(self):
        # argmax of l + n is drawn from softmax(l), here (.6, .3, .1); the wrong tail of the same
        # noise would draw otherwise
        layer, p = EvoMoE(nn.Linear(1, 1), rank=1, start=1e-3, end=1e-3), [0.6, 0.3, 0.1]
        layer.grow(), layer.grow()
        layer.frozen_router[:, 0] = torch.tensor(p[:2]).log()
        layer.router.data.fill_(math.log(p[2]))
        w = layer.gate(torch.ones(20000, 1)).weight
        assert torch.allclose((w > 0.5).float().mean(0), torch.tensor(p), atol=0.015)
        assert torch.equal(layer.eval().gate(torch.ones(3, 1)).weight[:, 0], torch.ones(3))
