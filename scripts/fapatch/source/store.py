"""Keep upstream's files in a bare git repository in .cache: one commit a release, equal on every machine.

refs/upstream/<family>/<version>   what the lock pins
refs/local/<family>/<version>      what FA_SRC_DIR held when it differed from that
refs/cutlass/<commit or version>   the CUTLASS headers that a CUDA build needs
refs/heads/<family>/<version>      the patched tree, with whatever was committed on top
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..base import git
from ..base.errors import FapError
from ..base.files import name_fault
from ..base.project import Project

_INCOMING = "refs/incoming"
_AUTHOR = f"upstream <upstream@localhost> {git.FIXED_DATE}"
# Files that a run leaves in the tree, which are no change of the source.
EXCLUDE = "__pycache__/\n*.egg-info/\n.pytest_cache/\n.hypothesis/\n/build/\n*.so\n"
_CONFIG = """[core]
	repositoryformatversion = 0
	bare = true
	useReplaceRefs = false
	commitGraph = false
	multiPackIndex = false
"""
# Other settings that a store may have: facts of the file system, the meaning of `@{upstream}`, a user's name.
_SETTING = re.compile(
    r"core\.(filemode|ignorecase|precomposeunicode|symlinks)\n(true|false)"
    r"|branch\.[\w./+-]+\.(remote\n\.|merge\nrefs/[\w./+-]+)"
    r'|user\.(name|email)\n[^"\\\n]+'
)
# Files that would make git run a program, or read other objects than those of this store.
_FOREIGN = (
    "hooks/*",
    "info/attributes",
    "info/grafts",
    "objects/info/*alternates",
    "commondir",
    "shallow",
    "config.worktree",
    "worktrees/*/config.worktree",
)


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
        git.git("init", "--quiet", "--bare", "--template=", new)
        os.replace(new, project.store)
    own(project)


def _own_config(config: Path) -> list[str]:
    """Write the settings of a store to ``config``, keeping those that match _SETTING; returns the names of
    the others.
    """
    said = git.git("config", "--file", config, "--no-includes", "--null", "--list", check=False)
    found = said.stdout.decode("utf-8", "replace").split("\0")[:-1]
    kept = [setting for setting in found if _SETTING.fullmatch(setting)]
    text = _CONFIG
    for setting in kept:
        name, value = setting.split("\n")
        section, key = name.rsplit(".", 1)
        section, _, about = section.partition(".")
        text += f'[{section} "{about}"]\n' if about else f"[{section}]\n"
        text += f"\t{key} = {value}\n"
    if not config.is_file() or config.read_bytes() != text.encode():
        config.write_bytes(text.encode())
    ours = {f"core.{line.strip().lower()}".replace(" = ", "\n") for line in _CONFIG.splitlines()}
    return [setting.split("\n")[0] for setting in found if setting not in {*kept, *ours}]


def own(project: Project) -> None:
    """Remove from the store, which may come from another machine, everything that could run a program or
    change what an id stands for, and report it. (``sound`` checks the objects.)

    Raises FapError if the store holds a symbolic link, which could lead anywhere.
    """
    store = project.store
    if not store.is_dir():
        return
    if link := next((path for path in store.rglob("*") if path.is_symlink()), None):
        raise FapError(
            f"{link} is a symbolic link, and a store holds none",
            f"move {store.relative_to(project.root)} away; `make fetch` makes another",
        )
    dropped = _own_config(store / "config")
    for path in [path for pattern in _FOREIGN for path in store.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if path.suffix != ".sample":  # git's own examples of hooks
            dropped.append(path.relative_to(store).as_posix())
    exclude = store / "info" / "exclude"
    exclude.parent.mkdir(exist_ok=True)
    exclude.write_text(EXCLUDE, encoding="utf-8")
    if dropped:
        print(
            f"warning: dropped from {store.relative_to(project.root)}, where they do not belong: "
            + ", ".join(dropped),
            file=sys.stderr,
        )


def set_aside(project: Project) -> Path | None:
    """Move an unusable store out of the way and return its new place. It is never deleted, because it may
    hold commits.
    """
    if not project.store.exists():
        return None
    number = 1
    while (away := project.store.with_suffix(f".broken-{number}")).exists():
        number += 1
    project.store.rename(away)
    return away


def lookup(project: Project, ref: str) -> tuple[str, str] | None:
    """Return (commit, tree) that ``ref`` names, or None if it or the store does not exist."""
    if not project.store.is_dir():
        return None
    commit = git.resolve(f"{ref}^{{commit}}", repo=project.store)
    tree = git.resolve(f"{commit}^{{tree}}", repo=project.store) if commit else ""
    return (commit, tree) if tree else None


def sound(project: Project, ref: str) -> tuple[str, str] | None:
    """Return ``lookup`` after comparing every object of the store with its id. A store with a wrong object is
    moved out of the way.
    """
    if not project.store.is_dir():
        return None
    found = lookup(project, ref)
    # git compares all objects with their ids, whichever commit it is asked for.
    fsck = ("fsck", "--no-dangling", "--no-reflogs", "--no-progress")
    if git.git(*fsck, *(found or ())[:1], repo=project.store, check=False).returncode == 0:
        return found
    away = set_aside(project)
    print(f"the store was damaged; it lies in {away} now and is filled again", file=sys.stderr)
    return None


def import_files(
    project: Project, ref: str, files: Iterable[tuple[str, bytes]], subject: str, expected: str = ""
) -> tuple[str, str]:
    """Commit ``files`` (path, content) as plain files under ``ref``; returns (commit, tree).

    Author, date and modes are fixed, so that equal files give an equal commit. Raises FapError, leaving
    ``ref`` as it was, if there is no file, a file has a wrong name, or the tree is not ``expected``.
    """
    ensure(project)
    message = subject.encode()
    stream = [f"commit {_INCOMING}\ncommitter {_AUTHOR}\ndata {len(message)}\n".encode(), message, b"\n"]
    for path, content in files:
        if fault := name_fault(path):
            raise FapError(f"{subject}: {path!r} {fault}", "check the source that was used")
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
