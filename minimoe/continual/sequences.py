"""Letters that are said again in the task's order, by a transformer whose gates see one token each.

    cue  a b c d e f g h   c a h b f e d g      the task is in the cue and in the order alone

The base domain says them in order, so a transformer that knows it looks back; a task has it look
elsewhere. Each letter is drawn alone: what stands before it says nothing of it, nor does its
neighbour, and no count of neighbours helps. The labels of the first half are left out.
"""

import torch

from .backbones import Decoder
from .stream import IGNORED, Stream, Task

LETTERS = 26
LENGTH = 8
MOST = 10  # tasks; a cue each, and one of the base domain's


def sequences(tasks: int, seed: int) -> Stream:
    """a cue, eight random letters, and these again in the task's order: a transformer must look
    back, and a gate sees one token"""
    draw = torch.Generator().manual_seed(seed)

    def task(name: str, cue: int, order: torch.Tensor, train: int) -> Task:
        data = []
        for n in (train, 512):
            letters = torch.randint(LETTERS, (n, LENGTH), generator=draw)
            whole = torch.cat([torch.full((n, 1), LETTERS + cue), letters, letters[:, order]], 1)
            y = whole[:, 1:].clone()
            y[:, :LENGTH] = IGNORED  # nobody can know these
            data.append((whole[:, :-1], y))
        return Task(name, *data)

    base = task("in order", 0, torch.arange(LENGTH), 8192)
    made = []
    for t in range(min(tasks, MOST)):
        order = torch.randperm(LENGTH, generator=draw)
        made.append(task(f"order {t + 1}", t + 1, order, 512))
    return Stream(
        "sequences",
        made,
        base,
        model=lambda stream: Decoder(LETTERS + 1 + MOST, 2 * LENGTH),
        classes=LETTERS + 1 + MOST,
        pretraining={"epochs": 5},
    )
