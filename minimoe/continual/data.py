"""What a task's data may be, and how it is gone through in batches.

    (x, y)          all of it in memory: x and y tensors, or dictionaries of tensors
    a dictionary    likewise, x with y as its "labels"
    a Dataset       torch's, of such pairs or dictionaries
    a DataLoader    or whatever else can be gone through again and again: batches of such

The first axis of a tensor counts examples. A model is called as model(x), and as model(**x) where x
is a dictionary. Where it gives an object with `logits`, as transformers' do, these are its answers.
All that draws from torch, NumPy or `random` is seeded, and a DataLoader's own generator too.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

Inputs = Any  # a tensor (N, ...), or a dictionary of such
Data = Any  # as above


def pair(data: Data) -> tuple[Inputs, Inputs] | None:
    """(x, y) of a batch, or of data in memory; None for data that come in batches."""
    if isinstance(data, Mapping) and "labels" in data:
        return {key: value for key, value in data.items() if key != "labels"}, data["labels"]
    if isinstance(data, tuple | list) and len(data) == 2 and all(map(_is_inputs, data)):
        x, y = (dict(part) if isinstance(part, Mapping) else part for part in data)
        return x, y
    return None


def require(data: Data, what: str) -> None:
    """Raise ValueError unless data is one of the kinds above, with at least one example."""
    whole = pair(data)
    if whole is not None:
        lengths = {len(tensor) for part in whole for tensor in tensors(part)}
        if len(lengths) != 1 or 0 in lengths:
            given = " and ".join(map(str, sorted(lengths)))
            raise ValueError(f"{what} is of {given} examples, allowed: as many x as y, and some")
        return
    kind = type(data).__name__
    loops = hasattr(data, "__iter__") and not isinstance(data, Iterator | str | Tensor | Mapping)
    if not (loops or _maps(data) or isinstance(data, Mixed)):
        raise ValueError(
            f"{what} is a {kind}, allowed: (x, y) of tensors or of dictionaries of tensors, "
            "a Dataset, or a DataLoader"
        )
    if (first := next(iter(batches(data, 1)), None)) is None:
        raise ValueError(f"{what} has no examples")
    require(first, f"a batch of {what}")


def batches(
    data: Data,
    size: int,
    order: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Iterator[tuple[Inputs, Inputs]]:
    """The batches (x, y) of one time through the data: of `size` examples, shuffled by `order` if
    there is one. A DataLoader has its own size and order."""
    whole = pair(data)
    if whole is not None:
        n = count(whole[0])
        some = torch.arange(n) if order is None else torch.randperm(n, generator=order)
        for rows in some.to(device_of(whole[0])).split(size):
            yield to(take(whole[0], rows), device), to(take(whole[1], rows), device)
        return
    if isinstance(data, Mixed):
        yield from data.batches(size, order, device)
        return
    if _maps(data):
        data = DataLoader(data, size, shuffle=order is not None, generator=order)
    for batch in data:
        xy = pair(batch)
        if xy is None:
            raise ValueError(
                f"a batch is a {type(batch).__name__}, allowed: (x, y) of tensors or of "
                "dictionaries of them, or a dictionary with labels"
            )
        yield to(xy[0], device), to(xy[1], device)


def some(data: Data, n: int) -> Inputs:
    """x of at most n examples, at random if data is in memory, else the first."""
    whole = pair(data)
    if whole is not None:
        x = whole[0]
        return take(x, torch.randperm(count(x))[:n].to(device_of(x)))
    return leading(data, n)


def leading(data: Data, n: int) -> Inputs:
    """x of the first n examples; of the first batch alone where batches are of unlike shapes."""
    parts: list[Inputs] = []
    for x, _ in batches(data, n):
        parts.append(x)
        if sum(map(count, parts)) >= n:
            break
    alike = len({str(layout(x)) for x in parts}) == 1
    return take(stacked(parts) if alike else parts[0], slice(n))


def digest(data: Data) -> str:
    """12 hexadecimal digits that change with data in memory (a TensorDataset's, too, and that of a
    DataLoader). Of all else the kind alone counts."""
    kind = "" if pair(data) else type(data).__name__
    total = hashlib.sha256(kind.encode())
    inside = getattr(data, "dataset", data)
    whole = getattr(inside, "tensors", pair(inside))
    for x in whole or ():
        for tensor in tensors(x):
            total.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            total.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:12]


def together(parts: Sequence[Data]) -> Data:
    """Several tasks' data as one, if all are in memory and fit together; else the batches in turn
    of those that fit, or of each."""
    groups: list[tuple[list[Any], list[tuple[Inputs, Inputs]]]] = []  # layouts, and who has them
    for part in parts:
        xy = pair(part)
        if xy is None:
            return _InTurn(parts)
        layouts = [layout(x) for x in xy]
        fitting = next((group for known, group in groups if known == layouts), None)
        if fitting is None:
            groups.append((layouts, fitting := []))
        fitting.append(xy)
    found: list[Data] = [
        tuple(stacked(some) for some in zip(*group, strict=True)) for _, group in groups
    ]
    return found[0] if len(found) == 1 else _InTurn(found)


class Mixed:
    """Data made of other data, which makes its own batches of them."""

    def batches(
        self, size: int, order: torch.Generator | None, device: torch.device | str | None
    ) -> Iterator[tuple[Inputs, Inputs]]:
        """As the function `batches`."""
        raise NotImplementedError


class _InTurn(Mixed):
    """Several data, a batch of each in turn until none has more."""

    def __init__(self, parts: Sequence[Data]):
        self.parts = parts

    def batches(
        self, size: int, order: torch.Generator | None, device: torch.device | str | None
    ) -> Iterator[tuple[Inputs, Inputs]]:
        def repeated(part: Data) -> Iterator[tuple[Inputs, Inputs]]:
            """What several tasks share may be gone through once at a time."""
            for _ in range(sum(other is part for other in self.parts)):
                yield from batches(part, size, order, device)

        going = [repeated(part) for part in {id(part): part for part in self.parts}.values()]
        while going:
            for one in list(going):
                if (batch := next(one, None)) is None:
                    going.remove(one)
                else:
                    yield batch


def layout(x: Inputs) -> list[Any]:
    """Of one example: what must be alike for examples to be stacked."""
    named = x if isinstance(x, dict) else {"": x}
    return [(key, tuple(named[key].shape[1:]), named[key].dtype) for key in sorted(named)]


def stacked(parts: Sequence[Inputs]) -> Inputs:
    """Examples of one layout as one x."""
    if isinstance(parts[0], dict):
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return torch.cat(list(parts))


def call(model: Callable[..., Any], x: Inputs) -> Any:
    """The model's answers to x."""
    answers = model(**x) if isinstance(x, dict) else model(x)
    return getattr(answers, "logits", answers)


