"""A fingerprint changes with what code does, and with nothing else."""

import shutil
import subprocess
import sys

import pytest

from minimoe.tools import fingerprint as module
from minimoe.tools.fingerprint import PACKAGE, fingerprint, of, of_own

SOURCE = '''"""Words."""
from helper import double

def gate(x):
    """More words."""
    return double(x) + 1  # why
'''


def test_words_and_breaks_do_not_count_and_all_else_does(tmp_path):
    path = tmp_path / "own.py"

    def made_of(text):
        path.write_text(text)
        return of([path], tmp_path)

    first = made_of(SOURCE)
    assert len(first) == 12 and int(first, 16) >= 0
    for same in (
        SOURCE.replace("  # why", ""),
        SOURCE.replace('"""More words."""', '"""Other words."""'),
        SOURCE.replace('    """More words."""\n', ""),
        SOURCE.replace("double(x) + 1", "(double(x)\n        + 1)"),
    ):
        assert made_of(same) == first
    for other in (
        SOURCE.replace("+ 1", "+ 2"),
        SOURCE.replace("+ 1", "+ 1.0"),
        SOURCE.replace("gate", "gait"),
        SOURCE + "\n1 +",
        SOURCE + "\n1 + 1",
    ):
        assert made_of(other) != first


def test_what_somebodys_file_imports_from_beside_it_counts(tmp_path):
    (tmp_path / "own.py").write_text(SOURCE)
    (tmp_path / "deep").mkdir()
    (tmp_path / "helper.py").write_text("from deep.part import double\n")
    (tmp_path / "deep" / "__init__.py").write_text("")
    (tmp_path / "deep" / "part.py").write_text(
        "from .near import two\ndouble = lambda x: two * x\n"
    )
    (tmp_path / "deep" / "near.py").write_text("from . import nearer\ntwo = nearer.one + 1\n")
    (tmp_path / "deep" / "nearer.py").write_text("from ..top import one\n")
    (tmp_path / "top.py").write_text("one = 1\n")
    (tmp_path / "beside.py").write_text("x = 1\n")
    first = of_own(tmp_path / "own.py")
    (tmp_path / "beside.py").write_text("x = 2\n")
    assert of_own(tmp_path / "own.py") == first
    for name in (
        "helper.py",
        "deep/__init__.py",
        "deep/part.py",
        "deep/near.py",
        "deep/nearer.py",
        "top.py",
    ):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(before + "x = 3\n")
        assert of_own(tmp_path / "own.py") != first
        (tmp_path / name).write_text(before)
    assert of_own(tmp_path / "own.py") == first
    (tmp_path / "deep" / "part.py").rename(tmp_path / "deep" / "other.py")
    assert of_own(tmp_path / "own.py") != first


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("mora.py", True),
        ("schemes/ewc.py", True),
        ("continual/streams.py", True),
        ("studies/routing.py", True),
        ("cli.py", False),
        ("tools/plots.py", False),
        ("tools/tables.py", False),
        ("laws/laws.py", False),
    ],
)
def test_the_sources_that_decide_numbers_count(file, counts, tmp_path, monkeypatch):
    copy = shutil.copytree(PACKAGE, tmp_path / "minimoe")
    monkeypatch.setattr(module, "PACKAGE", copy)
    ask = fingerprint.__wrapped__  # not what was kept for this process
    assert ask() == fingerprint()
    with open(copy / file, "a") as source:
        source.write("\nedited = True\n")
    assert (ask() != fingerprint()) == counts


def test_the_sources_named_as_outside_are_there():
    assert all((PACKAGE / name).exists() for name in module.OUTSIDE)


@pytest.mark.slow
def test_a_gate_that_is_edited_between_two_runs_of_a_study_is_noticed(tmp_path):
    copy = shutil.copytree(PACKAGE, tmp_path / "minimoe")
    command = [sys.executable, "-m", "minimoe", "study", "grain", "--quick", "--seeds", "0"]
    command += ["--jobs", "1", "--out", "out"]

    def run():
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    first = run().stdout
    kept = {p: p.read_bytes() for p in (tmp_path / "out" / "cells").iterdir()}
    assert "are run again" not in run().stderr
    assert {p: p.read_bytes() for p in kept} == kept
    source = (copy / "lora_moe.py").read_text()
    edited = source.replace("top.softmax(-1)", "(2 * top).softmax(-1)")
    assert edited != source
    (copy / "lora_moe.py").write_text(edited)
    again = run()
    assert "cells of code " in again.stderr and "are run again: here it is " in again.stderr
    assert all(p.read_bytes() != data for p, data in kept.items())
    assert again.stdout != first
