"""Plain PyTorch on two processes (DistributedDataParallel), growing between tasks.

    python tutorials/loops/ddp.py  # starts torchrun --nproc-per-node 2, and again to resume

SMoRA learns three tasks of permuted digits; each process trains on half of every batch. Its biases
move in `after_step` by the counts of both. `grow` makes new parameters. So after it come, in this
order, a new wrapper, which also gives every process the ranks that process 0 drew, and a new
optimiser; with the old ones there would be an error.

A checkpoint between tasks is the adapters alone, as the next task has a new optimiser anyway. It is
written after task 2, when the model has grown once. Then two fresh processes load it into a model
that has not grown, and learn task 3: the adapters end the same, bit for bit.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minimoe.adapt import adapt, adapters, after_step, context, grow, load, parameters, save, state
from minimoe.continual.backbones import Backbone
from minimoe.continual.learn import score, train
from minimoe.continual.streams import make
from minimoe.schemes.smora import SMoRA

STREAM = make("permuted-digits", tasks=3)
EPOCHS, BATCH = 6, 64


def new_model() -> nn.Module:
    torch.manual_seed(0)
    model = Backbone()
    train(model, model.parameters(), STREAM.base, epochs=8, seed=0)  # it knows upright digits
    return adapt(model, SMoRA, r"fc\d", rank=16, top_k=8, rate=1e-3)


def learn(model: nn.Module, t: int) -> None:
    """Train on task t, and print what came of it."""
    torch.manual_seed(t)  # all processes draw the same order of batches
    wrapped = DistributedDataParallel(model)
    optimiser = torch.optim.AdamW(parameters(model), lr=3e-3, weight_decay=0.0)
    task, mine = STREAM.tasks[t], slice(dist.get_rank(), None, dist.get_world_size())
    model.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(task.y_train)).split(BATCH):
            rows = rows[mine]
            with context(model) as batch:
                loss = F.cross_entropy(wrapped(task.x_train[rows]), task.y_train[rows])
                loss = loss + batch.aux_loss  # 0 for SMoRA, whose balance is in after_step
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            after_step(model)
    model.eval()
    with torch.no_grad():
        acc = " ".join(f"{score(model(k.x_test), k.y_test):.2f}" for k in STREAM.tasks[: t + 1])
    moved = max(layer.expert_bias.abs().max().item() for _, layer in adapters(model))
    if dist.get_rank() == 0:
        print(f"task {t + 1}: accuracy {acc}; a bias has moved by {moved:.3f}", flush=True)


def main(folder: Path, resume: bool) -> None:
    model, start = new_model(), 0
    if resume:
        load(model, folder / "task2.safetensors")
        start = 2
    dist.init_process_group("gloo")
    for t in range(start, len(STREAM.tasks)):
        if t > 0:
            torch.manual_seed(t)
            grow(model)  # the plain model, not its wrapper
        learn(model, t)
        if dist.get_rank() == 0 and not resume:
            save(model, folder / f"task{t + 1}.safetensors")
    dist.destroy_process_group()
    if resume and os.environ["RANK"] == "0":
        mine = state(model)
        load(model, folder / "task3.safetensors")
        equal = all(map(torch.equal, mine.values(), state(model).values()))
        print("resumed:", "equal" if equal else "different", flush=True)


if __name__ == "__main__":
    if "RANK" in os.environ:  # one of the two
        main(Path(sys.argv[1]), resume=len(sys.argv) > 2)
    else:
        two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([*two, __file__, folder], check=True)
            subprocess.run([*two, __file__, folder, "resume"], check=True)
