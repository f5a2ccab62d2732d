"""Others' training loops: AdapterTrainer makes the steps of a loop that is written out, whatever
Trainer is asked to do beside; and the loops of tutorials/loops run and resume."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", minversion="5.24")  # older ones count items otherwise
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import minimoe.trainer
from minimoe import LoRAMoE
from minimoe.adapt import adapt, adapters, context, grow, load_state, parameters, state
from minimoe.schemes.lora_moe_plugin import LoRAMoEPlugin
from minimoe.schemes.olora import OLoRA
from minimoe.schemes.smora import SMoRA
from minimoe.trainer import AdapterTrainer

pytestmark = pytest.mark.slow  # transformers takes seconds to import
LOOPS = Path(__file__).parent.parent / "tutorials/loops"
V, T, N, LR = 11, 6, 5, 0.3  # words, tokens, rows: one a micro-batch, so steps of 3 and of 2
SCHEMES = {
    LoRAMoE: {"top_k": 1, "balance": 2.0},
    OLoRA: {"orthogonality": 2.0},
    SMoRA: {"top_k": 2, "rate": 0.1},
}


def llama(scheme=LoRAMoE, grown=True, **settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).double()
    settings = settings or SCHEMES[scheme]
    adapt(model, scheme, r".*(o|up|down)_proj", rank=4, **settings)
    if grown:
        load_state(model, {k: 0.3 * torch.randn_like(v) for k, v in state(model).items()})
        grow(model)
    return model


def rows(**more):
    """Sentences of 2 to 6 words and padding, so that micro-batches weigh differently."""
    draw = torch.Generator().manual_seed(1)
    made = []
    for i in range(N):
        x = torch.randint(V, (T,), generator=draw)
        mask = (torch.arange(T) < 2 + i).long()
        row = {"input_ids": x, "attention_mask": mask, "labels": x.where(mask == 1, -100)}
        made.append(row | {name: torch.tensor(value[i]) for name, value in more.items()})
    return made


def trained(model, folder, kind=AdapterTrainer, data=None, options=None, **more):
    """(the Trainer after two epochs of plain SGD, the micro-batches in their order)."""
    seen = []

    def collate(rows):
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        seen.append({key: value.clone() for key, value in batch.items()})
        return batch

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        num_train_epochs=2,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        **{"save_strategy": "no", **(options or {})},
    )
    data = data or rows()
    trainer = kind(model=model, args=arguments, train_dataset=data, data_collator=collate, **more)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer, seen


def cross_entropy(logits, y, items, smooth=0.0):
    """The sum over what is no padding, over `items`."""
    x, y = logits[:, :-1].float().flatten(0, 1), y[:, 1:].flatten()
    return F.cross_entropy(x, y, reduction="sum", label_smoothing=smooth) / items


def by_hand(model, batches, loss=cross_entropy, by_items=True, aux=1.0, words=(), amp=False):
    """The same steps, written out. Returns each step's loss."""
    model.train()
    losses = []
    for epoch in (batches[:N], batches[N:]):
        for step in (epoch[:3], epoch[3:]):
            items = [int((b["labels"][:, 1:] != -100).sum()) for b in step]
            losses.append(0.0)
            for b, own in zip(step, items, strict=True):
                over = sum(items) if by_items else own * len(step)
                given = {word: b[word] for word in words}
                with context(model, mask=b["attention_mask"], **given) as batch:
                    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                        out = model(b["input_ids"], b["attention_mask"]).logits
                    f = loss(out, b["labels"], over)
                    f = f + aux * batch.aux_loss / len(step)
                f.backward()
                losses[-1] += f.item()
            with torch.no_grad():
                for p in parameters(model):
                    if p.grad is not None:
                        p -= LR * p.grad
                    p.grad = None
            for _, layer in adapters(model):
                layer.after_step()
                layer.end_step()
    return losses


def apart(model, other):
    """The largest difference in what two models have learned."""
    a, b = state(model), state(other)
    return max((a[key] - b[key]).abs().max().item() for key in a)


