"""Show the progress of a CUDA build: n of m files, the time so far and an estimate of the rest. The whole
output goes to a file.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TextIO

NINJA = re.compile(rb"^\[(\d+)/(\d+)\] ")
NOTE = b"kernel_build: "  # starts a message of kernel_build.py (overlay) to the user
SECONDS_BETWEEN_LINES = 20  # if the output is no terminal


def clock(seconds: float) -> str:
    """Minutes and seconds, such as 3:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    """Takes the lines of a build and writes them to ``log``. Writes to ``screen`` a progress line for each
    file that ninja has finished, and the build's messages to the user.
    """

    def __init__(
        self,
        log: BinaryIO,
        screen: TextIO = sys.stdout,
        now: Callable[[], float] = time.monotonic,
        afterwards: str = "linking",
    ) -> None:
        self.log, self.screen, self.now, self.afterwards = log, screen, now, afterwards
        self.start = now()
        self.shown = -SECONDS_BETWEEN_LINES
        self.total = 0

    def __call__(self, line: bytes) -> None:
        self.log.write(line)
        self.log.flush()
        if match := NINJA.match(line):
            self._show(int(match[1]), int(match[2]))
        elif line.startswith(NOTE):
            self.screen.write(line.decode("utf-8", "replace"))

    def _show(self, done: int, total: int) -> None:
        elapsed = self.now() - self.start
        self.total = total
        terminal, last = self.screen.isatty(), done == total
        if not (terminal or last or elapsed - self.shown >= SECONDS_BETWEEN_LINES):
            return
        self.shown = elapsed
        rest = self.afterwards if last else f"about {clock(elapsed / done * (total - done))} left"
        text = f"compiled {done} of {total} files, {clock(elapsed)} elapsed, {rest}"
        self.screen.write(f"\r{text:<78}" + ("\n" if last else "") if terminal else f"{text}\n")
        self.screen.flush()


def errors_in(log: Path, most: int = 20) -> str:
    """Return the first lines of a failed build's output that name an error, or else its last lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line for line in lines if re.search(r"\berror\b|Error:|FAILED:", line)]
    return "\n".join((found or lines[-most:])[:most])
