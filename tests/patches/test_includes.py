"""Test that every header that the kernels include is in the patched tree, so that the lock's list of upstream
files is complete for a CUDA build.
"""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.source
INCLUDE = re.compile(rb'^\s*#\s*include\s+"([^"/]+)"', re.MULTILINE)
OF_CUDA = {"cuda_runtime.h"}  # included in quotes, although it is CUDA's
SOURCES = (".cu", ".cpp", ".h", ".cuh")


def test_every_included_file_is_there(with_extension):
    src = with_extension.built.folder / "csrc" / "flash_attn" / "src"
    files = [path for path in [*src.iterdir(), *src.parent.glob("*.cpp")] if path.suffix in SOURCES]
    assert len(files) > 72
    missing = {
        f"{path.name}: {name.decode()}"
        for path in files
        for name in INCLUDE.findall(path.read_bytes())
        if name.decode() not in OF_CUDA and not (src / name.decode()).is_file()
    }
    assert not missing
