"""Our own files: those in overlay/<family>, at the paths that they take in upstream's tree."""

from __future__ import annotations

from .errors import FapError
from .project import Project

# What tools leave behind. Anything else in the folder is part of the product.
_JUNK_FOLDERS = ("__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis")
_JUNK_ENDINGS = (".pyc", ".orig", ".rej", "~", ".swp", ".so")


def load(project: Project) -> dict[str, bytes]:
    """Path in upstream's tree -> content. Raises FapError for a symbolic link, which a wheel could not hold."""
    files: dict[str, bytes] = {}
    for path in sorted(project.overlay.rglob("*")):
        name = path.relative_to(project.overlay).as_posix()
        if name.endswith(_JUNK_ENDINGS) or any(part in _JUNK_FOLDERS for part in path.parts):
            continue
        if path.is_symlink():
            raise FapError(f"{path.relative_to(project.root)} is a symbolic link", "put the file itself there")
        if path.is_file():
            files[name] = path.read_bytes()
    return files
