"""SEMA against its oracle, numbers worked by hand, and what is its own."""

import math

import numpy as np
import pytest
import torch
from layers import X, arrays, frozen_and_live, grown, live
from oracle import base, sample_means, softmax
from torch import nn

from minimoe.adapt import context
from minimoe.continual.probe import dense_gate
from minimoe.schemes.sema import SEMA

SETTINGS = {"scale": 0.7, "width": 2}
UNCLAIMED = {"support", "merge_is_equal"}  # laws


def sema(x, W0, b, A, B, W, scale, sample):
    """Wang et al., 2403.18886: a softmax router that reads the mean of the token's sample."""
    y, E = base(x, W0, b), len(W)
    r, means = len(A) // E, sample_means(x, sample)
    for t in range(len(x)):
        w = softmax([means[sample[t]] @ W[e] for e in range(E)])
        for e in range(E):
            for i in range(e * r, (e + 1) * r):
                y[t] += scale * w[e] * (x[t] @ A[i]) * B[i]
    return y


def reconstruction_error(m, P, Q):
    """Wang et al.: mean square of m (D,) less what one autoencoder, P and Q (h, D), makes of it."""
    D = len(m)
    code = [sum(P[j][d] * m[d] for d in range(D)) for j in range(len(P))]
    again = [sum(code[j] * Q[j][d] for j in range(len(P))) for d in range(D)]
    return sum((m[d] - again[d]) ** 2 for d in range(D)) / D


def surprise(means, P, Q, mu, sigma):
    """Wang et al.: the least, over descriptors (E, h, D), of the mean over samples of how many
    deviations the error is off."""
    each = []
    for e in range(len(mu)):
        off = [abs(reconstruction_error(m, P[e], Q[e]) - mu[e]) / sigma[e] for m in means]
        each.append(sum(off) / len(off))
    return min(each)


def expected(layer, x, rows, given):
    return sema(x, *frozen_and_live(rows), rows["router"], layer.scale, given["sample"])


AUX = {"P", "Q"}
AUX_ONLY = {"P", "Q"}  # a descriptor does not shape the output


def expected_aux(layer, x, rows, given):
    means, own = sample_means(x, given["sample"]).values(), live(layer, rows)
    each = [reconstruction_error(m, own["P"], own["Q"]) for m in means]
    return sum(each) / len(each)


def STORED(D, O, R, r, E):
    return R * (D + O) + E * (D + 2 * 2 * D + 2)


