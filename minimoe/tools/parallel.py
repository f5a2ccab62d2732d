"""Data-parallel training: every process sees its part of a batch, and all make the same step.

    torchrun --nproc-per-node 2 -m minimoe compare

A loss that is a mean over tokens adds up over processes by itself. What is no such mean, a balance
loss or a count of chosen ranks, is a function of sums over the whole batch: the sums must be taken
over all processes before the function is. `sum_over_processes` does that; one process pays nothing.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def start(device: str = "cpu") -> None:
    """Join the other processes, if torchrun started this one (gloo on a CPU, NCCL on a GPU)."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        on_cpu = torch.device(device).type == "cpu"
        if not on_cpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo" if on_cpu else "nccl")


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process() -> int:
    """Which of them this is; process 0 alone prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_processes(sums: Tensor) -> Tensor:
    """The sum of `sums` over all processes. Its gradient is that of the sum of their losses."""
    return _SumOverProcesses.apply(sums) if processes() > 1 else sums


class _SumOverProcesses(torch.autograd.Function):
    """A sum both ways: every process reads what each gives, so each gets the gradients of all."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor) -> Tensor:
        total = sums.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _SumOverProcesses.forward(ctx, *grads)


def average(weights: Iterable[Tensor]) -> None:
    """Make each gradient its mean over all processes: 0 in one whose part of the batch did not use
    the weight; none at all where no part did."""
    if processes() == 1 or not (weights := list(weights)):
        return
    used = torch.tensor([float(w.grad is not None) for w in weights], device=weights[0].device)
    dist.all_reduce(used)
    for weight, n in zip(weights, used.tolist(), strict=True):
        if n:
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            dist.all_reduce(grad)
            weight.grad = grad / processes()


def agreed(choice: Any) -> Any:
    """Process 0's choice, in all processes."""
    if processes() == 1:
        return choice
    choices = [choice]
    dist.broadcast_object_list(choices)
    return choices[0]
