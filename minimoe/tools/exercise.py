"""Exercises that check themselves."""

import contextlib
import sysconfig
import traceback
from collections.abc import Iterator
from types import CodeType

from .fingerprint import PACKAGE


class Wrong(AssertionError):
    """An answer that is wrong, and how: the message has a line for each of what is known, such as
    the case, what was expected, what was got. Its cause is what the answer raised, if it did."""


@contextlib.contextmanager
def exercise(name: str) -> Iterator[None]:
    """Say whether what stands inside holds, and let the notebook go on in any case.

        with exercise("1"):
            assert mine(2) == 4, "mine(2) should be 4"

    prints "exercise 1: right", or "exercise 1: not yet", what was wrong, and the line of one's own
    function that raised it.
    """
    try:
        yield
    except Exception as error:  # whatever an unfinished answer raises
        cause = error.__cause__ if isinstance(error, Wrong) and error.__cause__ else error
        stub = isinstance(cause, NotImplementedError) and not str(cause)  # torch has others
        if stub:
            problem = " (nothing is written yet: replace `raise NotImplementedError`)"
        elif isinstance(error, Wrong):
            problem = "".join(f"\n  {line}" for line in str(error).splitlines())
        else:
            said = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
            problem = f" ({said})"
        print(f"exercise {name}: not yet{problem}")
        inside = error.__traceback__.tb_next if error.__traceback__ else None
        line = own_line(cause, inside.tb_frame.f_code if inside else None)
        if line and not stub:
            print(f"  your line {line}")
    else:
        print(f"exercise {name}: right")


def own_line(error: BaseException, but: CodeType | None) -> str:
    """The last line, with its number, of one's own code that an error went through; "" if none.
    What is installed is not one's own, nor the code `but`."""
    places = [str(PACKAGE), *(sysconfig.get_path(n) for n in ("stdlib", "purelib", "platlib"))]
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):
        code = frame.f_code
        if code is not but and not code.co_filename.startswith((*places, "<frozen")):
            (summary,) = traceback.StackSummary.extract(iter([(frame, number)]))
            return f"{number}: {summary.line}"
    return ""
