"""Read upstream.toml into frozen dataclasses: the releases, their sources, and the tree id of each one's
upstream files. The file pins inputs alone; everything made from them is computed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import FapError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    try:
        import tomli as tomllib
    except ModuleNotFoundError:  # before `make env`; pip brings its own
        from pip._vendor import tomli as tomllib

LOCK_NAME = "upstream.toml"


@dataclass(frozen=True)
class Sdist:
    """A source distribution on the Python package index. ``size`` in bytes."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Release:
    """One upstream release. ``tree`` is the git tree id of upstream's files.

    ``tag`` and the commits are those of the family's submodule, "" without one. The release of a user's own
    checkout (FA_SRC_DIR) has only its version.
    """

    version: str
    tag: str = ""
    sdist: Sdist | None = None
    commit: str = ""
    cutlass: str = ""
    tree: str = ""


@dataclass(frozen=True)
class Family:
    """The releases of one upstream package that one series of patches serves. Paths are relative to the
    project root.

    ``folder``: where setup.py or pyproject.toml lies in upstream's tree, "" for its top; the source
    distribution is that folder. ``code``: the folder of upstream's tree whose Python files the wheel holds.
    ``extension``: the compiled module of a CUDA build, "" when there is nothing to compile. ``submodule``: ""
    when the source distribution is the only source. ``smoke``: how the wheel is tested, "run" or "compile"
    (smoke.py). ``undeclared``: requirements that the wheel does not name. ``shared``: path in upstream's tree
    -> file of this repository, for overlay files whose home is another family's overlay.
    """

    name: str
    default: str
    url: str
    submodule: str
    cutlass_submodule: str
    series: str
    overlay: str
    package: str
    folder: str
    code: str
    extension: str
    smoke: str
    undeclared: tuple[str, ...]
    shared: dict[str, str]
    revision: int
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    releases: tuple[Release, ...]

    @property
    def local_label(self) -> str:
        """The local version label of the patched tree, the part after the ``+``."""
        return f"nosoftmax.{self.revision}"

    def wheel_label(self, backend: str) -> str:
        """The local version label of a wheel; ``.cpu`` says that it lacks the extension of its release's CUDA
        wheels.
        """
        return f"{self.local_label}.cpu" if backend == "cpu" else self.local_label

    def release(self, version: str | None = None, checkout: bool = False) -> Release:
        """The release called ``version``, or the default one. Raises UsageError for a version that is not in
        the lock, unless ``checkout`` is set.
        """
        wanted = version or self.default
        for release in self.releases:
            if release.version == wanted:
                return release
        if checkout:
            return Release(wanted)
        known = ", ".join(r.version for r in self.releases)
        raise UsageError(
            f"VERSION={wanted} is not a release of {self.name} that this patch set supports",
            f"choose one of: {known}; fap.py lock add {wanted} adds one",
        )


@dataclass(frozen=True)
class Lock:
    path: Path
    default_family: str
    families: tuple[Family, ...]

    def family(self, name: str | None = None) -> Family:
        """The family called ``name``, or the default one. Raises UsageError for an unknown name."""
        wanted = name or self.default_family
        for family in self.families:
            if family.name == wanted:
                return family
        raise UsageError(
            f"FAMILY={wanted} is not in {self.path.name}",
            f"choose one of: {', '.join(f.name for f in self.families)}",
        )


def _release(version: str, raw: dict[str, Any]) -> Release:
    return Release(
        version=version,
        tag=raw.get("tag", ""),
        sdist=Sdist(**raw["sdist"]),
        commit=raw.get("commit", ""),
        cutlass=raw.get("cutlass", ""),
        tree=raw.get("tree", ""),
    )


def _family(name: str, raw: dict[str, Any]) -> Family:
    return Family(
        name=name,
        default=raw["default"],
        url=raw["url"],
        submodule=raw.get("submodule", ""),
        cutlass_submodule=raw.get("cutlass-submodule", ""),
        series=raw["series"],
        overlay=raw["overlay"],
        package=raw["package"],
        folder=raw.get("folder", ""),
        code=raw.get("code", raw["package"]),
        extension=raw.get("extension", ""),
        smoke=raw.get("smoke", "run"),
        undeclared=tuple(raw.get("undeclared", ())),
        shared=dict(raw.get("shared", {})),
        revision=raw["revision"],
        include=tuple(raw["include"]),
        exclude=tuple(raw.get("exclude", ())),
        releases=tuple(_release(v, r) for v, r in raw["version"].items()),
    )


def load(path: Path) -> Lock:
    """Read the lock file at ``path``. Raises FapError when it is missing, malformed or of another schema."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] != 1:
            raise FapError(
                f"{path.name} has schema {raw['schema']}, this tool reads schema 1",
                "update the scripts or the file",
            )
        families = tuple(_family(name, f) for name, f in raw["family"].items())
        return Lock(path, raw["default-family"], families)
    except FileNotFoundError as e:
        raise FapError(
            f"{path} is missing", "run from a complete checkout, or `git checkout upstream.toml`"
        ) from e
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as e:
        raise FapError(
            f"{path.name} cannot be read: {type(e).__name__} {e}",
            "`git diff upstream.toml` shows what changed",
        ) from e
