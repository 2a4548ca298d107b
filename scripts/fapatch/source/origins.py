"""Read upstream's files from each possible source, as (path, content) of the wanted files, or None if the
source has nothing. No name in an archive ever becomes a path on this machine.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from ..base import git
from ..base.errors import FapError, UsageError
from ..base.files import matches, name_fault
from ..base.project import Project
from . import download

Files = Iterator[tuple[str, bytes]]
Wanted = Callable[[str], bool]
PROBE_SECONDS = 20.0
CLONE_SECONDS = 600.0
CLONE = ("submodule", "update", "--init", "--depth", "1", "--")


def _member_fault(member: tarfile.TarInfo, path: PurePosixPath, kinds: dict[PurePosixPath, bool]) -> str:
    """Say what is wrong with ``member``, at ``path`` below the archive's top folder; "" if nothing.
    ``kinds``: path of each earlier member -> whether it is a file.
    """
    if fault := name_fault(member.name):
        return fault
    if member.name.startswith("/") or ".." in path.parts:
        return "would leave the archive's folder"
    if not (member.isfile() or member.isdir()):
        return "is a link or a device, not a plain file"
    if member.isfile() and kinds.get(path):
        return "is there twice"
    for place, is_file in [(path, member.isfile()), *((folder, False) for folder in path.parents)]:
        if kinds.setdefault(place, is_file) != is_file:
            return "makes one path a file and a folder"
    return ""


def read_archive(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield (path below the top folder, content) of every file whose path is ``wanted``. Every member is
    checked, wanted or not.

    Raises FapError, naming the archive, if it is truncated or damaged, or holds a member that a source
    distribution should not have.
    """
    kinds: dict[PurePosixPath, bool] = {}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
                if fault := _member_fault(member, path, kinds):
                    raise FapError(f"{archive.name}: {member.name!r} {fault}", "do not use this file")
                if member.isfile() and wanted(str(path)):
                    content = tar.extractfile(member)
                    assert content is not None
                    yield str(path), content.read()
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise FapError(f"{archive} is damaged or cut short: {e}", f"rm {archive} and fetch again") from e


def ours(project: Project) -> Wanted:
    """A predicate for the paths that this patch set takes from upstream."""
    family = project.family
    return lambda path: matches(path, family.include) and not matches(path, family.exclude)


def from_folder(project: Project, folder: Path) -> Files:
    """Read the files in ``folder``, a user's own checkout or unpacked archive, edits included."""
    family = project.family
    build_files = [Path(family.folder) / name for name in ("setup.py", "pyproject.toml")]
    if not any((folder / name).is_file() for name in build_files) or not (folder / family.code).is_dir():
        raise UsageError(
            f"{folder} is not a checkout of {family.package}: it lacks "
            f"{' and '.join(map(str, build_files))}, or {family.code}/",
            "set FA_SRC_DIR (or SOURCE) to the top folder of one",
        )
    wanted = ours(project)
    found = {
        p.relative_to(folder).as_posix(): p
        for pattern in family.include
        for p in folder.glob(pattern)
        if p.is_file()
    }
    return ((path, found[path].read_bytes()) for path in sorted(found) if wanted(path))


def _pinned(project: Project, checkout: Path) -> str:
    """The commit of the project's release in ``checkout``, or ""."""
    release = project.release
    if not (checkout / ".git").exists():
        return ""
    # A tag can be moved, so it is used only if the lock has the tree id to check it.
    name = release.commit or (f"refs/tags/{release.tag}" if release.tree else "")
    return git.resolve(f"{name}^{{commit}}", cwd=checkout) if name else ""


def _clone_submodule(project: Project) -> str:
    """Fill the submodule folder; returns "", or the reason why it cannot be filled."""
    path = project.family.submodule
    if (project.submodule / ".git").exists():
        return f"{path} is there without {project.release.commit[:12] or project.release.tag}"
    if not (project.root / ".git").exists():
        return "this is not a git checkout"
    if project.release.commit != project.family.release().commit:
        return f"{path} is pinned to {project.family.default}"
    # The checkout's own setting, which may name a mirror, overrides .gitmodules, as for `git submodule`.
    asked = (
        git.git("config", *where, f"submodule.{path}.url", cwd=project.root, check=False)
        for where in ((), ("--file", ".gitmodules"))
    )
    url = next((said.stdout.decode().strip() for said in asked if said.returncode == 0), project.family.url)
    try:
        # If the host cannot be reached, this fails in bounded time; a clone would hang for minutes.
        git.git("ls-remote", "--exit-code", url, "HEAD", timeout=PROBE_SECONDS)
        git.git(*CLONE, path, cwd=project.root, timeout=CLONE_SECONDS)
    except FapError as e:
        return e.message
    return ""


def from_submodule(project: Project, online: bool) -> tuple[Files | None, str]:
    """Return (the files of the pinned commit, "") or (None, the reason). ``online``: clone the submodule if
    it is empty.
    """
    if not project.family.submodule:
        return None, f"{project.family.name} has no submodule"
    reason = "the submodule is empty"
    if online and not _pinned(project, project.submodule):
        reason = _clone_submodule(project)
    commit = _pinned(project, project.submodule)
    if not commit:
        return None, reason
    return git.read_tree(commit, ours(project), cwd=project.submodule), ""


def from_sdist(project: Project, online: bool) -> Files | None:
    """Return the files of the verified source distribution; None if the cache lacks it and ``online`` is not
    set.
    """
    path = download.sdist(project, offline=not online)
    if path is None:
        return None
    wanted, prefix = ours(project), f"{project.family.folder}/" if project.family.folder else ""
    return (
        (prefix + name, content) for name, content in read_archive(path, lambda name: wanted(prefix + name))
    )


def cutlass_from_folder(project: Project, folder: str) -> Files | None:
    """Return the CUTLASS headers in a checkout of a version that the lock does not have."""
    headers = Path(folder) / project.family.cutlass_submodule
    if project.release.sdist or not folder or not (headers / "include").is_dir():
        return None
    files = (path for path in sorted((headers / "include").rglob("*")) if path.is_file())
    return ((path.relative_to(headers).as_posix(), path.read_bytes()) for path in files)


def cutlass_from_submodule(project: Project, online: bool) -> Files | None:
    """Return the CUTLASS headers from the submodule nested in the submodule, at the pinned commit."""
    nested = project.submodule / project.family.cutlass_submodule
    wanted = project.release.cutlass
    if not wanted or not (project.submodule / ".git").exists():
        return None
    if online and not (nested / ".git").exists():
        try:
            git.git(*CLONE, project.family.cutlass_submodule, cwd=project.submodule, timeout=CLONE_SECONDS)
        except FapError:
            return None
    if not (nested / ".git").exists() or not git.resolve(f"{wanted}^{{commit}}", cwd=nested):
        return None
    return git.read_tree(wanted, lambda path: path.startswith("include/"), cwd=nested)


def cutlass_from_sdist(project: Project, online: bool) -> Files | None:
    """Return the CUTLASS headers that the source distribution vendors."""
    path = download.sdist(project, offline=not online)
    prefix = f"{project.family.cutlass_submodule}/"
    if path is None:
        return None
    files = read_archive(path, lambda name: name.startswith(f"{prefix}include/"))
    return ((name.removeprefix(prefix), content) for name, content in files)
