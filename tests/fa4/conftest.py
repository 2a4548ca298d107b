"""Provide the pristine and patched trees of flash-attn-4, an interpreter that compiles its kernels, and a GPU
that runs them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import Forked
from hopper import Hopper, missing

from fapatch.base import locking
from fapatch.base.project import Project
from fapatch.kernels import compile_check
from fapatch.series import apply, refresh
from fapatch.source import fetch
from fapatch.wheel import cuda_toolkit
from fapatch.wheel.cuda_toolkit import Torch


@pytest.fixture(scope="session")
def compiler() -> tuple[Path, Path]:
    """(an interpreter with torch and nvidia-cutlass-dsl, cuobjdump). FA4_PYTHON names an interpreter other
    than this one.
    """
    python = Path(os.environ.get("FA4_PYTHON", sys.executable))
    if not compile_check.has_dsl(python):
        pytest.skip(f"{python} has no nvidia-cutlass-dsl (make toolchain FAMILY=flash-attn-4)")
    cuobjdump = cuda_toolkit.find_program("cuobjdump", Path(sys.prefix), Torch.of(python), None)
    if cuobjdump is None:
        pytest.skip("cuobjdump is not installed")
    return python, cuobjdump


@pytest.fixture(scope="session")
def trees(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The trees (pristine, patched) of the default release, in separate folders."""
    project = Project.open(family="flash-attn-4", version="")
    with locking.exclusive(project, "tests/fa4"):
        base, files = fetch.pinned(project), refresh.Files.of(project)
        folder = tmp_path_factory.mktemp("fa4")
        apply.build(project, base, folder / "patched", files.patches, files.overlay)
        pristine = compile_check.export(project, base.tree, folder / "pristine")
    return pristine, compile_check.importable(folder / "patched")


@pytest.fixture(scope="session")
def forked(compiler, trees, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    """An interpreter that has imported the patched tree and runs each program in a fork of itself."""
    made = Forked(compiler[0], trees[1], tmp_path_factory.mktemp("forked"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def hopper() -> Hopper:
    """The installed flash-attn-4 on this machine's GPU."""
    if why := missing():
        pytest.skip(why)
    return Hopper()
