"""Numbers of long runs that lessons read, so that these need no folder beside them.

They are parts of tutorials/findings and tutorials/results; `python tutorials/pages.py` writes them
to numbers.json, and a test holds them to where they come from.
"""

from pathlib import Path
from typing import Any

from ..tools.files import read_json

NUMBERS = Path(__file__).with_name("numbers.json")


def numbers(section: str) -> Any:
    """A section of the stored numbers:

    atlas       {stream: {learner: {"acc": one for each seed, "stored": numbers at the end}}}
    planted     {learner: {"acc", "bwt", "reachable", "limit"}}, means of three seeds; limit: true
                where nothing above `reachable` can be, false where it is known to be possible
    bench       {"tokens", "width", "top_k", "rows"} of a CPU; rows: {"part", "pass", "R", "name",
                "routing", "ratio", "ms"} and, of a layer, "peak" in bytes; a ratio is to the first
                name of its part

    Raises ValueError on another.
    """
    stored = read_json(NUMBERS, "lesson", mend="it comes with minimoe: install it again")[1]
    if section not in stored:
        raise ValueError(f"section is {section!r}, allowed: {', '.join(stored)}")
    return stored[section]
