"""Provide a toy upstream with two releases and a patch set over it, fresh and applied. No network, no
torch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from toy import MESSAGE, RELEASES, Toy, lock_text, make_sdist, make_upstream, point_pip_at, shell

ROOT = Path(__file__).resolve().parents[2]
CHOICES = ("VERSION", "FAMILY", "SOURCE", "FA_SRC_DIR", "FORCE")  # the variables that fap.py reads


@pytest.fixture(autouse=True)
def person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a home folder with a name in its git configuration, and no setting of this machine. Returns the
    configuration file.
    """
    home = tmp_path / "home"
    home.mkdir()
    for name in list(os.environ):
        if name.startswith("GIT_") or name in (*CHOICES, "XDG_CONFIG_HOME"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    config = home / ".gitconfig"
    config.write_text(
        "[user]\n name = A Person\n email = person@example.org\n[init]\n defaultBranch = main\n[safe]\n "
        "directory = *\n"
    )
    return config


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy checkout, of which every test gets a copy: two patches and one overlay file, applied and
    refreshed once.
    """
    folder = tmp_path_factory.mktemp("toy")
    config = folder / "gitconfig"
    config.write_text(
        "[user]\n name = A Person\n email = person@example.org\n[init]\n defaultBranch = main\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_CONFIG_GLOBAL", str(config))
        for name in CHOICES:
            patch.delenv(name, raising=False)
        root = folder / "checkout"
        root.mkdir()
        commits = make_upstream(folder / "upstream")
        sdists = {v: make_sdist(root / ".cache" / "downloads" / f"toy-{v}.tar.gz", v) for v in RELEASES}
        (root / "upstream.toml").write_text(lock_text(sdists, commits, str(folder / "upstream")))
        (root / "patches" / "toy").mkdir(parents=True)
        (root / "patches" / "toy" / "series").write_text("# The order matters.\n")
        (root / "overlay" / "toy" / "toy").mkdir(parents=True)
        (root / "overlay" / "toy" / "toy" / "ours.py").write_text("ours = 1\n")
        for name in (".gitattributes", ".gitignore"):
            shutil.copy(ROOT / name, root / name)
        toy = Toy(root)
        toy.fap("apply")
        toy.commit(
            MESSAGE.format(area="core", title="Change line eight", applies=">=1.0"),
            core=("line 8\n", "line eight\n"),
        )
        toy.commit(
            MESSAGE.format(area="dos", title="Change a file with carriage returns", applies=">=1.0"),
            dos=("second\r\n", "2nd\r\n"),
            core=("line 30\n", "line thirty\n"),
        )
        toy.fap("refresh")
        shell("git", "init", "--quiet", root, cwd=folder)
        shell("git", "add", "--all", cwd=root)
        shell("git", "commit", "--quiet", "-m", "toy", cwd=root)
    return root


@pytest.fixture
def upstream(made: Path) -> Path:
    """The toy's upstream git repository. Do not change it."""
    return made.parent / "upstream"


@pytest.fixture
def fresh(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Toy]:
    """A clone: nothing is built, the store is empty, the two sdists are in the cache."""
    root = tmp_path / "fresh"
    shutil.copytree(made, root, ignore=shutil.ignore_patterns("build", "store.git"))
    yield Toy(root, capsys)


@pytest.fixture
def toy(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Toy]:
    """A checkout in which the series of 1.0 is applied."""
    root = tmp_path / "checkout"
    shutil.copytree(made, root, symlinks=True)
    yield Toy(root, capsys)


@pytest.fixture
def index_is_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the package index unreachable, as on a machine without network."""
    point_pip_at(monkeypatch, "http://127.0.0.1:9/simple")
