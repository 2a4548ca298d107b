"""The bare git repository in .cache that holds upstream's files: one commit a release, equal on every
machine.

refs/upstream/<family>/<version>   what the lock pins
refs/local/<family>/<version>      what FA_SRC_DIR held when it differed from that
refs/cutlass/<commit or version>   the CUTLASS headers that a CUDA build needs
refs/heads/<family>/<version>      the patched tree, with whatever was committed on top
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..base import git
from ..base.errors import FapError
from ..base.project import Project

_INCOMING = "refs/incoming"
_AUTHOR = f"upstream <upstream@localhost> {git.FIXED_DATE}"
# What running the tree leaves in it is no change of the source.
EXCLUDE = "__pycache__/\n*.egg-info/\n.pytest_cache/\n.hypothesis/\n/build/\n*.so\n"


def upstream_ref(project: Project) -> str:
    return f"refs/upstream/{project.family.name}/{project.release.version}"


def local_ref(project: Project) -> str:
    return f"refs/local/{project.family.name}/{project.release.version}"


def cutlass_ref(project: Project) -> str:
    return f"refs/cutlass/{project.release.cutlass or project.release.version}"


def branch(project: Project) -> str:
    """The branch of the patched tree: commits made there outlive a deleted build folder."""
    return f"{project.family.name}/{project.release.version}"


def ensure(project: Project) -> None:
    """Make the store where there is none."""
    if (project.store / "HEAD").is_file():
        return
    set_aside(project)
    project.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=project.cache, prefix=".store-") as scratch:
        new = Path(scratch) / "store.git"
        git.git("init", "--quiet", "--bare", new)
        (new / "info").mkdir(exist_ok=True)
        (new / "info" / "exclude").write_text(EXCLUDE, encoding="utf-8")
        os.replace(new, project.store)


def set_aside(project: Project) -> Path | None:
    """Move a store that cannot be used out of the way, never delete it: commits may be in it. Returns its new
    place.
    """
    if not project.store.exists():
        return None
    number = 1
    while (away := project.store.with_suffix(f".broken-{number}")).exists():
        number += 1
    project.store.rename(away)
    return away


def lookup(project: Project, ref: str) -> tuple[str, str] | None:
    """(commit, tree) that ``ref`` names, or None when it or the store is not there."""
    if not project.store.is_dir():
        return None
    commit = git.resolve(f"{ref}^{{commit}}", repo=project.store)
    tree = git.resolve(f"{commit}^{{tree}}", repo=project.store) if commit else ""
    return (commit, tree) if tree else None


def is_sound(project: Project, commit: str) -> bool:
    """Whether every object of ``commit`` can be read and has the content that its id says."""
    checked = git.git(
        "fsck", "--no-dangling", "--no-reflogs", "--no-progress", commit, repo=project.store, check=False
    )
    return checked.returncode == 0


def import_files(
    project: Project, ref: str, files: Iterable[tuple[str, bytes]], subject: str, expected: str = ""
) -> tuple[str, str]:
    """Commit ``files`` (path, content) as plain files under ``ref``; returns (commit, tree).

    Author, date and modes are fixed, so that equal files give an equal commit. Raises FapError, with ``ref``
    as it was, when there is no file, or when the tree is not ``expected``.
    """
    ensure(project)
    message = subject.encode()
    stream = [f"commit {_INCOMING}\ncommitter {_AUTHOR}\ndata {len(message)}\n".encode(), message, b"\n"]
    for path, content in files:
        stream += [f"M 100644 inline {path}\ndata {len(content)}\n".encode(), content, b"\n"]
    if len(stream) == 3:
        raise FapError(f"{subject}: no file of it was found", "check the source that was used")
    git.git("fast-import", "--quiet", "--force", repo=project.store, stdin=b"".join(stream))
    commit, tree = (
        git.resolve(_INCOMING, repo=project.store),
        git.resolve(f"{_INCOMING}^{{tree}}", repo=project.store),
    )
    git.git("update-ref", "-d", _INCOMING, repo=project.store)
    if expected and tree != expected:
        raise FapError(
            f"{subject}: its tree is {tree}, {project.lock.path.name} says {expected}",
            "this is not the pinned source; do not use it",
        )
    git.git("update-ref", ref, commit, repo=project.store)
    return commit, tree
