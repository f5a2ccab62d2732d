"""transformers' Trainer, with what adapters add to a loop: their auxiliary loss, and after_step.

    loss of a step = Σ_i f_i / N + (1/n) Σ_i aux_i      over its n micro-batches, of N items in all

A stock Trainer trains adapters too, but adds no auxiliary loss (LoRAMoE's balance, OLoRA's penalty)
and never moves SMoRA's biases. One Trainer is one task: make a new one after `grow`, for it keeps
its optimiser. Its checkpoints hold the model's tensors and the adapters' under their own names, and
`train(resume_from_checkpoint=...)` gives a grown model back to one that is adapted in the same way,
grown or not. `minimoe.adapt.save` writes the adapters alone.

Needs transformers 4.57 or newer, whose Trainer counts the micro-batches of a step.
"""

from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from .adapt import after_step
from .context import context


class AfterStep(TrainerCallback):
    """Calls the model's `after_step` after each step of the optimiser."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after_step(kwargs["model"])


class AdapterTrainer(Trainer):
    """A Trainer for adapted models. To have it in another: `class Mine(AdapterTrainer, Other)`.

    The loss that is trained and logged has the auxiliary loss, divided by the number of
    micro-batches as the model's own is; in evaluation there is none. Args and errors: Trainer's.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(AfterStep())

    def describe(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The `context` of a batch: by default its attention_mask (B, T), if it has one. Override
        it for a scheme that needs more, or where layers see other axes than (B, T)."""
        mask = inputs.get("attention_mask")
        return {} if mask is None or mask.ndim != 2 else {"mask": mask}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        with context(model, **self.describe(inputs)) as batch:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            loss = loss + batch.aux_loss / self.undivided(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def undivided(self, num_items_in_batch: Tensor | int | None) -> int:
        """By what an auxiliary loss is still to be divided: the micro-batches of this step, where
        the model's loss is over the items of them all; else 1, for Trainer divides what it gets."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # what newer ones can be told
        if scaled is None:
            scaled = num_items_in_batch is not None or self.compute_loss_func is not None
        return getattr(self, "current_gradient_accumulation_steps", 1) if scaled else 1
