"""Check the contents of a wheel before it is installed."""

from __future__ import annotations

import zipfile
from email.parser import BytesParser
from pathlib import Path

from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from ..base.errors import FapError
from ..base.files import sha256
from ..base.process import run
from ..base.project import Project
from ..series.state import State
from . import facts

HINT = "make clean wheel"
# Prints the sha256 of the wheel that the installed package came from, as pip recorded it (PEP 610), or
# nothing.
ORIGIN = """
import json, sys
from importlib import metadata
try:
    origin = json.loads(metadata.distribution(sys.argv[1]).read_text("direct_url.json") or "{}")
    print(origin.get("archive_info", {}).get("hashes", {}).get("sha256", ""))
except metadata.PackageNotFoundError:
    pass
"""


def _python_files(tree: Path, code: str) -> dict[str, bytes]:
    """Read every Python file in ``code``, except those in the build folder of setuptools: path -> content."""
    files = (p for p in (tree / code).rglob("*.py") if p.relative_to(tree / code).parts[0] != "build")
    return {p.relative_to(tree).as_posix(): p.read_bytes() for p in files}


def check(wheel: Path, project: Project, backend: str, tree: Path, made: State) -> None:
    """Raise FapError unless ``wheel`` is the package of the patched tree that ``made`` describes and whose
    files are in ``tree``: name, version, tags, every Python file, the licence, the hooks, its own facts.

    A cuda wheel must hold the extension; any other must be pure Python for any platform.
    """
    name, version, _, tags = parse_wheel_filename(wheel.name)
    # A checkout says itself what version it is; VERSION= is the name that its patches are kept under.
    public = project.release.version if project.release in project.family.releases else version.public
    expected = Version(f"{public}+{project.family.wheel_label(backend)}")
    package = project.family.package
    if (name, version) != (canonicalize_name(package), expected):
        raise FapError(f"the wheel is {name} {version}, expected {package} {expected}", HINT)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        files = {n: archive.read(n) for n in names if n.endswith(".py")}
        info, said = facts.info(archive), facts.read(archive)
        metadata = BytesParser().parsebytes(archive.read(f"{info}/METADATA"))
        licences = [archive.read(n) for n in names if n.startswith(info) and n.endswith("/LICENSE")]
    source = _python_files(tree, project.family.code)
    if differing := sorted(n for n in source.keys() | files.keys() if source.get(n) != files.get(n)):
        raise FapError(
            f"{wheel.name} differs from the patched tree in {len(differing)} files, first: {differing[0]}",
            HINT,
        )
    # In upstream's own files, only the hooks contain that word.
    if not any(b"nosoftmax" in content for name, content in files.items() if name not in made.overlay):
        raise FapError(f"no file of upstream's in {wheel.name} has a hook: its tree is not patched", HINT)
    if said != facts.of(project, made):
        raise FapError(
            f"{wheel.name} says that it is of {said.get('patched tree', 'no tree')}, not of {made.tree}", HINT
        )
    if (
        metadata["Version"] != str(expected)
        or (tree / project.family.folder / "LICENSE").read_bytes() not in licences
    ):
        raise FapError(f"{wheel.name} lacks upstream's LICENSE or says version {metadata['Version']}", HINT)
    extension = project.family.extension
    extensions = [n for n in names if n.endswith(".so")]
    pure = {str(t) for t in tags} == {"py3-none-any"}
    if backend != "cuda" and (extensions or not pure):
        raise FapError(f"{wheel.name} is not a pure Python wheel (tags {', '.join(map(str, tags))})", HINT)
    if backend == "cuda" and (pure or not any(n.startswith(extension) for n in extensions)):
        raise FapError(f"{wheel.name} lacks the compiled extension {extension}", HINT)


def installed(python: Path, wheel: Path) -> bool:
    """Whether the environment of ``python`` holds the package of exactly this wheel file."""
    said = run(python, "-c", ORIGIN, wheel.name.partition("-")[0]).stdout.decode().strip()
    return said == sha256(wheel)
