"""The real series on upstream's real source, in a checkout of its own, so that nothing here touches build/ or waits for
a lock.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fapatch import apply, fetch, git, locking, refresh
from fapatch.fetch import Base
from fapatch.project import Project

REAL = Project.open(version="")
VERSIONS = [release.version for release in REAL.family.releases]


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
        """Path -> blob id of every file of upstream's."""
        return git.list_tree(self.base.commit, repo=self.project.store)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of this checkout whose store has every release."""
    with locking.exclusive(REAL, "tests/patches"):
        for release in REAL.family.releases:
            fetch.pinned(replace(REAL, release=release))
    root = tmp_path_factory.mktemp("checkout")
    for folder in (REAL.patches, REAL.overlay, REAL.store):
        shutil.copytree(folder, root / folder.relative_to(REAL.root), ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REAL.lock.path, root)
    (root / ".cache" / "downloads").symlink_to(REAL.downloads)
    return Project.open(root, REAL.family.name, REAL.family.default)


@pytest.fixture(scope="session")
def make(checkout: Project):
    """version -> Patched, each made once."""
    made: dict[str, Patched] = {}

    def patched(version: str) -> Patched:
        if version not in made:
            project = replace(checkout, release=checkout.family.release(version))
            base, files = fetch.pinned(project), refresh.Files.of(project)
            built = apply.build(project, base, project.root / "trees" / version, files.patches, files.overlay)
            made[version] = Patched(project, base, files, built)
        return made[version]

    return patched


@pytest.fixture(params=VERSIONS)
def patched(request: pytest.FixtureRequest, make) -> Patched:
    """Each release in turn."""
    return make(request.param)


@pytest.fixture
def default(make) -> Patched:
    """The release that the series is written for."""
    return make(REAL.family.default)


@pytest.fixture
def plain(patched: Patched, tmp_path: Path) -> Path:
    """Upstream's files of the release in a folder that no git knows."""
    for path, content in git.read_tree(patched.base.commit, lambda _: True, repo=patched.project.store):
        (tmp_path / "plain" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "plain" / path).write_bytes(content)
    return tmp_path / "plain"
