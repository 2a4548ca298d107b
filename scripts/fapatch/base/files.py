"""Match path patterns, check file names, hash files, and write files whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=None)
def _regex(pattern: str) -> re.Pattern[str]:
    parts = {"**/": r"(?:[^/]+/)*", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    return re.compile(
        "".join(parts.get(piece) or re.escape(piece) for piece in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))
    )


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether any of ``patterns`` matches the whole of ``path``. ``*`` stays within a folder and ``**``
    crosses folders, as in Path.full_match of Python 3.13.
    """
    return any(_regex(p).fullmatch(path) for p in patterns)


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def name_fault(path: str) -> str:
    """Say why ``path``, relative to its tree, cannot be the path of a source file; "" if it can."""
    if any(ord(c) < 32 or c in '"\\' or "\ud800" <= c <= "\udfff" for c in path):
        return "is not a name that a source file has"
    if {".git", "git~1"} & set(path.lower().split("/")):
        return "is a path that git keeps for itself"
    return ""


def write(path: Path, content: bytes | str) -> None:
    """Replace ``path`` by ``content`` in one step, or leave it as it was. Makes its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.chmod(file.name, path.stat().st_mode & 0o777 if path.exists() else 0o644)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
