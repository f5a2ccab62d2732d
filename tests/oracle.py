"""The papers' equations as loops in NumPy float64: slow, and with nothing to hide behind.

x (T, D), W0 (O, D), b (O,), A (R, D), B (R, O), W (E, D). Every function returns y (T, O).
"""

import math

import numpy as np


def lora(x, W0, b, A, B, scale):
    """Hu et al., 2106.09685, section 4.1."""
    y = base(x, W0, b)
    for t in range(len(x)):
        for i in range(len(A)):
            y[t] += scale * (x[t] @ A[i]) * B[i]
    return y


def lora_moe(x, W0, b, A, B, W, scale, top_k):
    """Softmax over the top_k of the router's logits; expert e is rows e·r to (e+1)·r."""
    y, E = base(x, W0, b), len(W)
    r = len(A) // E
    for t in range(len(x)):
        logits = [x[t] @ W[e] for e in range(E)]
        kept = sorted(range(E), key=lambda e: -logits[e])[:top_k]
        total = sum(math.exp(logits[e]) for e in kept)
        for e in kept:
            for i in range(e * r, (e + 1) * r):
                y[t] += scale * math.exp(logits[e]) / total * (x[t] @ A[i]) * B[i]
    return y


def mora(x, W0, b, A, B, scale, top_k, tau, delta=None):
    """Lu et al., 2506.21035, eq. 5-8; delta None in training."""
    y, R = base(x, W0, b), len(A)
    for t in range(len(x)):
        z = [x[t] @ A[i] for i in range(R)]
        norm = math.sqrt(sum(value**2 for value in z))
        s = [value / norm if norm > 0 else 0.0 for value in z]  # eq. 5
        kept = sorted(range(R), key=lambda i: -s[i])[:top_k]  # eq. 6
        highest = max(s[i] for i in kept)
        total = sum(math.exp((s[i] - highest) / tau) for i in kept)
        for i in kept:
            w = math.exp((s[i] - highest) / tau) / total  # eq. 7
            if delta is not None and s[i] < delta:  # eq. 8
                w = 0.0
            y[t] += scale * w * z[i] * B[i]
    return y


def base(x, W0, b):
    y = np.zeros((len(x), len(W0)))
    for t in range(len(x)):
        for o in range(len(W0)):
            y[t, o] = sum(W0[o, d] * x[t, d] for d in range(x.shape[1])) + b[o]
    return y


def gradient(f, array, dy, step=1e-6):
    """d(sum of f() · dy) / d array, by central differences; f reads array, which is put back."""
    out = np.zeros_like(array)
    for place in np.ndindex(array.shape):
        value = array[place]
        array[place] = value + step
        above = (f() * dy).sum()
        array[place] = value - step
        below = (f() * dy).sum()
        array[place] = value
        out[place] = (above - below) / (2 * step)
    return out


# Further papers. `sample` (T,) says which sample a token is of; what is said of samples (label,
# cluster, embedding) is given once per token.


def smora(x, W0, b, A, B, W, bias, scale, top_k):
    """Zhao et al., 2501.15103: k sigmoid scores with their biases, as weights that sum to k."""
    y, R = base(x, W0, b), len(A)
    for t in range(len(x)):
        s = [1 / (1 + math.exp(-(x[t] @ W[i]))) + bias[i] for i in range(R)]
        kept = sorted(range(R), key=lambda i: -s[i])[:top_k]
        total = sum(s[i] for i in kept)
        for i in kept:
            y[t] += scale * len(kept) * s[i] / total * (x[t] @ A[i]) * B[i]
    return y


def flylora(x, W0, b, A, B, bias, scale, top_k, signed):
    """Zou et al., 2510.08396: the k largest |z + bias|, or z + bias, at weight 1."""
    y, R = base(x, W0, b), len(A)
    for t in range(len(x)):
        z = [x[t] @ A[i] for i in range(R)]
        score = [z[i] + bias[i] if signed else abs(z[i] + bias[i]) for i in range(R)]
        for i in sorted(range(R), key=lambda i: -score[i])[:top_k]:
            y[t] += scale * z[i] * B[i]
    return y


def mor1e(x, W0, b, A, B, W, centres, w1, w2, scale, embedding):
    """Liu et al., 2404.08985: R · omega · softmax + 4 (1 - omega) · intuition, under one factor."""
    y, R = base(x, W0, b), len(A)
    omega, outer = (1 / (1 + math.exp(-100 * w[0])) for w in (w1, w2))
    for t in range(len(x)):
        length = math.sqrt(sum(value**2 for value in embedding[t]))
        p = softmax([x[t] @ W[i] for i in range(R)])
        for i in range(R):
            c = sum(embedding[t][f] * centres[i][f] for f in range(len(centres[i]))) / length
            g = R * omega * p[i] + 4 * (1 - omega) * c
            y[t] += scale * outer * g * (x[t] @ A[i]) * B[i]
    return y


