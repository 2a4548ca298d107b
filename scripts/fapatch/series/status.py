"""Say whether the patched tree is up to date, and if not, why; and which releases of the lock are not carried
yet.

Exit code 0: clean. 1: out of date, edited, or a release is not carried. 2: in the middle of a `git am` or a
rebase, or broken.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from ..base.project import Project
from ..source import fetch
from . import apply, rebase_state, series, state

_NEXT = {
    0: "",
    1: "make apply, or make refresh after a change of your own",
    2: "finish or abort it there; make clean FORCE=1 drops the tree",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def not_carried(project: Project) -> list[str]:
    """A line for each release of the lock, and for the project's own, that is not carried."""
    patches = series.load(project)
    releases = dict.fromkeys([project.release, *project.family.releases])
    return [
        f"not carried yet: {reason}  ->  {apply.rebase_command(replace(project, release=release))}"
        for release in releases
        if (reason := series.not_carried(patches, release.version))
    ]


def main(project: Project, args: argparse.Namespace) -> int:
    found = state.assess(project, fetch.current(project))
    if target := rebase_state.place(project):
        found.insert(0, state.Finding(state.Reason.REBASE_IN_PROGRESS, (target,)))
    tree, waiting = project.source.relative_to(project.root), not_carried(project)
    for line in waiting:
        print(line)
    own = series.not_carried(series.load(project), project.release.version)
    if own and [f.reason for f in found] == [state.Reason.NOT_APPLIED]:
        return 1  # the tree cannot be made yet
    if not found:
        recorded = state.read(project)
        assert recorded is not None
        print(f"{tree}: clean, {len(recorded.applied)} patches, patched tree {recorded.tree[:12]}")
        return 1 if waiting else 0
    for finding in found:
        print(f"{tree}: {finding}")
    code = max(f.reason.code for f in found)
    work = code == 1 and any(f.reason.holds_work for f in found)
    print(
        f"  ->  {'make refresh keeps the work in it, make clean FORCE=1 drops it' if work else _NEXT[code]}"
    )
    return code
