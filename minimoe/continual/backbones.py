"""Small networks to adapt. What a model may have, beside its forward, for those who use it:

    targets         a pattern for the layers that adapters wrap; by default all linear layers
    inputs          a number D: it reads D real numbers of an example, x (N, ...)
    features(x)     (N, F), what it makes of an input before it answers
    classes         (C, F), an embedding of each class: logits = features(x) classesᵀ
    vocabulary      a number C: it reads tokens (N, T), and says after each which of C comes next

Without the last four it can be carried through a stream as well, but for those who need them
(`minimoe list` says who).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tools.load import load_function
from . import data
from .stream import Stream


class Backbone(nn.Module):
    """Three linear layers (D-128-128-64), and frozen class embeddings as the head, as CLIP's text
    side is.

        logits = features(x) Cᵀ             C (classes, 64), one embedding per class

    Every linear layer reads LayerNorm's output, as in a transformer. That matters to a signed
    score: inputs with a common mean (plain ReLU's) excite the same ranks whatever the task.
    """

    targets = r"fc\d"

    def __init__(self, classes: int = 10, widths: tuple[int, ...] = (64, 128, 128, 64)):
        super().__init__()
        self.inputs = widths[0]
        self.fc1, self.fc2, self.fc3 = map(nn.Linear, widths, widths[1:])
        self.classes = nn.Parameter(torch.randn(classes, widths[-1]) / math.sqrt(widths[-1]))

    def features(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        h = self.fc1(F.layer_norm(x, x.shape[-1:]))
        h = self.fc2(F.layer_norm(F.relu(h), h.shape[-1:]))
        return self.fc3(F.layer_norm(F.relu(h), h.shape[-1:]))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) @ self.classes.T


class TransformerBlock(nn.Module):
    """A transformer's block: attention, then two linear layers, each beside a residual.

        h = x + proj(attention(q, k, v))    q, k, v of LN(x); `heads` heads
        y = h + fc2(gelu(fc1(LN(h))))

    x (N, T, D). causal: a token sees only those before it, and itself.
    """

    def __init__(self, D: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.proj = (nn.Linear(D, D) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x, x.shape[-1:])
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, heads, T, D / heads)
            for layer in (self.q, self.k, self.v)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        h = x + self.proj(seen.transpose(1, 2).flatten(2))
        return h + self.fc2(F.gelu(self.fc1(F.layer_norm(h, h.shape[-1:]))))


class Attention(nn.Module):
    """A transformer of one block for 8×8 images: 16 tokens of 2×2 pixels, learned positions, the
    mean over tokens, two linear layers beside a residual, and class embeddings.

    In the block a gate sees one token. After pooling, under --targets 'fc.', it sees the image.
    """

    targets = r"block\.(q|k|v|proj|fc\d)"
    inputs = 64

    def __init__(self, classes: int = 10, D: int = 64, heads: int = 4):
        super().__init__()
        self.embed = nn.Linear(4, D)
        self.positions = nn.Parameter(0.02 * torch.randn(16, D))
        self.block = TransformerBlock(D, heads)
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.classes = nn.Parameter(torch.randn(classes, D) / math.sqrt(D))

    def features(self, x: Tensor) -> Tensor:
        tokens = F.pixel_unshuffle(x.reshape(-1, 1, 8, 8), 2).flatten(2).transpose(1, 2)
        h = self.block(self.embed(tokens) + self.positions)  # (N, 16, D)
        h = F.layer_norm(h, h.shape[-1:]).mean(1)
        return h + self.fc2(F.gelu(self.fc1(F.layer_norm(h, h.shape[-1:]))))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) @ self.classes.T


class Decoder(nn.Module):
    """A transformer of two blocks that says, after each token, what comes next.

    x (N, T) tokens; answers (N, T, C), logits = h classesᵀ of LayerNorm's h; embeddings of tokens
    and positions, and `classes`, are no part of what adapters wrap.
    """

    targets = r"blocks\.\d\.(q|k|v|proj|fc\d)"

    def __init__(self, classes: int, length: int, D: int = 64, heads: int = 4, blocks: int = 2):
        super().__init__()
        self.vocabulary = classes
        self.tokens = nn.Parameter(0.5 * torch.randn(classes, D))
        self.positions = nn.Parameter(0.5 * torch.randn(length, D))
        self.blocks = nn.Sequential(
            *[TransformerBlock(D, heads, causal=True) for _ in range(blocks)]
        )
        self.classes = nn.Parameter(torch.randn(classes, D) / math.sqrt(D))

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(F.embedding(x, self.tokens) + self.positions[: x.shape[1]])
        return F.layer_norm(h, h.shape[-1:]) @ self.classes.T


def mlp(stream: Stream) -> Backbone:
    """three linear layers for what is in a row, such as pixels"""
    if stream.real or isinstance(x := data.leading(stream.tasks[0].train, 1), dict):
        raise ValueError(
            f"no model for {stream.name}: mlp is for tensors that belong to classes (integers)"
        )
    return Backbone(stream.label_space(), (x.flatten(1).shape[1], 128, 128, 64))


def attention(stream: Stream) -> Attention:
    """a transformer of one block for 8×8 images, of 16 tokens"""
    x = None if stream.real else data.leading(stream.tasks[0].train, 1)
    if not isinstance(x, Tensor) or x[0].numel() != 64:
        raise ValueError(f"no model for {stream.name}: attention is for 8×8 images of classes")
    return Attention(stream.label_space())


BACKBONES: dict[str, Callable[[Stream], nn.Module]] = {"mlp": mlp, "attention": attention}


def find(name: str) -> Callable[[Stream], nn.Module]:
    """What makes a model for a stream, by name or as a function in a file, file.py:make. Raises
    FileNotFoundError, and ValueError on an unknown name or a file without such a function."""
    path, colon, function = name.rpartition(":")
    if colon:
        return load_function(path, function)
    if name not in BACKBONES:
        raise ValueError(f"backbone is {name!r}, allowed: {', '.join(BACKBONES)}, file.py:make")
    return BACKBONES[name]
