"""Mixtures of low-rank experts, side by side: one equation, many gates.

y = x W0ᵀ + scale · (g ⊙ x Aᵀ) B
"""

from .lora import Adapter, Claims, LoRA
from .lora_moe import LoRAMoE
from .mora import MoRA

__all__ = ["SCHEMES", "Adapter", "Claims", "LoRA", "LoRAMoE", "MoRA"]

# those that ship, by the names that the command gives them
SCHEMES: dict[str, type[Adapter]] = {"lora": LoRA, "lora_moe": LoRAMoE, "mora": MoRA}

__version__ = "0.1.0"
