"""Losses of what a gate does with the tokens of a batch, in all processes.

Axes: E experts, k kept experts.
"""

import torch
from torch import Tensor

from .sparse import widened
from .tools.parallel import sum_over_processes


def switch_balance(l: Tensor, expert: Tensor, mask: Tensor) -> Tensor:
    """E · Σ_e f_e P_e of logits l (..., E), kept expert (..., k), over tokens of mask (...) 1 in
    all processes: f_e the share of the kept that are e, P_e the mean of softmax(l)_e (2101.03961,
    eq. 4-6). 1 if uniform, E if one takes all, 0 if no token. MixLoRA's (2404.15159) is k times."""
    E, k, m = l.shape[-1], expert.shape[-1], mask.unsqueeze(-1)
    P = (m * widened(l).softmax(-1)).reshape(-1, E).sum(0)
    f = torch.zeros_like(P).scatter_add(0, expert.flatten(), m.expand_as(expert).flatten())
    f, P, kept = sum_over_processes(torch.cat([f, P, f.sum(0, keepdim=True)])).split([E, E, 1])
    return E * (f / kept.clamp_min(1) * (k * P / kept.clamp_min(1))).sum()


def mean_over_tokens(each: Tensor, mask: Tensor) -> Tensor:
    """The mean of a loss (...) over the tokens of all processes where mask (...) is 1; 0 if there
    are none."""
    total, tokens = (mask * each.where(mask > 0, 0)).sum(), mask.sum()
    return sum_over_processes(total) / sum_over_processes(tokens).clamp_min(1)
