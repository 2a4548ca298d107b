"""Load our own files, by their path in upstream's tree: those in overlay/<family>, and those that the family
shares with another one.
"""

from __future__ import annotations

from ..base.errors import FapError
from ..base.lock import Family
from ..base.project import Project

# What tools leave behind. Anything else in the folder is part of the product.
_JUNK_FOLDERS = ("__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis")
_JUNK_ENDINGS = (".pyc", ".orig", ".rej", "~", ".swp", ".so")


def home(family: Family, path: str) -> str:
    """The file of this repository that holds the overlay file at ``path`` of upstream's tree."""
    return family.shared.get(path, f"{family.overlay}/{path}")


def load(project: Project) -> dict[str, bytes]:
    """Read the overlay files: path in upstream's tree -> content.

    Raises FapError for a symbolic link, which a wheel cannot hold, and for a shared file that is missing or
    has a copy.
    """
    files: dict[str, bytes] = {}
    for path in sorted(project.overlay.rglob("*")):
        name = path.relative_to(project.overlay).as_posix()
        if name.endswith(_JUNK_ENDINGS) or any(part in _JUNK_FOLDERS for part in path.parts):
            continue
        if path.is_symlink():
            raise FapError(
                f"{path.relative_to(project.root)} is a symbolic link", "put the file itself there"
            )
        if path.is_file():
            files[name] = path.read_bytes()
    for name, kept in project.family.shared.items():
        if name in files:
            raise FapError(
                f"{project.family.overlay}/{name} is a copy of {kept}",
                f"remove it; {project.lock.path.name} shares that file",
            )
        try:
            files[name] = (project.root / kept).read_bytes()
        except FileNotFoundError as e:
            raise FapError(
                f"{kept} is missing, and {project.lock.path.name} shares it as {name}", f"git checkout {kept}"
            ) from e
    return dict(sorted(files.items()))