def loramoe(x, W0, b, A, B, W, scale):
    """Dou et al., 2312.09979: a softmax over all experts."""
    y, E = base(x, W0, b), len(W)
    r = len(A) // E
    for t in range(len(x)):
        w = softmax([x[t] @ W[e] for e in range(E)])
        for e in range(E):
            for i in range(e * r, (e + 1) * r):
                y[t] += scale * w[e] * (x[t] @ A[i]) * B[i]
    return y


def localized_balance(x, W, sample, label, delta):
    """Dou et al.: var(Z) / mean(Z), Z being each expert's weight in each sample, times 1 + delta
    where the sample is of the expert's type, and 1 - delta elsewhere."""
    Z = []
    for m in sorted(set(sample)):
        tokens = [t for t in range(len(x)) if sample[t] == m]
        w = [softmax([x[t] @ W[e] for e in range(len(W))]) for t in tokens]
        for e in range(len(W)):
            weight = 1 + delta if label[tokens[0]] == e else 1 - delta
            Z.append(weight * sum(row[e] for row in w))
    mean = sum(Z) / len(Z)
    return sum((z - mean) ** 2 for z in Z) / len(Z) / mean


def mosld(x, W0, b, A, B, W, scale, top_k):
    """Zhao et al., 2412.08946: A (r, D) for every expert, as dropout left it; the top_k of a
    softmax over all, renormalised."""
    y, r = base(x, W0, b), len(A)
    for t in range(len(x)):
        p = softmax([x[t] @ W[e] for e in range(len(W))])
        kept = sorted(range(len(W)), key=lambda e: -p[e])[:top_k]
        total = sum(p[e] for e in kept)
        for e in kept:
            for i in range(r):
                y[t] += scale * p[e] / total * (x[t] @ A[i]) * B[e * r + i]
    return y


def mocle(x, W0, b, A, B, UA, UB, W, C, scale, tau, cluster):
    """Gou et al., 2312.12379: the likeliest expert of the cluster by its G, the universal one by
    1 - G."""
    y, r = base(x, W0, b), len(UA)
    for t in range(len(x)):
        p = softmax([C[cluster[t]] @ W[e] / tau for e in range(len(W))])
        e = max(range(len(W)), key=lambda e: p[e])
        for i in range(r):
            y[t] += scale * p[e] * (x[t] @ A[e * r + i]) * B[e * r + i]
            y[t] += scale * (1 - p[e]) * (x[t] @ UA[i]) * UB[i]
    return y


def meteora(x, W0, b, A, B, W, scale, top_k, tau):
    """Xu et al., 2405.13053: a softmax at temperature tau over the top_k logits."""
    y, E = base(x, W0, b), len(W)
    r = len(A) // E
    for t in range(len(x)):
        logits = [x[t] @ W[e] for e in range(E)]
        kept = sorted(range(E), key=lambda e: -logits[e])[:top_k]
        for e, w in zip(kept, softmax([logits[e] / tau for e in kept]), strict=True):
            for i in range(e * r, (e + 1) * r):
                y[t] += scale * w * (x[t] @ A[i]) * B[i]
    return y


def label_loss(x, W, label):
    """Xu et al.: the mean of -ln softmax(logits) at the label."""
    total = 0.0
    for t in range(len(x)):
        total -= math.log(softmax([x[t] @ W[e] for e in range(len(W))])[label[t]])
    return total / len(x)


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


def sample_means(x, sample):
    """The mean token of each sample, by sample."""
    means = {}
    for m in sorted(set(sample)):
        tokens = [x[t] for t in range(len(x)) if sample[t] == m]
        means[m] = sum(tokens) / len(tokens)
    return means


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


def overlap(old, new):
    """Wang et al., 2310.14152: sum of |a · b| over old and new keys."""
    return sum(abs(sum(p * q for p, q in zip(a, b, strict=True))) for a in old for b in new)


def elastic(theta, tasks):
    """Kirkpatrick et al., 1612.00796, eq. 3: F (theta - theta*)², summed over weights and over all
    tasks (F, theta*)."""
    total = 0.0
    for F, star in tasks:
        for place in np.ndindex(theta.shape):
            total += F[place] * (theta[place] - star[place]) ** 2
    return total


def fisher(logits, array, power=2):
    """The mean over inputs of the expectation over y ~ softmax of (d ln p(y) / d array)^power;
    logits() (N, C) reads array."""
    out, rows = np.zeros_like(array), logits()
    for n, row in enumerate(rows):
        for y, p in enumerate(softmax(row)):
            slope = gradient(lambda n=n, y=y: math.log(softmax(logits()[n])[y]), array, np.ones(()))
            out += p * slope**power / len(rows)
    return out


def softmax(logits):
    highest = max(logits)
    parts = [math.exp(value - highest) for value in logits]
    return [part / sum(parts) for part in parts]
