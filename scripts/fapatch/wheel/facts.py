"""Make and read nosoftmax.json, the record in a wheel's .dist-info of what it was made from."""

from __future__ import annotations

import json
import zipfile

from ..base.project import Project
from ..series.state import State

NAME = "nosoftmax.json"


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


def text(facts: dict[str, object]) -> bytes:
    return json.dumps(facts, indent=1).encode() + b"\n"
