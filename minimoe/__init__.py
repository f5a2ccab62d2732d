"""Mixtures of low-rank experts, side by side: one equation, many gates.

y = x W0ᵀ + scale · (g ⊙ x Aᵀ) B
"""

from .lora import Adapter, Claims, LoRA
from .lora_moe import LoRAMoE
from .mora import MoRA
from .schemes import (
    EWC,
    SEMA,
    FlyLoRA,
    LoRAMoEPlugin,
    MeteoRA,
    MoCLE,
    MoR1E,
    MoSLD,
    OLoRA,
    SMoRA,
)

__all__ = ["SCHEMES", "Adapter", "Claims"]

# those that ship, by the names that the command gives them
SCHEMES: dict[str, type[Adapter]] = {
    "lora": LoRA,
    "lora_moe": LoRAMoE,
    "mora": MoRA,
    "smora": SMoRA,
    "flylora": FlyLoRA,
    "mor1e": MoR1E,
    "loramoe": LoRAMoEPlugin,
    "mosld": MoSLD,
    "mocle": MoCLE,
    "meteora": MeteoRA,
    "sema": SEMA,
    "olora": OLoRA,
    "ewc": EWC,
}
__all__ += [scheme.__name__ for scheme in SCHEMES.values()]

__version__ = "0.1.0"
