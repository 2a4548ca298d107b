"""Does a pytest id name a test? Answered from the syntax tree: nothing is imported, so it needs no torch and
takes milliseconds.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=None)
def _tests(path: Path) -> frozenset[str]:
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}::{n.name}"
                for n in node.body
                if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
            }
    return frozenset(name for name in found if name.rpartition("::")[2].startswith("test"))


def exists(root: Path, test_id: str) -> bool:
    """Whether ``test_id`` is a test below ``root``: ``tests/x.py::test_y`` or ``tests/x.py::TestZ::test_y``,
    ``[parameters]`` or not.
    """
    file, _, name = test_id.partition("::")
    path = root / file
    return file.startswith("tests/") and path.is_file() and name.partition("[")[0] in _tests(path)
