"""Schemes that nobody has looked at yet: each law, or comparison, in a process of its own.

A scheme's code runs nowhere else, from the moment its file is loaded. So whatever it does, nothing
is left of it: if it takes too long it is killed, with the processes of its group; if it ends its
process, that is evidence; what it changes goes with its process; what it prints goes to stderr.

On Linux a process is a fork, which starts in milliseconds: all that it needs is imported. On other
systems, where a fork is not safe, each imports torch anew.
"""

import contextlib
import ctypes
import math
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from ..adapter import Adapter
from ..lora import LoRA
from ..roster import SCHEMES, lookup
from ..tools.load import load_name
from .case import Broken, cases
from .check import TELL, Row, claimed, drawn, hold, unchanged
from .laws import LAWS, Law
from .pair import WITHIN, mapped
from .same import STEPS, require_ways, same

SECONDS = 60.0
FORK = sys.platform == "linux"
CONTEXT: Any = get_context("fork" if FORK else "spawn")
LOADED, BUILT = "when it is loaded", "when a layer is built"  # told of before laws and steps
Done = Callable[[str, int, int], None]  # a label, how many are newly done, of how many
Call = Callable[[], Any]


def check_apart(
    names: Sequence[str], jobs: int, seconds: float = SECONDS, done: Done = lambda *_: None
) -> dict[str, list[Row]]:
    """Hold schemes, by such names as `minimoe check` takes, to the laws: a Row for each of LAWS.

    jobs: processes side by side; rows do not depend on it. seconds: for each law; one that takes
    longer is broken, and so is one whose process ends. done is told of progress. No Row has a case.

    Raises ValueError, before the first law, on what cannot be loaded and built.
    """
    _require(names, [partial(_built, name) for name in names], jobs, seconds)
    every = [(name, law) for name in names for law in LAWS]
    calls = [(f"{name}, {law.__name__}", partial(_held, name, law)) for name, law in every]
    results: dict[str, list[Row]] = {name: [] for name in names}
    for (name, law), found in zip(every, _run(calls, jobs, seconds, done), strict=True):
        results[name].append(found.row(law.__name__) if isinstance(found, Lost) else found)
    return results


def same_apart(
    names: Sequence[str],
    theirs: str,
    jobs: int,
    seconds: float = SECONDS,
    done: Done = lambda *_: None,
    device: str = "cpu",
    within: float = WITHIN,
) -> dict[str, list[Row]]:
    """Hold each of names to the scheme of the name theirs: a Row for each of STEPS. seconds: for
    each step. device, within: as of `same`. All else is as of `check_apart`."""
    tries: list[Call] = [partial(_built, theirs)]
    tries += [partial(_mapped, name, theirs, device, within) for name in names]
    _require([theirs, *names], tries, jobs, seconds)
    calls = [(name, partial(_same, name, theirs, device, within)) for name in names]
    results = zip(names, _run(calls, jobs, seconds, done), strict=True)
    return {name: r.steps() if isinstance(r, Lost) else r for name, r in results}


def _require(names: Sequence[str], calls: Sequence[Call], jobs: int, seconds: float) -> None:
    """Raise ValueError if the call for one of the names does not return."""
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}, allowed: 1 or more")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds is {seconds:g}, allowed: above 0")
    for name in names:
        if name not in SCHEMES and ":" not in name:
            raise ValueError(f"scheme is {name!r}, allowed: {', '.join(SCHEMES)}, file.py:Class")
    tries = [(name, partial(_tried, call)) for name, call in zip(names, calls, strict=True)]
    for name, found in zip(names, _run(tries, jobs, seconds, first=True), strict=True):
        if isinstance(found, Lost):
            raise ValueError(f"{name} {found.why} {found.at}")


# In a process of its own


def _built(name: str) -> type[Adapter]:
    """The scheme of that name. Raises ValueError if it cannot be loaded, or built."""
    with _loading(name):
        scheme = lookup(name)[1].scheme
    assert scheme is not None
    TELL.get()(BUILT, "")
    claimed(scheme, {})
    return scheme


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    TELL.get()(LOADED, "")
    try:
        with unchanged():
            yield
    except Broken as error:
        raise ValueError(f"{name.rpartition(':')[0]} {error} {LOADED}") from error


def _tried(call: Call) -> bool:
    call()
    return True


def _held(name: str, law: Law) -> Row:
    return replace(hold(law, _built(name)), case=None)  # no pickle holds somebody's classes


def _mapped(name: str, theirs: str, device: str, within: float) -> tuple[Any, type[Adapter]]:
    """Mine and theirs. Raises ValueError if they cannot be loaded, or are none; or if they cannot
    be compared in this way."""
    require_ways(device, within)  # not before: a process that has asked for a GPU cannot fork
    scheme = _built(theirs)
    path, colon, in_file = name.rpartition(":")
    if not colon:
        return _built(name), scheme
    with _loading(name):
        mine = load_name(path, in_file)
    try:
        mapped(mine, scheme)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error
    return mine, scheme


def _same(name: str, theirs: str, device: str, within: float) -> list[Row]:
    mine, scheme = _mapped(name, theirs, device, within)
    return [replace(row, case=None) for row in same(mine, scheme, device, within)]


