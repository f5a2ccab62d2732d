"""TensorPoly: Poly whose keys are products of small factors, and whose factors are mixed apart.

Mixture of Experts Using Tensor Products. arXiv 2405.16671; its version II, at order 2.

A skill's keys are sums of Q Kronecker products, and a task mixes left and right factors before
they are multiplied:

    a ⊗ c = (a_1 c, a_2 c, ...)             a (D₁) and c (D₂), with D₁ D₂ = D
    A'_s = Σ over q of a_sq ⊗ c_sq          a skill's keys
    α¹_t, α², α³ = sigmoid(Z_t) / Σ sigmoid(Z_t)    each S weights that sum to 1
    A_t = Σ over q of (Σ over s of α¹_ts a_sq) ⊗ (Σ over u of α²_tu c_uq)
    B_t = Σ over s of α³_ts B'_s            values as in Poly
    z = x Aᵀ                                of all tasks' keys
    g = 1 for each rank of the task t that the sample is said to be of, 0 elsewhere
    y = x W0ᵀ + scale · (g ⊙ z) B

So a task's keys are Σ_su α¹_s α²_u Σ_q a_sq ⊗ c_uq: any skill's left factors with any other's right
ones, S² products of S skills. Version I has one α for whole keys, Σ_s α_s A'_s: that is Poly, with
keys of fewer numbers. The two agree where α¹ and α² both are 1 for the same skill. As a matrix
(D₁, D₂) a key has rank Q at most.

Axes: B batch, T tokens, D in, O out, R ranks in all, r ranks per task, E experts, K kept, S skills,
Q terms; D₁ is the largest whole factor of D that is not above its square root, so 1 if D is prime.
x (..., D), W0 (O, D), a (S, r, Q, D₁) `left`, c (S, r, Q, D₂) `right`, B' (S·r, O), Z (E, 3·S),
A (R, D) and B (R, O) means of skills; one expert per task: R = E·r and K = r.

Life and noise: Poly's.

Departures: reconstructed. The paper factors the values too, trains all tasks at once, and has other
orders; a D that is no square it pads, and then cuts. What its layer norms do to products is left
out: factors are drawn so that a skill's key has the variance of LoRA's.
"""

import math

import torch
from torch import Tensor, nn

from ..adapter import require
from .poly import Poly, shares


class TensorPoly(Poly):
    """Tasks that mix skills' factors. Parameters: n + 3 E S; active, n + 3 S, of which keys' and
    values' n = S r (Q (D₁ + D₂) + O).

    Args beyond Poly's:
        terms: Q, the products that a key is a sum of.

    Context and errors: Poly's, and ValueError if terms < 1.
    """

    left: Tensor
    right: Tensor

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 8,
        scale: float = 1 / 8,
        skills: int = 4,
        noise: float = 1.0,
        terms: int = 1,
    ):
        require(terms >= 1, "terms", terms, "1 or more")
        self.terms = terms
        super().__init__(base, rank, scale, skills, noise)

    def rows(self, name: str) -> Tensor:
        """All rows of that name; of A and B the tasks' means, as they are in evaluation."""
        if name != "A":
            return super().rows(name)
        return self.keys_of(self.alphas(self.rows("Z"))).flatten(0, 1)

    def keys_of(self, alphas: dict[str, Tensor]) -> Tensor:
        """A_t (..., r, D), of each α (..., S)."""
        mixed = "...s,srqd->...rqd"
        a = torch.einsum(mixed, alphas["left"].to(self.left.dtype), self.left)
        c = torch.einsum(mixed, alphas["right"].to(self.right.dtype), self.right)
        return torch.einsum("...rqu,...rqv->...ruv", a, c).flatten(-2)

    def alphas(self, Z: Tensor) -> dict[str, Tensor]:
        alphas = shares(Z.unflatten(-1, (3, -1))).unbind(-2)
        return dict(zip(("left", "right", "B"), alphas, strict=True))

    def of_task(self, x: Tensor, alphas: dict[str, Tensor]) -> Tensor:
        return torch.einsum("...d,...rd->...r", x, self.keys_of(alphas))

    def speaking(self) -> int:
        of_rank = self.terms * sum(halves(self.in_features)) + self.out_features
        return self.skills * self.rank * of_rank

    def active(self) -> int:
        return self.speaking() + 3 * self.skills

    def fresh(self) -> dict[str, Tensor]:
        return {"Z": self.empty(1, 3 * self.skills).uniform_(-1e-3, 1e-3)}

    def task_agnostic(self) -> dict[str, Tensor]:
        D, S, r, Q = self.in_features, self.skills, self.rank, self.terms
        bound = (3 / (Q * D)) ** 0.25  # Var(key) = Q · Var(a) · Var(c) = Q · bound⁴ / 9 = 1 / 3D
        left, right = (self.empty(S, r, Q, d).uniform_(-bound, bound) for d in halves(D))
        return {"left": left, "right": right, "B": super().task_agnostic()["B"]}


def halves(D: int) -> tuple[int, int]:
    """D₁ and D₂."""
    D1 = next(d for d in range(math.isqrt(D), 0, -1) if D % d == 0)
    return D1, D // D1
