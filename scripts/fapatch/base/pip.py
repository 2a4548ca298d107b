"""The one way this project runs pip."""

from __future__ import annotations

import re
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


def settings(python: Path) -> dict[str, str]:
    """What pip of ``python`` is set to, by its files and by the environment, which wins: "index-url" and
    so on.
    """
    said = run(python, "-m", "pip", "config", "list").stdout.decode()
    found = re.findall(r"^(global|install|:env:)\.([\w-]+)='(.*)'$", said, re.MULTILINE)
    ranked = sorted(found, key=lambda setting: ("global", "install", ":env:").index(setting[0]))
    return {name: value for _, name, value in ranked}


def local_wheels(python: Path) -> list[Path]:
    """The wheels in the folders that pip of ``python`` is set to look into (find-links)."""
    folders = re.split(r"\s+|\\n", settings(python).get("find-links", ""))
    return [
        wheel for folder in folders if folder for wheel in Path(folder.removeprefix("file://")).glob("*.whl")
    ]


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