def _work(call: Call, mouth: Connection, notes: str) -> None:
    """All that a process does: it tells what it looks at, and at last what it found."""
    from hypothesis.configuration import set_hypothesis_home_dir

    if FORK:  # when its parent ends, however that does, so does it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # what it starts is killed with it; Ctrl-C comes to its parent alone
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        os.dup2(2, 1)
    sys.stdout = sys.stderr
    set_hypothesis_home_dir(notes)  # and not .hypothesis in the folder one stands in
    tempfile.tempdir = notes
    torch.set_num_threads(1)

    def say(name: str | None, what: Any) -> None:
        try:
            mouth.send((name, what))
        except OSError:  # the scheme has closed it
            os._exit(1)

    TELL.set(lambda n, what: say(n, what if isinstance(what, str) else replace(what, case=None)))
    found: Any
    try:
        found = call()
    except (ValueError, OSError) as error:
        found = ValueError(str(error))
    except KeyboardInterrupt:  # nobody's but the scheme's
        found = Lost("raises KeyboardInterrupt")
    say(None, found)


# And here


@dataclass
class Lost:
    """A call that found nothing: why; where it was; and what it had told before, by name."""

    why: str = ""
    at: str = ""
    told: dict[str, str | Row] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """Of the law or step of that name, which it was at."""
        what = self.told.get(name, self.at)
        if isinstance(what, Row):  # it looked for a smaller case
            return replace(what, verdict="broken", evidence=f"{what.evidence}; then it {self.why}")
        return Row(name, "broken", f"{self.why}; {what}")

    def steps(self) -> list[Row]:
        """Of all steps, as `same` gives them."""
        names = [step.__name__ for step in STEPS]
        last = names.index(self.at) if self.at in names else 0
        before = [row for row in self.told.values() if isinstance(row, Row)][:last]
        seen = [r if r.verdict == "held" else replace(r, verdict="not claimed") for r in before]
        left = [Row(name, "not claimed", "not looked at") for name in names[last + 1 :]]
        return [*seen, self.row(names[last]), *left]


class _Process:
    """A call on its way. found: what came of it, or None."""

    def __init__(self, label: str, call: Call, notes: str):
        self.label, self.lost = label, Lost()
        self.found: Any = None
        self.ear, mouth = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=_work, args=(call, mouth, notes))
        with warnings.catch_warnings():
            # of a fork of several threads: no other thread of ours holds anything
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process.start()
        mouth.close()
        self.since = time.monotonic()

    def listen(self, seconds: float) -> None:
        """Hear what it has told."""
        ended = self.process.exitcode is not None  # if so, nothing comes after what there is
        try:
            while self.found is None and self.ear.poll():
                name, what = self.ear.recv()
                if name is None:
                    self.found = what
                    continue
                if name != self.lost.at:
                    self.lost.at, self.since = name, time.monotonic()
                known = self.lost.told.get(name)
                if isinstance(what, Row) or not (
                    isinstance(known, Row) and known.verdict == "broken"
                ):
                    self.lost.told[name] = what
        except EOFError:
            ended = True
        if isinstance(self.found, Lost):
            self.found = replace(self.lost, why=self.found.why)
        elif self.found is None and ended:
            self.process.join(1)
            code = self.process.exitcode
            if code is not None and code < 0:
                self.lost.why = f"has its process killed by {signal.Signals(-code).name}"
            else:
                self.lost.why = f"ends its process with status {code}"
            self.found = self.lost
        elif self.found is None and time.monotonic() - self.since > seconds:
            self.lost.why = f"takes longer than {seconds:g} s"
            self.found = self.lost

    def end(self) -> None:
        """Leave nothing of it."""
        with contextlib.suppress(ValueError):  # closed, before a stop came
            with contextlib.suppress(OSError, AttributeError):  # no such group, or no groups here
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.join()
            self.process.close()
        self.ear.close()


def _run(
    calls: Sequence[tuple[str, Call]],
    jobs: int,
    seconds: float,
    done: Done = lambda *_: None,
    first: bool = False,
) -> list[Any]:
    """What each labelled call returns, or a Lost. first: raise the first ValueError of one."""
    waiting, running = [*enumerate(calls)], dict[int, _Process]()
    found: dict[int, Any] = {}
    with _warm() as notes:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    i, (label, call) = waiting.pop()  # the longest laws are the last ones
                    running[i] = _Process(label, call, notes)
                    done(label, 0, len(calls))
                left = min(p.since for p in running.values()) + seconds - time.monotonic()
                wait([p.ear for p in running.values()], min(max(left, 0), 1))
                for i, process in [*running.items()]:
                    process.listen(seconds)
                    if isinstance(process.found, ValueError):  # what could be built before
                        if first:
                            raise process.found
                        process.found = replace(process.lost, why=f"says {process.found}")
                    if process.found is not None:
                        found[i] = process.found
                        process.end()
                        del running[i]
                        done(process.label, 1, len(calls))
        finally:
            for process in running.values():
                process.end()
    return [found[i] for i in range(len(calls))]


@contextlib.contextmanager
def _warm() -> Iterator[str]:
    """Inside, hypothesis has done what it does once in a process, reading all sources. Yields a
    folder for its notes."""
    from hypothesis.configuration import set_hypothesis_home_dir

    with tempfile.TemporaryDirectory() as notes:
        set_hypothesis_home_dir(notes)
        try:
            drawn("", lambda case: None, cases(LoRA, {}, LoRA.claims), 30)
            yield notes
        finally:
            set_hypothesis_home_dir(None)
