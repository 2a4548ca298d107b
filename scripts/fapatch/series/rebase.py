"""Carry the series from the release that it is written for to another one.

`rebase` with VERSION=x replays the commits of the patched tree onto release x in build/rebase/. At a conflict
it stops with the list of files: mend them there, `git add` them, then `rebase --continue`, or `rebase
--abort` to return to where you were. At the end it shows a range-diff and exports the result to patches/ as
`refresh` does.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from subprocess import CompletedProcess

from ..base import git
from ..base.errors import FapError, UsageError
from ..base.process import CommandFailed
from ..base.project import Project
from ..source import fetch
from . import apply, rebase_state, refresh, state, worktree
from .rebase_state import Running

EXCLUSIVE = True


def _blobs(files: refresh.Files) -> tuple[dict[str, str], dict[str, str]]:
    return {p.name: p.blob for p in files.patches}, {
        path: git.blob_id(data) for path, data in files.overlay.items()
    }


def start(project: Project, origin: str) -> int:
    """Begin to carry the series from release ``origin`` to the project's. Raises FapError when one is going
    on, or nothing is to do.
    """
    if running := rebase_state.read(project):
        raise FapError(
            f"a rebase onto {running.target} is going on in {rebase_state.place(project)}",
            "make rebase-continue or make rebase-abort",
        )
    release = project.release.version
    if release == origin:
        raise UsageError(
            f"the series is on {origin} already", "name the release to carry it to: make rebase VERSION=…"
        )
    source = replace(project, release=project.family.release(origin))
    # The result becomes the tree of the target: what somebody committed there would be in its way.
    apply.refuse_to_lose(project, state.look_at_tree(project, state.read(project)))
    apply.ensure(source, "")
    files = refresh.Files.of(project)
    base, onto = fetch.pinned(source), fetch.pinned(project)
    # A patch that the target does not take, such as a backport of what it has, would only make conflicts.
    carried = tuple(p for p in files.patches if p.applies_to(release))
    built = apply.build(source, base, rebase_state.folder(project), carried, files.overlay)
    rebase_state.write(
        project, Running(origin, release, base.commit, onto.commit, built.commit, *_blobs(files))
    )
    print(f"carrying {len(built.applied)} patches from {origin} to {release}", flush=True)
    return _finish_or_stop(
        project,
        git.git("rebase", "--quiet", "--onto", onto.commit, base.commit, cwd=built.folder, check=False),
    )


def go_on(project: Project) -> int:
    """After a conflict was mended."""
    folder = rebase_state.folder(project)
    if unmerged := worktree.conflicts(folder):
        where = rebase_state.place(project)
        raise FapError(f"not mended yet: {', '.join(unmerged)}", f"edit them in {where} and git add them")
    if worktree.in_progress(folder) is worktree.InProgress.NOTHING:
        return _finish_or_stop(project)
    return _finish_or_stop(project, git.git("rebase", "--continue", cwd=folder, check=False))


def abort(project: Project) -> int:
    """Drop the rebase; patches/ and the patched trees are as they were before it."""
    worktree.remove(project, rebase_state.folder(project))
    rebase_state.forget(project)
    print("the rebase was dropped; patches/ and overlay/ are as they were")
    return 0


def _changed_meanwhile(running: Running, now: refresh.Files, wanted: refresh.Files) -> list[str]:
    """The files that are neither as they were when the rebase began nor as it wants them (written before it
    was interrupted).
    """
    current, allowed = _blobs(now), (_blobs(wanted), (running.patches, running.overlay))
    return [
        name
        for kind, blobs in enumerate(current)
        for name in blobs.keys() | allowed[1][kind].keys()
        if blobs.get(name) not in [either[kind].get(name) for either in allowed]
    ]


def _finish_or_stop(project: Project, step: CompletedProcess[bytes] | None = None) -> int:
    running, folder = rebase_state.read(project), rebase_state.folder(project)
    where = rebase_state.place(project)
    assert running is not None
    if worktree.in_progress(folder) is not worktree.InProgress.NOTHING:
        stopped = git.output("log", "-1", "--format=%s", "REBASE_HEAD", cwd=folder)
        print(f"stopped at: {stopped}")
        for path in worktree.conflicts(folder):
            print(f"  conflict in {path}")
        print(f"  ->  mend them in {where}, git add them, then make rebase-continue (or make rebase-abort)")
        return 1
    if step is not None and step.returncode != 0:
        raise CommandFailed(["git", "rebase"], step, "make rebase-abort, and try again")
    if worktree.edited(folder):
        raise FapError(
            f"{where} has changes that are not committed", "commit them there, then make rebase-continue"
        )
    files = refresh.Files.of(project)
    wanted = refresh.export_tree(project, folder, running.onto, files.patches)
    if changed := _changed_meanwhile(running, files, wanted):
        raise FapError(
            f"{changed[0]} changed since the rebase began", "put it back as it was, or make rebase-abort"
        )
    print(
        git.output(
            "range-diff", "--no-color", f"{running.base}..{running.tip}", f"{running.onto}..HEAD", cwd=folder
        )
    )
    code = refresh.publish(project, files, wanted)
    worktree.remove(project, folder)
    rebase_state.forget(project)
    if running.target != project.family.default:
        print(
            f"the patches are written against {running.target} now  ->  make it the default in "
            f"{project.lock.path.name}, or make refresh writes them against {project.family.default} again"
        )
    return code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="origin", help="the release that the series is on now (default: the family's default)"
    )
    parser.add_argument(
        "--continue", dest="go_on", action="store_true", help="go on after a conflict was mended"
    )
    parser.add_argument("--abort", action="store_true", help="drop the rebase")


def main(project: Project, args: argparse.Namespace) -> int:
    if not (args.go_on or args.abort):
        return start(project, args.origin or project.family.default)
    running = rebase_state.read(project)
    if running is None:
        raise FapError("no rebase is going on", "make rebase VERSION=… begins one")
    return (abort if args.abort else go_on)(replace(project, release=project.family.release(running.target)))
