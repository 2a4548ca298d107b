"""How the tests are laid out: a test module is imported by pytest alone, what two of them need is a module of
its own.
"""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parents[1]


def imported(path: Path) -> set[str]:
    """The modules that a file imports, by their last names."""
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
