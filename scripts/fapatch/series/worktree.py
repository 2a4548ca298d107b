"""Make, inspect and remove worktrees of the store without losing anybody's commits or edits."""

from __future__ import annotations

import os
import shutil
from enum import Enum
from pathlib import Path

from ..base import git
from ..base.project import Project
from ..source import store


class InProgress(Enum):
    """The operation that git is in the middle of."""

    NOTHING = ""
    AM = "git am"
    REBASE = "git rebase"


def _admin(project: Project, folder: Path) -> Path | None:
    """The part of the store that belongs to the worktree ``folder``."""
    try:
        name = Path((folder / ".git").read_text(encoding="utf-8").strip()).name
    except OSError:
        return None
    admin = project.store / "worktrees" / name
    return admin if name and admin.is_dir() else None


def _link(project: Project, folder: Path) -> None:
    """Connect ``folder`` and its part of the store. Paths are relative where git allows it, so that a moved
    or copied checkout goes on working and never reaches into its original (as after `git worktree repair`).
    """
    admin = _admin(project, folder)
    if admin is None:
        return
    for file, path in (
        (folder / ".git", f"gitdir: {os.path.relpath(admin.resolve(), folder.resolve())}"),
        (admin / "gitdir", str(folder.resolve() / ".git")),
    ):
        if file.read_text(encoding="utf-8").strip() != path:
            file.write_text(path + "\n", encoding="utf-8")


def _tidy(project: Project) -> None:
    """Drop the store's entries of worktrees that are gone or belong to the checkout from which this store was
    copied.
    """
    for folder in (*project.build.glob("src/*/*"), *project.build.glob("rebase/*")):
        _link(project, folder)
    for back in (project.store / "worktrees").glob("*/gitdir"):
        folder = Path(back.read_text(encoding="utf-8").strip()).parent
        if _admin(project, folder) != back.parent or not _belongs(project, folder):
            shutil.rmtree(back.parent)


def add(project: Project, folder: Path, commit: str) -> None:
    """Make a worktree at ``folder``, detached at ``commit``, in place of what an interrupted run left
    there.
    """
    remove(project, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    git.git("worktree", "add", "--quiet", "--force", "--detach", folder, commit, repo=project.store)
    _link(project, folder)


def remove(project: Project, folder: Path) -> None:
    """Delete the worktree at ``folder``, if it is there, and its entry in the store, without asking."""
    if folder.exists():
        shutil.rmtree(folder)
    _tidy(project)


def reconnect(project: Project, folder: Path) -> bool:
    """Reconnect ``folder`` with the store if the checkout was moved. Returns whether git can work in it."""
    if not _belongs(project, folder):
        _link(project, folder)
    return _belongs(project, folder)


def _belongs(project: Project, folder: Path) -> bool:
    if not (folder / ".git").is_file():
        return False
    found = git.git(
        "rev-parse", "--path-format=absolute", "--git-common-dir", "HEAD^{tree}", cwd=folder, check=False
    )
    return (
        found.returncode == 0
        and Path(found.stdout.decode().splitlines()[0]).resolve() == project.store.resolve()
    )


def head(folder: Path) -> str:
    return git.output("rev-parse", "HEAD", cwd=folder)


def edited(folder: Path) -> list[str]:
    """The paths that differ from the last commit, new files included."""
    entries = git.output(
        "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", cwd=folder
    ).split("\0")
    return [entry[3:] for entry in entries if entry]


def in_progress(folder: Path) -> InProgress:
    private = Path(git.output("rev-parse", "--absolute-git-dir", cwd=folder))
    if (private / "rebase-apply" / "applying").exists():
        return InProgress.AM
    if (private / "rebase-apply").exists() or (private / "rebase-merge").exists():
        return InProgress.REBASE
    return InProgress.NOTHING


def conflicts(folder: Path) -> list[str]:
    """The paths that git could not merge."""
    return git.output("diff", "--name-only", "--diff-filter=U", cwd=folder).splitlines()


def put_in_place(project: Project, new: Path, base: str) -> None:
    """Make the worktree ``new`` the project's patched tree, on its branch, which follows ``base`` (a ref).
    The old tree is deleted and must hold nothing worth keeping.
    """
    final, branch = project.source, store.branch(project)
    remove(project, final)
    new.rename(final)
    _link(project, final)
    git.git("checkout", "--quiet", "--ignore-other-worktrees", "-B", branch, cwd=final)
    # With this, `git log @{upstream}..` and a bare `git rebase -i --autosquash` cover exactly our commits.
    git.git("config", f"branch.{branch}.remote", ".", repo=project.store)
    git.git("config", f"branch.{branch}.merge", base, repo=project.store)
