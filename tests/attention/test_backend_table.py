"""Test that the table of docs/backends.md is what the installed package answers."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.mark.slow
def test_the_page_has_the_table_of_this_package():
    if find_spec("flash_attn.cute") is None or find_spec("cutlass") is None:
        pytest.skip("needs flash-attn-4 of this patch set and its compiler")
    import backend_table

    page = backend_table.PAGE.read_text(encoding="utf-8")
    written = page.partition(backend_table.BEGIN)[2].partition(backend_table.END)[0]
    assert written == backend_table.table()
