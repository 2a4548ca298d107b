"""Allow one run at a time in a checkout, by a lock that the kernel drops when its holder ends in any way."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import FapError
from .project import Project

WAIT_SECONDS = 600.0


def _try(path: Path) -> int | None:
    """An open file descriptor that holds the lock, or None when somebody else has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # `distclean` removes the file, and a lock on a removed file keeps nobody out.
        if os.fstat(descriptor).st_ino == path.stat().st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip() or "another run"
    except OSError:
        return "another run"


@contextmanager
def exclusive(project: Project, what: str, wait: float | None = None) -> Iterator[None]:
    """Hold the lock of ``project`` while the block runs. ``what`` names the command to whoever has to wait.

    Waits up to ``wait`` seconds (default: FAP_LOCK_WAIT or ten minutes) with a message, then raises FapError
    naming the holder.
    """
    wait = float(os.environ.get("FAP_LOCK_WAIT") or WAIT_SECONDS) if wait is None else wait
    path = project.cache / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait
    said = False
    while (descriptor := _try(path)) is None:
        if time.monotonic() >= deadline:
            raise FapError(
                f"{_holder(path)} has worked in {project.root} for more than {wait:.0f} s",
                "wait for it, or end that process, and run this again",
            )
        if not said:
            print(f"waiting for {_holder(path)}", file=sys.stderr, flush=True)
            said = True
        time.sleep(0.1)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} ({what})\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
