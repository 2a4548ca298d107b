"""Delete what the tools made, unless a patched tree holds work that was not exported. FORCE=1 deletes that
too.

`clean` deletes build/; `distclean` also dist/, .venv and .cache. Neither touches third_party/, patches/ or
overlay/.
"""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import replace

from ..base.errors import FapError
from ..base.project import Project
from . import rebase_state, state, worktree

EXCLUSIVE = True


def unsaved(project: Project) -> list[str]:
    """List a line for each patched tree, of any family and release, that holds work which no patch has."""
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


def clean(project: Project) -> str:
    """Delete build/; returns what was done. Committed work stays in the store."""
    there = project.build.exists()
    worktree.remove(project, project.build)
    return "build/ removed" if there else "there is no build/. Nothing to do."


def distclean(project: Project) -> str:
    """Delete what git ignores. The cache goes last, because it holds the lock that keeps other runs out."""
    gone = [f for f in (project.build, project.dist, project.venv, project.cache) if f.exists()]
    for folder in gone:
        shutil.rmtree(folder)
    return "removed: " + ", ".join(folder.name for folder in gone)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    forced = os.environ.get("FORCE", "") not in ("", "0")
    parser.add_argument(
        "--force", action="store_true", default=forced, help="drop unexported work too (FORCE=1)"
    )


def main(project: Project, args: argparse.Namespace) -> int:
    refuse_to_lose(project, args.force, args.command)
    print((distclean if args.command == "distclean" else clean)(project))
    return 0
