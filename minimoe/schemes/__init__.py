"""The atlas: one file per further paper, each the same equation with another gate."""

from .ewc import EWC
from .flylora import FlyLoRA
from .loramoe import LoRAMoEPlugin
from .meteora import MeteoRA
from .mocle import MoCLE
from .mor1e import MoR1E
from .mosld import MoSLD
from .olora import OLoRA
from .sema import SEMA
from .smora import SMoRA

__all__ = [
    "EWC",
    "SEMA",
    "FlyLoRA",
    "LoRAMoEPlugin",
    "MeteoRA",
    "MoCLE",
    "MoR1E",
    "MoSLD",
    "OLoRA",
    "SMoRA",
]
