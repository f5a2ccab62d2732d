"""Recovery: does a gate find the clusters of its inputs, where one map for all explains nothing?

Mixture of Experts Provably Detect and Learn the Latent Cluster Structure in Gradient-Based
Learning. Kawata et al., arXiv 2506.01656. Reconstructed from its abstract.

    x = m_c + ε                 ε ~ N(0, I) (D,), cluster c drawn at random, all equally likely
    y = x U V_c                 U (D, Q) the same for all clusters, orthogonal to all means

    two clusters                m_2 = -m_1, V_2 = -V_1
    four clusters               orthogonal means, V_c (Q, O) drawn at random
    equal means                 the same, but m_c = m_1: x does not say whose it is

‖m_c‖ = 4, V of variance 1/Q. Of two clusters, by algebra, E[y] = 0 and E[yᵀ x] = 0:

    2 E[yᵀ x] = V_1ᵀ Uᵀ (I + m_1ᵀ m_1) + V_2ᵀ Uᵀ (I + m_2ᵀ m_2) = (V_1 + V_2)ᵀ Uᵀ = 0

So of all linear maps the best is 0, and explains 0; but an expert for each cluster, and a gate that
reads the mean, explain all. Of four clusters the best map is U V̄, V̄ the mean of V_c, and explains
‖V̄‖² / mean ‖V_c‖², about a quarter. With equal means the same holds of every gate whatsoever, as
it holds of E[y | x]: there nothing can be found.

All clusters are shown at once. One linear layer, W0 = 0, and as many ranks for all learners, C Q:
one LoRA; a router over C LoRAs, 2 or all of them kept (of 1 the weight is always 1, and no gradient
reaches the router); MoRA, Q ranks kept. NMI: the normalised mutual information of the cluster and
the expert that weighs most, 1 if each names the other. MoRA's experts are single ranks, more than
there are clusters, and several for a cluster lower it.

Fixed before any run: sizes, steps, arms. Settings are the roster's but for ranks and how many are
kept, and MoRA has no delta, as no input is of no task.

Axes: D in, O out, C clusters, Q directions that count, R = C Q ranks.
Departures: the paper has nonlinear single-index models, and proves how many samples and steps SGD
takes; here maps are linear, and one dense update fails by algebra.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn

from ..adapt import adapt, adapters, parameters
from ..continual.learn import train
from ..continual.linear import one_map, zero
from ..continual.probe import dense_gate
from ..continual.stream import Stream, Task, score
from ..roster import EPOCHS, SCHEMES
from ..tools.results import Panel
from ..tools.seeds import seeded
from .common import SHARE, across, cells_of, line, mean, settings_of
from .study import Cell, Rows, Study
from .verdicts import Claim, Comparison

D, O, Q = 16, 16, 4
DISTANCE = 4.0  # of a mean from 0
TRAIN, TEST = 2048, 1024
CASES = {  # clusters, and whether their means differ
    "two": (2, True),
    "four": (4, True),
    "two of equal means": (2, False),
    "four of equal means": (4, False),
}
CLOSED, MOE = "least_squares", "lora_moe, top 2"


def arms(C: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Each learner's scheme and settings: all of C Q ranks."""
    rank = {"rank": C * Q}
    routed = rank | {"experts": C}
    mora = settings_of("mora") | rank | {"top_k": Q, "delta": -1.0}
    found = {"lora": ("lora", rank), MOE: ("lora_moe", routed | {"top_k": 2})}
    if C > 2:
        found[f"lora_moe, top {C}"] = "lora_moe", routed | {"top_k": C}
    return {"least squares": (CLOSED, {}), **found, "mora": ("mora", mora)}


def mixture(C: int, apart: bool, seed: int) -> tuple[Stream, Tensor]:
    """All clusters as one task, and the cluster (TEST,) of each input that tests."""
    draw = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=draw, dtype=torch.float64)
    basis = torch.linalg.qr(normal(D, D)).Q
    m, U, V = DISTANCE * basis[:, :C].T, basis[:, C : C + Q], normal(C, Q, O) / math.sqrt(Q)
    if C == 2:
        m[1], V[1] = -m[0], -V[0]
    if not apart:
        m[:] = m[0].clone()
    data = []
    for n in (TRAIN, TEST):
        c = torch.randint(C, (n,), generator=draw)
        x = m[c] + normal(n, D)
        data.append((x.float(), torch.einsum("nd,dq,nqo->no", x, U, V[c]).float()))
    return Stream("mixture", [Task("all clusters", *data)], model=zero), c


