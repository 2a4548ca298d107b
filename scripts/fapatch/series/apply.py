"""Make the patched tree: upstream's files, one commit for the overlay, one for each patch of the series.

All or nothing: it is built beside the old one and put in its place when it is whole and has the tree id that
upstream.toml names. Exact: no fuzz, no three-way merge. What somebody edited or committed in the tree is
never thrown away.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from unidiff import PatchSet

from ..base import git
from ..base.errors import FapError
from ..base.process import CommandFailed
from ..base.project import Project
from ..source import fetch, store
from ..source.fetch import Base
from . import overlay, series, state, worktree
from .series import Patch
from .state import Reason, State

EXCLUSIVE = True
_OVERLAY_DATE = {"GIT_AUTHOR_DATE": git.FIXED_DATE, "GIT_COMMITTER_DATE": git.FIXED_DATE}
_OVERLAY_MESSAGE = (
    "[overlay] Add our own files\n\nEdit them here or in overlay/: `make refresh` exports "
    "what was committed here.\n"
)


@dataclass(frozen=True)
class Built:
    """A patched tree. ``applied`` and ``skipped`` are names of patches."""

    folder: Path
    commit: str
    tree: str
    applied: tuple[str, ...]
    skipped: tuple[str, ...]


def _hunk(patch: Patch, file: str, line: int) -> str:
    """Which hunk of ``patch`` starts at ``line`` of ``file``, in words."""
    for changed in PatchSet(patch.data.decode("utf-8", "replace")):
        if changed.path == file:
            for number, hunk in enumerate(changed, 1):
                if hunk.source_start == line:
                    return f"hunk {number} of {len(changed)} (line {line})"
    return f"line {line}"


def explain(patch: Patch, said: str, version: str) -> FapError:
    """The error for ``patch`` when `git am` ended with ``said``: names patch, file and hunk."""
    hint = f"correct the patch, or leave {version} out with its Applies-To"
    if found := re.search(r"^error: patch failed: (.+):(\d+)$", said, re.MULTILINE):
        return FapError(
            f"{patch.name} does not apply to {version}: {found[1]}, {_hunk(patch, found[1], int(found[2]))}",
            hint,
        )
    if found := re.search(r"^error: (.+: (?:does not exist|already exists) in .+)$", said, re.MULTILINE):
        return FapError(f"{patch.name} does not apply to {version}: {found[1]}", hint)
    reason = next(
        (line for line in said.splitlines() if re.match(r"error|fatal|Patch", line)),
        said.strip() or "git am failed",
    )
    return FapError(
        f"{patch.name} cannot be read as a patch: {reason}",
        f"git checkout the file, or export it again; base {version}",
    )


def _commit_overlay(folder: Path, files: dict[str, bytes]) -> None:
    if clash := sorted(set(files) & git.list_tree("HEAD", cwd=folder).keys()):
        raise FapError(
            f"overlay holds {clash[0]}, which upstream has too",
            "move the file, or change upstream's by a patch",
        )
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    paths = "\0".join(files).encode()
    git.git(
        "add",
        "--force",
        "--chmod=-x",
        "--pathspec-from-file=-",
        "--pathspec-file-nul",
        cwd=folder,
        stdin=paths,
        env={"GIT_LITERAL_PATHSPECS": "1"},
    )
    git.git("commit", "--quiet", "--file=-", cwd=folder, stdin=_OVERLAY_MESSAGE.encode(), env=_OVERLAY_DATE)


def _am(folder: Path, patch: Patch, version: str) -> None:
    try:
        # --keep-non-patch: the [area] of the subject stays. --keep-cr: so do carriage returns in upstream's
        # files. --committer-date-is-author-date: equal patches give equal commits.
        git.git(
            "am",
            "--quiet",
            "--keep-non-patch",
            "--keep-cr",
            "--no-scissors",
            "--no-3way",
            "--committer-date-is-author-date",
            cwd=folder,
            stdin=series.with_name(patch),
        )
    except CommandFailed as e:
        raise explain(patch, (e.stderr + b"\n" + e.stdout).decode("utf-8", "replace"), version) from e


def build(
    project: Project, base: Base, folder: Path, patches: tuple[Patch, ...], files: dict[str, bytes]
) -> Built:
    """Make a worktree at ``folder`` with ``files`` (the overlay) and ``patches`` on top of ``base``; nothing
    is left on failure.
    """
    version = project.release.version
    applied = tuple(p for p in patches if p.applies_to(version))
    try:
        worktree.add(project, folder, base.commit)
        if files:
            _commit_overlay(folder, files)
        for patch in applied:
            _am(folder, patch, version)
        commit, tree = git.output("rev-parse", "HEAD", "HEAD^{tree}", cwd=folder).split()
    except BaseException:
        worktree.remove(project, folder)
        raise
    return Built(
        folder,
        commit,
        tree,
        tuple(p.name for p in applied),
        tuple(p.name for p in patches if p not in applied),
    )


def install(
    project: Project, base: Base, built: Built, patches: tuple[Patch, ...], files: dict[str, bytes]
) -> None:
    """Put ``built`` in the place of the project's patched tree and remember what it was made from."""
    state.forget(project)
    worktree.put_in_place(
        project, built.folder, store.upstream_ref(project) if base.pinned else store.local_ref(project)
    )
    state.write(project, State.of(base, patches, files, built.commit, built.tree))


