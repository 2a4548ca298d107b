"""The source distribution in .cache/downloads: verified before anybody reads it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from ..base.errors import FapError
from ..base.lock import Sdist
from ..base.pip import pip
from ..base.process import run
from ..base.project import Project

# pip asks upstream's build for the package's metadata, and that imports these.
_NEEDS = "import packaging, psutil, setuptools, setuptools_scm, torch, wheel"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(path: Path, sdist: Sdist) -> None:
    """Raise FapError unless ``path`` has the size and the sha256 of ``sdist``."""
    size = path.stat().st_size
    if size != sdist.size:
        raise FapError(
            f"{path} has {size} bytes, {sdist.name} has {sdist.size}: cut short or another file",
            f"rm {path} and fetch again",
        )
    found = sha256(path)
    if found != sdist.sha256:
        raise FapError(
            f"{path} has sha256 {found}, expected {sdist.sha256}", f"do not use it: rm {path} and fetch again"
        )


def python(project: Project) -> Path:
    """The interpreter whose pip downloads: the project's own environment where it is there, else the one that
    runs this.
    """
    import sys

    own = project.venv / "bin" / "python"
    return own if own.exists() else Path(sys.executable)


def pip_download(project: Project, requirement: str, into: Path) -> Path:
    """Download the source distribution that ``requirement`` (a line of a requirements file) names; returns
    the one new file.

    Raises FapError when the environment cannot run upstream's build, or the index cannot be reached, or the
    hash is wrong.
    """
    interpreter = python(project)
    run(
        interpreter,
        "-c",
        _NEEDS,
        hint=f"upstream's build needs these packages: make env ({interpreter} was used)",
    )
    requirements = into / "requirements.txt"
    requirements.write_text(requirement + "\n", encoding="utf-8")
    folder = into / "files"
    hashes = ["--require-hashes"] if "--hash" in requirement else []
    options = ("--no-deps", "--no-binary", ":all:", "--no-build-isolation", *hashes)
    pip(
        interpreter,
        "download",
        *options,
        "--dest",
        folder,
        "--requirement",
        requirements,
        what=requirement.split()[0],
        offline=f"connect to the package index, or put the file into {project.downloads}",
    )
    (file,) = folder.iterdir()
    return file


def sdist(project: Project, offline: bool = False) -> Path | None:
    """The verified source distribution of the project's release, from the cache or downloaded into it.

    Returns None when ``offline`` and it is not in the cache. Raises FapError when it is there but not the
    pinned file.
    """
    pinned = project.release.sdist
    path = project.downloads / pinned.name
    if path.exists():
        verify(path, pinned)
        return path
    if offline:
        return None
    project.downloads.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that the rename is atomic, and gone whatever happens.
    with tempfile.TemporaryDirectory(dir=project.downloads, prefix=".part-") as scratch:
        requirement = f"{project.family.package}=={project.release.version} --hash=sha256:{pinned.sha256}"
        file = pip_download(project, requirement, Path(scratch))
        verify(file, pinned)
        os.replace(file, path)
    return path