def ACTIVE(D, O, R, r, E, k):
    return R * (D + O) + E * D


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": math.nan}, "threshold is nan, allowed: any number"),
        ({"width": 0}, "width is 0, allowed: 1 or more"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        SEMA(nn.Linear(7, 5), **{"rank": 2} | settings)


class TestSEMA:
    def weights(self, layer, x):
        return dense_gate(layer, x)[..., :: layer.block]

    def test_old_weights_keep_their_proportions_when_an_expert_comes(self):
        layer = grown("sema")
        before = self.weights(layer, X)
        layer.grow()
        torch.nn.init.normal_(layer.router)
        after = self.weights(layer, X)
        assert torch.allclose(after[:, :3] / after[:, :3].sum(1, keepdim=True), before, atol=1e-12)
        assert (after[:, 3] > 0).all()

    def test_one_expert_has_weight_1(self):
        layer = grown("sema", tasks=1)
        assert torch.equal(self.weights(layer, X), torch.ones(40, 1, dtype=torch.float64))

    def test_a_samples_tokens_share_a_weight_which_is_its_means(self):
        layer, x = grown("sema"), X.view(5, 2, 4, 7)
        w = self.weights(layer, x)
        assert torch.equal(w, w[:, :1, :1].expand_as(w))
        assert torch.allclose(w[:, 0, 0], self.weights(layer, x.mean((1, 2))), atol=1e-12)
        spread = x + torch.tensor([[3.0, -1.0, -1.0, -1.0]]).T  # of the same mean
        assert torch.allclose(self.weights(layer, spread), w, atol=1e-12)
        other = torch.cat([x[:1], -x[1:]])
        assert torch.equal(self.weights(layer, other)[0], w[0])
        assert not torch.allclose(self.weights(layer, other)[1:], w[1:])

    def test_tokens_without_a_sample_axis_are_samples(self):
        layer = grown("sema").eval()
        assert torch.allclose(layer(X), layer(X.unsqueeze(1)).squeeze(1), atol=1e-12)
        assert torch.allclose(layer(X[0]), layer(X)[0], atol=1e-12)

    def test_surprise_is_the_oracles(self):
        layer = grown("sema")
        n = arrays(layer)
        P, Q = n["P"].reshape(3, 2, 7), n["Q"].reshape(3, 2, 7)
        x = X.view(10, 4, 7)
        means = sample_means(X.numpy(), [t // 4 for t in range(40)]).values()
        eps = layer.errors(x.mean(1)).detach().numpy()
        wanted = [[reconstruction_error(m, P[e], Q[e]) for e in range(3)] for m in means]
        np.testing.assert_allclose(eps, wanted, rtol=1e-12)
        s = surprise(means, P, Q, n["mu"], n["sigma"])
        for layer.threshold in (s - 1e-9, s + 1e-9):
            assert layer.surprised(x) == (layer.threshold < s)

    def test_settling_by_hand(self):
        # descriptors of zeros: eps is the mean square, here of (1, 1), (2, 0) and (3, 3), the mean
        # tokens: 1, 2 and 9, of mean 4 and deviation √((9 + 4 + 25) / 2)
        layer = SEMA(nn.Linear(2, 2), rank=1, width=1)
        for rows in (layer.P, layer.Q):
            rows.data.zero_()
        x = torch.tensor([[[0.0, 1.0], [2.0, 1.0]], [[2.0, 0.0]] * 2, [[3.0, 3.0]] * 2])
        layer.settle(x[:2])
        assert layer.sigma.tolist() == [math.inf] and not layer.surprised(1e3 * x)
        layer.settle(x)
        assert layer.mu.tolist() == [4.0]
        assert math.isclose(layer.sigma.item(), math.sqrt(19), rel_tol=1e-6)
        # s = (3, 2, 5) / √19, of mean .76
        for layer.threshold in (0.75, 0.78):
            assert layer.surprised(x) == (layer.threshold == 0.75)

    def test_samples_that_are_all_alike_settle_too(self):
        layer = grown("sema", tasks=1)
        seen = torch.ones(5, 7, dtype=torch.float64)
        layer.settle(seen)
        assert layer.sigma == 0 and not layer.surprised(seen)
        assert layer.surprised(torch.cat([seen, 3 * seen]))

    def test_a_fresh_layer_is_never_surprised(self):
        assert not SEMA(nn.Linear(7, 7), rank=2).surprised(1e3 * X.float())

    def test_a_seen_task_does_not_surprise_and_a_far_one_does(self):
        layer = SEMA(nn.Linear(12, 12), rank=2, width=3)
        bases = torch.randn(3, 3, 12)

        def draw(task, samples=200):
            tokens = torch.randn(samples, 4, 3) @ bases[task]
            return tokens + 0.1 * torch.randn_like(tokens)

        for task in range(2):
            if task:
                assert layer.surprised(draw(task))
                layer.grow()
            x = draw(task)
            optimiser = torch.optim.Adam([layer.P, layer.Q], lr=0.02)
            for _ in range(300):
                optimiser.zero_grad()
                with context(layer) as batch:
                    layer(x)
                batch.aux_loss.backward()
                optimiser.step()
            layer.settle(x)
            assert not any(layer.surprised(draw(seen)) for seen in range(task + 1))
        assert layer.surprised(draw(2)) and layer.surprised(5 * draw(0))
