"""The laws as tests of somebody's project."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minimoe import MoRA
from minimoe.laws import LAWS
from minimoe.laws.testing import laws_of

EXAMPLE = Path(__file__).parents[1] / "example_project"
QUICK = "any_shape or simplex or merge_is_equal"


def run(folder, *args):
    """The project's tests, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.fixture
def project(tmp_path):
    return shutil.copytree(EXAMPLE, tmp_path / "project")


def test_a_projects_tests_are_three_lines():
    lines = (EXAMPLE / "test_laws.py").read_text().split("\n")
    assert len([line for line in lines if line]) == 3


@pytest.mark.parametrize("laws", [QUICK, pytest.param("law", marks=pytest.mark.slow)])
def test_the_example_project_passes(laws, project):
    status, said = run(project, "-v", "-k", laws)
    assert status == 0, said
    names = [law.__name__ for law in LAWS if laws == "law" or law.__name__ in laws]
    for name in names:
        assert f"test_laws.py::test_laws[CosineGate-{name}] " in said
    assert said.count(" PASSED ") + said.count(" SKIPPED ") == len(names)
    assert "CosineGate does not claim merge_is_equal" in said


def test_a_wrong_scheme_fails_with_its_evidence_and_nothing_else(project):
    scheme = project / "cosine_gate.py"
    right = scheme.read_text()
    scheme.write_text(right.replace(".softmax(-1)", ".exp()"))
    assert scheme.read_text() != right
    status, said = run(project, "-k", QUICK)
    assert status == 1 and "1 failed, 1 passed, 1 skipped" in said, said
    assert "\nCosineGate breaks simplex: a token's weights sum to 1 +" in said
    assert "Traceback" not in said and ".py:" not in said.partition("FAILURES")[2].split("===")[1]


def test_a_scheme_that_cannot_be_built_fails_its_own_tests(project):
    scheme = project / "cosine_gate.py"
    more = "\n\nclass Raises(CosineGate):\n    def __init__(self, base, rank):\n        1 / 0\n"
    scheme.write_text(scheme.read_text() + more)
    tests = project / "test_laws.py"
    both = tests.read_text().replace("import CosineGate", "import CosineGate, Raises")
    tests.write_text(both.replace("laws_of(CosineGate)", "laws_of(CosineGate, Raises)"))
    status, said = run(project, "-k", "any_shape")
    assert status == 1 and "1 failed, 1 passed" in said, said
    assert "Raises(nn.Linear(8, 8), rank=2) raises ZeroDivisionError" in said


def test_what_is_no_scheme_is_said_at_once():
    with pytest.raises(TypeError, match=r"scheme is 'mora', allowed: a subclass of minimoe\.Ada"):
        laws_of("mora")


def test_settings_reach_the_laws(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "minimoe.laws.testing.hold",
        lambda law, scheme, **settings: seen.append(settings) or pytest.skip("seen"),
    )
    with pytest.raises(pytest.skip.Exception):
        laws_of(MoRA, top_k=2)(MoRA, next(iter(LAWS)))
    assert seen == [{"top_k": 2}]
