"""Bring upstream's source into the store, verified; the second run does nothing and says so.

Sources are tried in this order: FA_SRC_DIR, the submodule as it is, the source distribution in
.cache/downloads, then over the network the submodule by git and the source distribution from pip's index.
SOURCE=submodule, SOURCE=sdist or SOURCE=<path> allows only one. Each must give the tree that upstream.toml
names. A checkout of your own may differ, with a warning.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..base import git
from ..base.errors import FapError, UsageError
from ..base.project import PINNED_SOURCES, Project, chosen_checkout, chosen_source
from . import origins, store

EXCLUSIVE = True
Find = Callable[[Project, str], tuple[str, str] | None]


@dataclass(frozen=True)
class Base:
    """Upstream's files in the store. ``pinned``: the lock names them; ``origin``: their source, in words."""

    commit: str
    tree: str
    pinned: bool
    origin: str


def _subject(project: Project) -> str:
    return f"{project.family.package} {project.release.version}, upstream's files"


def _own_checkout(project: Project, folder: Path) -> Base:
    """Import ``folder`` anew each time, because its files may have been edited."""
    store.sound(project, store.local_ref(project))
    commit, tree = store.import_files(
        project, store.local_ref(project), origins.from_folder(project, folder), _subject(project)
    )
    if tree == project.release.tree:
        git.git("update-ref", store.upstream_ref(project), commit, repo=project.store)
        return Base(commit, tree, True, str(folder))
    if project.release.tree:
        print(
            f"warning: {folder} is not {project.release.version} as released (tree {tree[:12]}, expected "
            f"{project.release.tree[:12]})",
            file=sys.stderr,
        )
    return Base(commit, tree, False, str(folder))


def _pinned_files(project: Project, wanted: str) -> tuple[origins.Files, str]:
    reasons = []
    if project.release.sdist is None:
        raise UsageError(
            f"{project.release.version} is not in {project.lock.path.name}: it is the version of a checkout",
            "set FA_SRC_DIR to the top folder of that checkout",
        )
    for online in (False, True):
        if wanted in ("", "submodule"):
            files, reason = origins.from_submodule(project, online)
            if files is not None:
                return (
                    files,
                    f"{project.family.submodule} at {project.release.commit[:12] or project.release.tag}",
                )
            reasons.append(reason)
        if wanted in ("", "sdist"):
            files = origins.from_sdist(project, online)
            if files is not None:
                return files, project.release.sdist.name
    raise FapError(
        f"no submodule gives {project.release.version}: {reasons[-1]}",
        "SOURCE=sdist takes the source distribution",
    )


def _stored(project: Project, find: Find = store.lookup) -> Base | None:
    """Return the files that are in the store, if they are those that the lock names."""
    found = find(project, store.upstream_ref(project))
    if found and project.release.tree in ("", found[1]):
        return Base(*found, True, "the store")
    return None


def current(project: Project) -> Base | None:
    """Return the files from which a patched tree would be made, without fetching; None if not known yet."""
    return None if chosen_checkout() else _stored(project)


def pinned(project: Project, wanted: str = "", again: bool = False) -> Base:
    """Return the files that the lock names, in the store. They are fetched if they are missing or damaged, or
    if ``again`` is set. ``wanted``: "" or one of PINNED_SOURCES. Raises FapError if no source can be reached
    or one gives other files.
    """
    stored = _stored(project, store.sound)
    if stored and not again:
        return stored
    files, origin = _pinned_files(project, wanted)
    commit, tree = store.import_files(
        project, store.upstream_ref(project), files, _subject(project), project.release.tree
    )
    return Base(commit, tree, True, origin)


def ensure(project: Project, wanted: str | None = None, again: bool = False) -> Base:
    """Return ``pinned``, or the files of a user's own checkout if ``wanted`` (default: the environment) is a
    folder.
    """
    wanted = chosen_source() if wanted is None else wanted
    if wanted in ("", *PINNED_SOURCES):
        return pinned(project, wanted, again)
    if not Path(wanted).is_dir():
        raise UsageError(
            f"SOURCE or FA_SRC_DIR is {wanted}, which is no folder",
            "give submodule, sdist or the path of a checkout",
        )
    return _own_checkout(project, Path(wanted).resolve())


def cutlass(project: Project) -> str:
    """Return the commit in the store that holds the CUTLASS headers of the project's release, fetched if
    missing.
    """
    ref = store.cutlass_ref(project)
    if (found := store.sound(project, ref)) and project.release.sdist:
        return found[0]
    for online in (False, True):
        files = (
            origins.cutlass_from_folder(project, chosen_checkout())
            or origins.cutlass_from_submodule(project, online)
            or origins.cutlass_from_sdist(project, online)
        )
        if files is not None:
            return store.import_files(
                project, ref, files, f"CUTLASS headers of {project.family.package} {project.release.version}"
            )[0]
    raise FapError(
        f"no source has the CUTLASS headers of {project.release.version}",
        "git submodule update --init csrc/cutlass in the checkout, or make fetch SOURCE=sdist",
    )


def export_cutlass(project: Project, folder: Path) -> int:
    """Write the CUTLASS headers of the release to ``folder``/include; returns the number of files.

    ``folder`` stands for upstream's csrc/cutlass. Files that already have the same bytes keep their time
    stamps.
    """
    commit = cutlass(project)
    files = list(git.read_tree(commit, lambda _: True, repo=project.store))
    for path, content in files:
        target = folder / path
        if target.is_file() and target.read_bytes() == content:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return len(files)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        help="submodule, sdist or the path of a checkout (default: SOURCE, else any that can be reached)",
    )


def main(project: Project, args: argparse.Namespace) -> int:
    wanted = args.source if args.source is not None else chosen_source()
    # A source asked for by name is fetched and compared, even if the store has the files from another source.
    base = ensure(project, wanted, again=bool(wanted))
    name = f"{project.family.package} {project.release.version}"
    if base.origin == "the store":
        print(f"{name} is in the store already, tree {base.tree[:12]}. Nothing to do.")
    else:
        print(
            f"{name} fetched from {base.origin}, tree {base.tree[:12]}"
            + ("" if project.release.tree else " (not in the lock yet)")
        )
    return 0
