"""ReXMoE's schedule against its oracle, numbers worked by hand, and what is its own."""

import pytest
import torch
from layers import X, frozen_and_live, grown
from test_lora_moe import ACTIVE, lora_moe
from torch import nn

from minimoe import LoRAMoE
from minimoe.continual.probe import dense_gate
from minimoe.schemes.rexmoe import ReXMoE

SETTINGS = {"scale": 0.7, "top_k": 2, "reuse": 2.0, "end": 10}
UNCLAIMED = {"merge_is_equal"}  # laws
__all__ = ["ACTIVE"]


def expected(layer, x, rows, given):
    """With all experts shown: a softmax over the largest logits."""
    return lora_moe(x, *frozen_and_live(rows), rows["router"], layer.scale, layer.top_k)


def STORED(D, O, R, r, E):
    return R * (D + O) + E * D + E


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reuse": 0.5}, "reuse is 0.5, allowed: 1 or more"),
        ({"begin": 5, "end": 5}, "begin is 5, allowed: 0 to below end 5"),
        ({"begin": -1}, "begin is -1, allowed: 0 to below end 1000"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        ReXMoE(nn.Linear(7, 5), **{"rank": 2} | settings)


class TestReXMoE:
    def test_how_many_are_shown_by_hand(self):
        # N 4, n 4, from step 0 to 12, so E 16: 4, (1 + 3 · 6 / 12) · 4 = 10, 16
        layer = grown("rexmoe", tasks=16, reuse=4.0, end=12)
        steps = torch.tensor([0, 1, 2, 6, 11, 12, 1000])
        assert layer.shown(steps).tolist() == [4, 5, 6, 10, 15, 16, 16]
        layer.begin = 6
        assert layer.shown(torch.tensor([0, 6, 9])).tolist() == [4, 4, 10]
        assert grown("rexmoe", tasks=1, reuse=4.0).shown(torch.tensor(0)) == 1

    def test_as_many_are_seen_as_are_shown_the_live_one_among_them(self):
        layer = grown("rexmoe", tasks=6, top_k=6, reuse=3.0, end=6).train()
        layer.steps_done.zero_()
        for N in (2, 2, 3, 4, 4, 5, 6):
            picked = set()
            for _ in range(20):
                speak = (dense_gate(layer, X)[:, ::2] > 0).any(0)
                assert speak.sum() == N and speak[-1]
                picked.add(tuple(speak.tolist()))
            assert (len(picked) == 1) == (N == 6)  # drawn anew for each pass
            layer.after_step()
        layer.grow()
        assert layer.steps_done.tolist() == [0]

    def test_evaluation_shows_all(self):
        layer = grown("rexmoe", reuse=3.0).eval()
        other = LoRAMoE(layer.base, rank=2, scale=0.7, top_k=2)
        other.grow(), other.grow()
        other.load_state_dict({k: t for k, t in layer.state_dict().items() if "steps" not in k})
        assert torch.equal(layer(X), other(X))
