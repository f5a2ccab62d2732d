"""Frozen rows, and what is kept of them from step to step: they are constants within a task.

    room     frozen rows stand in memory with room behind for the live ones: a step that wants all
             rows in one matrix writes the live ones there, and copies no frozen one.
    gram     the frozen rows' part of AᵀA, which the gradient through ‖x Aᵀ‖ needs (sparse.py).

Neither is a parameter, and neither is in a state_dict or a file. Rows that have no room, as after
`.to` or a deepcopy, are right too: they are copied in each step, until the layer grows or loads.

Limits. Under autocast rows are cast anew in each pass, so nothing is kept of them. A room serves
one thread at a time, as a model does. Weak references are kept to frozen rows, which
`torch.utils.swap_tensors` refuses.

Axes: F frozen rows come first, r live ones last, R = F + r; D wide.
"""

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from torch.utils.weak import WeakTensorKeyDictionary

_ROOMS = WeakTensorKeyDictionary()  # by frozen rows: the memory they stand in, with room behind
_GRAMS = WeakTensorKeyDictionary()  # by frozen rows F: Fᵀ F, and when it was made


def with_room(frozen: Tensor, r: int) -> Tensor:
    """A copy of frozen (F, ...), with room for r live rows behind it, where `joined` writes them:
    so no step copies the frozen ones."""
    fits = type(frozen) is Tensor and frozen.device.type in ("cpu", "cuda")  # none that is fake
    if not fits or frozen.is_inference() or torch.is_inference_mode_enabled():
        return frozen.clone()
    F = len(frozen)
    room = frozen.new_empty(F + r, *frozen.shape[1:])
    room[:F] = frozen
    # As a tensor of its own on that memory, so that what is saved, copied or shared ends with it,
    # and what is written behind it is no edit of it.
    rows = from_dlpack(room[:F])
    _ROOMS[rows] = room
    return rows


@torch.no_grad()
def joined(frozen: Tensor, live: Tensor) -> Tensor:
    """frozen, then live, in one (R, D): to be used at once, as the next call may write there."""
    F, r = len(frozen), len(live)
    if not F:
        return live.detach()
    room = None if torch.compiler.is_compiling() else _ROOMS.get(frozen)
    if room is None or len(room) != F + r or room.data_ptr() != frozen.data_ptr():
        return torch.cat([frozen, live])
    room[F:].copy_(live)
    return room


def gram(frozen: Tensor, live: Tensor) -> Tensor:
    """Aᵀ A (D, D), A being frozen, then live; the frozen rows' part is made once for each task.

    It is made anew where the rows are others, in another place, dtype or version, as after load, to
    or any edit that torch counts. It does not see an edit through `.data` or NumPy."""
    if torch.compiler.is_compiling() or frozen.is_inference():
        A = torch.cat([frozen, live])
        return A.T @ A
    made = (frozen.data_ptr(), frozen._version, frozen.dtype)
    kept = _GRAMS.get(frozen)
    with torch.autocast(frozen.device.type, enabled=False):
        if kept is None or kept[1] != made:
            rows = frozen.to(torch.promote_types(frozen.dtype, torch.float32))
            _GRAMS[frozen] = kept = (rows.T @ rows, made)
        rows = live.to(kept[0].dtype)
        return torch.addmm(kept[0], rows.T, rows).to(live.dtype)
