"""Add a release to upstream.toml: `lock add 2.9.0` downloads its source distribution and fills in size,
sha256 and tree.

The hash is the one of the file that was downloaded now: compare it with what the package index shows before
committing it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import tomlkit
from packaging.version import InvalidVersion, Version

from ..base import files
from ..base.errors import UsageError
from ..base.lock import Release, Sdist, load
from ..base.project import Project
from ..source import download, fetch

EXCLUSIVE = True
ANY_RELEASE = True  # VERSION may name one that is not in the lock yet


def write_trees(project: Project, trees: dict[str, tuple[str, str]]) -> bool:
    """Write (tree, patched-tree) for each version of ``trees`` into upstream.toml, comments kept; whether
    anything changed.
    """
    text = project.lock.path.read_text(encoding="utf-8")
    document = tomlkit.parse(text)
    versions = document["family"][project.family.name]["version"]
    for version, (tree, patched) in trees.items():
        versions[version]["tree"] = tree
        versions[version]["patched-tree"] = patched
    new = tomlkit.dumps(document)
    if new == text:
        return False
    files.write(project.lock.path, new)
    return True


def _download(project: Project, version: str) -> Sdist:
    """The source distribution of ``version``: the one in .cache/downloads, or what pip finds."""
    path = project.downloads / f"{project.family.package}-{version}.tar.gz"
    if not path.exists():
        project.downloads.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=project.downloads, prefix=".part-") as scratch:
            file = download.pip_download(project, f"{project.family.package}=={version}", Path(scratch))
            path = project.downloads / file.name
            os.replace(file, path)
    return Sdist(path.name, path.stat().st_size, download.sha256(path))


def add(project: Project, version: str, commit: str = "", cutlass: str = "") -> Release:
    """Add ``version`` to the project's family in upstream.toml. Raises UsageError when it is no version or
    there already.
    """
    try:
        version = str(Version(version))
    except InvalidVersion as e:
        raise UsageError(f"{version!r} is not a version", "write it like 2.8.4 or 2.8.3.post1") from e
    if version in (r.version for r in project.family.releases):
        raise UsageError(
            f"{version} is in {project.lock.path.name} already", f"make rebase VERSION={version}"
        )
    release = Release(
        version,
        f"v{version}" if project.family.submodule else "",
        _download(project, version),
        commit,
        cutlass,
        "",
        "",
    )
    tree = fetch.pinned(replace(project, release=release), "sdist").tree
    document = tomlkit.parse(project.lock.path.read_text(encoding="utf-8"))
    entry = tomlkit.table()
    entry.update(
        {
            name: value
            for name, value in (("tag", release.tag), ("commit", commit), ("cutlass", cutlass))
            if value
        }
    )
    sdist = tomlkit.inline_table()
    sdist.update({"name": release.sdist.name, "size": release.sdist.size, "sha256": release.sdist.sha256})
    entry["sdist"] = sdist
    entry["tree"] = tree
    entry["patched-tree"] = ""
    document["family"][project.family.name]["version"][version] = entry
    files.write(project.lock.path, tomlkit.dumps(document))
    return load(project.lock.path).family(project.family.name).release(version)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="add", required=True)
    adding = verbs.add_parser("add", help="add a release")
    adding.add_argument("version", metavar="VERSION", help="an upstream release on the package index")
    adding.add_argument(
        "--commit", default="", help="the commit of its tag, so that the submodule can give it too"
    )
    adding.add_argument("--cutlass", default="", help="the commit of csrc/cutlass there")


def main(project: Project, args: argparse.Namespace) -> int:
    release = add(project, args.version, args.commit, args.cutlass)
    print(
        f"{project.lock.path.name}: {release.version} added\n  {release.sdist.name}, {release.sdist.size} "
        f"bytes\n  sha256 {release.sdist.sha256}\n  tree   {release.tree}\n  ->  compare the sha256 with "
        f"the package index, then make rebase VERSION={release.version}"
    )
    return 0
