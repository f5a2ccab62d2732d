"""LoRA folders of Hugging Face's peft, read and written without peft.

A folder is `adapter_config.json`, and `adapter_model.safetensors` with these tensors, all names
after the prefix "base_model.model.":

    LAYER.lora_A.weight (r, D), LAYER.lora_B.weight (O, r)      y = x W0ᵀ + s · (x Aᵀ) Bᵀ
    MODULE.weight, ...                                          what trains beside: modules_to_save

with s = alpha / r, under rsLoRA alpha / √r; r and alpha may differ by layer. Here B is (r, O).
Where peft skips something in silence, this raises. Checked against peft 0.21.

Axes: D in, O out, R ranks in all, r ranks of a folder's layer, k kept experts.
"""

from .read import load_peft
from .write import save_peft

__all__ = ["load_peft", "save_peft"]
