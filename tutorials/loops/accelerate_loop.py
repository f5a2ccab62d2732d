"""accelerate: three tasks, growth between them, micro-batches, a checkpoint in the middle of one.

    python tutorials/loops/accelerate_loop.py

O-LoRA learns three tasks of permuted digits; its penalty keeps a task's keys away from older ones.
`accelerator.backward` divides the loss by the number of micro-batches, and so the penalty with it.
`after_step` comes where the optimiser really steps, `accelerator.sync_gradients` (O-LoRA does
nothing there; SMoRA would). `grow` the unwrapped model, let accelerate forget what it prepared for
the task before, and prepare the model and a new optimiser.

A checkpoint in the middle of task 2 is accelerate's own `save_state`. A fresh process prepares a
model that has not grown, `load_state` gives it the grown adapters, the optimiser and the random
numbers, and `skip_first_batches` what is left of the epoch: it ends the same, bit for bit.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from minimoe.adapt import adapt, after_step, context, grow, load, parameters, save, state
from minimoe.continual.backbones import Backbone
from minimoe.continual.learn import score, train
from minimoe.continual.streams import make
from minimoe.schemes.olora import OLoRA

STREAM = make("permuted-digits", tasks=3)
EPOCHS, BATCH, STOP = 6, 32, (3, 10)  # the checkpoint: epoch and batch of task 2


def new_model() -> nn.Module:
    torch.manual_seed(0)
    model = Backbone()
    train(model, model.parameters(), STREAM.base, epochs=8, seed=0)  # it knows upright digits
    return adapt(model, OLoRA, r"fc\d", rank=8, orthogonality=0.5)


def learn(accelerator: Accelerator, model: nn.Module, t: int, folder: Path, resume: bool) -> None:
    task = STREAM.tasks[t]
    accelerator.free_memory()  # the optimiser and the wrapper of the task before
    loader = DataLoader(TensorDataset(task.x_train, task.y_train), BATCH, shuffle=True)
    optimiser = torch.optim.AdamW(parameters(model), lr=3e-3, weight_decay=0.0)
    wrapped, optimiser, loader = accelerator.prepare(model, optimiser, loader)
    first = skip = 0
    if resume:
        accelerator.load_state(str(folder / "state"))
        first, skip = STOP
    model.train()
    for epoch in range(first, EPOCHS):
        loader.set_epoch(epoch)
        left = accelerator.skip_first_batches(loader, skip) if skip else loader
        for i, (x, y) in enumerate(left, start=skip):
            if not resume and (t, epoch, i) == (1, *STOP):
                accelerator.save_state(str(folder / "state"))
            with accelerator.accumulate(wrapped):
                with context(model) as batch:
                    f = F.cross_entropy(wrapped(x), y)
                    aux = batch.aux_loss
                accelerator.backward(f + aux)
                optimiser.step()
                optimiser.zero_grad()
                if accelerator.sync_gradients:
                    after_step(model)
        skip = 0
    model.eval()
    with torch.no_grad():
        acc = " ".join(f"{score(model(k.x_test), k.y_test):.2f}" for k in STREAM.tasks[: t + 1])
    print(f"task {t + 1}: last loss {f:.3f} + penalty {aux:.4f}; accuracy {acc}")


def main(folder: Path, resume: bool) -> None:
    seeded = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)  # an epoch's order
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, dataloader_config=seeded)
    model = new_model()
    for t in range(1 if resume else 0, len(STREAM.tasks)):
        here = resume and t == 1  # where the checkpoint is
        if t > 0 and not here:
            torch.manual_seed(t)
            grow(model)  # the plain model, not what `prepare` gave
        learn(accelerator, model, t, folder, here)
    if resume:
        mine = state(model)
        load(model, folder / "adapters.safetensors")
        equal = all(map(torch.equal, mine.values(), state(model).values()))
        print("resumed:", "equal" if equal else "different")
    else:
        save(model, folder / "adapters.safetensors")


if __name__ == "__main__":
    if len(sys.argv) > 1:  # the fresh process
        main(Path(sys.argv[1]), resume=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder), resume=False)
            subprocess.run([sys.executable, __file__, folder], check=True)
