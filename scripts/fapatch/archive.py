"""Read a source distribution without unpacking it: nothing of an archive ever becomes a path on this
machine.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from .errors import FapError


def _checked_path(member: tarfile.TarInfo, archive: Path) -> str:
    """The path of ``member`` below the archive's top folder. Raises FapError for what no source distribution
    should hold.
    """
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise FapError(
            f"{archive.name}: {member.name} would leave the archive's folder", "do not use this file"
        )
    if not (member.isfile() or member.isdir()):
        raise FapError(
            f"{archive.name}: {member.name} is a link or a device, not a plain file", "do not use this file"
        )
    if any(ord(c) < 32 or c in '"\\' for c in member.name):
        raise FapError(
            f"{archive.name}: {member.name!r} is not a name that a source file has", "do not use this file"
        )
    return "/".join(path.parts[1:])


def read(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(path below the top folder, content) of every file whose path is ``wanted``. Every member is checked,
    wanted or not.

    Raises FapError, naming the archive, when it is truncated or damaged, or holds a link, an absolute path or
    a ``..``.
    """
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                path = _checked_path(member, archive)
                if member.isfile() and wanted(path):
                    content = tar.extractfile(member)
                    assert content is not None
                    yield path, content.read()
    except (tarfile.TarError, EOFError, zlib.error) as e:
        raise FapError(f"{archive} is damaged or cut short: {e}", f"rm {archive} and fetch again") from e
