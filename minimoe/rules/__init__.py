"""Rules: what can be done with trained experts, without training. A layer in, a changed one out.

keeping.py    use, keep, prune: how much each expert is used; some of them; the best of them
              merge: those kept take in the others
serving.py    skip, quantise, nudge: a weak second gets weight 0; fewer bits; some are preferred
making.py     upcycle, extract, merged: one LoRA as many experts; one expert as a LoRA; all as a
              plain linear layer
              choose_experts: of whole adapted models, a few that are able and unlike

An expert is what has one weight: a rank, or a block of them (Claims.expert). The layer given stays
as it is. The new one stands on the same base, and may take its place: `net.fc1 = keep(net.fc1, S)`.
minimoe.adapt saves and loads it. x is what the layer is given, (..., D), in the mode that it is in;
what its gate needs beside x comes from an open `context`. Padding does not count.

Axes: D in, O out, R ranks in all, E experts. A (R, D) keys, B (R, O) values: ΔW = Σ B_i A_iᵀ.

All raise ValueError if layer is no adapter of the one equation (MoCLE has a term more), and
RuntimeError if it is merged.
"""

from .keeping import keep, merge, prune, use
from .making import choose_experts, extract, merged, upcycle
from .serving import nudge, quantise, skip

__all__ = [
    "choose_experts",
    "extract",
    "keep",
    "merge",
    "merged",
    "nudge",
    "prune",
    "quantise",
    "skip",
    "upcycle",
    "use",
]
