"""Apply the real series of every family to upstream's real source, in a separate checkout, so that no test
touches build/ or waits for a lock.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fapatch.base import git, locking
from fapatch.base.project import Project
from fapatch.series import apply, refresh
from fapatch.source import fetch
from fapatch.source.fetch import Base

REAL = Project.open(family="flash-attn", version="")
RELEASES = [(family.name, release.version) for family in REAL.lock.families for release in family.releases]
WITH_EXTENSION = [(name, version) for name, version in RELEASES if REAL.lock.family(name).extension]


@dataclass(frozen=True)
class Patched:
    """One release with the series applied."""

    project: Project
    base: Base
    files: refresh.Files
    built: apply.Built

    @property
    def applied(self):
        return [p for p in self.files.patches if p.name in self.built.applied]

    @property
    def upstream(self) -> dict[str, str]:
        """Path -> blob id of every upstream file."""
        return git.list_tree(self.base.commit, repo=self.project.store)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of this checkout whose store has every release of every family."""
    with locking.exclusive(REAL, "tests/patches"):
        for family, version in RELEASES:
            fetch.pinned(Project.open(REAL.root, family, version))
    root = tmp_path_factory.mktemp("checkout")
    for folder in (REAL.root / "patches", REAL.root / "overlay", REAL.store):
        shutil.copytree(
            folder, root / folder.relative_to(REAL.root), ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(REAL.lock.path, root)
    (root / ".cache" / "downloads").symlink_to(REAL.downloads)
    return Project.open(root, REAL.family.name, REAL.family.default)


@pytest.fixture(scope="session")
def make(checkout: Project):
    """Return a function (version, family) -> Patched that makes each only once."""
    made: dict[tuple[str, str], Patched] = {}

    def patched(version: str, family: str = REAL.family.name) -> Patched:
        if (version, family) not in made:
            project = Project.open(checkout.root, family, version)
            base, files = fetch.pinned(project), refresh.Files.of(project)
            built = apply.build(
                project, base, project.root / "trees" / family / version, files.patches, files.overlay
            )
            made[version, family] = Patched(project, base, files, built)
        return made[version, family]

    return patched


@pytest.fixture(scope="session")
def on_host(make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """Return a function that compiles a program of the folder on_host for the CPU, with the kernels' headers,
    and loads it.
    """
    nvcc = next((n for path in sys.path for n in Path(path).glob("nvidia/*/bin/nvcc")), None)
    if nvcc is None or shutil.which("g++") is None:
        pytest.skip("needs g++, and the package cuda-toolkit[cccl,nvcc] of CUDA 13 or newer")
    made = make(REAL.family.default)
    folder = tmp_path_factory.mktemp("on_host")
    fetch.export_cutlass(made.project, folder / "cutlass")
    generator = (
        folder / "ATen" / "cuda" / "CUDAGeneratorImpl.h"
    )  # of torch with CUDA, and needed by its name only
    generator.parent.mkdir(parents=True)
    generator.write_text("#pragma once\nnamespace at { struct PhiloxCudaState {}; }\n")
    cuda, source = nvcc.parents[1] / "include", made.built.folder / "csrc/flash_attn/src"
    of_torch = Path(torch.__file__).parent / "include"
    headers = [folder, source, folder / "cutlass/include", cuda, cuda / "cccl", of_torch]

    def load(program: str) -> ctypes.CDLL:
        library = folder / Path(program).with_suffix(".so")
        subprocess.run(
            ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *(f"-I{path}" for path in headers),
             Path(__file__).parent / "on_host" / program, "-o", library],
            check=True,
        )  # fmt: skip
        return ctypes.CDLL(str(library))

    return load


@pytest.fixture(params=RELEASES, ids="-".join)
def patched(request: pytest.FixtureRequest, make) -> Patched:
    """One release of one family at a time."""
    family, version = request.param
    return make(version, family)


@pytest.fixture(params=WITH_EXTENSION, ids="-".join)
def with_extension(request: pytest.FixtureRequest, make) -> Patched:
    """One release at a time whose kernels are compiled into the wheel."""
    family, version = request.param
    return make(version, family)


@pytest.fixture(params=[family.name for family in REAL.lock.families])
def default(request: pytest.FixtureRequest, make) -> Patched:
    """The release that the series is written for, one family at a time."""
    return make(REAL.lock.family(request.param).default, request.param)


@pytest.fixture
def plain(patched: Patched, tmp_path: Path) -> Path:
    """Upstream's files of the release, in a folder outside git."""
    for path, content in git.read_tree(patched.base.commit, lambda _: True, repo=patched.project.store):
        (tmp_path / "plain" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "plain" / path).write_bytes(content)
    return tmp_path / "plain"
