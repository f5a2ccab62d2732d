"""Which ranks the tokens choose, in a bench: R of them in all and K each.

random     K at random, as of an untrained router: the worst for memory
pool       K at random of the same 64: a batch of one task
recorded   as MoRA chose them on permuted-digits, 64 ranks a task, R/64 tasks, test images
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..continual.learn import AdapterLearner, pretrain, task_seed, train
from ..continual.streams import Task, make
from ..mora import MoRA

POOL = 64  # ranks of one task, of which `pool` chooses and by which `recorded` grows
RECORDED = 4096  # ranks at most, which 64 tasks add
ROUTINGS = ("random", "pool", "recorded")


def make_routes(
    ranks: tuple[int, ...], routings: tuple[str, ...], K: int, tokens: int
) -> dict[tuple[int, str], Tensor]:
    """{(R, routing): idx (tokens, K)}, for each R those routings that are made for it."""
    recorded = record(ranks, K, tokens) if "recorded" in routings else {}
    routes = {}
    for R in ranks:
        pool = torch.randperm(R)[:POOL]
        if "random" in routings:
            routes[R, "random"] = torch.rand(tokens, R).topk(K)[1]
        if "pool" in routings and K <= POOL < R:
            routes[R, "pool"] = pool[torch.rand(tokens, POOL).topk(K)[1]]
        if R in recorded:
            routes[R, "recorded"] = recorded[R]
    if not routes:
        raise ValueError(f"none of the routings {', '.join(routings)} is made for any R of {ranks}")
    return routes


def record(ranks: tuple[int, ...], top_k: int, tokens: int) -> dict[int, Tensor]:
    """{R: idx (tokens, top_k)}: what the second layer's MoRA chose of R ranks on test images of
    the R/64 tasks of permuted-digits that it had learned, two epochs each."""
    wanted = [R for R in ranks if R % POOL == 0 and top_k <= R <= RECORDED]
    if not wanted:
        return {}
    stream = make("permuted-digits", max(wanted) // POOL, 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = pretrain(stream, 0)
        learner = AdapterLearner(model, MoRA, rank=POOL, top_k=top_k, tau=0.1)
        layer: Any = model.fc2

        def two_epochs(model: nn.Module, weights: Iterable[Tensor], task: Task, t: int) -> None:
            train(model, weights, task, 2, task_seed(0, t))

        idx_of = {}
        for t in range(len(stream.tasks)):
            learner.learn(stream, t, partial(two_epochs, t=t))
            if (R := POOL * (t + 1)) in wanted:
                images = torch.cat([task.x_test for task in stream.tasks[: t + 1]])
                rows = torch.randint(len(images), (tokens,))
                chosen: list[Tensor] = []
                hook = layer.register_forward_pre_hook(
                    lambda module, args, chosen=chosen: chosen.append(module.gate(args[0]).idx)
                )
                with torch.no_grad():
                    model(images[rows])
                hook.remove()
                idx_of[R] = chosen[0]
    torch.set_num_threads(threads)
    return idx_of
