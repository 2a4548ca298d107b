"""Drop build/, unless a patched tree in it holds work that was not exported. FORCE=1 drops that too.

third_party/, patches/ and overlay/ are never touched.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

from . import rebase_state, state, worktree
from .errors import FapError
from .project import Project

EXCLUSIVE = True


def unsaved(project: Project) -> list[str]:
    """One line for every patched tree of any family and release that holds work which no patch has."""
    found = []
    for family in project.lock.families:
        for release in family.releases:
            one = replace(project, family=family, release=release)
            tree = one.source.relative_to(one.root)
            found += [f"{tree}: {f}" for f in state.look_at_tree(one, state.read(one)) if f.reason.holds_work]
        if target := rebase_state.place(replace(project, family=family)):
            found.append(f"{target}: a rebase is in progress")
    return found


def refuse_to_lose(project: Project, force: bool, command: str) -> None:
    """Raise FapError when something would be lost and ``force`` is not set."""
    if not force and (found := unsaved(project)):
        raise FapError(
            found[0],
            f"make refresh keeps commits, make rebase-abort ends a rebase; make {command} FORCE=1 drops them",
        )


def clean(project: Project, force: bool = False) -> bool:
    """Delete build/; returns whether there was one."""
    refuse_to_lose(project, force, "clean")
    there = project.build.exists()
    worktree.remove(project, project.build)
    return there


def add_arguments(parser: argparse.ArgumentParser) -> None:
    forced = os.environ.get("FORCE", "") not in ("", "0")
    parser.add_argument(
        "--force", action="store_true", default=forced, help="drop unexported work too (FORCE=1)"
    )


def main(project: Project, args: argparse.Namespace) -> int:
    print("build/ removed" if clean(project, args.force) else "there is no build/. Nothing to do.")
    return 0
