"""Say whether the patched tree is what the files ask for, and if not, why.

Exit code 0: clean. 1: out of date or edited. 2: in the middle of a `git am` or a rebase, or broken.
"""

from __future__ import annotations

import argparse

from ..base.project import Project
from ..source import fetch
from . import rebase_state, state

_NEXT = {
    0: "",
    1: "make apply, or make refresh after a change of your own",
    2: "finish or abort it there; make clean FORCE=1 drops the tree",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def main(project: Project, args: argparse.Namespace) -> int:
    found = state.assess(project, fetch.current(project))
    if target := rebase_state.place(project):
        found.insert(0, state.Finding(state.Reason.REBASE_IN_PROGRESS, (target,)))
    tree = project.source.relative_to(project.root)
    if not found:
        recorded = state.read(project)
        assert recorded is not None
        print(f"{tree}: clean, patched tree {recorded.tree[:12]}")
        return 0
    for finding in found:
        print(f"{tree}: {finding}")
    code = max(f.reason.code for f in found)
    work = code == 1 and any(f.reason.holds_work for f in found)
    print(
        f"  ->  {'make refresh keeps the work in it, make clean FORCE=1 drops it' if work else _NEXT[code]}"
    )
    return code
