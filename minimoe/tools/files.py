"""Files that are whole or not there: every file of this package is written through here."""

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


def write_atomic(path: str | Path, data: bytes) -> None:
    """Put data at path: a reader, or a kill at any moment, finds the old file or the new one."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(draft, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_tensors(path: str | Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """A safetensors file of tensors, with `facts` (anything JSON holds) in its header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": "pt", "minimoe": json.dumps(facts)}
    write_atomic(path, safetensors.torch.save(tensors, header))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote. Raises FileNotFoundError, and ValueError on a file that is
    truncated, no safetensors file, or not one of ours."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["minimoe"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or no safetensors file ({error})") from None
    except (KeyError, json.JSONDecodeError):
        raise ValueError(f"{path}: a safetensors file, but not one that minimoe wrote") from None
