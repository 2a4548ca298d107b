"""Carry the series from the release that it is written for to another release, or to a checkout.

`rebase` with VERSION=x replays the commits of the patched tree onto release x in build/rebase/. With
FA_SRC_DIR=folder too, it replays them onto that checkout, and VERSION names it. A patch whose Applies-To
leaves x out is reported; WIDEN=1 carries it too and widens its Applies-To as far as x. At a conflict the
rebase stops with the list of files: correct them there, `git add` them, then run `rebase --continue`, or
`rebase --abort` to return to where you were. At the end it shows a range-diff and exports the result to
patches/ as `refresh` does. It keeps the old form of a patch beside the new one if other releases need it.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from subprocess import CompletedProcess

from packaging.version import Version

from ..base import git
from ..base.errors import FapError, UsageError
from ..base.process import CommandFailed
from ..base.project import Project, chosen_checkout
from ..source import fetch, store
from ..source.fetch import Base
from . import apply, arguments, forms, rebase_state, refresh, series, state, worktree
from .rebase_state import Running
from .series import Patch

EXCLUSIVE = True


def _blobs(files: refresh.Files) -> tuple[dict[str, str], dict[str, str]]:
    return {p.name: p.blob for p in files.patches}, {
        path: git.blob_id(data) for path, data in files.overlay.items()
    }


def _origin(project: Project, patches: tuple[Patch, ...], asked: str) -> Project:
    """Return the project at the release to start from: ``asked``, else the default or the newest other
    release that takes every patch that the target takes.
    """
    if asked:
        return replace(project, release=project.family.release(asked, checkout=True))
    taken = [p for p in patches if p.applies_to(project.release.version)]
    others = sorted(project.family.releases, key=lambda r: Version(r.version), reverse=True)
    for release in [project.family.release(), *others]:
        fits = all(p.applies_to(release.version) for p in taken)
        if fits and release != project.release and not series.not_carried(patches, release.version):
            return replace(project, release=release)
    raise UsageError(
        f"no other release takes every patch that {project.release.version} takes",
        f"make apply VERSION={project.release.version} tries the series as it is",
    )


def _base(project: Project) -> Base:
    """Upstream's files to start from: those that the lock pins, or a checkout as it was imported."""
    found = store.lookup(project, store.local_ref(project))
    if project.release in project.family.releases or not found:
        return fetch.pinned(project)
    return Base(*found, False, "the store")


def _widened(patches: tuple[Patch, ...], version: str, origin: str) -> tuple[Patch, ...]:
    """Add ``version`` to the Applies-To of each patch that ``origin`` takes and that keeps ``version`` from
    being carried.
    """
    outside = [p for p in series.outside(patches, version) if p.applies_to(origin)]
    return tuple(p.with_applies(forms.widened(p.applies, version)) if p in outside else p for p in patches)


def start(project: Project, asked: str = "", widen: bool = False) -> int:
    """Begin to carry the series from a release (``asked``, or one that fits) to the project's. Raises
    FapError if a rebase is going on, if there is nothing to do, or if a patch leaves the target out and
    ``widen`` is not set.
    """
    if running := rebase_state.read(project):
        raise FapError(
            f"a rebase onto {running.target} is going on in {rebase_state.place(project)}",
            "make rebase-continue or make rebase-abort",
        )
    version, checkout = project.release.version, chosen_checkout()
    if checkout and project.release in project.family.releases:
        raise UsageError(
            f"VERSION={version} is a release in {project.lock.path.name}, and {checkout} is a checkout",
            apply.rebase_command(project),
        )
    if version == (asked or project.family.default):
        raise UsageError(
            f"the series is on {version} already", "name the release to carry it to: make rebase VERSION=…"
        )
    files = refresh.Files.of(project)
    origin = _origin(project, files.patches, asked)
    wide = _widened(files.patches, version, origin.release.version)
    outside = [old for old, new in zip(files.patches, wide) if old != new]
    for patch in outside:
        print(f"outside    {patch.name}: Applies-To {patch.applies}", flush=True)
    if outside and not widen:
        raise FapError(
            f"{version} is outside the Applies-To of {len(outside)} patches",
            f"{apply.rebase_command(project)} WIDEN=1 carries them and widens it",
        )
    # The target's tree is replaced, and commits in the origin's tree are not yet patches.
    for one in (project, origin):
        apply.refuse_to_lose(one, state.look_at_tree(one, state.read(one)))
    base, onto = _base(origin), fetch.ensure(project)
    arguments.check(project, onto, files.overlay)
    # A patch that the target does not take, such as a backport of a fix that it has, would only make
    # conflicts.
    carried = tuple(p for p in wide if p.applies_to(version))
    built = apply.build(origin, base, rebase_state.folder(project), carried, files.overlay)
    commits = (base.commit, onto.commit, built.commit)
    rebase_state.write(project, Running(origin.release.version, version, checkout, *commits, *_blobs(files)))
    goal = apply.target(project, onto)
    print(f"carrying {len(built.applied)} patches from {origin.release.version} to {goal}", flush=True)
    return _finish_or_stop(
        project,
        git.git("rebase", "--quiet", "--onto", onto.commit, base.commit, cwd=built.folder, check=False),
    )


def go_on(project: Project) -> int:
    """Go on after a conflict was resolved."""
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
    """List the files that differ both from their state when the rebase began and from its result, which an
    interrupted run may have written.
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
    before = _widened(files.patches, running.target, running.origin)
    wanted = refresh.export_tree(project, folder, running.onto, before)
    wanted = replace(wanted, patches=forms.keep_old(project, files.patches, wanted.patches))
    if changed := _changed_meanwhile(running, files, wanted):
        raise FapError(
            f"{changed[0]} changed since the rebase began", "put it back as it was, or make rebase-abort"
        )
    print(
        git.output(
            "range-diff", "--no-color", f"{running.base}..{running.tip}", f"{running.onto}..HEAD", cwd=folder
        )
    )
    tree = git.output("rev-parse", f"{running.onto}^{{tree}}", repo=project.store)
    base = Base(running.onto, tree, not running.checkout, running.checkout or "the store")
    code = refresh.publish(project, base, files, wanted)
    worktree.remove(project, folder)
    rebase_state.forget(project)
    if running.target != project.family.default:
        choice = f"fap.py lock default {running.target} makes it the default"
        if running.checkout:
            choice = f"apply, wheel and refresh take FA_SRC_DIR={running.checkout} VERSION={running.target}"
        print(
            f"the patches are written against {apply.target(project, base)} now  ->  {choice}; make refresh "
            f"writes them against {project.family.default} again"
        )
    return code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="origin",
        default="",
        help="the release to start from (default: the family's default, or one that takes the same patches)",
    )
    parser.add_argument(
        "--widen",
        action="store_true",
        default=os.environ.get("WIDEN", "") not in ("", "0"),
        help="also carry patches whose Applies-To leaves the target out, and widen it (WIDEN=1)",
    )
    parser.add_argument(
        "--continue", dest="go_on", action="store_true", help="go on after a conflict was resolved"
    )
    parser.add_argument("--abort", action="store_true", help="drop the rebase")


def main(project: Project, args: argparse.Namespace) -> int:
    if not (args.go_on or args.abort):
        return start(project, args.origin, args.widen)
    running = rebase_state.read(project)
    if running is None:
        raise FapError("no rebase is going on", "make rebase VERSION=… begins one")
    target = replace(project, release=project.family.release(running.target, checkout=True))
    return (abort if args.abort else go_on)(target)
