"""A dozen kills, dozens of corruptions, full disks and 300 mistakes (faults.py runs more)."""

import os

import pytest

if os.name != "posix":
    pytest.skip("os.fork is POSIX's", allow_module_level=True)

import faults


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("part", "count"),
    [(faults.kills, 12), (faults.corruptions, 60), (faults.errors, 8), (faults.mistakes, 300)],
)
def test_nothing_is_lost_and_no_number_changes(part, count, tmp_path, monkeypatch):
    monkeypatch.setitem(faults.PRETRAIN, "epochs", 1)  # accuracies only have to repeat
    assert part(count, tmp_path) == []
