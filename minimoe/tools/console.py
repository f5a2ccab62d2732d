"""The console that a command runs in: how wide it is, what it can show, and how it is stopped."""

import codecs
import contextlib
import importlib
import os
import shutil
import signal
import sys
import threading
import unicodedata
from collections.abc import Iterator
from typing import Any

# what stands in for a character that the console's encoding does not have, in the same width
ALIKE = str.maketrans("±–≥≤‖Σ·÷×στδθ→", "~-><|S.:xstdt>")
STOPS = (signal.SIGINT, signal.SIGTERM)
_stopped: list[int] = []  # signals that came
_held: list[None] = []  # not empty where they must wait


class Stopped(KeyboardInterrupt):
    """SIGTERM came."""


def width() -> int | None:
    """Columns of the terminal; None where the output goes elsewhere, and may be of any width."""
    if sys.stdout is None or not sys.stdout.isatty():
        return None
    return max(shutil.get_terminal_size().columns, 40)


def degrade() -> None:
    """Have what the console's encoding cannot hold shown as something like it."""
    codecs.register_error("minimoe.alike", _alike)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="minimoe.alike")


def _alike(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    shown = ""
    for character in error.object[error.start : error.end]:
        plain = unicodedata.normalize("NFKD", character.translate(ALIKE))[0]
        shown += plain if plain.isascii() else "?"
    return shown, error.end


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGINT raises KeyboardInterrupt and SIGTERM Stopped, unless they are ignored."""
    before: dict[int, Any] = {}
    _stopped.clear()
    if threading.current_thread() is threading.main_thread():
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _stop)
    report = sys.unraisablehook

    def unless_stopped(what: Any) -> None:
        """What is raised in a garbage collector's callback cannot rise; `Progress` raises again."""
        if not isinstance(what.exc_value, KeyboardInterrupt):
            report(what)

    sys.unraisablehook = unless_stopped
    try:
        yield
    finally:
        sys.unraisablehook = report
        for stop, handler in before.items():
            signal.signal(stop, handler)


@contextlib.contextmanager
def quiet_children() -> Iterator[None]:
    """Processes that are started inside leave it to this one to say that it was stopped.

    They ignore SIGINT, which Ctrl-C sends to all processes of a terminal (this one too, but only
    inside). And joblib's, which cleans up behind a process that was stopped, does not warn of what
    is gone already.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    filters = os.environ.get("PYTHONWARNINGS")
    quiet = "ignore:resource_tracker:UserWarning"
    os.environ["PYTHONWARNINGS"] = f"{filters},{quiet}" if filters else quiet
    try:
        yield
    finally:
        del os.environ["PYTHONWARNINGS"]
        if filters is not None:
            os.environ["PYTHONWARNINGS"] = filters
        if before is not None:  # None: not a handler of Python's
            signal.signal(signal.SIGINT, before)


def ignore_stops() -> None:
    """Until `stoppable` ends, one more signal changes nothing."""
    if threading.current_thread() is threading.main_thread():
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Inside, a signal waits; it raises at the end. For what an exception may not pass through."""
    _held.append(None)
    try:
        yield
    finally:
        _held.pop()
    if not _held:
        raise_if_stopped()


def _stop(number: int, frame: Any) -> None:
    _stopped.append(number)
    if not _held:
        raise_if_stopped()


def raise_if_stopped() -> None:
    """Raise again, if somebody else's code has swallowed what a signal raised."""
    if _stopped:
        raise Stopped if _stopped[-1] == signal.SIGTERM else KeyboardInterrupt


class Progress:
    """A bar on stderr, below the line `first`. The first call opens it, when bad input has had its
    one line. A call raises if the command was stopped.

    trains: torch's first optimiser imports its compiler, with Triton, in which an exception ends
    the process without a word: it is imported when the bar opens, while stops are held."""

    def __init__(self, unit: str, first: str = "", hidden: bool = False, trains: bool = False):
        self.unit, self.first, self.hidden, self.trains = unit, first, hidden, trains
        self.bar: Any = None

    def __call__(self, label: str, n: int, total: int) -> None:
        """n more of total are done; label says what is done now."""
        from tqdm import tqdm

        raise_if_stopped()
        if self.hidden or sys.stderr is None:
            return
        if self.bar is None:
            if self.first:
                print(self.first, file=sys.stderr, flush=True)
            if self.trains:
                with held():
                    importlib.import_module("torch._dynamo")
            often = 0.1 if sys.stderr.isatty() else 30  # seconds: a log is not a screen
            self.bar = tqdm(unit=self.unit, leave=False, mininterval=often, file=sys.stderr)
        self.bar.total = total
        self.bar.set_description(label, refresh=False)
        self.bar.update(n)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def say(line: str) -> None:
    """A line on stderr, where nothing is read by programs."""
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


def discard_output() -> None:
    """Send what is still to be printed nowhere: nobody reads it, or it cannot be written."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
