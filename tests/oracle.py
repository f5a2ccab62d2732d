"""What the oracles share. Each scheme's own oracle, its paper's equation as loops in NumPy float64,
stands in its test file: slow, and with nothing to hide behind.

x (T, D), W0 (O, D), b (O,), A (R, D), B (R, O), W (E, D). Every oracle returns y (T, O).
"""

import math

import numpy as np


def base(x, W0, b):
    y = np.zeros((len(x), len(W0)))
    for t in range(len(x)):
        for o in range(len(W0)):
            y[t, o] = sum(W0[o, d] * x[t, d] for d in range(x.shape[1])) + b[o]
    return y


def blocks(x, W0, b, A, B, w, scale):
    """y of weights w (T, E): expert e is rows e·r to (e+1)·r."""
    y = base(x, W0, b)
    for t in range(len(x)):
        r = len(A) // len(w[t])
        for i in range(len(A)):
            y[t] += scale * w[t][i // r] * (x[t] @ A[i]) * B[i]
    return y


def softmax(logits):
    highest = max(logits)
    parts = [math.exp(value - highest) for value in logits]
    return [part / sum(parts) for part in parts]


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


def sample_means(x, sample):
    """The mean token of each sample, by sample."""
    means = {}
    for m in sorted(set(sample)):
        tokens = [x[t] for t in range(len(x)) if sample[t] == m]
        means[m] = sum(tokens) / len(tokens)
    return means
