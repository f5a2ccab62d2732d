"""Routing: ranks that choose themselves, beside routers over ranks and over LoRAs, which store as
much, and let as many ranks speak."""

from collections.abc import Sequence

from ..roster import EPOCHS
from ..tools.results import Panel
from .common import (
    ACC,
    COLUMNS,
    MOE,
    MORA,
    PERMUTED,
    SHARE,
    beside,
    carried,
    cells_of,
    line,
    mean,
    with_settings,
)
from .study import Cell, Rows, Study
from .verdicts import Claim, Comparison, Values

SELF, SELF_27 = "self-activated ranks, 9 speak", "self-activated ranks, 27 speak"
RANKS = "router over ranks, 9 speak"
LORAS_27, LORAS_81 = "router over LoRAs, 27 speak", "router over LoRAs, 81 speak"
BALANCED = "router over LoRAs, 27 speak, balance .01"


def arms() -> dict[str, Cell]:
    """Each arm's scheme. All store the same but for 6 %: in units of Σ D = Σ O = 320 over the
    layers, ranks store 2 r a task and a router one row of 1 per expert. So 9 self-activated ranks
    store 18 a task, 6 ranks with a row each 6 · 3 = 18, and a LoRA of 9 with its row 19.

    What they compare at equal cost is what is used for a token: 9 ranks, or 27. A router over LoRAs
    with 81 uses nine times as much, and is shown because it does better than with 27.
    """

    def moe(rank: int, top_k: int, experts: int = 1, balance: float = 0.0) -> Cell:
        return with_settings(MOE, rank=rank, top_k=top_k, experts=experts, balance=balance)

    return {
        SELF: with_settings(MORA, rank=9, top_k=9),
        SELF_27: with_settings(MORA, rank=9, top_k=27),
        RANKS: moe(6, 9, experts=6),
        LORAS_27: moe(9, 3),
        LORAS_81: moe(9, 9),
        BALANCED: moe(9, 3, balance=0.01),
    }


def cells(seeds: Sequence[int], quick: bool) -> list[Cell]:
    """The long stream has all arms, the short ones those that differ in who chooses."""
    lengths = {PERMUTED: 20, "repeat": 4, "conflict": 4}
    if quick:
        lengths = dict.fromkeys(lengths, 3)
    rows = {
        f"{stream}, {arm}": {"stream": stream, "tasks": tasks, **rest}
        for stream, tasks in lengths.items()
        for arm, rest in arms().items()
        if stream == PERMUTED or arm in (SELF, RANKS, LORAS_27)
    }
    return cells_of("routing", rows, seeds, epochs=6 if quick else EPOCHS)


def panels(rows: Rows) -> list[Panel]:
    made = []
    for measure, first, ylabel in (
        ("seen", 1, "mean accuracy on the tasks seen so far"),
        ("drift", 2, "drift of old tasks' layer outputs"),
    ):
        lines = [line(arm, rows[f"{PERMUTED}, {arm}"][measure]) for arm in arms()]
        x: list[float] = list(range(first, first + len(lines[0].mean)))
        made.append(Panel(PERMUTED, "tasks learned", lines, ylabel, x))
    return made


def finding(rows: Rows) -> str:
    accs = {arm: rows[f"{PERMUTED}, {arm}"]["acc"] for arm in arms()}
    J = len(rows[f"{PERMUTED}, {SELF}"]["seen"][0])
    conflict = [mean(rows[f"conflict, {arm}"]["acc"]) for arm in (SELF, RANKS, LORAS_27)]
    return (
        f"After {J} tasks of {PERMUTED}, with 9 ranks speaking, self-activated ranks reach "
        f"{mean(accs[SELF])}, {beside(accs[SELF], accs[RANKS])} a router over ranks "
        f"({mean(accs[RANKS])}); with 27, {mean(accs[SELF_27])}, "
        f"{beside(accs[SELF_27], accs[LORAS_27])} a router over LoRAs ({mean(accs[LORAS_27])}); a "
        f"router over LoRAs of which 81 speak ({mean(accs[LORAS_81])}) is "
        f"{beside(accs[LORAS_81], accs[SELF])} 9 self-activated ranks; on conflict, where no gate "
        f"that sees the input alone can win, the three reach {', '.join(conflict)}."
    )


def claims(rows: Rows) -> list[Claim]:
    def values(arm: str, measure: str, stream: str = PERMUTED) -> Values:
        return rows[f"{stream}, {arm}"][measure]

    def compared(measure: str, more: str, less: str) -> Comparison:
        label, matters = ("ACC", ACC) if measure == "acc" else (measure, SHARE)
        pair = values(more, measure), values(less, measure)
        return Comparison(f"{label}, {more} - {less}", *pair, matters)

    equal = ((RANKS, SELF), (LORAS_27, SELF_27))  # in what speaks
    return [
        Claim(
            1,
            "Self-activated ranks interfere less with old tasks than routed experts do.",
            [compared("interference", routed, own) for routed, own in equal],
        ),
        Claim(
            2,
            "A repeated task is served by the ranks that learned it, not learned a second time.",
            [
                Comparison(
                    "share said by the first time's ranks - by the second's",
                    values(SELF, "back", "repeat"),
                    values(SELF, "anew", "repeat"),
                    SHARE,
                )
            ],
        ),
        Claim(
            3,
            "As experts accumulate, old tasks' routing changes less than with a learned router.",
            [compared("instability", routed, own) for routed, own in equal],
        ),
        Claim(
            8,
            "Self-activated ranks do better than routed experts.",
            [compared("acc", own, routed) for routed, own in (*equal, (LORAS_81, SELF))],
        ),
        Claim(
            9,
            "A balance loss on the router hurts.",
            [compared("acc", LORAS_27, BALANCED)],
        ),
    ]


STUDY = Study(
    asks="Who should choose the ranks: they themselves, a router over ranks, one over LoRAs?",
    cells=cells,
    measure=carried,
    columns=COLUMNS
    | {name: name for name in ("back", "anew", "again", "stored", "read", "speaking")},
    panels=panels,
    finding=finding,
    claims=claims,
)
