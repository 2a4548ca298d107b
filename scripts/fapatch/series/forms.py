"""Widen and split Applies-To, so that an old and a new form of one patch can lie side by side and no release
takes both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from packaging.specifiers import Specifier
from packaging.version import Version

from ..base import git
from ..base.errors import FapError
from ..base.project import Project
from ..source import fetch
from . import series
from .series import Patch


def _clauses(applies: str) -> list[Specifier]:
    return [Specifier(clause) for clause in applies.split(",") if clause.strip()]


def _text(clauses: Iterable[Specifier | str]) -> str:
    return ",".join(map(str, clauses))


def widened(applies: str, version: str) -> str:
    """``applies`` with its lower or upper bound moved as far as ``version``, and no further."""
    found = []
    for clause in _clauses(applies):
        if clause.contains(version, prereleases=True):
            found.append(str(clause))
        elif clause.operator in ("==", "===", "~="):
            low, high = sorted((clause.version.removesuffix(".*"), version), key=Version)
            found += [f">={low}", f"<={high}"]
        elif clause.operator != "!=":
            found.append(f"{clause.operator[0]}={version}")
    return _text(found)


def split(applies: str, version: str, newest: bool) -> tuple[str, str]:
    """Return disjoint (Applies-To of the old form, Applies-To of the new form for ``version``). ``newest``:
    the new form also serves releases after ``version``.
    """
    clauses = _clauses(applies)
    if not newest:
        return _text([*clauses, f"!={version}"]), f"=={version}"
    lower = [c for c in clauses if c.operator[0] != "<"]
    upper = [c for c in clauses if c.operator[0] == "<"]
    return _text([*lower, f"<{version}"]), _text([f">={version}", *upper])


def _with_gone(
    before: tuple[Patch, ...], after: tuple[Patch, ...], version: str, newest: bool, served: list[str]
) -> tuple[Patch, ...]:
    """Put back into ``after``, in their places, the patches that ``version`` does not need but a release of
    ``served`` does. Raises FapError if such a patch is no backport.
    """
    result = {p.name: p for p in after}
    order = [p.name for p in after]
    for place, patch in enumerate(before):
        if patch.name in result or not any(patch.applies_to(release) for release in served):
            continue
        if not patch.is_backport:
            raise FapError(
                f"{patch.name} has nothing left in {version}, and other releases need it",
                f"make rebase-abort; if it has its change, write Upstream-Status: Backport [{version}] "
                "into it and start again",
            )
        result[patch.name] = patch.with_applies(split(patch.applies, version, newest)[0])
        behind = [p.name for p in before[:place] if p.name in order]
        order.insert(order.index(behind[-1]) + 1 if behind else 0, patch.name)
    return tuple(result[name] for name in order)


def keep_old(project: Project, before: tuple[Patch, ...], after: tuple[Patch, ...]) -> tuple[Patch, ...]:
    """Add old forms, from ``before``, to ``after``, the series written for the project's release: of each
    patch that ``after`` lost, or whose new form does not apply to a release that took the old one.
    """
    old, needed, version = {p.name: p for p in before}, set(), project.release.version
    others = [r for r in project.family.releases if r.version != version]
    served = [r for r in others if not series.not_carried(before, r.version)]
    newest = all(Version(version) > Version(r.version) for r in served)
    after = _with_gone(before, after, version, newest, [r.version for r in served])
    for release in served:
        commit = fetch.pinned(replace(project, release=release)).commit
        with git.index_of(commit, repo=project.store) as index:
            for patch in (p for p in after if p.applies_to(release.version)):
                if patch.name in needed:
                    index.apply(old[patch.name].data)
                elif index.apply(patch.data) and patch.name in old and not index.apply(old[patch.name].data):
                    needed.add(patch.name)
    suffix = "-" + re.sub(r"[^a-z0-9]+", "-", version.lower())
    result: list[Patch] = []
    for patch in after:
        if patch.name not in needed:
            result.append(patch)
            continue
        first, second = split(patch.applies, version, newest)
        kept = old[patch.name]
        result.append(kept if not kept.applies_to(version) else kept.with_applies(first))
        result.append(
            replace(patch.with_applies(second), name=patch.name.removesuffix(".patch") + f"{suffix}.patch")
        )
    return tuple(result)
