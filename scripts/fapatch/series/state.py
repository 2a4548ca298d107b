"""Find out whether the patched tree matches the files that it is made from, by comparing contents, never
dates.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from ..base import files, git
from ..base.project import Project
from ..source import store
from ..source.fetch import Base
from . import overlay, series, worktree
from .series import Patch


class Reason(Enum):
    """(exit code of `status`, whether work could be lost, message). Codes: 1 out of date or edited, 2 in the
    middle of a git operation, or broken.
    """

    NOT_APPLIED = 1, False, "the patched tree was not made yet"
    UPSTREAM_CHANGED = 1, False, "made from other upstream files: {}"
    PATCH_ADDED = 1, False, "patch added: {}"
    PATCH_REMOVED = 1, False, "patch removed: {}"
    PATCH_CHANGED = 1, False, "patch changed: {}"
    SERIES_REORDERED = 1, False, "the series has another order"
    OVERLAY_CHANGED = 1, False, "overlay changed: {}"
    STORE_LOST = 1, False, "its store in .cache is gone or damaged; the tree itself is as it was made"
    SOURCE_EDITED = 1, True, "source changed, not committed: {}"
    SOURCE_COMMITTED = 1, True, "source changed, commits on top: {}"
    AM_IN_PROGRESS = 2, True, "`git am` is in progress in it"
    REBASE_IN_PROGRESS = 2, True, "a rebase is in progress in {}"
    BROKEN = 2, True, "it cannot be read as a git worktree, and its files are not as they were made"

    def __init__(self, code: int, holds_work: bool, text: str) -> None:
        self.code = code
        self.holds_work = holds_work
        self.text = text


@dataclass(frozen=True)
class Finding:
    reason: Reason
    what: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(self.what[:4]) + (f" and {len(self.what) - 4} more" if len(self.what) > 4 else "")
        return self.reason.text.format(shown)


@dataclass(frozen=True)
class State:
    """The inputs of a patched tree, and the result. ``patches``: (name, blob id) of the series in order;
    ``applied``: the patches that the release takes; ``overlay``: path -> blob id.
    """

    base: str
    base_tree: str
    pinned: bool
    patches: tuple[tuple[str, str], ...]
    applied: tuple[str, ...]
    overlay: dict[str, str]
    commit: str
    tree: str

    @classmethod
    def of(
        cls,
        base: Base,
        patches: tuple[Patch, ...],
        applied: tuple[str, ...],
        files: dict[str, bytes],
        commit: str,
        tree: str,
    ) -> State:
        return cls(
            base.commit,
            base.tree,
            base.pinned,
            tuple((p.name, p.blob) for p in patches),
            applied,
            {path: git.blob_id(data) for path, data in files.items()},
            commit,
            tree,
        )


def _path(project: Project) -> Path:
    return project.build / "state" / project.family.name / f"{project.release.version}.json"


def read(project: Project) -> State | None:
    """Read the state of the last `apply`; None if there is none that can be read."""
    try:
        raw = json.loads(_path(project).read_text(encoding="utf-8"))
        listed = tuple((name, blob) for name, blob in raw["patches"])
        return State(**{**raw, "patches": listed, "applied": tuple(raw["applied"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write(project: Project, state: State) -> None:
    files.write(_path(project), json.dumps(asdict(state), indent=1) + "\n")


def forget(project: Project) -> None:
    _path(project).unlink(missing_ok=True)


def changed(old: dict[str, str], new: dict[str, str]) -> tuple[str, ...]:
    """The names whose blob ids differ in ``old`` and ``new``."""
    return tuple(sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)))


def compare_inputs(project: Project, state: State, base: Base | None) -> list[Finding]:
    """List what changed in the files of this repository, and upstream, since ``state`` was written."""
    old, new = dict(state.patches), {p.name: p.blob for p in series.load(project)}
    common = [name for name in old if name in new]
    found = []
    if base and base.tree != state.base_tree:
        found.append(Finding(Reason.UPSTREAM_CHANGED, (base.origin,)))
    found += [
        Finding(Reason.PATCH_ADDED, tuple(n for n in new if n not in old)),
        Finding(Reason.PATCH_REMOVED, tuple(n for n in old if n not in new)),
        Finding(Reason.PATCH_CHANGED, tuple(n for n in common if old[n] != new[n])),
        Finding(
            Reason.OVERLAY_CHANGED,
            changed(state.overlay, {path: git.blob_id(data) for path, data in overlay.load(project).items()}),
        ),
    ]
    found = [f for f in found if f.what]
    if common != [name for name in new if name in old]:
        found.append(Finding(Reason.SERIES_REORDERED))
    return found


def look_at_tree(project: Project, state: State | None) -> list[Finding]:
    """List what happened to the patched tree itself since it was made."""
    folder = project.source
    if not folder.exists():
        return [Finding(Reason.NOT_APPLIED)]
    if not worktree.reconnect(project, folder):
        unchanged = state is not None and git.tree_of(folder, store.EXCLUDE) == state.tree
        return [Finding(Reason.STORE_LOST if unchanged else Reason.BROKEN)]
    doing = worktree.in_progress(folder)
    if doing is worktree.InProgress.AM:
        return [Finding(Reason.AM_IN_PROGRESS)]
    if doing is worktree.InProgress.REBASE:
        return [Finding(Reason.REBASE_IN_PROGRESS, (str(folder.relative_to(project.root)),))]
    found = []
    if paths := worktree.edited(folder):
        found.append(Finding(Reason.SOURCE_EDITED, tuple(paths)))
    if state is None:
        return found or [Finding(Reason.NOT_APPLIED)]
    if worktree.head(folder) != state.commit:
        log = git.output("log", "--format=%h %s", f"{state.commit}..HEAD", cwd=folder).splitlines()
        found.append(Finding(Reason.SOURCE_COMMITTED, tuple(log) or ("commits were dropped",)))
    return found


def assess(project: Project, base: Base | None) -> list[Finding]:
    """List every difference between the patched tree and the files that it is made from. ``base``: upstream's
    files, if known.
    """
    state = read(project)
    found = look_at_tree(project, state)
    if state and not any(f.reason is Reason.NOT_APPLIED for f in found):
        found += compare_inputs(project, state, base)
    return found
