"""Export the commits of the patched tree to patches/ and overlay/, and try the result on every release.

The files that it writes survive a round trip: export(apply(series)) is the series, byte for byte. Exit code 1
if the series no longer applies to a release that was carried; everything is written all the same. A release
that is not carried yet is left out.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from ..base import git
from ..base.errors import FapError
from ..base.files import write
from ..base.project import Project
from ..source import fetch
from ..source.fetch import Base
from . import apply, overlay, series, state, worktree
from .export import Exported, export, with_skipped
from .series import Patch
from .state import Reason, State

EXCLUSIVE = True


@dataclass(frozen=True)
class Files:
    """The patch files and the overlay, as they are or as they will be."""

    patches: tuple[Patch, ...]
    overlay: dict[str, bytes]

    @classmethod
    def of(cls, project: Project) -> Files:
        return cls(series.load(project), overlay.load(project))


def patch_id(patch: Patch) -> str:
    """An id that is equal for two patches that make the same change at any lines."""
    return git.git("patch-id", "--stable", stdin=patch.data).stdout.decode().partition(" ")[0]


def compare(old: tuple[Patch, ...], new: tuple[Patch, ...]) -> list[tuple[str, str]]:
    """List (untouched | refreshed | changed | added | dropped, name) for every patch. Refreshed: the same
    change at other lines.
    """
    before, after = {p.name: p for p in old}, {p.name: p for p in new}

    def verdict(name: str) -> str:
        if name not in after:
            return "dropped"
        if name not in before:
            return "added"
        if before[name] == after[name]:
            return "untouched"
        # Compare without the first line, which names a commit.
        words = [series.split(patch.data)[0].partition(b"\n")[2] for patch in (before[name], after[name])]
        return (
            "refreshed"
            if words[0] == words[1] and patch_id(before[name]) == patch_id(after[name])
            else "changed"
        )

    return [(verdict(name), name) for name in dict.fromkeys([*after, *before])]


def merge(recorded: State, files: Files, exported: Files) -> Files:
    """Merge the commits in the tree (``exported``) and the edits in overlay/ (``files``) since ``recorded``.

    Raises FapError for a file that was changed in both places.
    """
    base = dict(recorded.patches)
    ours = {p.name: p.blob for p in files.patches}
    theirs = {p.name: p.blob for p in exported.patches}
    for name in base.keys() | ours.keys():
        if ours.get(name) not in (base.get(name), theirs.get(name)):
            raise FapError(
                f"{name} changed in patches/ while the patched tree has commits of its own",
                "git stash or commit one of the two, refresh, and do the other after it",
            )
    merged = {}
    for path in sorted(files.overlay.keys() | exported.overlay.keys()):
        mine, tree = files.overlay.get(path), exported.overlay.get(path)
        blob = {id(data): git.blob_id(data) if data is not None else None for data in (mine, tree)}
        if blob[id(tree)] == recorded.overlay.get(path):
            kept = mine
        elif blob[id(mine)] in (recorded.overlay.get(path), blob[id(tree)]):
            kept = tree
        else:
            raise FapError(
                f"{path} changed in overlay/ and in the patched tree", "make the two equal, then refresh"
            )
        if kept is not None:
            merged[path] = kept
    return Files(exported.patches, merged)


def export_tree(project: Project, folder: Path, base: str, before: tuple[Patch, ...]) -> Files:
    exported: Exported = export(folder, base)
    return Files(with_skipped(exported.patches, before, project.release.version), exported.overlay)


def _wanted(project: Project, before: Files) -> tuple[Files, str]:
    """Return the files to write, and the tree that they must give ("" if that cannot be known before)."""
    recorded = state.read(project)
    found = state.look_at_tree(project, recorded)
    for finding in found:
        if finding.reason.holds_work and finding.reason is not Reason.SOURCE_COMMITTED:
            hint = (
                "commit it there first, with --fixup for a change of a patch"
                if finding.reason is Reason.SOURCE_EDITED
                else "finish it there, or make clean FORCE=1"
            )
            raise FapError(f"{project.source.relative_to(project.root)}: {finding}", hint)
    if recorded is None or not any(f.reason is Reason.SOURCE_COMMITTED for f in found):
        return before, ""
    exported = export_tree(project, project.source, recorded.base, before.patches)
    merged = merge(recorded, before, exported)
    as_committed = recorded.pinned and merged.overlay == exported.overlay
    return merged, git.output("rev-parse", "HEAD^{tree}", cwd=project.source) if as_committed else ""


def _settle(project: Project, base: Base, wanted: Files, expected: str) -> tuple[apply.Built, Files]:
    """Build ``wanted`` and export it again until both agree, so that hand-edited patches become as git writes
    them.
    """
    for _ in range(3):
        built = apply.build(project, base, apply.scratch(project), wanted.patches, wanted.overlay)
        again = export_tree(project, built.folder, base.commit, wanted.patches)
        if again == wanted and built.tree == (expected or built.tree):
            return built, wanted
        worktree.remove(project, built.folder)
        if again == wanted:
            raise FapError(
                f"the exported files give tree {built.tree[:12]}, the commits {expected[:12]}",
                "a commit changes what a patch cannot hold, like a mode or a link: take that out",
            )
        wanted = again
    raise FapError(
        "the export changes each time it is applied",
        "look for lines in a message that git reads as part of a patch",
    )


def _write(project: Project, old: Files, new: Files) -> None:
    for patch in new.patches:
        if patch not in old.patches:
            write(project.patches / patch.name, patch.data)
    text = project.series.read_text(encoding="utf-8")
    rewritten = series.rewrite(text, [p.name for p in new.patches])
    if rewritten != text:
        write(project.series, rewritten)
    for name in {p.name for p in old.patches} - {p.name for p in new.patches}:
        (project.patches / name).unlink(missing_ok=True)
    for path, content in new.overlay.items():
        if old.overlay.get(path) != content:
            target = project.root / overlay.home(project.family, path)
            write(target, content)
    for path in old.overlay.keys() - new.overlay.keys():
        (project.overlay / path).unlink(missing_ok=True)


def check_others(project: Project, files: Files) -> list[str]:
    """Try ``files`` on every other release; returns a complaint for each release that they no longer
    serve.
    """
    complaints = []
    for release in project.family.releases:
        if release.version == project.release.version:
            continue
        if reason := series.not_carried(files.patches, release.version):
            print(f"left out   not carried yet: {reason}")
            continue
        one = replace(project, release=release)
        try:
            taken = [p for p in files.patches if p.applies_to(release.version)]
            failed = apply.failures(one, fetch.pinned(one).commit, taken)
        except FapError as e:
            complaints.append(f"{release.version} was not tried: {e}")
        else:
            listed = "; ".join(f"{name} ({why})" for name, why in failed.items())
            complaints += [f"{release.version}: does not apply any more: {listed}"] if failed else []
    return complaints


def publish(project: Project, base: Base, old: Files, wanted: Files, expected: str = "") -> int:
    """Write ``wanted`` in the place of ``old``, try it on every other release, and install the patched tree
    of the project's release, whose upstream files are ``base``.
    """
    if lost := sorted(project.family.shared.keys() - wanted.overlay.keys()):
        raise FapError(
            f"{lost[0]} is gone from the patched tree, and other families have it too",
            f"bring it back there, or take it out of `shared` in {project.lock.path.name}",
        )
    apply.require_carried(project, wanted.patches)
    built, new = _settle(project, base, wanted, expected)
    try:
        _write(project, old, new)
        complaints = check_others(project, new)
    except BaseException:
        worktree.remove(project, built.folder)
        raise
    apply.install(project, base, built, new.patches, new.overlay)
    for verdict, name in compare(old.patches, new.patches):
        print(f"{verdict:<10} {name}")
    changed = sum(old.overlay.get(p) != new.overlay.get(p) for p in old.overlay.keys() | new.overlay.keys())
    print(f"overlay    {changed or 'no'} of {len(new.overlay)} files changed")
    print(f"tree       {apply.target(project, base)}, patched tree {built.tree[:12]}")
    for complaint in complaints:
        print(f"warning: {complaint}")
    return 1 if complaints else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def main(project: Project, args: argparse.Namespace) -> int:
    old = Files.of(project)
    return publish(project, fetch.ensure(project), old, *_wanted(project, old))
