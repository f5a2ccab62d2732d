"""What lessons are made of: a student's functions in the place of the package's schemes.

wrap.py          plain functions of tensors as adapters
questions.py     what is asked, the cases it is tried on, slips and their sentences
check.py         a function held to the package, in seconds; a value held to what it should be
talk.py          predictions, claims, hints
learned.py       the shipped backbone, and what a scheme learns with it
numbers.py       numbers of long runs
figures.py       pictures
"""

from .check import check, expect, scheme_of
from .learned import learn, shipped
from .numbers import numbers
from .talk import claim, hint, predict
from .wrap import adapter_of

__all__ = [
    "adapter_of",
    "check",
    "claim",
    "expect",
    "hint",
    "learn",
    "numbers",
    "predict",
    "scheme_of",
    "shipped",
]
