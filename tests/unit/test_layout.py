"""Test the layout: only pytest imports test modules, and the rooms (subpackages) of scripts/fapatch import
downwards.
"""

from __future__ import annotations

import ast
import shutil
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fapatch

TESTS = Path(__file__).parents[1]
TOOLS = Path(fapatch.__file__).parent


def imported(path: Path) -> set[str]:
    """The last parts of the names of the modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update([node.module or "", *(alias.name for alias in node.names)])
    return {name.rpartition(".")[2] for name in names}


def test_no_test_module_imports_another():
    modules = {path.stem: path for path in TESTS.glob("*/test_*.py")}
    assert len(modules) > 50
    assert {name: found for name, path in modules.items() if (found := imported(path) & set(modules))} == {}


def test_the_check_sees_an_import(tmp_path):
    path = tmp_path / "module.py"
    for text in (
        "import test_a",
        "from test_a import x",
        "from . import test_a",
        "def f():\n    from tests.test_a import x",
    ):
        path.write_text(text)
        assert "test_a" in imported(path), text


def module_imports(tools: Path) -> dict[str, set[str]]:
    """Map room/module -> the room/module of every import anywhere in it; an imported room is room/."""
    found = {}
    for path in tools.glob("*/*.py"):
        room = path.parent.name
        targets = found[f"{room}/{path.stem}"] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                where = ([room] if node.level == 1 else []) + (node.module or "").split(".")
                where = [part for part in where if part]
                names = [alias.name for alias in node.names]
                paths = [[*where, name] for name in names] if len(where) < 2 else [where]
                targets.update(f"{p[0]}/{p[1] if len(p) > 1 else ''}" for p in paths)
            else:
                # An absolute import would escape this check, so there may be none.
                names = [a.name for a in getattr(node, "names", ())] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not any(n.split(".")[0] in ("fapatch", "fap") for n in names), f"{path}: {names}"
    return found


def breaches(tools: Path) -> list[str]:
    """List every import that goes up or sideways, and an import cycle if there is one."""
    floor = {room: n for n, rooms in enumerate(fapatch.FLOORS) for room in rooms}
    imports = module_imports(tools)
    found = [
        f"{module} imports {target}"
        for module, targets in imports.items()
        for target in targets
        for here, there in [(module.split("/")[0], target.split("/")[0])]
        if here != there and floor[there] >= floor[here]
    ]
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as e:
        found.append(f"circle: {' -> '.join(e.args[1])}")
    return sorted(found)


def test_the_tools_import_downwards_and_in_no_circle():
    rooms = {p.parent.name for p in TOOLS.glob("*/__init__.py")}
    assert rooms == {room for floor in fapatch.FLOORS for room in floor} and len(fapatch.FLOORS) <= 6
    assert not [p.name for p in TOOLS.glob("*.py") if p.name != "__init__.py"]
    assert breaches(TOOLS) == []


@pytest.mark.parametrize(
    "module, line, told",
    [
        ("base/git.py", "from ..series import apply", "base/git imports series/apply"),
        ("base/git.py", "def f():\n    from ..wheel.wheel import main", "base/git imports wheel/wheel"),
        ("kernels/sanitize.py", "from ..upstream import report", "kernels/sanitize imports upstream/report"),
        ("series/state.py", "def f():\n    from . import status", "circle: "),
        ("series/series.py", "from .apply import ensure", "circle: "),
    ],
)
def test_a_breach_is_seen(tmp_path, module, line, told):
    shutil.copytree(TOOLS, tmp_path / "fapatch")
    path = tmp_path / "fapatch" / module
    path.write_text(path.read_text() + line + "\n")
    assert any(found.startswith(told) for found in breaches(tmp_path / "fapatch"))
