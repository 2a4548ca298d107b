"""Record the rebase that is going on, while it waits for a conflict to be resolved."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..base import files
from ..base.project import Project


@dataclass(frozen=True)
class Running:
    """A rebase that has begun. ``checkout``: the folder that ``target`` names, "" for a release of the lock;
    ``tip``: the commit that is carried over; ``patches``, ``overlay``: name -> blob id of the files it began
    with.
    """

    origin: str
    target: str
    checkout: str
    base: str
    onto: str
    tip: str
    patches: dict[str, str]
    overlay: dict[str, str]


def folder(project: Project) -> Path:
    """The worktree in which the project's family is rebased."""
    return project.build / "rebase" / project.family.name


def _file(project: Project) -> Path:
    return project.build / "rebase" / f"{project.family.name}.json"


def read(project: Project) -> Running | None:
    """The rebase that is going on, or None."""
    try:
        return Running(**json.loads(_file(project).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write(project: Project, running: Running) -> None:
    files.write(_file(project), json.dumps(asdict(running), indent=1) + "\n")


def forget(project: Project) -> None:
    _file(project).unlink(missing_ok=True)


def place(project: Project) -> str:
    """Where a rebase waits, as a path to show, or ""."""
    return str(folder(project).relative_to(project.root)) if read(project) else ""