def logged(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_its_steps_are_those_of_a_loop_by_hand(scheme, tmp_path):
    model, other = llama(scheme), llama(scheme)
    trainer, seen = trained(model, tmp_path)
    losses = by_hand(other, seen)
    assert apart(model, other) < 1e-12
    assert logged(trainer) == pytest.approx(losses, rel=1e-6)  # Trainer sums them in float32
    assert apart(model, llama(scheme)) > 0.1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.filterwarnings("ignore:.* has an auxiliary loss or counts:UserWarning")
def test_a_stock_trainer_makes_others(scheme, tmp_path):
    model, other = llama(scheme), llama(scheme)
    by_hand(other, trained(model, tmp_path, Trainer)[1])
    assert apart(model, other) > 1e-3
    if scheme is not SMoRA:  # whose biases have moved: it is the auxiliary loss alone
        other = llama(scheme)
        by_hand(other, trained(llama(scheme), tmp_path, Trainer)[1], aux=0.0)
        assert apart(model, other) < 1e-12


def unscaled(model):
    """As a model that takes no num_items_in_batch: Trainer divides what it gives."""
    model.accepts_loss_kwargs = False
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_where_trainer_divides_the_loss_it_divides_the_auxiliary_loss_too(scheme, tmp_path):
    model, other = unscaled(llama(scheme)), llama(scheme)
    trainer, seen = trained(model, tmp_path)
    losses = by_hand(other, seen, by_items=False)
    assert apart(model, other) < 1e-12
    assert logged(trainer) == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("labels", [True, False])
def test_a_loss_function_of_ones_own(labels, tmp_path):
    """Trainer takes it as scaled, also of a batch without labels, whose items it cannot count."""

    def own(outputs, y, num_items_in_batch):
        x = outputs.logits.square()
        return x.sum() / (num_items_in_batch if labels else 7)

    def same(logits, y, items):
        return logits.square().sum() / (items if labels else 7)

    data = rows()
    if not labels:
        data = [{("y" if k == "labels" else k): v for k, v in row.items()} for row in data]
    model, other = unscaled(llama()), llama()
    options = {"remove_unused_columns": False}
    pop = AdapterTrainer if labels else Unlabelled
    seen = trained(model, tmp_path, pop, data, options, compute_loss_func=own)[1]
    by_hand(other, [b | {"labels": b.get("labels", b.get("y"))} for b in seen], same)
    assert apart(model, other) < 1e-12


class Unlabelled(AdapterTrainer):
    def describe(self, inputs):
        inputs.pop("y")
        return super().describe(inputs)


def test_a_loss_that_trainer_is_told_to_divide(tmp_path):
    class Told(AdapterTrainer):
        loss_is_scaled_for_ga = False

    if not hasattr(Trainer, "loss_is_scaled_for_ga"):
        pytest.skip("older Trainers cannot be told")
    model, other = llama(), llama()
    function = {"compute_loss_func": lambda outputs, y, num_items_in_batch: outputs.logits.mean()}
    seen = trained(model, tmp_path, Told, **function)[1]
    sizes = iter([3, 3, 3, 2, 2] * 2)  # of the steps, for each micro-batch
    by_hand(other, seen, lambda x, y, items: x.mean() / next(sizes))
    assert apart(model, other) < 1e-12


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("how", ["checkpointing", "label smoothing", "bfloat16"])
def test_with_what_else_trainer_can_do(scheme, how, tmp_path):
    model, other, options = llama(scheme), llama(scheme), {}
    smooth, amp = 0.0, how == "bfloat16"
    if how == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif how == "label smoothing":
        options = {"label_smoothing_factor": (smooth := 0.2)}
    else:
        model, other, options = model.float(), other.float(), {"bf16": True}
    seen = trained(model, tmp_path, options=options)[1]
    by_hand(other, seen, lambda x, y, n: cross_entropy(x, y, n, smooth), amp=amp)
    assert apart(model, other) < 1e-6  # where Trainer itself sums in float32


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
def test_reentrant_checkpointing_is_refused(tmp_path):
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="checkpoint with use_reentrant=False"):
        trained(model, tmp_path)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_evaluation_adds_nothing_and_counts_nothing(scheme, tmp_path):
    model = llama(scheme)
    trainer, _ = trained(model, tmp_path)
    before = state(model)
    loss = trainer.evaluate(rows())["eval_loss"]
    batch = {key: torch.stack([row[key] for row in rows()]) for key in rows()[0]}
    with torch.no_grad():
        alone = model.eval()(**batch).loss.item()
    assert loss == pytest.approx(alone, rel=1e-6)
    assert all(layer.counts is None for _, layer in adapters(model))
    assert all(torch.equal(before[key], tensor) for key, tensor in state(model).items())


