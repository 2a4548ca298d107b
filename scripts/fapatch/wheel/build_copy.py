"""Prepare the folder in which upstream's setup.py runs: the files of the patched tree, without git, beside
the objects of earlier builds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..base import git
from ..base.errors import FapError
from ..base.project import Project
from ..series import state
from ..series.state import State
from ..source import fetch

MANIFEST = ".fapatch-files.json"
CUTLASS_MARK = "csrc/cutlass/include/cutlass/cutlass.h"


def verified(project: Project, worktree: Path) -> State:
    """Return the state that `apply` recorded. Raises FapError unless ``worktree`` has that tree committed."""
    known = state.read(project)
    found = git.output("rev-parse", "HEAD^{tree}", cwd=worktree)
    if known is None or found != known.tree:
        raise FapError(
            f"the patched tree is {found[:12]}, and `make apply` made {known.tree[:12] if known else 'none'}",
            "`make refresh` exports what was committed, `make status` says what differs",
        )
    return known


def _write_if_different(target: Path, content: bytes) -> None:
    """Write ``target`` unless it is equal already: ninja decides by time stamps what to compile."""
    if target.is_file() and target.read_bytes() == content:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)


def _provide_cutlass(project: Project, with_cutlass: bool) -> None:
    if not project.family.cutlass_submodule:
        return
    if with_cutlass:
        fetch.export_cutlass(project, project.wheel_dir / project.family.cutlass_submodule)
        return
    # setup.py asserts that this file exists, even if it compiles nothing.
    mark = project.wheel_dir / CUTLASS_MARK
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def sync(project: Project, tree: str, with_cutlass: bool) -> None:
    """Write the files of ``tree``, a git id, to ``project.wheel_dir`` and remove those of an earlier tree;
    objects stay.
    """
    target = project.wheel_dir
    target.mkdir(parents=True, exist_ok=True)
    if (target / ".git").exists():
        raise FapError(
            f"{target.relative_to(project.root) / '.git'} exists, and upstream's setup.py would run git "
            "there",
            "remove it",
        )
    # Read from the store, not the worktree: the store has the bytes that the verified id stands for.
    files = dict(git.read_tree(tree, lambda path: True, repo=project.store))
    manifest = target / MANIFEST
    before = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else []
    manifest.write_text(
        json.dumps(sorted({*before, *files})), encoding="utf-8"
    )  # old and new names, in case the copy is cut short
    for name, content in files.items():
        _write_if_different(target / name, content)
    for name in set(before) - set(files):
        (target / name).unlink(missing_ok=True)
    # setuptools would put files that an earlier build left in these folders into the new wheel.
    top = project.setup_dir
    for leftover in [*(top / "build").glob("lib*"), *(top / "build").glob("bdist*"), *top.glob("*.egg-info")]:
        shutil.rmtree(leftover)
    _provide_cutlass(project, with_cutlass)
    manifest.write_text(json.dumps(sorted(files)), encoding="utf-8")