def scratch(project: Project) -> Path:
    """Where a tree is built before it is put in place."""
    return project.source.with_name(f".new-{project.release.version}")


def refuse_to_lose(project: Project, found: list[state.Finding]) -> None:
    for finding in found:
        if finding.reason.holds_work:
            tree = project.source.relative_to(project.root)
            kept = (
                "`make refresh` keeps it"
                if finding.reason is Reason.SOURCE_COMMITTED
                else "finish or commit it there"
            )
            raise FapError(f"{tree}: {finding}", f"{kept}; `make clean FORCE=1` drops it")


def ensure(project: Project, source: str | None = None) -> Path:
    """The project's patched tree, made anew if anything that it depends on changed. Prints what was done and
    why.

    Raises FapError, with the old tree as it was, when a patch does not apply, the result is not the tree that
    the lock names, or there is unexported work in the tree.
    """
    base = fetch.ensure(project, source)
    found = state.assess(project, base)
    refuse_to_lose(project, found)
    patches, files = series.load(project), overlay.load(project)
    tree, expected = project.source.relative_to(project.root), project.release.patched_tree
    if not found:
        print(
            f"{tree} is up to date: {len(patches)} patches, {len(files)} overlay files, upstream tree "
            f"{base.tree[:12]}, patched tree {expected[:12] or '(not in the lock yet)'}. Nothing to do."
        )
        return project.source
    print(f"making {tree}: " + "; ".join(map(str, found)), flush=True)
    built = build(project, base, scratch(project), patches, files)
    if base.pinned and expected and built.tree != expected:
        worktree.remove(project, built.folder)
        raise FapError(
            f"the patched tree of {project.release.version} is {built.tree}, {project.lock.path.name} says "
            f"{expected}",
            "if patches or overlay were changed on purpose: make refresh",
        )
    install(project, base, built, patches, files)
    for name in built.skipped:
        print(f"skipped {name}: {project.release.version} is outside its Applies-To")
    print(
        f"{tree} is ready: {len(built.applied)} patches, {len(files)} overlay files, patched tree "
        f"{built.tree[:12]}" + ("" if expected or not base.pinned else " (not in the lock yet: make refresh)")
    )
    return project.source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        help="submodule, sdist or the path of a checkout (default: SOURCE, else whatever can be reached)",
    )


def main(project: Project, args: argparse.Namespace) -> int:
    ensure(project, args.source)
    return 0
