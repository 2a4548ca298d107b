"""Locate the project's files and folders. No other module spells out a path of the project."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .lock import LOCK_NAME, Family, Lock, Release, load

PINNED_SOURCES = ("submodule", "sdist")


def chosen_source() -> str:
    """The source that the environment asks for: "", "submodule", "sdist" or the folder of a checkout."""
    return os.environ.get("SOURCE") or os.environ.get("FA_SRC_DIR") or ""


def chosen_checkout() -> str:
    """The folder of the checkout that the environment asks for, or ""."""
    return "" if chosen_source() in PINNED_SOURCES else chosen_source()


@dataclass(frozen=True)
class Project:
    """One checkout of this repository together with the family and release that a command works on."""

    root: Path
    lock: Lock
    family: Family
    release: Release

    @classmethod
    def open(cls, root: Path | None = None, family: str | None = None, version: str | None = None) -> Project:
        """Open the checkout at ``root`` (default: the one that holds these scripts)."""
        root = (root or Path(__file__).resolve().parents[3]).resolve()
        lock = load(root / LOCK_NAME)
        chosen = lock.family(family or os.environ.get("FAMILY") or None)
        wanted = version or os.environ.get("VERSION") or None
        return cls(root, lock, chosen, chosen.release(wanted, checkout=bool(chosen_checkout())))

    @property
    def series(self) -> Path:
        """The file that lists the patches in order."""
        return self.root / self.family.series

    @property
    def patches(self) -> Path:
        return self.series.parent

    @property
    def overlay(self) -> Path:
        return self.root / self.family.overlay

    @property
    def submodule(self) -> Path:
        return self.root / self.family.submodule

    @property
    def cache(self) -> Path:
        """Downloads and the bare store; may be carried to another machine and used there offline."""
        return self.root / ".cache"

    @property
    def downloads(self) -> Path:
        return self.cache / "downloads"

    @property
    def store(self) -> Path:
        """The bare git repository that holds every imported upstream tree of every family."""
        return self.cache / "store.git"

    @property
    def build(self) -> Path:
        return self.root / "build"

    @property
    def source(self) -> Path:
        """The patched tree: a git worktree of the store."""
        return self.build / "src" / self.family.name / self.release.version

    @property
    def wheel_dir(self) -> Path:
        """Where a wheel is built: a copy of the patched tree, without git. It is kept so that a build can
        resume.
        """
        return self.build / "wheel" / self.family.name / self.release.version

    @property
    def setup_dir(self) -> Path:
        """Where setup.py or pyproject.toml lies in ``wheel_dir``."""
        return self.wheel_dir / self.family.folder

    @property
    def dist(self) -> Path:
        return self.root / "dist"

    @property
    def venv(self) -> Path:
        """The project's own Python environment."""
        return self.root / ".venv"
