"""transformers' Trainer: three tasks, growth between them, and a checkpoint in the middle of one.

    python tutorials/loops/trainer.py

A tiny Llama, made from its config with random weights that stay frozen, learns to spell: in task t
each letter has its one successor. Its linear layers are LoRA-MoE's, with a balance loss. What
minimoe adds to a Trainer (minimoe/trainer.py): the auxiliary loss in the loss, in training only,
and `after_step`. What you do: `grow` between tasks, and a new Trainer for each.

Then a fresh process takes up the checkpoint of task 2, which Trainer wrote when the model had grown
once, in a model that has not: Trainer gives back the adapters, the frozen weights, the optimiser,
and the order of the data. It ends with the same adapters, bit for bit.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from minimoe import LoRAMoE
from minimoe.adapt import adapt, grow, load, save, state
from minimoe.trainer import AdapterTrainer

LETTERS, LENGTH, TASKS = 12, 8, 3  # a sentence: the task's own sign, then letters
TARGETS = r".*(o|gate|up|down)_proj"
SETTINGS = {"rank": 8, "top_k": 2, "balance": 0.01}


def new_model(seed: int) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=LETTERS + TASKS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return adapt(transformers.LlamaForCausalLM(config), LoRAMoE, TARGETS, **SETTINGS)


def sentences(t: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(t)
    successor = torch.randperm(LETTERS, generator=draw)
    letters = [torch.randint(LETTERS, (240,), generator=draw)]
    for _ in range(LENGTH - 1):
        letters.append(successor[letters[-1]])
    x = torch.stack([torch.full((240,), LETTERS + t), *letters], dim=1)
    return [{"input_ids": row, "labels": row.where(row < LETTERS, -100)} for row in x]


@torch.no_grad()
def accuracy(model: torch.nn.Module, t: int) -> float:
    """Of the letters after the first, how many it expects."""
    x = torch.stack([row["input_ids"] for row in sentences(t)])
    guess = model.eval()(input_ids=x).logits[:, 1:-1].argmax(-1)
    return (guess == x[:, 2:]).float().mean().item()


def learn(model: torch.nn.Module, folder: Path, task: int = 0, checkpoint: str | None = None):
    """Learn from this task on, which a checkpoint may have begun."""
    for t in range(task, TASKS):
        if t > 0 and checkpoint is None:
            torch.manual_seed(t)  # the fresh ranks are drawn
            grow(model)
        options = transformers.TrainingArguments(
            output_dir=str(folder / f"task{t + 1}"),
            per_device_train_batch_size=10,
            gradient_accumulation_steps=2,  # the auxiliary loss is divided as the loss is
            num_train_epochs=4,
            learning_rate=1e-2,
            save_steps=30,
            logging_strategy="epoch",
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        )
        trainer = AdapterTrainer(model=model, args=options, train_dataset=sentences(t))
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(resume_from_checkpoint=checkpoint)
        loss = trainer.state.log_history[-2]["loss"]
        alone = trainer.evaluate(sentences(t))["eval_loss"]
        scores = " ".join(f"{accuracy(model, j):.2f}" for j in range(t + 1))
        print(f"task {t + 1}: loss {loss:.3f}, then {alone:.3f} without aux; accuracy {scores}")
        checkpoint = None


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    if len(sys.argv) > 1:  # the fresh process
        folder, model = Path(sys.argv[1]), new_model(1)
        learn(model, folder / "again", 1, str(folder / "task2/checkpoint-30"))
        mine = state(model)
        load(model, folder / "adapters.safetensors")
        equal = all(map(torch.equal, mine.values(), state(model).values()))
        print("resumed:", "equal" if equal else "different")
    else:
        with tempfile.TemporaryDirectory() as name:
            learn(model := new_model(0), Path(name))
            save(model, Path(name, "adapters.safetensors"))
            subprocess.run([sys.executable, __file__, name], check=True)
