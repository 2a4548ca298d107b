"""Print as JSON which packages of a pyproject.toml the running Python lacks: those of the optional
dependencies GROUP..., or without a group those that the project itself depends on. Run by .venv's Python.

    python missing.py PYPROJECT GROUP...      ->  ["ninja", "torch==2.13.0"]

Needs nothing but the standard library and pip, whose own copies of `packaging` and `tomli` it reads: it runs
before anything is installed.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib


def is_met(requirement: Requirement, extra: str = "") -> bool:
    """Whether ``requirement`` does not apply to this Python, or installed distributions satisfy it and what
    its extras bring. ``extra``: the one of another distribution that asks for it.
    """
    if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
        return True
    try:
        found = metadata.distribution(requirement.name)
    except metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(found.version, prereleases=True) and all(
        is_met(Requirement(brought), name) for name in requirement.extras for brought in found.requires or ()
    )


def main(argv: list[str]) -> int:
    project = tomllib.loads(Path(argv[0]).read_text(encoding="utf-8"))["project"]
    groups = [project["optional-dependencies"][group] for group in argv[1:]] or [project["dependencies"]]
    wanted = [requirement for group in groups for requirement in group]
    json.dump([r for r in wanted if not is_met(Requirement(r))], sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
