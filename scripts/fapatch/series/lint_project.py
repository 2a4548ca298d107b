"""Define the rules for the series, the overlay, the lock, the submodule and the git attributes. No rule
repeats what `make apply` refuses anyway.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from ..base.files import matches
from ..base.lock import Family, Lock, Release
from . import series
from .overlay import home
from .series import Patch

Complaint = tuple[str, int, str]


@dataclass(frozen=True)
class Checkout:
    """What the rules look at. ``gitlinks``: path -> commit of every submodule in the index."""

    root: Path
    lock: Lock
    gitlinks: dict[str, str]

    def listed(self, family: Family) -> list[str]:
        """The names in the series."""
        return series.names((self.root / family.series).read_text(encoding="utf-8"))

    def patches(self, family: Family) -> list[Path]:
        """Every patch file, in the order of the series, then those that it does not list."""
        folder = (self.root / family.series).parent
        listed = [folder / name for name in self.listed(family)]
        return [p for p in dict.fromkeys([*listed, *sorted(folder.glob("*.patch"))]) if p.is_file()]

    def overlay(self, family: Family) -> list[str]:
        """The paths in the overlay's folder, as they will lie in upstream's tree."""
        folder = self.root / family.overlay
        files = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        return sorted(p.relative_to(folder).as_posix() for p in files)


RULES: dict[str, Callable[[Checkout], Iterator[Complaint]]] = {}


def rule(name: str) -> Callable:
    def register(
        function: Callable[[Checkout], Iterator[Complaint]],
    ) -> Callable[[Checkout], Iterator[Complaint]]:
        RULES[name] = function
        return function

    return register


@rule("series")
def series_lists_every_file(checkout: Checkout) -> Iterator[Complaint]:
    for family in checkout.lock.families:
        listed = checkout.listed(family)
        for path in checkout.patches(family):
            if path.name not in listed:
                yield path.relative_to(checkout.root).as_posix(), 0, f"not listed in {family.series}"


def _is_specifier(text: str) -> bool:
    try:
        return bool(SpecifierSet(text))
    except InvalidSpecifier:
        return False


@rule("forms")
def forms_of_a_patch_are_apart(checkout: Checkout) -> Iterator[Complaint]:
    """Two patches of one subject are an old and a new form of one change; no release may take both."""
    for family in checkout.lock.families:
        patches = [(path, Patch(path.name, path.read_bytes())) for path in checkout.patches(family)]
        for release in family.releases:
            seen: dict[str, str] = {}
            for path, patch in patches:
                if not _is_specifier(patch.applies) or not patch.applies_to(release.version):
                    continue  # the rule applies-to reports it
                if other := seen.get(patch.header.subject):
                    message = f"{release.version} takes this form of the patch and {other}"
                    yield path.relative_to(checkout.root).as_posix(), 0, message
                seen[patch.header.subject] = path.name


@rule("overlay")
def overlay_stays_out_of_excluded_folders(checkout: Checkout) -> Iterator[Complaint]:
    for family in checkout.lock.families:
        for name in sorted({*checkout.overlay(family), *family.shared}):
            if matches(name, family.exclude):
                yield home(family, name), 0, f"{name} is excluded in the lock"


@rule("shared")
def shared_files_lie_in_another_overlay(checkout: Checkout) -> Iterator[Complaint]:
    for family in checkout.lock.families:
        others = tuple(f"{other.overlay}/" for other in checkout.lock.families if other is not family)
        for kept in family.shared.values():
            if not kept.startswith(others):
                message = f"{family.name} shares {kept}, which is in no other family's overlay"
                yield checkout.lock.path.name, 0, message


def _release_complaints(release: Release, has_submodule: bool) -> Iterator[str]:
    for field, length in (("commit", 40), ("cutlass", 40), ("tree", 40)):
        value = getattr(release, field)
        if (value or field == "tree") and not re.fullmatch(rf"[0-9a-f]{{{length}}}", value):
            yield f"{field} is {value!r}, not {length} hexadecimal digits"
    if not re.fullmatch(r"[0-9a-f]{64}", release.sdist.sha256):
        yield f"the sha256 of {release.sdist.name} is not 64 hexadecimal digits"
    if not isinstance(release.sdist.size, int) or release.sdist.size <= 0:
        yield f"the size of {release.sdist.name} is {release.sdist.size!r}, not a number of bytes"
    if release.version not in release.sdist.name or not release.sdist.name.endswith(".tar.gz"):
        yield f"{release.sdist.name} is not the name of its source distribution"
    tag = f"v{release.version}" if has_submodule else ""
    if release.tag != tag:
        yield f"the tag is {release.tag!r}, expected {tag!r}"


@rule("lock")
def lock_is_well_formed(checkout: Checkout) -> Iterator[Complaint]:
    lines = checkout.lock.path.read_text(encoding="utf-8").splitlines()

    def line_of(version: str) -> int:
        return next(
            (i for i, line in enumerate(lines, 1) if line.startswith("[") and f'"{version}"' in line), 0
        )

    for family in checkout.lock.families:
        if not isinstance(family.revision, int) or family.revision < 1:
            yield (
                checkout.lock.path.name,
                0,
                f"{family.name}: revision is {family.revision!r}, not a number from 1 on",
            )
        if family.default not in {r.version for r in family.releases}:
            yield checkout.lock.path.name, 0, f"{family.name}: the default {family.default} has no entry"
        for release in family.releases:
            try:
                Version(release.version)
            except InvalidVersion:
                yield (
                    checkout.lock.path.name,
                    line_of(release.version),
                    f"{release.version!r} is not a version",
                )
            for complaint in _release_complaints(release, bool(family.submodule)):
                yield checkout.lock.path.name, line_of(release.version), f"{release.version}: {complaint}"


@rule("submodule")
def submodule_is_at_the_default(checkout: Checkout) -> Iterator[Complaint]:
    for family in (f for f in checkout.lock.families if f.submodule):
        commit, found = family.release().commit, checkout.gitlinks.get(family.submodule)
        if found is None:
            yield ".gitmodules", 0, f"{family.submodule} is not a submodule in the index"
        elif not commit:
            message = (
                f"{family.default} names no commit: fap.py lock add {family.default} --commit records it"
            )
            yield checkout.lock.path.name, 0, message
        elif found != commit:
            yield (
                ".gitmodules",
                0,
                f"{family.submodule} is at {found[:12]}, the lock's default {family.default} is "
                f"{commit[:12]}",
            )


@rule("attributes")
def attributes_keep_patches_as_they_are(checkout: Checkout) -> Iterator[Complaint]:
    path = checkout.root / ".gitattributes"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    # The last matching line wins, and `* text=auto` after `*.patch -text` would undo it.
    text = ""
    for line in lines:
        pattern, *attributes = line.split() or [""]
        if pattern in ("*.patch", "*"):
            text = next((a for a in reversed(attributes) if a.lstrip("-!").partition("=")[0] == "text"), text)
    if text != "-text":
        yield ".gitattributes", 0, "`*.patch -text` must hold, or a checkout on Windows changes the patches"
