"""SpeechMoE2 against its oracle, numbers worked by hand, and what is its own."""

import math

import pytest
import torch
from layers import X, context_of, grown
from oracle import blocks, softmax
from torch import nn

from minimoe import LoRAMoE
from minimoe.adapt import adapters, context
from minimoe.continual.learners import SampleLearner
from minimoe.continual.probe import dense_gate
from minimoe.schemes.speech_moe import SpeechMoE2

SETTINGS = {"scale": 0.7, "top_k": 2, "embedding": 3}
UNCLAIMED = {"merge_is_equal"}  # laws


def expected(layer, x, rows, given):
    """A softmax over the largest of what one matrix makes of the token and its sample at once."""
    E, w = len(rows["router"]), []
    for t in range(len(x)):
        both = [*x[t], *given["embedding"][t]]
        W = [[*rows["router"][e], *rows["sample_router"][e]] for e in range(E)]
        l = [sum(a * b for a, b in zip(W[e], both, strict=True)) for e in range(E)]
        kept = sorted(range(E), key=lambda e: -l[e])[: layer.top_k]
        share = dict(zip(kept, softmax([l[e] for e in kept]), strict=True))
        w.append([share.get(e, 0.0) for e in range(E)])
    return blocks(x, rows["W0"], rows["b"], rows["A"], rows["B"], w, layer.scale)


def STORED(D, O, R, r, E):
    return R * (D + O) + E * (D + 3)


def ACTIVE(D, O, R, r, E, k):
    return E * (D + 3) + k * r * (D + O)


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"^embedding is 0, allowed: 1 or more$"):
        SpeechMoE2(nn.Linear(7, 5), rank=2, embedding=0)


def lora_moe(layer):
    """The same without what is read of samples."""
    other = LoRAMoE(layer.base, rank=2, scale=layer.scale, top_k=layer.top_k)
    other.grow(), other.grow()
    state = {k: t for k, t in layer.state_dict().items() if "sample" not in k}
    other.load_state_dict(state)
    return other


class TestSpeechMoE2:
    def test_by_hand(self):
        # x 1, c (2, -1): of the one 0·1 + ln 3 · 2 + ln 3 · 1, of the other 2 ln 3 · 1: 27 to 9
        layer = SpeechMoE2(nn.Linear(1, 1).double(), rank=1, embedding=2)
        layer.grow()
        layer.frozen_router.fill_(0.0), layer.router.data.fill_(2 * math.log(3))
        layer.frozen_sample_router.copy_(torch.tensor([[1.0, -1.0]]) * math.log(3))
        layer.sample_router.data.zero_()
        with context(layer, embedding=torch.tensor([2.0, -1.0])):
            g = dense_gate(layer, torch.ones(1, dtype=torch.float64))
        assert torch.allclose(g, torch.tensor([0.75, 0.25]).double())

    def test_where_the_sample_is_like_nothing_it_is_lora_moe(self):
        layer = grown("speech_moe")
        with context(layer, embedding=torch.zeros(40, 3)):
            assert torch.allclose(layer(X), lora_moe(layer)(X), rtol=0, atol=1e-13)

    def test_and_elsewhere_it_is_not(self):
        layer = grown("speech_moe")
        with context(layer, **context_of(layer, 40)):
            assert not torch.allclose(layer(X), lora_moe(layer)(X), atol=1e-3)

    def test_all_tokens_of_a_sample_lean_the_same_way(self):
        layer, x = grown("speech_moe", top_k=3), X.view(8, 5, 7)
        given = context_of(layer, 8)
        with context(layer, **given):
            l = layer.logits(x)
        lean = l - x @ layer.rows("router").T
        want = (given["embedding"].double() @ layer.rows("sample_router").T).unsqueeze(1)
        assert torch.allclose(lean, want.expand(8, 5, 3), rtol=0, atol=1e-12)

    def test_a_sample_chooses_where_tokens_do_not(self):
        layer = grown("speech_moe", top_k=1)
        layer.frozen_router.zero_(), layer.router.data.zero_()
        given = {"embedding": torch.eye(3)[torch.arange(40) % 3].double()}
        layer.frozen_sample_router.copy_(torch.eye(3)[:2])
        layer.sample_router.data.copy_(torch.eye(3)[2:])
        with context(layer, **given):
            chosen = dense_gate(layer, X)[:, ::2].argmax(-1)
        assert torch.equal(chosen, torch.arange(40) % 3)


class Net(nn.Module):
    inputs = 4

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)

    def features(self, x):
        return self.fc1(x)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


def test_the_embedding_is_the_frozen_backbones_at_all_times():
    learner, x = SampleLearner(Net().requires_grad_(False), SpeechMoE2, rank=2), torch.randn(5, 4)
    before = learner.context(x)["embedding"]
    assert before.shape == (5, 6) and all(n.embedding == 6 for _, n in adapters(learner.model))
    assert torch.allclose(before.norm(dim=-1), torch.ones(5))
    for _, layer in adapters(learner.model):
        nn.init.normal_(layer.B)
    assert torch.equal(learner.context(x)["embedding"], before)
