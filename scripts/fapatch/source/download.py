"""Download source distributions into .cache/downloads: found by name on the package index, verified before
anything reads them, never run.

The index is pip's. Its page names each file with a hash, so that, unlike with `pip download`, no code of a
package runs to identify it.
"""

from __future__ import annotations

import base64
import errno
import html
import json
import os
import re
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from ..base.env import venv_python
from ..base.errors import FapError
from ..base.files import sha256
from ..base.lock import Sdist
from ..base.pip import default_index, settings
from ..base.project import Project

SECONDS = 60.0
ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
LINK = re.compile(r"<a\s[^>]*href=[\"']([^\"']+)[\"']", re.IGNORECASE)


@dataclass(frozen=True)
class Link:
    """A file that an index offers; ``sha256`` is "" if the index gives none."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return urllib.parse.unquote(urllib.parse.urlsplit(self.url).path).rpartition("/")[2]


def verify(path: Path, sdist: Sdist) -> None:
    """Raise FapError unless ``path`` has the size and the sha256 of ``sdist``."""
    size = path.stat().st_size
    if size != sdist.size:
        raise FapError(
            f"{path} has {size} bytes, {sdist.name} has {sdist.size}: cut short or another file",
            f"rm {path} and fetch again",
        )
    found = sha256(path)
    if found != sdist.sha256:
        raise FapError(
            f"{path} has sha256 {found}, expected {sdist.sha256}", f"do not use it: rm {path} and fetch again"
        )


def indexes(project: Project) -> list[str]:
    """List the indexes and folders that pip is configured for, in pip's order."""
    own = venv_python(project.venv)
    python = own if own.exists() else Path(sys.executable)
    found = settings(python, "download")
    main = [] if found.get("no-index") else [found.get("index-url") or default_index(python)]
    extra = found.get("extra-index-url", "").split() if main else []
    return [*found.get("find-links", "").split(), *main, *extra]


def _open(url: str):
    """Open ``url``, sending the user and the password in it as a header, as pip does."""
    parts = urllib.parse.urlsplit(url)
    request = urllib.request.Request(url, headers={"Accept": ACCEPT})
    if parts.username:
        token = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        request.full_url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        request.add_header("Authorization", f"Basic {base64.b64encode(token.encode()).decode()}")
    return urllib.request.urlopen(request, timeout=SECONDS)


def _links(index: str, package: str) -> Iterator[Link]:
    """List the files of ``package`` on ``index``, a folder of files or the address of a simple index."""
    folder = Path(urllib.parse.unquote(index.removeprefix("file://")))
    if folder.is_dir():
        page = folder / re.sub(r"[-_.]+", "-", package).lower()
        yield from (
            Link(path.absolute().as_uri(), "") for path in sorted((*folder.iterdir(), *page.glob("*")))
        )
        return
    address = f"{index.rstrip('/')}/{re.sub(r'[-_.]+', '-', package).lower()}/"
    with _open(address) as answer:
        text, kind = answer.read().decode("utf-8", "replace"), answer.headers.get("Content-Type", "")
        address = answer.url
    if "json" in kind:
        for file in json.loads(text)["files"]:
            yield Link(urllib.parse.urljoin(address, file["url"]), file["hashes"].get("sha256", ""))
    else:
        for href in LINK.findall(text):
            url, _, fragment = urllib.parse.urljoin(address, html.unescape(href)).partition("#")
            yield Link(url, fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else "")


def find(project: Project, name: str) -> Link:
    """Find the file called ``name``. Raises FapError, with the answer of each index, if none has it."""
    reasons = []
    for index in indexes(project):
        host = urllib.parse.urlsplit(index).hostname or index
        try:
            for link in _links(index, project.family.package):
                if link.name == name:
                    return link
            reasons.append(f"{host} does not have it")
        except (OSError, HTTPException, ValueError, KeyError) as e:
            reasons.append(f"{host}: {getattr(e, 'reason', '') or e}")
    raise FapError(
        f"{name} was not found: {'; '.join(reasons) or 'pip is configured for no index'}",
        f"correct the version, connect to the package index, or put the file into {project.downloads}",
    )


def get(link: Link, into: Path, most: int) -> Path:
    """Download ``link`` into the folder ``into`` with a line of progress, and no more than ``most`` bytes."""
    path, done, shown = into / link.name, 0, time.monotonic()
    print(f"downloading {link.name}", flush=True)
    try:
        with _open(link.url) as answer, path.open("wb") as file:
            total = int(answer.headers.get("Content-Length") or 0)
            while done <= most and (block := answer.read(1 << 16)):
                file.write(block)
                done += len(block)
                if time.monotonic() - shown > 2:
                    shown = time.monotonic()
                    of = f" of {total / 1e6:.1f}" if total else ""
                    print(f"  {done / 1e6:.1f}{of} MB", flush=True)
    except (OSError, HTTPException, ValueError) as e:
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT):  # the disk, not the network
            raise
        raise FapError(
            f"{link.name} could not be downloaded: {getattr(e, 'reason', '') or e}",
            "connect to the package index and run this again",
        ) from e
    return path


LARGEST = 1 << 30  # bytes: the most that a file not in the lock may have


def add(project: Project, version: str) -> Sdist:
    """Get the source distribution of ``version``, which is not in the lock yet: from .cache/downloads, else
    downloaded from the index and compared with the index's own hash.
    """
    name = f"{project.family.package}-{version}.tar.gz"
    path = project.downloads / name
    if not path.exists():
        link = find(project, name)
        if not link.sha256:
            raise FapError(f"the index gives no sha256 for {name}", f"put the file into {project.downloads}")
        _bring(project, link, None)
    return Sdist(name, path.stat().st_size, sha256(path))


def _bring(project: Project, link: Link, pinned: Sdist | None) -> None:
    project.downloads.mkdir(parents=True, exist_ok=True)
    # Download beside the final place, so that the rename is atomic and a failure leaves nothing.
    with tempfile.TemporaryDirectory(dir=project.downloads, prefix=".part-") as scratch:
        file = get(link, Path(scratch), pinned.size if pinned else LARGEST)
        verify(file, pinned or Sdist(link.name, file.stat().st_size, link.sha256))
        os.replace(file, project.downloads / link.name)


def sdist(project: Project, offline: bool = False) -> Path | None:
    """Get the verified source distribution of the project's release, from the cache or downloaded into it.

    Returns None if there is none, or if ``offline`` is set and the cache lacks it. Raises FapError if it is
    there but not the pinned file.
    """
    pinned = project.release.sdist
    if pinned is None:
        return None
    path = project.downloads / pinned.name
    if path.exists():
        verify(path, pinned)
        return path
    if offline:
        return None
    _bring(project, find(project, pinned.name), pinned)
    return path
