"""What each learner could reach on the planted stream, by algebra and not by training.

The model is one linear layer, and what it lacks for task t a matrix Δ_t (O, D) of rank Q, read
from a subspace of the task's own. All that a scheme can answer is then one layer's answer, and the
best of it can be written down. On the test inputs themselves, with e = y - W0 x what is lacking:

    one update of rank R for all tasks       min over Δ of rank R of Σ_t Σ‖e - Δ x‖² / Σ‖y‖²
    (lora, ewc, lora_grown, olora, joint,    = least squares, then its leading R directions
    replay)
    one of rank r per task, and told which   the same, task by task
    (oracle)
    none (zero_shot)                         Δ = 0

These are limits: nothing that trains gets above them. Where the gate reads x no such form is known;
there it is shown what the scheme can say at least, with weights that are set and not trained:

    lora_moe    a task's router row is the mean of its inputs, and long; its ranks are Δ_t's
    mora        a task's keys are all that mean, all but one of them leaning a little to directions
                of Δ_t: the ranks then fire as one, at nearly the same weight, and the values take
                their small differences apart

Both answer as the oracle does for inputs on the mean's side of the subspace, and not at all for
those on the other side, one in 44: such a gate knows one direction, and of x and -x it chooses one.

Axes: N inputs, J tasks, D in, O out, R ranks in all, r ranks per task, Q rank of a change.
"""

import copy
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..lora_moe import LoRAMoE
from ..mora import MoRA
from ..tools.results import Reachable
from .linear import linear, reduced_rank
from .probe import dense_gate
from .stream import Stream, Task, score

Q = 4
LONG, LEAN = 30.0, 0.003  # of router rows; of keys: further on nothing changes

Data = list[tuple[Tensor, Tensor]]  # x (N, D) and e (N, O) of each task


def planted(tasks: int, seed: int) -> Stream:
    """a linear teacher, changed for each task at rank 4 on a subspace of its own: what each scheme
    can reach is known (scored by the share of the answer explained)"""
    D, M = 64, 12  # inputs and outputs; dimensions of a subspace
    draw = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=draw, dtype=torch.float64)

    def task(name: str, W: Tensor, U: Tensor, mean: float, train: int) -> Task:
        """x = U (a + mean of the first coordinate), a normal; y = W x."""
        data = []
        for n in (train, 256):
            a = normal(n, U.shape[1])
            a[:, 0] += mean
            data.append(((a @ U.T).float(), (a @ U.T @ W.T).float()))
        return Task(name, *data)

    W0 = normal(D, D) / math.sqrt(D)
    base = task("teacher", W0, torch.eye(D, dtype=torch.float64), 0.0, 4096)
    made = []
    for t, U in enumerate(torch.linalg.qr(normal(D, D)).Q.split(M, dim=1)[: min(tasks, 5)]):
        P, V = (torch.linalg.qr(normal(n, Q)).Q for n in (D, M))
        made.append(task(f"subspace {t + 1}", W0 + 3 * P @ V.T @ U.T, U, 2.0, 1024))
    return Stream("planted", made, base, model=linear, reachable=reachable)


@torch.no_grad()
def reachable(
    model: Any, stream: Stream, settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, Reachable]:
    """The mean score over tasks that each learner can reach, and whether none can get above it.

    model is the pretrained backbone; settings are constructor arguments by scheme: those of lora
    (its rank is everyone's), lora_moe and mora are read. Runs in float64, on the CPU.
    """
    base = copy.deepcopy(model.fc1).double().cpu()
    test = [(k.x_test.double(), k.y_test.double()) for k in stream.tasks]
    lacking = [(k.x_train.double(), k.y_train - base(k.x_train.double())) for k in stream.tasks]
    r, J = settings["lora"]["rank"], len(test)

    def limit(tasks: Data, rank: int) -> float:
        """The mean score of the best single update of that rank; tasks count alike, as in ACC."""
        x = torch.cat([x / y.norm() for x, y in tasks])
        e = torch.cat([(y - base(x)) / y.norm() for x, y in tasks])
        return 1 - (e - x @ reduced_rank(x, e, rank).T).square().sum().item() / len(tasks)

    def at_least(layer: Adapter) -> float:
        layer.eval()
        return sum(score(layer(x), y) for x, y in test) / J

    limits = {
        **dict.fromkeys(("lora", "replay_20", "replay_80"), limit(test, r)),
        "zero_shot": limit(test, 0),
        "ewc": limit(test, r),
        "lora_grown": limit(test, r * J),
        "olora": limit(test, r * J),
        "joint": limit(test, r * J),
        "oracle": sum(limit([task], r) for task in test) / J,
    }
    shown = {
        "lora_moe": at_least(plant_lora_moe(LoRAMoE(base, **settings["lora_moe"]), lacking)),
        "mora": at_least(plant_mora(MoRA(base, **settings["mora"]), lacking)),
    }
    shown["mora_detached"] = shown["mora"]  # what the gate's gradient is decides no answer
    return {name: Reachable(acc, None, limit=True) for name, acc in limits.items()} | {
        name: Reachable(acc, None, limit=False) for name, acc in shown.items()
    }


def plant_lora_moe(layer: LoRAMoE, tasks: Data) -> LoRAMoE:
    """Set all its weights, one expert per task: W_t along the mean of x, Bᵀ A = Δ_t."""
    r = layer.rank
    A, B, W = [], [], []
    for x, e in tasks:
        keys = torch.zeros(r, x.shape[1], dtype=x.dtype)
        delta = reduced_rank(x, e, min(r, Q))
        keys[: min(r, Q)] = torch.linalg.svd(delta).Vh[: min(r, Q)]
        A.append(keys)
        B.append(keys @ delta.T)
        W.append(LONG * x.mean(0, keepdim=True) / x.mean(0).norm())
    return _set(layer, {"A": A, "B": B, "router": W})


def plant_mora(layer: MoRA, tasks: Data) -> MoRA:
    """Set all its weights: keys that fire at once as described above, the others 0; and values by
    least squares over all tasks, as the update is linear in them."""
    A, r = [], layer.rank
    fire = min(r, layer.top_k)
    lean = min(fire - 1, Q)
    for x, e in tasks:
        keys = torch.zeros(r, x.shape[1], dtype=x.dtype)
        keys[:fire] = x.mean(0) / x.mean(0).norm()
        keys[:lean] += LEAN * torch.linalg.svd(reduced_rank(x, e, Q)).Vh[:lean]
        A.append(keys)
    _set(layer, {"A": A, "B": [torch.zeros(r, e.shape[1]) for _, e in tasks]})
    layer.eval()
    x, e = (torch.cat(part) for part in zip(*tasks, strict=True))
    h = dense_gate(layer, x) * (x @ torch.cat(A).T)  # (N, R)
    B = torch.linalg.lstsq(h, e, driver="gelsd").solution
    return _set(layer, {"A": A, "B": list(B.split(r))})


def _set(layer: Any, rows: dict[str, list[Tensor]]) -> Any:
    """Give a layer these rows, the last task's live and the others frozen."""
    state = layer.state_dict()
    for name, tasks in rows.items():
        *frozen, state[name] = tasks
        state[f"frozen_{name}"] = torch.cat([tasks[0][:0], *frozen])
    layer.load_state_dict(state)
    return layer
