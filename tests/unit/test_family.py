"""Test families that lack a submodule, a compiled extension or the top folder of upstream's tree."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fapatch.base.errors import UsageError
from fapatch.base.project import Project
from fapatch.source import origins
from fapatch.wheel import wheel
from toy import release_files


@pytest.fixture
def below(fresh) -> Project:
    """The toy's release, with a source distribution that is the folder a/b of upstream's tree and the only
    source.
    """
    project = fresh.project()
    include = ("a/b/setup.py", "a/b/toy/**/*.py")
    return replace(
        project,
        family=replace(project.family, folder="a/b", code="a/b", submodule="", include=include, exclude=()),
    )


def test_the_source_distribution_lies_in_its_folder(below):
    files = dict(origins.from_sdist(below, online=False))
    assert files == {
        f"a/b/{n}": t.encode()
        for n, t in release_files("1.0").items()
        if n == "setup.py" or n.startswith("toy/")
    }
    assert below.setup_dir == below.wheel_dir / "a" / "b"


def test_a_checkout_of_ones_own_is_upstreams_whole_tree(below, tmp_path):
    for name in ("setup.py", "toy/core.py"):
        (tmp_path / "own" / "a" / "b" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / "a" / "b" / name).write_text("mine\n")
    assert [path for path, _ in origins.from_folder(below, tmp_path / "own")] == [
        "a/b/setup.py",
        "a/b/toy/core.py",
    ]
    with pytest.raises(UsageError, match="lacks a/b/setup.py and a/b/pyproject.toml, or a/b/"):
        list(origins.from_folder(below, tmp_path / "own" / "a" / "b"))


def test_without_a_submodule_it_is_said_so(below):
    assert origins.from_submodule(below, online=True) == (None, "toy has no submodule")


def test_there_is_nothing_to_compile(fresh, below):
    assert wheel.without_extension(below.family, "auto").name == "python"
    with pytest.raises(UsageError, match="BACKEND=cuda: toy is Python alone"):
        wheel.without_extension(below.family, "cuda")
    assert "sass-identity is about a compiled extension" in fresh.fap("sass-identity", code=2)
