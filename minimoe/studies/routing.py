"""Routing: ranks that choose themselves, beside routers over ranks and over LoRAs, at equal
parameters."""

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

SELF = "self-activated ranks"
RANKS_STORED, RANKS_READ = "router over ranks, = stored", "router over ranks, = read"
LORAS_STORED, LORAS_READ = "router over LoRAs, = stored", "router over LoRAs, = read"
BALANCED = "router over LoRAs, balance .01"


def arms(J: int) -> dict[str, Cell]:
    """Each arm's scheme, for a stream of J tasks.

    In units of Σ D = Σ O = 320 over the layers, ranks store 2 r a task and a router one row of 1
    per expert: r = 9 self-activated ranks store 18 a task, 6 ranks with a row each 6 · 3 = 18, and
    a LoRA of 9 with its row 19. One token reads 9 J + 9 of the self-activated, K = 9. Of ranks
    under a router 9 J + 2 K: K = 4. Of LoRAs J + 18 k: k = (8 J + 9) / 18.
    """

    def moe(rank: int, top_k: int, experts: int = 1, balance: float = 0.0) -> Cell:
        return with_settings(MOE, rank=rank, top_k=top_k, experts=experts, balance=balance)

    return {
        SELF: with_settings(MORA, rank=9, top_k=9),
        RANKS_STORED: moe(6, 9, experts=6),
        RANKS_READ: moe(9, 4, experts=9),
        LORAS_STORED: moe(9, 3),
        LORAS_READ: moe(9, max(1, round((8 * J + 9) / 18))),
        BALANCED: moe(9, 3, balance=0.01),
    }


def cells(seeds: Sequence[int], quick: bool) -> list[Cell]:
    lengths = {PERMUTED: 20, "repeat": 4, "overlap": 5, "conflict": 4}
    if quick:
        lengths = dict.fromkeys(lengths, 3)
    rows = {
        f"{stream}, {arm}": {"stream": stream, "tasks": tasks, **rest}
        for stream, tasks in lengths.items()
        for arm, rest in arms(tasks).items()
        if stream == PERMUTED or arm != BALANCED
    }
    return cells_of("routing", rows, seeds, epochs=6 if quick else EPOCHS)


def panels(rows: Rows) -> list[Panel]:
    made = []
    for measure, first, ylabel in (
        ("seen", 1, "mean accuracy on the tasks seen so far"),
        ("drift", 2, "drift of old tasks' layer outputs"),
    ):
        lines = [line(arm, rows[f"{PERMUTED}, {arm}"][measure]) for arm in arms(1)]
        x: list[float] = list(range(first, first + len(lines[0].mean)))
        made.append(Panel(PERMUTED, "tasks learned", lines, ylabel, x))
    return made


def finding(rows: Rows) -> str:
    own, ranks, loras = (
        rows[f"{PERMUTED}, {arm}"]["acc"] for arm in (SELF, RANKS_READ, LORAS_READ)
    )
    J = len(rows[f"{PERMUTED}, {SELF}"]["seen"][0])
    conflict = [mean(rows[f"conflict, {arm}"]["acc"]) for arm in (SELF, RANKS_READ, LORAS_READ)]
    return (
        f"After {J} tasks of {PERMUTED}, with equal parameters read, self-activated ranks reach "
        f"{mean(own)}, {beside(own, ranks)} a router over ranks ({mean(ranks)}) and "
        f"{beside(own, loras)} a router over LoRAs ({mean(loras)}); the router over ranks is "
        f"{beside(ranks, loras)} that over LoRAs; on conflict, where no router that sees the input "
        f"alone can win, the three reach {', '.join(conflict)}."
    )


def claims(rows: Rows) -> list[Claim]:
    def values(arm: str, measure: str, stream: str = PERMUTED) -> Values:
        return rows[f"{stream}, {arm}"][measure]

    def compared(label: str, measure: str, more: str, less: str) -> Comparison:
        matters = ACC if measure == "acc" else SHARE
        return Comparison(label, values(more, measure), values(less, measure), matters)

    routers = (RANKS_STORED, RANKS_READ, LORAS_STORED, LORAS_READ)
    return [
        Claim(
            1,
            "Self-activated ranks interfere less with old tasks than routed experts do.",
            [
                compared(f"interference, {arm} - self-activated", "interference", arm, SELF)
                for arm in routers
            ],
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
            [
                compared(f"instability, {arm} - self-activated", "instability", arm, SELF)
                for arm in routers
            ],
        ),
        Claim(
            7,
            "A learned router over ranks is worse than one over whole LoRAs.",
            [
                compared("ACC, LoRAs - ranks, = stored", "acc", LORAS_STORED, RANKS_STORED),
                compared("ACC, LoRAs - ranks, = read", "acc", LORAS_READ, RANKS_READ),
            ],
        ),
        Claim(
            8,
            "Self-activated ranks do better than routed experts.",
            [compared(f"ACC, self-activated - {arm}", "acc", SELF, arm) for arm in routers],
        ),
        Claim(
            9,
            "A balance loss on the router hurts.",
            [compared("ACC, without - with", "acc", LORAS_STORED, BALANCED)],
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
