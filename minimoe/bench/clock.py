"""How calls are timed: all contenders in one process, interleaved; time, memory, and spread.

In each round every contender runs once, in an order that turns from round to round, and a ratio is
taken within its round: what slows the machine for a second slows all of them.

Memory: freed memory stays with the process (on glibc, by mallopt). Without that a fresh (T, O)
array costs page faults, which on some machines take as long as the base's GEMM, and one would
measure the kernel's mood. On a GPU times are those of CUDA events, every call finds the L2 cache
cold (a buffer larger than it is written before), and `floor` is the time that the bytes which
must be read and written take at the speed of a plain copy.
"""

import contextlib
import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

Contenders = dict[str, Callable[[], Any]]


class Clock:
    """What a call takes, in time and in memory."""

    def __init__(self, device: str):
        self.cpu = torch.device(device).type == "cpu"
        self.bandwidth: float | None = None
        if not self.cpu:
            self.cache = torch.empty(2**28, dtype=torch.uint8, device=device)  # past any L2
            source = torch.empty(2**30, dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            target.copy_(source)
            ms = statistics.median(self(lambda: target.copy_(source)) for _ in range(9))
            self.bandwidth = 2 * 2**30 / (ms / 1e3)

    def __call__(self, f: Callable[[], Any]) -> float:
        """Milliseconds of one call."""
        if self.cpu:
            start = time.perf_counter()
            f()
            return (time.perf_counter() - start) * 1e3
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        before.record()
        f()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after)

    def floor(self, size: int) -> Contenders:
        """On a GPU, a contender that takes as long as copying so many bytes does."""
        if self.bandwidth is None:
            return {}
        return {"floor": _Fixed(size / self.bandwidth * 1e3)}

    def peak(self, f: Callable[[], Any]) -> int:
        """Bytes that one call holds at most, beyond what was there before."""
        f()
        if not self.cpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            f()
            return torch.cuda.max_memory_allocated() - before
        activities = [torch.profiler.ProfilerActivity.CPU]
        with (
            _quiet_stderr(),  # the profiler reports its own start and stop there
            torch.profiler.profile(activities=activities, profile_memory=True) as profile,
        ):
            f()
        kineto: Any = profile.profiler
        events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
        now = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return most


def rounds(contenders: Contenders, repeats: int, clock: Clock) -> dict[str, list[float]]:
    """Milliseconds of each contender in each of so many rounds, after two that are not timed."""
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(2):  # the second warms what the first allocated
        for f in contenders.values():
            f()
    for i in range(repeats):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            f = contenders[name]
            times[name].append(f.ms if isinstance(f, _Fixed) else clock(f))
    return times


def spread(values: list[float]) -> dict[str, float]:
    """The median over rounds, and the distance between the quartiles."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "iqr": high - low}


def keep_freed_memory() -> None:
    """Ask glibc, where there is one, to keep what is freed and to take it all from one heap."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


class _Fixed:
    """A contender whose time is known, not measured."""

    def __init__(self, ms: float):
        self.ms = ms

    def __call__(self) -> None: ...


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """What libraries write to file descriptor 2 inside is dropped."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
