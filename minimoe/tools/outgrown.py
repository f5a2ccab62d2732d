"""What was made for a layer before it grew, and must be made anew: it would train nothing.

An optimiser goes on with the parameters that it was given, and a data-parallel wrapper sums the
gradients of those that it found. A layer that grows has new ones. Both are refused where they are
used; a sharded layer, whose rows no process has whole, where it would grow.
"""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

_outgrown: Any = WeakTensorKeyDictionary()  # {parameter: (its layer, its name there)}
_known: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()


def outgrow(parameter: Tensor, layer: nn.Module, name: str) -> None:
    """The layer has frozen what this parameter held, and trains another one of that name."""
    _outgrown[parameter] = (weakref.ref(layer), name)


def take_back(parameter: Tensor) -> None:
    """The layer trains this parameter after all."""
    if parameter in _outgrown:
        del _outgrown[parameter]


def refuse_old_optimiser(optimiser: Optimizer, *_: Any) -> None:
    """Raise RuntimeError if an optimiser holds what a layer has outgrown, and not what the layer
    trains in its place."""
    if not _outgrown:
        return
    held = [p for group in optimiser.param_groups for p in group["params"]]
    for parameter in held:
        layer, name = _outgrown.get(parameter, (lambda: None, ""))
        if (grown := layer()) is not None and not any(p is getattr(grown, name) for p in held):
            raise RuntimeError(
                f"{grown.where} has grown since this {type(optimiser).__name__} was made, which "
                f"does not train its {name}: make a new optimiser after grow()"
            )


register_optimizer_step_pre_hook(refuse_old_optimiser)


def refuse_old_wrapper(layer: Any) -> None:
    """Raise RuntimeError in a pass of a DistributedDataParallel that was made before the layer's
    values B."""
    if not (dist.is_available() and dist.is_initialized()) or torch.compiler.is_compiling():
        return
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is not None:
        if wrapper not in _known:
            _known[wrapper] = {id(p) for p in wrapper._module_parameters}
        if id(layer.B) not in _known[wrapper]:
            raise RuntimeError(
                f"{layer.where} has grown since this DistributedDataParallel was made (or was only "
                "then adapted), whose replicas would drift apart: wrap the model anew, and make a "
                "new optimiser"
            )


def refuse_shards(parameter: Any, where: str) -> None:
    """Raise RuntimeError if the parameter is a shard, or a view of one, of FSDP."""
    sharded = not isinstance(parameter, nn.Parameter) or hasattr(parameter, "device_mesh")
    if sharded or hasattr(parameter, "_fsdp_flattened"):
        raise RuntimeError(
            f"{where} is sharded by FSDP, and cannot grow: grow the plain model, then shard it "
            "anew, and make a new optimiser"
        )


def refuse_wrapped(model: nn.Module) -> None:
    """Raise RuntimeError if DDP or FSDP wraps the model, or a part of it."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, DistributedDataParallel) or kind.startswith(("FSDP", "FullySharded")):
            raise RuntimeError(
                f"{name or 'the model'} is wrapped by {kind}: grow the plain model inside, wrap it "
                "anew, and make a new optimiser"
            )
