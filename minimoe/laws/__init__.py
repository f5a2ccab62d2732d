"""The laws: what every routing scheme must keep, runnable on anyone's.

    from minimoe.laws import check
    for row in check(MyScheme, top_k=2):
        print(row)

A law is a function of one `Case`: a layer of drawn sizes that has lived through some tasks
(case.py). laws.py holds the laws, and says which claim calls for which; most are for everyone.
check.py holds a scheme to them. same.py holds an implementation to another scheme, and guess.py
says as if which step of the equation were another. apart.py is what `minimoe check` does: each law
in a process of its own. testing.py makes pytest's tests of them. template.py is what `minimoe
new-scheme` writes.
"""

from .case import Broken, Case, LeftOut, live
from .check import CheckResult, Row, check, claimed, hold, says, table
from .laws import (
    LAWS,
    Law,
    active_is_read,
    any_shape,
    compiles,
    degenerates_to_lora,
    equation,
    eval_is_still,
    exact_gradient,
    granularity,
    grow_keeps,
    half_precision,
    learns_from_birth,
    merge_is_equal,
    nan_stays,
    only_live_learns,
    padding_is_left_out,
    passes_add_up,
    paths_agree,
    round_trips,
    simplex,
    support,
    zero_at_birth,
    zero_is_finite,
)
from .pair import Mapped, mapped
from .same import STEPS, same

__all__ = [
    "LAWS",
    "STEPS",
    "Broken",
    "Case",
    "CheckResult",
    "Law",
    "LeftOut",
    "Mapped",
    "Row",
    "active_is_read",
    "any_shape",
    "check",
    "claimed",
    "compiles",
    "degenerates_to_lora",
    "equation",
    "eval_is_still",
    "exact_gradient",
    "granularity",
    "grow_keeps",
    "half_precision",
    "hold",
    "learns_from_birth",
    "live",
    "mapped",
    "merge_is_equal",
    "nan_stays",
    "only_live_learns",
    "padding_is_left_out",
    "passes_add_up",
    "paths_agree",
    "round_trips",
    "same",
    "says",
    "simplex",
    "support",
    "table",
    "zero_at_birth",
    "zero_is_finite",
]
