"""What a peft folder's config says, and of which of a model's layers."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt
from torch import nn

from ..tools.results import EXACT, parse

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
ANEW = "have peft save it anew"
RETRAIN = "train it without, or have peft merge it into the model (merge_and_unload)"


@dataclass(frozen=True)
class Config:
    """The fields that outputs depend on, with the values that are read here, and what they say of a
    module's name."""

    r: PositiveInt
    lora_alpha: float
    target_modules: str | list[str]
    peft_type: Literal["LORA"] = "LORA"
    exclude_modules: str | list[str] | None = None
    rank_pattern: dict[str, PositiveInt] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False  # says again that a layer is a Conv1D
    bias: Literal["none"] = "none"
    # where a model starts; the ways that are left out also change W0 when they are loaded
    init_lora_weights: Literal[True, False, "gaussian", "eva", "orthogonal"] = True
    __pydantic_config__ = EXACT

    def patterns(self) -> list[str]:
        """All that peft reads as regular expressions."""
        either = [n for n in (self.target_modules, self.exclude_modules) if isinstance(n, str)]
        return [*either, *(self.modules_to_save or ()), *self.rank_pattern, *self.alpha_pattern]

    def targets(self, name: str) -> bool:
        """Whether a layer of that name is to be adapted."""
        for one in self.modules_to_save or []:
            if re.match(rf"(^|.*\.){one}($|\..*)", name):
                return False
        excluded = self.exclude_modules and _is_one_of(self.exclude_modules, name)
        return not excluded and _is_one_of(self.target_modules, name)

    def rank(self, name: str) -> int:
        return _by_pattern(self.rank_pattern, name, self.r)

    def scale(self, name: str) -> float:
        r = self.rank(name)
        alpha = _by_pattern(self.alpha_pattern, name, self.lora_alpha)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def saved(self, names: Iterable[str]) -> list[str]:
        """The modules that train beside: names that end so, even in the middle of a word."""
        return [name for name in names if name.endswith(tuple(self.modules_to_save or ()))]


# fields of any value: the outputs of a trained adapter do not depend on them
INERT = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode"),
    *("loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "task_type"),
}


def read_config(path: Path) -> Config:
    file = path / CONFIG
    if not file.is_file():
        inside = ", ".join(sorted(each.parent.name for each in path.glob(f"*/{CONFIG}")))
        there = f"; there are {inside}" if inside else ""
        raise FileNotFoundError(f"{file}: no such file{there}")
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: truncated, or no JSON ({error}); {ANEW}") from None
    if not isinstance(found, dict) or "peft_type" not in found:
        raise ValueError(f"{file}: peft_type is missing; {ANEW}")
    known = {one.name for one in fields(Config)}
    for name, value in found.items():
        empty = value is None or value is False or value in ("", [], {})
        if name not in known | INERT and not empty:
            raise ValueError(f"{file}: {name} is {json.dumps(value)}, allowed: no value; {RETRAIN}")
    try:
        config = parse(Config, {k: v for k, v in found.items() if k in known and v is not None})
        for pattern in config.patterns():
            re.compile(pattern)
    except (ValueError, re.error) as error:
        retrain = str(error).startswith(("peft_type", "bias", "init_lora_weights"))
        mend = RETRAIN if retrain else "write in what it was trained with"
        raise ValueError(f"{file}: {error}; {mend}") from None
    return config


# peft's patterns


def _is_one_of(names: str | list[str], name: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(f".{name}".endswith(f".{one}") for one in names)


def _by_pattern(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first key that the end of the name matches."""
    ends = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(ends, default)


def places_of(model: nn.Module) -> Counter[int]:
    """In how many places each module stands, by id."""
    return Counter(id(child) for module in model.modules() for child in module._modules.values())


def either(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names))


def inside(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in names)
