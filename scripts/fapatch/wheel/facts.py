"""What a wheel says of its own making: nosoftmax.json in its .dist-info."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
import zipfile
from pathlib import Path

from ..base import git
from ..base.project import Project
from ..series.state import State

NAME = "nosoftmax.json"
_DATE = time.gmtime(int(git.FIXED_DATE.split()[0]))[:6]


def of(project: Project, made: State) -> dict[str, object]:
    """The facts of a wheel of the tree that ``made`` describes."""
    return {
        "upstream": f"{project.family.package} {project.release.version}",
        "upstream tree": made.base_tree,
        "patched tree": made.tree,
        "patches": list(made.applied),
        "revision": project.family.revision,
    }


def info(archive: zipfile.ZipFile) -> str:
    """The .dist-info folder in ``archive``."""
    return next(n.partition("/")[0] for n in archive.namelist() if n.endswith(".dist-info/METADATA"))


def read(archive: zipfile.ZipFile) -> dict[str, object]:
    """The facts in ``archive``; empty when there are none."""
    name = f"{info(archive)}/{NAME}"
    return json.loads(archive.read(name)) if name in archive.namelist() else {}


def add(wheel: Path, facts: dict[str, object]) -> None:
    """Write ``facts`` into ``wheel`` and its RECORD. The other files stay as they are, byte for byte."""
    new = wheel.with_suffix(".new")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as archive:
        folder = info(old)
        name, record = f"{folder}/{NAME}", f"{folder}/RECORD"
        text = json.dumps(facts, indent=1).encode() + b"\n"
        digest = base64.urlsafe_b64encode(hashlib.sha256(text).digest()).rstrip(b"=").decode()
        for member in old.infolist():
            content = old.read(member)
            if member.filename == record:  # the last one
                archive.writestr(zipfile.ZipInfo(name, _DATE), text)
                content += f"{name},sha256={digest},{len(text)}\n".encode()
            archive.writestr(member, content, zipfile.ZIP_DEFLATED)
    os.replace(new, wheel)
