"""Rewrite a wheel in one normal form, so that equal files give equal bytes whatever tool built it.

Versions of setuptools differ in the fields of METADATA, in the place of licences and in the name that they
put into WHEEL; the umask and the file system decide on modes and order. None of that is content.
"""

from __future__ import annotations

import base64
import hashlib
import os
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ..base import git
from . import facts

_DATE = time.gmtime(int(git.FIXED_DATE.split()[0]))[:6]
# These fields depend on the build tool, or are written anew.
_DROPPED = ("Metadata-Version: ", "Dynamic: ", "License-File: ")


def _requirement(text: str) -> str:
    found = Requirement(text)
    found.name = canonicalize_name(found.name)
    return str(found)


def _metadata(data: bytes, licences: list[str]) -> bytes:
    head, end, description = data.partition(b"\n\n")
    lines = [line for line in head.decode().split("\n") if not line.startswith(_DROPPED)]
    field = "Requires-Dist: "
    lines = [field + _requirement(line[len(field) :]) if line.startswith(field) else line for line in lines]
    lines = ["Metadata-Version: 2.4", *lines, *(f"License-File: {name}" for name in licences)]
    return "\n".join(lines).encode() + end + description


def _record(members: dict[str, bytes], name: str) -> bytes:
    lines = []
    for path, data in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        lines.append(f"{path},sha256={digest},{len(data)}\n")
    return "".join([*lines, f"{name},,\n"]).encode()


def rewrite(wheel: Path, added: Mapping[str, bytes] | None = None) -> None:
    """Replace ``wheel`` by its normal form: members in order, with fixed dates and modes, and a .dist-info
    folder in fixed wording, with the files of ``added`` (name -> content) in it.
    """
    with zipfile.ZipFile(wheel) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
        info = facts.info(archive)
    fields = members[f"{info}/METADATA"].partition(b"\n\n")[0].decode().split("\n")
    licences = sorted(line.partition(": ")[2] for line in fields if line.startswith("License-File: "))
    for name in licences:
        if f"{info}/{name}" in members:  # where setuptools put it before version 77
            members[f"{info}/licenses/{name}"] = members.pop(f"{info}/{name}")
    members[f"{info}/METADATA"] = _metadata(members[f"{info}/METADATA"], licences)
    wheel_file = members[f"{info}/WHEEL"].decode().splitlines(keepends=True)
    members[f"{info}/WHEEL"] = "".join(
        "Generator: fapatch\n" if line.startswith("Generator:") else line for line in wheel_file
    ).encode()
    members |= {f"{info}/{name}": content for name, content in (added or {}).items()}
    del members[f"{info}/RECORD"]
    # The folder of the metadata comes last, as the format asks for.
    members = dict(sorted(members.items(), key=lambda item: (item[0].startswith(f"{info}/"), item[0])))
    members[f"{info}/RECORD"] = _record(members, f"{info}/RECORD")
    new = wheel.with_suffix(".new")
    with zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            entry = zipfile.ZipInfo(name, _DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # Unix, whose modes these are
            entry.external_attr = (0o100755 if name.endswith(".so") else 0o100644) << 16
            archive.writestr(entry, data)
    os.replace(new, wheel)
