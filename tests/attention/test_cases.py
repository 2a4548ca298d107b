"""Every case of the audit is covered by a test, or stands in cases.py with the reason why it needs a GPU."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from cases import CASES, ELSEWHERE, NEED_A_GPU, PARTLY

HERE = Path(__file__).parent


def functions_in(path: Path) -> list[ast.FunctionDef]:
    functions = (
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    )
    return [function for function in functions if function.name.startswith("test_")]


def marked(function: ast.FunctionDef) -> list[int]:
    """The numbers in the function's ``case(...)`` mark."""
    marks = [
        call
        for call in function.decorator_list
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "case"
    ]
    return [argument.value for call in marks for argument in call.args]


def announced(function: ast.FunctionDef) -> set[int]:
    """The numbers after "Case" or "Cases" in its docstring."""
    found = re.findall(r"Cases? (\d+(?:, \d+)*)", ast.get_docstring(function) or "")
    return {int(number) for numbers in found for number in numbers.split(", ")}


def test_every_case_is_covered():
    covered = {
        number for path in HERE.glob("test_*.py") for function in functions_in(path) for number in marked(function)
    }
    missing = set(CASES) - covered - set(ELSEWHERE) - set(NEED_A_GPU)
    assert not missing, f"no test is marked with {sorted(missing)}"
    assert not covered & (set(ELSEWHERE) | set(NEED_A_GPU)), "a case that a test here covers needs no excuse"
    assert covered <= set(CASES) and set(PARTLY) <= covered


def test_docstrings_name_the_cases():
    for path in HERE.glob("test_*.py"):
        for function in functions_in(path):
            assert announced(function) == set(marked(function)), f"{path.name}::{function.name}"


def test_the_other_files_have_their_tests():
    for name, expected in ELSEWHERE.values():
        assert {function.name for function in functions_in(HERE / name)} >= set(expected), name
