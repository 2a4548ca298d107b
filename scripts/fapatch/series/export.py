"""Turn the commits of a patched tree back into patch files and overlay files. Equal commits give equal bytes
on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..base import git
from ..base.errors import FapError
from . import series
from .series import Patch

# What each flag keeps out of the diffs between two exports:
_FORMAT = (
    "--keep-subject",  # the "[PATCH n/m]" prefix, which counts the patches
    "--no-stat",  # the diffstat, which moves with every line and with the terminal's width
    "--no-signature",  # the version of git
    "--zero-commit",  # the id of a commit, which differs after each rebase
    "--no-attach",  # MIME parts, where format.attach is set in the store
    "--full-index",  # abbreviated blob ids, whose length grows with the store
)


@dataclass(frozen=True)
class Exported:
    """``patches`` in the order of the commits; ``overlay``: path -> content of every file that upstream does
    not have.
    """

    patches: tuple[Patch, ...]
    overlay: dict[str, bytes]


def _upstream_paths(folder: Path, commit: str, upstream: dict[str, str]) -> list[str]:
    """The files of upstream's that ``commit`` changes; the others are the overlay's."""
    changed = git.output("diff-tree", "-r", "--name-only", "--no-commit-id", "-z", commit, cwd=folder).split(
        "\0"
    )
    return [path for path in changed if path in upstream]


def commits(folder: Path, base: str) -> list[str]:
    """The commits on top of ``base``, oldest first. Raises FapError for what cannot become a patch: merges
    and open fixups.
    """
    listed = git.output("log", "--reverse", "--format=%H %p%x00%s", f"{base}..HEAD", cwd=folder).splitlines()
    found = []
    for line in listed:
        about, _, subject = line.partition("\0")
        commit, *parents = about.split()
        if len(parents) > 1:
            raise FapError(
                f"{commit[:12]} ({subject}) is a merge, and a patch is one change", "git rebase it away"
            )
        if subject.startswith(("fixup! ", "squash! ", "amend! ")):
            raise FapError(
                f"{commit[:12]} is still a {subject.partition('!')[0]}: {subject}",
                "GIT_SEQUENCE_EDITOR=: git rebase -i --autosquash @{upstream}",
            )
        found.append(commit)
    if git.git("merge-base", "--is-ancestor", base, "HEAD", cwd=folder, check=False).returncode != 0:
        raise FapError(
            f"the commits in {folder} are not on top of {base[:12]}, upstream's files",
            "git rebase --onto that commit",
        )
    return found


def export(folder: Path, base: str) -> Exported:
    """Read the commits on top of ``base`` in the worktree ``folder``. A commit that changes only our own
    files gives no patch.
    """
    upstream = git.list_tree(base, cwd=folder)
    patches: list[Patch] = []
    for commit in commits(folder, base):
        paths = _upstream_paths(folder, commit, upstream)
        if not paths:
            continue
        command, literal = ("format-patch", "-1", "--stdout", *_FORMAT), {"GIT_LITERAL_PATHSPECS": "1"}
        raw = git.git(*command, commit, "--", *paths, cwd=folder, env=literal).stdout
        name, data = series.without_name(raw)
        taken = [p.name for p in patches]
        if name in taken:
            raise FapError(
                f"two commits have Patch-Name: {name}",
                "take the line out of one of the messages, or squash them",
            )
        subject = git.output("log", "-1", "--format=%s", commit, cwd=folder)
        patches.append(Patch(name or series.name_for(subject, taken), data))
    overlay = dict(git.read_tree("HEAD", lambda path: path not in upstream, cwd=folder))
    return Exported(tuple(patches), overlay)


def with_skipped(exported: tuple[Patch, ...], before: tuple[Patch, ...], version: str) -> tuple[Patch, ...]:
    """Insert into ``exported`` the patches that the release ``version`` does not take, each behind the patch
    that it followed before.
    """
    result = list(exported)
    for position, patch in enumerate(before):
        if patch.applies_to(version):
            continue
        ahead = {p.name for p in before[:position]}
        at = max((i + 1 for i, p in enumerate(result) if p.name in ahead), default=0)
        result.insert(at, patch)
    return tuple(result)
