"""What a scheme promises, so that it can be held to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Claims:
    """What a scheme promises. `minimoe check` holds it to that, law by law (minimoe/laws).

    zero_at_birth: a fresh layer is the base layer, bit for bit.
    granularity: what a token's output may depend on: its own "token", all tokens of its "sample"
        (x being (samples, tokens, D)), or the whole "batch".
    expert: what has one weight: a "rank", or a "block" of `Adapter.block` ranks.
    top_k: at most `top_k` experts have a weight, for each token.
    simplex: weights are 0 or more and sum to 1 ("kept": to k); in evaluation, to that at most.
    as_lora: settings, and numbers to fill other rows with, at which all experts weigh the same.
        With all kept, the layer is then LoRA, its update divided by E if weights sum to 1.
    mergeable: it has merge() and unmerge(), as LoRA has.
    active_at_most: a token may depend on fewer parameters than active(): a weight may be 0, or a
        choice the same, for reasons of its own.
    equation: the layer is the one equation, with g and z as `gate` gives them.
    exact_gradient: the backward pass leaves nothing out.

    The last two are claimed unless taken back.
    """

    zero_at_birth: bool = False
    granularity: Literal["token", "sample", "batch"] = "batch"
    expert: Literal["rank", "block"] = "rank"
    top_k: bool = False
    simplex: bool | Literal["kept"] = False
    as_lora: Mapping[str, float] | None = None
    mergeable: bool = False
    active_at_most: bool = False
    equation: bool = True
    exact_gradient: bool = True
