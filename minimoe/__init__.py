"""Mixtures of low-rank experts, side by side: one equation, many gates.

y = x W0ᵀ + scale · (g ⊙ x Aᵀ) B
"""

from .lora import Adapter, LoRA
from .lora_moe import LoRAMoE
from .mora import MoRA

__all__ = ["Adapter", "LoRA", "LoRAMoE", "MoRA"]
__version__ = "0.1.0"
