"""A sigmoid per kept expert, where the weights are said to sum to 1."""

from dataclasses import replace

import torch

from minimoe import LoRAMoE
from minimoe.sparse import rank_scores

LAW = "simplex"


class Scheme(LoRAMoE):
    claims = replace(LoRAMoE.claims, as_lora=None)

    def gate(self, x):
        logits = self.project(x, "router")
        top, expert = logits.topk(min(self.top_k, logits.shape[-1]))
        w = top.sigmoid()
        ranks = torch.arange(self.rank, device=x.device)
        idx = (expert.unsqueeze(-1) * self.rank + ranks).flatten(-2)
        z = rank_scores(x, idx, self.frozen_A, self.A, self.path)
        return idx, w.repeat_interleave(self.rank, -1), z
