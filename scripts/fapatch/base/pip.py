"""The one way this project runs pip."""

from __future__ import annotations

from pathlib import Path

from .errors import FapError
from .process import CommandFailed, run

# What pip says when it fails, and what to do about it. The first that fits is taken.
_HINTS = {
    "No space left on device": "free some space and run this again",
    "Disk quota exceeded": "free some space and run this again",
    "DO NOT MATCH THE HASHES": "do not use that file: empty pip's cache (pip cache purge), ask another index",
}
OFFLINE = "connect to a package index, or put the files into a folder and set PIP_FIND_LINKS to it"


def pip(python: Path, *args: str | Path, what: str, offline: str = OFFLINE) -> None:
    """Run pip of ``python``. ``what`` names what it shall get; ``offline`` is the hint for a failure that is
    none of the machine's. Raises FapError with pip's own reason.

    pip shows what it does: with a bar on a terminal, elsewhere a line for each step.
    """
    options = ("--disable-pip-version-check", "--no-input")
    try:
        run(python, "-m", "pip", *args, *options, show=True, env={"PYTHONUNBUFFERED": "1"})
    except CommandFailed as e:
        said = e.stderr.decode("utf-8", "replace")
        errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR:")]
        hint = next((hint for words, hint in _HINTS.items() if words in said), offline)
        raise FapError(f"pip could not get {what}: {errors[-1] if errors else e.message}", hint) from e
