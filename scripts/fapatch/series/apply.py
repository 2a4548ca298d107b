"""Make the patched tree: upstream's files, one commit for the overlay, one for each patch of the series.

The new tree is built beside the old one and replaces it when it is whole. Patches apply exactly: no fuzz, no
three-way merge. Edits and commits in the tree are never thrown away.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from unidiff import PatchSet

from ..base import git
from ..base.errors import FapError
from ..base.process import CommandFailed
from ..base.project import Project, chosen_checkout
from ..source import fetch, store
from ..source.fetch import Base
from . import arguments, overlay, series, state, worktree
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
    """Name the hunk of ``patch`` that starts at ``line`` of ``file``."""
    for changed in PatchSet(patch.data.decode("utf-8", "replace")):
        if changed.path == file:
            for number, hunk in enumerate(changed, 1):
                if hunk.source_start == line:
                    return f"hunk {number} of {len(changed)} (line {line})"
    return f"line {line}"


def explain(patch: Patch, said: str) -> str:
    """Say why ``patch`` does not apply, with file and hunk, from git's output ``said``."""
    if found := re.search(r"^error: patch failed: (.+):(\d+)$", said, re.MULTILINE):
        return f"{found[1]}, {_hunk(patch, found[1], int(found[2]))}"
    if found := re.search(r"^error: (.+: (?:does not exist|already exists) in .+)$", said, re.MULTILINE):
        return found[1]
    words = (line for line in said.splitlines() if re.match(r"error|fatal|Patch", line))
    return f"cannot be read as a patch: {next(words, said.strip() or 'git am failed')}"


def failures(project: Project, commit: str, patches: Iterable[Patch]) -> dict[str, str]:
    """Apply ``patches`` to ``commit`` one after the other: name -> reason for each that does not apply."""
    with git.index_of(commit, repo=project.store) as index:
        tried = ((patch, index.apply(patch.data)) for patch in patches)
        return {patch.name: explain(patch, said) for patch, said in tried if said}


def target(project: Project, base: Base) -> str:
    """Name the release or checkout to which the patches are applied."""
    version = project.release.version
    return version if base.pinned else f"{base.origin} ({version})"


def rebase_command(project: Project) -> str:
    """The command that carries the series to the project's release or checkout."""
    folder, lock = chosen_checkout(), project.lock
    words = ["make rebase"]
    words += [f"FAMILY={project.family.name}"] if project.family.name != lock.default_family else []
    known = project.release in project.family.releases
    words += [f"FA_SRC_DIR={folder}"] if folder else []
    own = "<a version of its own, such as 2.8.4.dev0>" if folder and known else project.release.version
    return " ".join([*words, f"VERSION={own}"])


def require_carried(project: Project, patches: tuple[Patch, ...]) -> None:
    """Raise FapError, with the names of the patches, when the project's release is not carried."""
    if reason := series.not_carried(patches, project.release.version):
        raise FapError(f"not carried yet: {reason}", rebase_command(project))


def _refusal(project: Project, base: Base, failed: dict[str, str]) -> FapError:
    listed = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
    number = "1 patch does" if len(failed) == 1 else f"{len(failed)} patches do"
    default = base.pinned and project.release.version == project.family.default
    hint = (
        "correct it, or git checkout patches/"
        if default
        else f"{rebase_command(project)} carries the series to it"
    )
    return FapError(f"{number} not apply to {target(project, base)}: {listed}", hint)


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
    options, paths = (
        ("--force", "--chmod=-x", "--pathspec-from-file=-", "--pathspec-file-nul"),
        "\0".join(files),
    )
    literal = {"GIT_LITERAL_PATHSPECS": "1"}
    git.git("add", *options, cwd=folder, stdin=paths.encode(), env=literal)
    git.git("commit", "--quiet", "--file=-", cwd=folder, stdin=_OVERLAY_MESSAGE.encode(), env=_OVERLAY_DATE)


def _am(folder: Path, patch: Patch) -> None:
    # --keep-non-patch keeps the [area] of the subject, --keep-cr carriage returns in upstream's files.
    # --committer-date-is-author-date makes equal patches give equal commits.
    keep = ("--keep-non-patch", "--keep-cr", "--no-scissors", "--no-3way", "--committer-date-is-author-date")
    git.git("am", "--quiet", *keep, cwd=folder, stdin=series.with_name(patch))


def build(
    project: Project, base: Base, folder: Path, patches: tuple[Patch, ...], files: dict[str, bytes]
) -> Built:
    """Make a worktree at ``folder`` with ``files`` (the overlay) and ``patches`` on top of ``base``. A
    failure leaves nothing behind. Raises FapError that names every patch that does not apply.
    """
    applied = tuple(p for p in patches if p.applies_to(project.release.version))
    arguments.check(project, base, files)
    try:
        worktree.add(project, folder, base.commit)
        if files:
            _commit_overlay(folder, files)
        for patch in applied:
            try:
                _am(folder, patch)
            except CommandFailed as e:
                said = (e.stderr + b"\n" + e.stdout).decode("utf-8", "replace")
                failed = failures(project, base.commit, applied) or {patch.name: explain(patch, said)}
                raise _refusal(project, base, failed) from e
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
    """Replace the project's patched tree by ``built`` and record what it was made from."""
    state.forget(project)
    worktree.put_in_place(
        project, built.folder, store.upstream_ref(project) if base.pinned else store.local_ref(project)
    )
    state.write(project, State.of(base, patches, built.applied, files, built.commit, built.tree))


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
    """Return the project's patched tree, made anew if any of its inputs changed. Prints what was done and
    why.

    Raises FapError, with the old tree as it was, when the release is not carried, a patch does not apply, or
    there is unexported work in the tree.
    """
    patches, files = series.load(project), overlay.load(project)
    require_carried(project, patches)
    base = fetch.ensure(project, source)
    found = state.assess(project, base)
    refuse_to_lose(project, found)
    tree = project.source.relative_to(project.root)
    if not found:
        applied = sum(patch.applies_to(project.release.version) for patch in patches)
        print(
            f"{tree} is up to date: {applied} patches, {len(files)} overlay files, upstream tree "
            f"{base.tree[:12]}, patched tree {state.read(project).tree[:12]}. Nothing to do."
        )
        return project.source
    print(f"making {tree}: " + "; ".join(map(str, found)), flush=True)
    built = build(project, base, scratch(project), patches, files)
    install(project, base, built, patches, files)
    for name in built.skipped:
        print(f"skipped {name}: {project.release.version} is outside its Applies-To")
    print(
        f"{tree} is ready: {len(built.applied)} patches, {len(files)} overlay files, patched tree "
        f"{built.tree[:12]}"
    )
    return project.source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        help="submodule, sdist or the path of a checkout (default: SOURCE, else any that can be reached)",
    )


def main(project: Project, args: argparse.Namespace) -> int:
    ensure(project, args.source)
    return 0
