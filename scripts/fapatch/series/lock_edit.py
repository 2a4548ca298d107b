"""Change the releases in upstream.toml.

`lock add 2.9.0` downloads the release's source distribution from the package index, compares it with the
index's hash, reads it as an archive and records size, sha256 and upstream's tree. It runs nothing of it.
--commit and --cutlass record the commits of the submodule and of its csrc/cutlass, also for a release that is
already in the file. `lock default 2.9.0` makes 2.9.0 the release that the series is written for, and moves
the submodule's entry in git's index to it. `lock drop 2.8.0` removes a release, and the patches that no other
release takes.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace

import tomlkit
from packaging.version import InvalidVersion, Version

from ..base import files, git
from ..base.errors import FapError, UsageError
from ..base.lock import Family, Release, load
from ..base.project import Project
from ..source import download, fetch
from . import apply, arguments, overlay, series

EXCLUSIVE = True
ANY_RELEASE = True  # VERSION may name a release that is not in the lock yet


def _edit(project: Project, change) -> Family:
    """Let ``change`` alter the family's table of upstream.toml, keeping comments; returns the new family."""
    document = tomlkit.parse(project.lock.path.read_text(encoding="utf-8"))
    change(document["family"][project.family.name])
    files.write(project.lock.path, tomlkit.dumps(document).rstrip("\n") + "\n")
    return load(project.lock.path).family(project.family.name)


def _normal(version: str) -> str:
    try:
        return str(Version(version))
    except InvalidVersion as e:
        raise UsageError(f"{version!r} is not a version", "write it like 2.8.4 or 2.8.3.post1") from e


def _commits(project: Project, commit: str, cutlass: str) -> dict[str, str]:
    given = {name: value for name, value in (("commit", commit), ("cutlass", cutlass)) if value}
    for name, value in given.items():
        if not re.fullmatch("[0-9a-f]{40}", value):
            raise UsageError(f"--{name} {value} is not a commit", "give all 40 hexadecimal digits")
    if given and not project.family.submodule:
        raise UsageError(f"{project.family.name} has no submodule", "leave --commit and --cutlass out")
    return given


def add(project: Project, version: str, commit: str = "", cutlass: str = "") -> Release:
    """Add ``version`` to the project's family, or record the commits of a release that is already there.
    Raises UsageError if there is nothing to add.
    """
    version, commits = _normal(version), _commits(project, commit, cutlass)
    there = version in (r.version for r in project.family.releases)
    if there and not commits:
        raise UsageError(
            f"{version} is in {project.lock.path.name} already",
            f"make rebase VERSION={version}; --commit records the submodule's commit",
        )
    entry = tomlkit.table()
    if not there:
        entry.update({"tag": f"v{version}"} if project.family.submodule else {})
        release = Release(version, sdist=download.add(project, version))
        tree = fetch.pinned(replace(project, release=release), "sdist").tree
        sdist = tomlkit.inline_table()
        sdist.update(vars(release.sdist))
        entry.update({**commits, "sdist": sdist, "tree": tree})

    def change(family) -> None:
        if there:
            family["version"][version].update(commits)
        else:
            family["version"][version] = entry

    return _edit(project, change).release(version)


def standing(project: Project, release: Release) -> str:
    """Say in one line whether the series serves ``release`` as it is, with the next step if not."""
    one, patches = replace(project, release=release), series.load(project)
    if reason := series.not_carried(patches, release.version):
        return f"not carried yet: {reason}  ->  {apply.rebase_command(one)}"
    base, taken = fetch.pinned(one), [p for p in patches if p.applies_to(release.version)]
    if failed := apply.failures(one, base.commit, taken):
        return f"not carried yet: {', '.join(failed)} do not apply  ->  {apply.rebase_command(one)}"
    try:
        arguments.check(one, base, overlay.load(one))
    except FapError as e:
        return f"not carried yet: {e}"
    return f"carried: {len(taken)} patches apply as they are"


def make_default(project: Project, version: str) -> str:
    """Make ``version`` the family's default; returns what was done."""
    release = project.family.release(_normal(version))
    path = project.family.submodule
    if path and not release.commit:
        raise FapError(
            f"{release.version} names no commit for {path}",
            f"git ls-remote {project.family.url} {release.tag} tells it, fap.py lock add {release.version} "
            "--commit records it",
        )

    def change(family) -> None:
        family["default"] = release.version

    _edit(project, change)
    if not path:
        return f"{release.version} is the default"
    git.git("update-index", "--add", "--cacheinfo", f"160000,{release.commit},{path}", cwd=project.root)
    return f"{release.version} is the default, and {path} is at {release.commit[:12]} in git's index"


def drop(project: Project, version: str) -> list[str]:
    """Take ``version`` out of the lock; returns the names of the patches that went with it."""
    release = project.family.release(_normal(version))
    if release.version == project.family.default:
        raise UsageError(
            f"{release.version} is the default", "fap.py lock default makes another one the default"
        )
    left = _edit(project, lambda family: family["version"].remove(release.version)).releases
    patches = series.load(project)
    gone = [
        p.name
        for p in patches
        if p.applies_to(release.version) and not any(p.applies_to(r.version) for r in left)
    ]
    text = project.series.read_text(encoding="utf-8")
    files.write(project.series, series.rewrite(text, [p.name for p in patches if p.name not in gone]))
    for name in gone:
        (project.patches / name).unlink()
    return gone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    adding = verbs.add_parser("add", help="add a release, or record the commits of one")
    adding.add_argument("version", metavar="VERSION", help="an upstream release on the package index")
    adding.add_argument("--commit", default="", help="the commit of its tag, for the submodule")
    adding.add_argument("--cutlass", default="", help="the commit of csrc/cutlass there")
    for verb, text in (
        ("default", "make a release the one that the series is written for"),
        ("drop", "remove a release"),
    ):
        verbs.add_parser(verb, help=text).add_argument("version", metavar="VERSION")


def main(project: Project, args: argparse.Namespace) -> int:
    if args.verb == "default":
        print(make_default(project, args.version))
    elif args.verb == "drop":
        gone = drop(project, args.version)
        print(f"{args.version} is out of {project.lock.path.name}")
        for name in gone:
            print(f"removed    {name}: no release takes it any more")
    else:
        release = add(project, args.version, args.commit, args.cutlass)
        print(
            f"{project.lock.path.name}: {release.version}, {release.sdist.name}, {release.sdist.size} bytes"
        )
        print(f"  sha256 {release.sdist.sha256}\n  tree   {release.tree}")
        print(standing(project, release))
    return 0