def cells(seeds: Sequence[int], quick: bool) -> list[Cell]:
    rows = {
        f"{case}, {arm}": {"case": case, "scheme": scheme, "settings": settings}
        for case, (C, _) in list(CASES.items())[:: 2 if quick else 1]
        for arm, (scheme, settings) in arms(C).items()
    }
    return cells_of("recovery", rows, seeds, epochs=4 if quick else EPOCHS)


def measure(cell: Cell) -> dict[str, Any]:
    """explained: of y, on inputs that test. nmi: as the module says; 0 of one
    LoRA, all of whose ranks weigh 1, and nan without ranks."""
    stream, cluster = mixture(*CASES[cell["case"]], cell["seed"])
    if cell["scheme"] == CLOSED:
        return {"explained": one_map(stream), "nmi": math.nan}
    (task,) = stream.tasks
    with seeded(cell["seed"]):
        model = zero(stream)
        adapt(model, SCHEMES[cell["scheme"]], model.targets, **cell["settings"])
        train(model, parameters(model), task, cell["epochs"], cell["seed"])
    return scored(model, task, cluster)


@torch.no_grad()
def scored(model: nn.Module, task: Task, cluster: Tensor) -> dict[str, float]:
    """Of a model of one adapted layer."""
    ((_, layer),) = adapters(model)
    expert = dense_gate(layer, task.x_test).argmax(-1)  # (N,): of a block its first rank
    nmi = normalized_mutual_info_score(cluster, expert)
    return {"explained": score(model(task.x_test), task.y_test), "nmi": float(nmi)}


# What the numbers say


def arms_of(rows: Rows, case: str) -> dict[str, dict[str, Any]]:
    """The rows of a case, by arm."""
    start = f"{case}, "
    return {row.removeprefix(start): rows[row] for row in rows if row.startswith(start)}


def panels(rows: Rows) -> list[Panel]:
    made = []
    for measure, words in {
        "explained": "share explained",
        "nmi": "NMI, cluster and expert",
    }.items():
        shown = [row for row in rows if not math.isnan(rows[row][measure][0])]
        lines = [line(row, across(rows, [row], measure)) for row in shown]
        kinds = [row.partition(", ")[0] for row in shown]
        made.append(Panel(words, words, lines, names=shown, kinds=kinds))
    return made


def finding(rows: Rows) -> str:
    parts = []
    for case in CASES:
        arms = arms_of(rows, case)
        each = ", ".join(f"{arm} {mean(arms[arm]['explained'])}" for arm in arms)
        nmi = {arm: mean(arms[arm]["nmi"]) for arm in (MOE, "mora") if arm in arms}
        if arms:
            parts.append(f"{case}: {each}, at an NMI of {' and '.join(nmi.values())}")
    return (
        "Share of the answer explained, and the NMI of the clusters with the experts of "
        f"{MOE} and mora: {'; '.join(parts)}."
    )


def claims(rows: Rows) -> list[Claim]:
    def against(case: str, measure: str, less: str, more: str = MOE) -> Comparison:
        ours, theirs = rows[f"{case}, {more}"][measure], rows[less][measure]
        return Comparison(f"{case}: {measure}, {more} - {less}", ours, theirs, SHARE)

    whole = [case for case in CASES if CASES[case][1] and arms_of(rows, case)]
    return [
        Claim(
            11,
            "Experts divide a problem of clusters that one network fails on, as it takes it whole.",
            [against(case, "explained", f"{case}, lora") for case in whole],
        ),
        Claim(
            11,
            "The router finds the clusters.",
            [against(case, "nmi", f"{case} of equal means, {MOE}") for case in whole],
        ),
    ]


STUDY = Study(
    asks="Does a gate find clusters on which one map for all explains nothing?",
    cells=cells,
    measure=measure,
    columns={"explained": "explained", "nmi": "NMI"},
    panels=panels,
    finding=finding,
    claims=claims,
)
