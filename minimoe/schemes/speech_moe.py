"""SpeechMoE2: a router over whole LoRAs that reads an embedding of the sample beside the token.

SpeechMoE2: Mixture-of-Experts Model with Improved Routing. You et al., arXiv 2111.11831.
(Reconstructed from the abstract: "integrates additional global domain and accent embedding into
router input".)

The one equation, as lora_moe.py has it, but for the logits:

    z = x Aᵀ
    l = [x, c] Wᵀ                           c, an embedding of the sample, is given
    keep the k largest l
    w = softmax over the kept of l          one weight per kept expert; they sum to 1
    g = w_e for each rank of a kept expert e, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

So all tokens of a sample lean the same way, by c, and each then by itself. At c = 0 this is
lora_moe.py.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, k kept experts, F
width of an embedding. x (..., D), c (B, F), W0 (O, D), A (R, D) keys, B (R, O) values; W (E, D + F)
stands in two parts, `router` (E, D) and `sample_router` (E, F); one expert per task: R = E·r.

Life: one task trains one new expert and its row of both; all older ones are frozen. c is the frozen
backbone's embedding of the input (`SampleLearner`), the same at all times; no task is given.

Departures: the paper trains one mixture and never grows. Its c is an embedding of the domain and of
the accent, beside one of each frame's grapheme. Its losses are left out.
"""

from dataclasses import replace

from torch import Tensor, nn

from ..adapter import require
from ..lora_moe import LoRAMoE


class SpeechMoE2(LoRAMoE):
    """A router over tokens and samples. Parameters: R (D + O) + E (D + F); active, E (D + F) +
    k (R / E) (D + O).

    Args beyond LoRAMoE's, without balance and experts:
        embedding: F, the width of the embedding that it is given; 64 is the toy backbone's.

    Needs the context embedding (..., F), one per sample.
    Raises ValueError if embedding < 1.
    """

    claims = replace(LoRAMoE.claims, as_lora={"router": 0.0, "sample_router": 0.0})

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 16,
        scale: float = 1.0,
        top_k: int = 2,
        embedding: int = 64,
    ):
        require(embedding >= 1, "embedding", embedding, "1 or more")
        self.embedding = embedding
        super().__init__(base, rank, scale, top_k)

    def logits(self, x: Tensor) -> Tensor:
        c = self.given("embedding", x).to(x.dtype)  # (..., F)
        return super().logits(x) + self.project(c, "sample_router")

    def active(self) -> int:
        return super().active() + self.n_experts * self.embedding

    def fresh(self) -> dict[str, Tensor]:
        return super().fresh() | {"sample_router": self.empty(1, self.embedding).normal_(std=0.02)}

    def needs(self) -> dict[str, range | int]:
        return {"embedding": self.embedding}
