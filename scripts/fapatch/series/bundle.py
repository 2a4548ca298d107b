"""Write overlay and series as one patch into dist/, for `git apply` on a plain checkout of that release."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..base import files, git
from ..base.errors import FapError
from ..base.project import Project
from . import apply, series, state

EXCLUSIVE = True


def _target(project: Project) -> str:
    """Name the release that the bundle is for."""
    return project.release.tag or f"{project.family.package} {project.release.version}"


def _text(project: Project, titles: list[str]) -> str:
    """Make the text before the first diff, which git apply and patch both skip."""
    name = f"{project.family.package} {project.release.version}"
    lines = [
        f"{name}+{project.family.local_label}: attention with softmax made optional.",
        "",
        f"Apply on a checkout of {_target(project)}:  git apply THIS_FILE",
        "",
        "Holds:",
        *(f"  {title}" for title in titles),
        "",
        "",
    ]
    return "\n".join(lines)


def _check(project: Project, bundle: bytes, base: str, expected: str) -> None:
    """Raise FapError unless ``bundle`` turns the tree of ``base`` into ``expected``."""
    found = git.tree_with(base, [bundle], repo=project.store)
    if found != expected:
        raise FapError(
            f"the bundle gives tree {found[:12]}, the series {expected[:12]}",
            "make clean apply, and try again",
        )


def make(project: Project, base: str, folder: Path, tree: str) -> bytes:
    """Make the patch from the commit ``base`` to the last commit in the worktree ``folder``, whose tree id is
    ``tree``.
    """
    diff = git.git("diff", "--no-ext-diff", "--full-index", "--binary", base, "HEAD", cwd=folder).stdout
    titles = [p.header.subject for p in series.load(project) if p.applies_to(project.release.version)]
    bundle = _text(project, titles).encode() + diff
    _check(project, bundle, base, tree)
    return bundle


def write(project: Project) -> Path:
    """Make the bundle of the project's release and return its path in dist/."""
    folder = apply.ensure(project)
    made = state.read(project)
    assert made is not None
    bundle = make(project, made.base, folder, made.tree)
    path = (
        project.dist
        / f"{project.family.package}-{project.release.version}-{project.family.local_label}.patch"
    )
    files.write(path, bundle)
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def main(project: Project, args: argparse.Namespace) -> int:
    path = write(project)
    print(
        f"{path.relative_to(project.root)}  {path.stat().st_size / 1e3:.0f} kB  ->  git apply it on a "
        f"checkout of {_target(project)}"
    )
    return 0
