"""Read the patches of a family: their order, their headers, and the releases that take them."""

from __future__ import annotations

import email
import email.policy
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ..base import git
from ..base.errors import FapError, UsageError
from ..base.project import Project

# Stands in commits only: apply adds it and export removes it, so that a commit keeps its file under a new
# subject.
_NAME_LINE = re.compile(rb"^Patch-Name: *(\S+) *\n", re.MULTILINE)

REQUIRED_FIELDS = ("Why", "What", "Risk", "Drop-when", "Upstream-Status", "Test", "Applies-To")
_FIELD = re.compile(r"([A-Z][A-Za-z-]*):(?:\s+(.*)|$)")


@dataclass(frozen=True)
class Header:
    """``fields``: name -> value, the lines of a value joined by spaces."""

    subject: str
    author: str
    fields: dict[str, str]


def split(raw: bytes) -> tuple[bytes, bytes]:
    """(message, diff) of a patch file; the diff is empty when there is none."""
    start = re.search(rb"^diff --git ", raw, re.MULTILINE)
    return (raw[: start.start()], raw[start.start() :]) if start else (raw, b"")


def _parse_fields(body: str) -> dict[str, str]:
    """`Name: value` lines of ``body``; a value goes on until the next field or an empty line."""
    fields: dict[str, str] = {}
    current = ""
    for line in body.splitlines():
        if found := _FIELD.match(line):
            current = found[1]
            fields[current] = found[2] or ""
        elif not line.strip():
            current = ""
        elif current:
            fields[current] = f"{fields[current]} {line.strip()}".strip()
    return fields


def parse_header(raw: bytes) -> Header:
    """Read the message of a patch file as git format-patch --keep-subject writes it. Never fails: a missing
    part is empty.
    """
    message = email.message_from_bytes(
        re.sub(rb"\AFrom [^\n]*\n", b"", split(raw)[0]), policy=email.policy.default
    )
    body = message.get_content() if message.get_content_maintype() == "text" else ""
    return Header(str(message["Subject"] or ""), str(message["From"] or ""), _parse_fields(body))


@dataclass(frozen=True)
class Patch:
    """One patch file, as bytes."""

    name: str
    data: bytes

    @property
    def header(self) -> Header:
        return parse_header(self.data)

    @property
    def blob(self) -> str:
        return git.blob_id(self.data)

    @property
    def applies(self) -> str:
        """The value of Applies-To."""
        return self.header.fields.get("Applies-To", "")

    @property
    def is_backport(self) -> bool:
        """Whether it backports a fix from a later release, which does not need it."""
        return self.header.fields.get("Upstream-Status", "").startswith("Backport")

    def with_applies(self, wanted: str) -> Patch:
        """The same patch with another Applies-To."""
        message, diff = split(self.data)
        line = re.compile(rb"^Applies-To:.*$", re.MULTILINE)
        return replace(self, data=line.sub(f"Applies-To: {wanted}".encode(), message, count=1) + diff)

    def applies_to(self, version: str) -> bool:
        """Whether the release ``version`` is inside Applies-To. A patch without that field applies to all."""
        # Imported here, because `distclean` must run where nothing is installed.
        from packaging.specifiers import InvalidSpecifier, SpecifierSet
        from packaging.version import InvalidVersion, Version

        wanted = self.applies
        try:
            return SpecifierSet(wanted).contains(Version(version), prereleases=True)
        except InvalidVersion as e:
            raise UsageError(
                f"VERSION={version} is not a version", "write it like 2.8.4, 2.8.3.post1 or 2.8.4.dev0"
            ) from e
        except InvalidSpecifier as e:
            raise FapError(
                f"{self.name}: Applies-To: {wanted} is not a version specifier",
                "write it like `>=2.8.0,<2.9`",
            ) from e


def outside(patches: Iterable[Patch], version: str) -> list[Patch]:
    """List the patches that keep the release ``version`` from being carried: no form of their change applies
    to it. Two patches with one subject are forms of one change. A backport may be missing.
    """
    patches = tuple(patches)
    taken = {p.header.subject for p in patches if p.applies_to(version)}
    return [p for p in patches if not p.is_backport and p.header.subject not in taken]


def not_carried(patches: Iterable[Patch], version: str) -> str:
    """Why ``version`` is not carried, or "" when it is."""
    found = outside(patches, version)
    return f"{version} is outside the Applies-To of {', '.join(p.name for p in found)}" if found else ""


def with_name(patch: Patch) -> bytes:
    """The patch for `git am`, with its file name at the end of the message."""
    message, diff = split(patch.data)
    return message.rstrip(b"\n") + f"\n\nPatch-Name: {patch.name}\n\n".encode() + diff


def without_name(data: bytes) -> tuple[str, bytes]:
    """Split the output of `git format-patch` into (file name, patch); the name is "" if the commit has
    none.
    """
    message, diff = split(data)
    found = _NAME_LINE.search(message)
    return (found[1].decode() if found else ""), _NAME_LINE.sub(b"", message).rstrip(b"\n") + b"\n\n" + diff


def name_for(subject: str, taken: Iterable[str]) -> str:
    """Make a file name for a new commit: `[area] Do this` becomes `area-do-this.patch`, with a number if it
    is ``taken``.
    """
    stem = re.sub(r"[^a-z0-9]+", "-", subject.lower())[:60].strip("-") or "patch"
    taken, number, name = set(taken), 1, f"{stem}.patch"
    while name in taken:
        number += 1
        name = f"{stem}-{number}.patch"
    return name


def _name(line: str) -> str:
    return line.partition("#")[0].strip()


def names(text: str) -> list[str]:
    """The names that the series file ``text`` lists, in order."""
    return [name for name in map(_name, text.splitlines()) if name]


def load(project: Project) -> tuple[Patch, ...]:
    """Load the patches in the order of the series. Raises FapError for a file that is missing, listed twice
    or has Windows line ends.
    """
    try:
        listed = names(project.series.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise FapError(f"{project.family.series} is missing", f"git checkout {project.family.series}") from e
    patches: list[Patch] = []
    for name in listed:
        path = project.patches / name
        if Path(name).name != name or not path.is_file():
            raise FapError(
                f"{project.family.series} lists {name}, and there is no such file beside it",
                f"git checkout {project.family.series}, or take the line out",
            )
        if name in (p.name for p in patches):
            raise FapError(f"{project.family.series} lists {name} twice", "take one of the lines out")
        data = path.read_bytes()
        if b"\r\n" in data.partition(b"\n\n")[0]:
            raise FapError(
                f"{name} has Windows line ends: something rewrote it",
                f"git checkout {path.relative_to(project.root)}; .gitattributes says `*.patch -text`",
            )
        patches.append(Patch(name, data))
    return tuple(patches)


def rewrite(text: str, names: list[str]) -> str:
    """Return the series file ``text`` with ``names`` in place of its own. The lines on top stay there, and
    other comments stay with the name below them.
    """
    blocks: dict[str, list[str]] = {"": []}
    pending = blocks[""]
    for line in text.splitlines():
        if name := _name(line):
            blocks[name] = [line] if pending is blocks[""] else [*pending, line]
            pending = []
        else:
            pending.append(line)
    tail = [] if pending is blocks[""] else pending
    return "".join(
        f"{line}\n"
        for line in [*blocks[""], *(line for name in names for line in blocks.get(name, [name])), *tail]
    )