def each(change: Callable[[Tensor], Tensor], x: Inputs) -> Inputs:
    """x with every tensor changed."""
    return {key: change(t) for key, t in x.items()} if isinstance(x, dict) else change(x)


def take(x: Inputs, rows: Tensor | slice) -> Inputs:
    """Those examples of x."""
    return each(lambda tensor: tensor[rows], x)


def to(x: Inputs, device: torch.device | str | None) -> Inputs:
    return x if device is None else each(lambda tensor: tensor.to(device), x)


def count(x: Inputs) -> int:
    """How many examples x has."""
    return len(tensors(x)[0])


def device_of(x: Inputs) -> torch.device:
    return tensors(x)[0].device


def token_mask(x: Inputs) -> Tensor | None:
    """What says which of x's tokens count: the entry attention_mask, or mask, of a dictionary."""
    if not isinstance(x, dict):
        return None
    return x.get("attention_mask", x.get("mask"))


def tensors(x: Inputs) -> list[Tensor]:
    return list(x.values()) if isinstance(x, Mapping) else [x]


def _is_inputs(part: Any) -> bool:
    many = isinstance(part, Mapping) and len(part) > 0
    return all(isinstance(tensor, Tensor) and tensor.ndim for tensor in tensors(part)) and (
        many or isinstance(part, Tensor)
    )


def _maps(data: Data) -> bool:
    return isinstance(data, Dataset) and not isinstance(data, IterableDataset)
