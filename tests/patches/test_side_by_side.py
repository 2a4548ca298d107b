"""Test that pip installs the wheels of both families into one environment in either order, and that removing
one leaves the other whole.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

from fapatch.base import locking
from fapatch.base.project import Project
from fapatch.series import apply
from fapatch.source import fetch
from fapatch.wheel import build_copy, wheel

pytestmark = pytest.mark.source
FAMILIES = {"flash-attn": "cpu", "flash-attn-4": "python"}
# Reports the two packages of an environment, without importing flash_attn.cute, which needs its compiler.
ABOUT = """
import importlib.util, json
from importlib import metadata
from pathlib import Path
import flash_attn

def files(name):
    try:
        return [str(f.locate()) for f in metadata.files(name)]
    except metadata.PackageNotFoundError:
        return []

cute = importlib.util.find_spec("flash_attn.cute")
print(json.dumps({
    "flash_attn": getattr(flash_attn, "__version__", None) and flash_attn.flash_attn_func.__module__,
    "cute": cute and cute.origin,
    "files": {name: files(name) for name in ("flash_attn", "flash_attn_4")},
}))
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """family -> its wheel, built for this test from the default release."""
    built = {}
    for family, backend in FAMILIES.items():
        project = Project.open(family=family, version="")
        with locking.exclusive(project, "tests"):
            fetch.pinned(project)
            made = build_copy.verified(project, apply.ensure(project))
        root = tmp_path_factory.mktemp(family)
        (root / ".cache").symlink_to(project.cache)
        built[family] = wheel.build(replace(project, root=root), backend, Path(sys.executable), made)
    return built


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of a separate environment, which sees the packages of this one but not flash_attn."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith("flash_attn"):
            (packages / path.name).symlink_to(path)
    (own,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (own / "packages.pth").write_text(f"{packages}\n")
    return tmp_path / "venv" / "bin" / "python"


def pip(python: Path, *arguments: str | Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--python", python, *arguments],
        check=True,
        capture_output=True,
    )


def about(python: Path) -> dict:
    """Report the installed packages. Raises AssertionError if a file that pip wrote is gone."""
    done = subprocess.run([python, "-c", ABOUT], cwd=python.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert not [path for files in said["files"].values() for path in files if not Path(path).is_file()]
    return said


def is_whole(said: dict, family: str) -> bool:
    """Whether the package of ``family`` is installed, and its name imports it."""
    if family == "flash-attn":
        return said["flash_attn"] == "flash_attn.flash_attn_interface" and bool(said["files"]["flash_attn"])
    return said["cute"] in said["files"]["flash_attn_4"]


@pytest.mark.parametrize("order", [tuple(FAMILIES), tuple(reversed(FAMILIES))], ids=" then ".join)
def test_both_work_and_each_outlives_the_other(wheels, python, order):
    for removed in order:
        kept = next(family for family in order if family != removed)
        for family in order:
            pip(python, "install", "--no-index", "--no-deps", wheels[family])
        said = about(python)
        assert is_whole(said, "flash-attn") and is_whole(said, "flash-attn-4")
        pip(python, "uninstall", "--yes", removed)
        said = about(python)
        assert is_whole(said, kept) and not is_whole(said, removed)
        pip(python, "uninstall", "--yes", kept)


def test_the_check_notices_a_file_that_is_gone(wheels, python):
    """A file is gone, as after uninstalling upstream's flash_attn, whose wheel holds files of the same
    names.
    """
    pip(python, "install", "--no-index", "--no-deps", wheels["flash-attn-4"])
    (gone,) = (python.parents[1]).glob("lib/python*/site-packages/flash_attn/cute/mask.py")
    gone.unlink()
    with pytest.raises(AssertionError):
        about(python)


def test_the_version_is_that_of_the_distribution(wheels, python):
    """Runs only flash_attn.cute's own lines about its version, because importing the package needs its
    compiler.
    """
    pip(python, "install", "--no-index", "--no-deps", wheels["flash-attn-4"])
    (init,) = (python.parents[1]).glob("lib/python*/site-packages/flash_attn/cute/__init__.py")
    lines = init.read_text().partition("from .")[0] + "print(__version__)\n"
    said = subprocess.run([python, "-c", lines], capture_output=True, text=True, check=True).stdout.strip()
    assert said == wheels["flash-attn-4"].name.split("-")[1]
