"""What a lesson asks and says: predictions, claims, hints."""

from dataclasses import dataclass
from numbers import Real

from ..tools.tables import short


def written(number: float) -> str:
    """2, .564"""
    return f"{number:.0f}" if number == round(number) else short(number)


@dataclass(frozen=True)
class Prediction:
    """A number that was written down before a run."""

    question: str
    number: float | None

    def beside(self, outcome: float) -> None:
        """Print it beside what came out."""
        guess = "no number" if self.number is None else written(self.number)
        off = "" if self.number is None else f"; off by {written(abs(outcome - self.number))}"
        print(f"{self.question}: you wrote {guess}, it is {written(outcome)}{off}.")


def predict(question: str, number: float | None = None) -> Prediction:
    """Note a number, or print that there is none yet; `beside` is for after the run. Raises
    ValueError on anything else."""
    if not (number is None or isinstance(number, Real)):
        raise ValueError(f"number is {number!r}, allowed: a number such as .5, or None")
    if number is None:
        print(f"Predict: {question}? Write a number in this cell before you go on.")
    else:
        print(f"Noted: {question}: {written(number)}")
    return Prediction(question, number)


def claim(sentence: str, number: float, holds: bool) -> None:
    """Print a sentence, the number that stands for it, and whether it holds, in words."""
    print(
        f"{sentence}: {written(number)}. {'This holds.' if holds else 'THIS DOES NOT HOLD HERE.'}"
    )


HINTS = {
    "lora": [
        "Two outputs are added: that of the frozen layer, and that of the update.",
        "Shapes: x (..., D), W0 (O, D), A (R, D), B (R, O). The frozen layer's output is x @ W0.T.",
        "z = x @ A.T has one number per rank; z @ B adds the values.",
    ],
    "router_gate": [
        "Four steps: logits l = x @ W.T; top, expert = l.topk(k); a softmax of top; and back to R.",
        "torch.zeros_like(l).scatter(-1, expert, w) puts k weights w in their places among E.",
        "w.repeat_interleave(r, -1) gives each expert's weight to its r ranks.",
    ],
    "mora_gate": [
        "The scores are s = F.normalize(z, dim=-1); their norm is over all ranks.",
        "top, kept = s.topk(k), then the softmax of top / tau, then scatter as in the router.",
        "`if delta is None: return w`; otherwise w * (s >= delta).",
    ],
}
_GIVEN: dict[str, int] = {}


def hint(name: str) -> None:
    """Print one more hint at each call; after the last, that there is none. Raises ValueError on a
    name without hints."""
    if name not in HINTS:
        raise ValueError(f"name is {name!r}, allowed: {', '.join(HINTS)}")
    given = _GIVEN[name] = _GIVEN.get(name, 0) + 1
    if given > len(HINTS[name]):
        print(f"There is no more hint. The solutions have {name}, written out.")
    else:
        print(f"Hint {given} of {len(HINTS[name])}: {HINTS[name][given - 1]}")
