"""Test upstream's setup.py on the patched tree: its traps are real, and the wheel's build avoids them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from email.parser import BytesParser
from importlib import metadata as installed
from pathlib import Path

import pytest

from fapatch.base import files, locking
from fapatch.base.project import Project
from fapatch.series import apply, overlay
from fapatch.series.state import State
from fapatch.wheel import build_copy, facts, wheel

pytestmark = pytest.mark.source

# Loaded by every Python that starts with its folder on PYTHONPATH: a download raises and leaves a note.
NO_DOWNLOAD = """
import pathlib, urllib.request

def urlretrieve(url, *args, **kwargs):
    pathlib.Path(__file__).with_name("downloaded").write_text(url)
    raise RuntimeError("a wheel was about to be downloaded: " + url)

urllib.request.urlretrieve = urlretrieve
"""
# Replaces git, and records its arguments.
FAKE_GIT = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/git-calls"
"""


@pytest.fixture(scope="module")
def patched(request) -> tuple[Project, State]:
    """(this project, with flash-attn or the family that the test names; its patched tree)."""
    project = Project.open(family=getattr(request, "param", "flash-attn"), version="")
    with locking.exclusive(project, "tests"):
        return project, build_copy.verified(project, apply.ensure(project))


@pytest.fixture
def elsewhere(patched, tmp_path: Path) -> Project:
    """The project with its build and dist folders in ``tmp_path``."""
    (tmp_path / ".cache").symlink_to(patched[0].cache)
    return replace(patched[0], root=tmp_path)


@pytest.fixture
def guards(tmp_path: Path, monkeypatch) -> Path:
    """A folder whose `git` and `sitecustomize` record what setup.py does outside its folder."""
    folder = tmp_path / "guards"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(NO_DOWNLOAD)
    (folder / "git").write_text(FAKE_GIT)
    (folder / "git").chmod(0o755)
    return folder


def setup_py(folder: Path, guards: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FLASH_ATT")}
    path = os.pathsep.join([str(guards), os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=folder,
        capture_output=True,
        text=True,
        env={
            **environment,
            "PATH": path,
            "PYTHONPATH": str(guards),
            "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE",
            **env,
        },
    )


def test_a_git_folder_makes_setup_py_run_git_and_the_copy_has_none(patched, elsewhere, guards):
    build_copy.sync(elsewhere, patched[1].tree, with_cutlass=False)
    copy = elsewhere.wheel_dir
    done = setup_py(copy, guards, "--version", FLASH_ATTN_LOCAL_VERSION="nosoftmax.1")
    assert done.stdout.splitlines()[-1] == f"{elsewhere.release.version}+nosoftmax.1", done.stderr
    assert not (guards / "git-calls").exists()

    (copy / ".git").mkdir()  # the trap
    assert setup_py(copy, guards, "--version").returncode == 0
    assert "submodule update" in (guards / "git-calls").read_text()


def test_setup_py_downloads_a_wheel_unless_it_is_told_to_build(patched, elsewhere, guards):
    build_copy.sync(elsewhere, patched[1].tree, with_cutlass=False)
    copy = elsewhere.wheel_dir
    # The address holds torch's CUDA version, which a CPU torch lacks.
    with (guards / "sitecustomize.py").open("a") as file:
        file.write("import torch\ntorch.version.cuda = '12.8'\n")
    assert setup_py(copy, guards, "bdist_wheel").returncode != 0  # the trap
    assert "flash_attn" in (guards / "downloaded").read_text()

    (guards / "downloaded").unlink()
    environment = wheel.build_environment(elsewhere, "cpu") | {"PYTHONPATH": str(guards)}
    done = setup_py(copy, guards, "bdist_wheel", **environment)
    assert done.returncode == 0, done.stderr
    assert not (guards / "downloaded").exists()


@pytest.mark.parametrize(
    "patched, backend", [("flash-attn", "cpu"), ("flash-attn-4", "python")], indirect=["patched"]
)
def test_the_wheel_is_the_patched_package_and_the_same_each_time(patched, backend, elsewhere, tmp_path):
    first = wheel.build(elsewhere, backend, Path(sys.executable), patched[1])
    release, label, package = (
        elsewhere.release.version,
        elsewhere.family.wheel_label(backend),
        elsewhere.family.package,
    )
    assert first == elsewhere.dist / f"{package}-{release}+{label}-py3-none-any.whl"
    digest = files.sha256(first)
    with zipfile.ZipFile(first) as archive:
        names = archive.namelist()
        metadata = BytesParser().parsebytes(archive.read(next(n for n in names if n.endswith("/METADATA"))))
        ours = {
            n: content
            for n, content in overlay.load(patched[0]).items()
            if n.startswith("flash_attn/") and n.endswith(".py")
        }
        assert ours and {n: archive.read(n) for n in ours} == ours
        said = facts.read(archive)
    assert said["patched tree"] == patched[1].tree and said["patches"] == list(patched[1].applied)
    assert metadata["Version"] == f"{release}+{label}"
    assert any(n.endswith("/LICENSE") for n in names)
    # Each wheel has its own folder, so that both can be installed side by side.
    assert all(
        n.startswith("flash_attn/cute/") == (package == "flash_attn_4") for n in names if n.endswith(".py")
    )

    # Build again, without the first build's files, with another umask, and a setuptools that gives another
    # version.
    shutil.rmtree(elsewhere.build)
    site, other = Path(installed.distribution("setuptools").locate_file("")), tmp_path / "other"
    (info,) = site.glob("setuptools-*.dist-info")
    for folder in (site / "setuptools", info):
        shutil.copytree(folder, other / folder.name)
    metadata = other / info.name / "METADATA"
    metadata.write_text(
        metadata.read_text().replace(f"Version: {installed.version('setuptools')}", "Version: 99.9")
    )
    umask = os.umask(0o077)
    try:
        variables = {"PYTHONPATH": str(other)}
        second = wheel.build(elsewhere, backend, Path(sys.executable), patched[1], variables)
    finally:
        os.umask(umask)
    assert files.sha256(second) == digest


def test_a_failed_build_leaves_dist_alone_and_says_where_to_look(patched, elsewhere, monkeypatch):
    from fapatch.base.errors import FapError

    elsewhere.dist.mkdir()
    old = elsewhere.dist / f"flash_attn-{elsewhere.release.version}+old-py3-none-any.whl"
    old.write_bytes(b"old")
    monkeypatch.setattr(
        wheel, "build_environment", lambda project, backend: {"BUILD_TARGET": "no such target"}
    )
    with pytest.raises(FapError, match=r"build failed.*\.log"):
        wheel.build(elsewhere, "cpu", Path(sys.executable), patched[1])
    assert [p.name for p in elsewhere.dist.iterdir()] == [old.name]
    (log,) = (elsewhere.root / "build").rglob("*.log")
    assert "IS_ROCM" in log.read_text()
