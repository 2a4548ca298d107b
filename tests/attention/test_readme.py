"""Test that the README's example runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def test_example() -> None:
    marked = re.search(
        r"test_readme\.py\. -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL
    )
    assert marked, "README.md has lost the example that this test runs"
    exec(compile(marked[1], str(README), "exec"), {"__name__": "readme"})