def test_after_step_once_a_step_of_the_optimiser(tmp_path, monkeypatch):
    calls = []
    real = minimoe.trainer.after_step
    monkeypatch.setattr(
        minimoe.trainer, "after_step", lambda model: (calls.append(model), real(model))
    )
    model = llama(SMoRA)
    trainer, _ = trained(model, tmp_path)
    assert calls == [model] * 4 and trainer.state.global_step == 4
    biases = torch.cat([layer.expert_bias for _, layer in adapters(model)])
    steps = biases.abs() / 0.1
    torch.testing.assert_close(steps, steps.round())
    assert 1 <= steps.round().max() <= 4


def test_what_a_scheme_needs_is_described_by_ones_own(tmp_path):
    class Told(AdapterTrainer):
        def describe(self, inputs):
            return super().describe(inputs) | {"label": inputs.pop("kind")}

    settings = {"balance": 0.5}
    data = rows(kind=[0, 1, 0, 1, 1])
    model, other = llama(LoRAMoEPlugin, **settings), llama(LoRAMoEPlugin, **settings)
    seen = trained(model, tmp_path, Told, data, {"remove_unused_columns": False})[1]
    by_hand(other, [b | {"label": b["kind"]} for b in seen], words=["label"])
    assert apart(model, other) < 1e-12


def test_the_default_description_is_a_mask_of_two_axes():
    def describe(**inputs):
        return AdapterTrainer.describe(None, inputs)

    mask = torch.ones(2, 3)
    assert describe(attention_mask=mask) == {"mask": mask}
    assert describe(input_ids=mask) == describe(attention_mask=torch.ones(2, 1, 3, 3)) == {}


def test_it_can_be_had_in_another_trainer(tmp_path):
    class Mine(AdapterTrainer, transformers.Seq2SeqTrainer):
        pass

    model, other = llama(), llama()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "TrainingArguments", sequence_arguments)
        seen = trained(model, tmp_path, Mine)[1]
    by_hand(other, seen)
    assert apart(model, other) < 1e-12


def sequence_arguments(**options):
    return transformers.Seq2SeqTrainingArguments(**options)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_grown_checkpoint_resumes_in_a_fresh_model_to_the_same_bits(scheme, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}  # inside the second epoch
    model = llama(scheme)
    trainer, _ = trained(model, tmp_path, options=options)
    other = llama(scheme, grown=False)
    for parameter in other.parameters():  # its base comes from the checkpoint too
        parameter.data.normal_()
    again, _ = trained(llama(), tmp_path / "again")  # anything: for its arguments
    again = AdapterTrainer(
        model=other,
        args=again.args,
        train_dataset=rows(),
        data_collator=trainer.data_collator,
    )
    again.remove_callback(transformers.PrinterCallback)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 4
    a, b = model.state_dict(), other.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_trainer_does_not_outlive_a_task(tmp_path):
    model = llama()
    trainer, _ = trained(model, tmp_path)
    grow(model)
    with pytest.raises(RuntimeError, match=r"make a new optimiser after grow\(\)"):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("trainer", r"task 1: loss \d\.\d+, then \d\.\d+ without aux; accuracy \.?\d\.\d\d\n"),
        ("ddp", r"task 1: accuracy \d\.\d\d; a bias has moved by \d\.\d+\n"),
        ("accelerate_loop", r"task 2: last loss \d\.\d+ \+ penalty (?!0\.0000)\d\.\d+; accuracy"),
    ],
)
def test_a_loop_runs_and_resumes(name, line, tmp_path):
    if name == "ddp" and (not torch.distributed.is_available() or sys.platform != "linux"):
        pytest.skip("needs gloo")
    done = subprocess.run(
        [sys.executable, LOOPS / f"{name}.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == 0, done.stderr
    assert re.search(line, done.stdout), done.stdout
    tasks = re.findall(r"task (\d)", done.stdout)
    assert tasks[:3] == ["1", "2", "3"] and tasks[3:] in (["3"], ["2", "3"])
    assert done.stdout.endswith("resumed: equal\n")
    own = re.findall(r"^task (\d).*accuracy (?:[\d.]+ )*?([\d.]+)(?:;.*)?$", done.stdout, re.M)
    assert own and all(float(last) > 0.8 for _, last in own), done.stdout


def test_the_readme_names_each_loop():
    text = (LOOPS.parent / "README.md").read_text(encoding="utf-8")
    for path in LOOPS.glob("*.py"):
        assert f"(loops/{path.name})" in text
