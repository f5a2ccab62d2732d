"""The laws: what every routing scheme must keep, runnable on anyone's.

    from minimoe.laws import check
    for row in check(MyScheme, top_k=2):
        print(row)

A law is a function of one `Case`: a layer of drawn sizes that has lived through some tasks
(case.py). laws.py holds the laws, and says which claim calls for which; most are for everyone.
check.py holds a scheme to them. template.py is what `minimoe new-scheme` writes.
"""

from .case import Broken, Case, LeftOut, live
from .check import Row, check, claimed, hold, says, table
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
    merge_is_equal,
    nan_stays,
    only_live_learns,
    paths_agree,
    round_trips,
    simplex,
    support,
    zero_at_birth,
    zero_is_finite,
)

__all__ = [
    "LAWS",
    "Broken",
    "Case",
    "Law",
    "LeftOut",
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
    "live",
    "merge_is_equal",
    "nan_stays",
    "only_live_learns",
    "paths_agree",
    "round_trips",
    "says",
    "simplex",
    "support",
    "table",
    "zero_at_birth",
    "zero_is_finite",
]
