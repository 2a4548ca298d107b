"""Drop all that the tools made: build/, dist/, .venv and .cache. FORCE=1 drops unexported work too."""

from __future__ import annotations

import argparse
import shutil

from . import clean
from .project import Project

EXCLUSIVE = True
add_arguments = clean.add_arguments


def distclean(project: Project, force: bool = False) -> list[str]:
    """Delete them and return their names. The cache goes last: the lock that keeps other runs out
    lies in it.
    """
    clean.refuse_to_lose(project, force, "distclean")
    gone = [
        folder for folder in (project.build, project.dist, project.venv, project.cache) if folder.exists()
    ]
    for folder in gone:
        shutil.rmtree(folder)
    return [folder.name for folder in gone]


def main(project: Project, args: argparse.Namespace) -> int:
    print("removed: " + ", ".join(distclean(project, args.force)))
    return 0
