"""The house: imports go down, never up or round, and no private name crosses a file."""

import ast
import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "minimoe"
# from the ground up; a room is a file or a folder of minimoe, "" the package itself
FLOORS = [
    {"tools", "frozen"},
    {"sparse", "kernels", "claims"},
    {"balance"},
    {"contextual"},
    {"context", "wrapped"},
    {"hooks"},
    {"adapter"},
    {"saving"},
    {"", "lora", "lora_moe", "mora", "adapt"},
    {"many", "trainer"},
    {"continual"},
    {"schemes", "rules"},
    {"roster", "peft"},
    {"options", "setting"},
    {"compare", "laws", "studies", "bench"},
    {"cli", "lesson"},
    {"__main__"},
]


def modules(package):
    """{dotted name within the package: its source}."""
    named = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        named[".".join(parts)] = path.read_text(encoding="utf-8")
    return named


def imports(name, source, known, is_package):
    """(module, name or None) of all that a module takes from its own package."""
    found = []
    here = name.split(".") if name else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "minimoe":
                    found.append((alias.name.partition(".")[2], None))
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                up = node.level - is_package
                base = here[: len(here) - up] if up else here
            elif (node.module or "").split(".")[0] == "minimoe":
                base = []
            else:
                continue
            inside = (node.module or "").split(".") if node.module else []
            inside = inside[1:] if not node.level else inside
            target = ".".join([*base, *inside])
            for alias in node.names:
                module = ".".join(filter(None, [target, alias.name]))
                found.append((module, None) if module in known else (target, alias.name))
    return found


def problems(package):
    """What is wrong with the house, a line each."""
    known = modules(package)
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    lines, arrows = [], {name: set() for name in known}
    for name, source in known.items():
        is_package = (package / Path(*name.split("."))).is_dir() if name else True
        room = name.split(".")[0]
        if room not in floor:
            lines.append(f"{name}: on no floor")
            continue
        for target, what in imports(name, source, known, is_package):
            other = target.split(".")[0]
            if floor.get(other, len(FLOORS)) > floor[room]:
                lines.append(f"{name} imports {target}, which is above it")
            if what and what.startswith("_") and not what.startswith("__"):
                lines.append(f"{name} takes the private {what} of {target}")
            if target != name:
                arrows[name].add(target)
        bound = {
            m.split(".")[-1] for m, what in imports(name, source, known, is_package) if not what
        }
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                if private and node.value.id in bound:
                    lines.append(f"{name} takes the private {node.attr} of {node.value.id}")
    return lines + circles(arrows)


def circles(arrows):
    """Modules that import each other, however far round: what is left when all others are gone."""
    left = {name: set(targets) for name, targets in arrows.items()}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    while idle := [n for n in left if not any(n in targets for targets in left.values())]:
        for name in idle:  # reads a circle, is in none
            del left[name]
    return [f"a circle: {', '.join(sorted(left))}"] if left else []


def test_imports_go_down_and_no_private_name_crosses_a_file():
    assert problems(PACKAGE) == []


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"adapter": "from .lora import LoRA"}, "adapter imports lora, which is above it"),
        ({"tools/a": "from ..cli import main"}, "tools.a imports cli, which is above it"),
        ({"tools/a": "def f():\n    from minimoe.cli import main"}, "tools.a imports cli"),
        ({"tools/a": "import minimoe.cli"}, "tools.a imports cli"),
        ({"sparse": "from .tools import a", "cellar": ""}, "cellar: on no floor"),
        ({"sparse": "from .kernels import _x"}, "sparse takes the private _x of kernels"),
        ({"sparse": "from . import kernels\nkernels._x()"}, "sparse takes the private _x of"),
        (
            {"sparse": "from . import kernels", "kernels": "from .sparse import x"},
            "kernels, sparse",
        ),
        (
            {
                "tools/a": "from . import b",
                "tools/b": "from .a import x",
                "sparse": "from .tools import a",
            },
            "a circle: tools.a, tools.b",
        ),
    ],
)
def test_a_wrong_wall_is_seen(files, problem, tmp_path):
    for name in {"lora", "cli", "kernels", "tools/a"} - files.keys():
        files = files | {name: ""}
    for name, text in files.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert any(problem in line for line in problems(tmp_path)), problems(tmp_path)


def test_the_four_files_are_one_sitting():
    lines = {p.stem: len(p.read_text().splitlines()) for p in PACKAGE.glob("*.py")}
    most = {"lora": 90, "lora_moe": 95, "mora": 95, "adapter": 230}
    assert {name: lines[name] for name in most if lines[name] > most[name]} == {}


@pytest.mark.skipif(shutil.which("diff") is None, reason="no diff here")
def test_the_lesson_is_a_short_diff():
    command = ["diff", PACKAGE / "lora_moe.py", PACKAGE / "mora.py"]
    changed = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    for side in "<>":
        assert 0 < sum(line.startswith(side) for line in changed) <= 50
