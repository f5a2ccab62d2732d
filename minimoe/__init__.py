"""Mixtures of low-rank experts, side by side: one equation, many gates.

    y = x W0ᵀ + scale · (g ⊙ x Aᵀ) B

Read lora.py, then the difference between lora_moe.py and mora.py. The atlas of further papers is
in schemes/, a file each; roster.py lists them all.
"""

from .adapter import Adapter, Gate
from .claims import Claims
from .lora import LoRA
from .lora_moe import LoRAMoE
from .mora import MoRA

__all__ = ["Adapter", "Claims", "Gate", "LoRA", "LoRAMoE", "MoRA"]

__version__ = "0.1.0"
