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
