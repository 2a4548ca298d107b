"""Run pip and read its settings."""

from __future__ import annotations

import ast
from pathlib import Path

from .errors import FapError
from .process import CommandFailed, hint_for, run

# Output of pip, beside its error, if it did not reach an index.
_NO_NETWORK = (b"Retrying (", b"Connection", b"Network is unreachable", b"timed out")
_OFFLINE = "connect to a package index, or put the wheels into a folder and set PIP_FIND_LINKS to it"
_ELSEWHERE = (
    "ask another index (PIP_INDEX_URL), or a folder of wheels (PIP_FIND_LINKS), for this Python and machine"
)


def settings(python: Path, command: str) -> dict[str, str]:
    """Read pip's settings for ``command``, such as "index-url", from its files and the environment, which
    wins.
    """
    said = run(python, "-m", "pip", "config", "list").stdout.decode()
    lines = (line.partition("=") for line in said.splitlines())
    values = {key: str(ast.literal_eval(value)) for key, _, value in lines}
    found = {}
    for section in ("global.", f"{command}.", ":env:."):  # the last one wins
        found |= {key.removeprefix(section): v for key, v in values.items() if key.startswith(section)}
    return found


def default_index(python: Path) -> str:
    """The index that pip of ``python`` asks where nothing is configured."""
    program = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    return run(python, "-c", program).stdout.decode().strip()


def local_wheels(python: Path) -> list[Path]:
    """List the wheels in the find-links folders of pip of ``python``."""
    folders = settings(python, "install").get("find-links", "").split()
    return [wheel for folder in folders for wheel in Path(folder.removeprefix("file://")).glob("*.whl")]


def pip(python: Path, *args: str | Path, what: str, or_else: str = "") -> None:
    """Run pip of ``python``. ``what`` names the packages to get; ``or_else`` adds another way to get them to
    the hint. Raises FapError with pip's own reason and a hint.

    pip shows its progress: a bar on a terminal, elsewhere a line for each step.
    """
    options = ("--disable-pip-version-check", "--no-input")
    try:
        run(python, "-m", "pip", *args, *options, show=True, env={"PYTHONUNBUFFERED": "1"})
    except CommandFailed as e:
        lines = e.stderr.decode("utf-8", "replace").splitlines()
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
        offline = any(words in e.stderr for words in _NO_NETWORK)
        hint = hint_for(e.stderr) or (_OFFLINE if offline else _ELSEWHERE) + or_else
        raise FapError(f"pip could not get {what}: {errors[-1] if errors else e.message}", hint) from e
