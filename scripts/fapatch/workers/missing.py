"""Print as JSON which of REQUIREMENT..., and of their dependencies, the running Python lacks.

    python missing.py LOCK REQUIREMENT...      ->  ["ninja", "torch==2.13.0"]

A package of this environment must have the version in LOCK, a requirements file of pip. A package that the
environment shares with its base may have any version that meets the requirement.

Needs only the standard library and pip's own copy of `packaging`, because it runs before anything is
installed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.specifiers import SpecifierSet
from pip._vendor.packaging.utils import canonicalize_name


def pins(lock: str) -> dict[str, SpecifierSet]:
    """Read the text of a lock: package -> its version for the running Python."""
    lines = (Requirement(line) for line in re.findall(r"^(\w.*?)\s*\\?$", lock, re.MULTILINE))
    return {canonicalize_name(r.name): r.specifier for r in lines if not r.marker or r.marker.evaluate()}


def unmet(requirements: Iterable[str], pinned: dict[str, SpecifierSet]) -> list[str]:
    """List those of ``requirements``, and of their dependencies at any depth, that no installed package
    meets.
    """
    own, found, seen = Path(sys.prefix).resolve(), [], set()
    queue = [(line, "") for line in requirements]
    while queue:
        line, extra = queue.pop(0)
        wanted = Requirement(line)
        if (wanted.marker and not wanted.marker.evaluate({"extra": extra})) or line in seen:
            continue
        seen.add(line)
        try:
            have = metadata.distribution(wanted.name)
        except metadata.PackageNotFoundError:
            found.append(f"{wanted.name}{wanted.specifier}")
            continue
        is_own = Path(have.locate_file("")).resolve().is_relative_to(own)
        exact = pinned.get(canonicalize_name(wanted.name), SpecifierSet()) if is_own else SpecifierSet()
        if not (wanted.specifier & exact).contains(have.version, prereleases=True):
            found.append(f"{wanted.name}{wanted.specifier}")
        elif is_own:
            queue += [(need, extra) for extra in ("", *wanted.extras) for need in have.requires or ()]
    return sorted(set(found))


def main(argv: list[str]) -> int:
    lock, *requirements = argv
    json.dump(unmet(requirements, pins(Path(lock).read_text(encoding="utf-8"))), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
