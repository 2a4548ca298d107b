"""The one way this project starts another program."""
from __future__ import annotations

import logging
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import FapError

log = logging.getLogger("fapatch")


class CommandFailed(FapError):
    """A program exited with an error; ``returncode``, ``stdout`` and ``stderr`` hold what it said."""

    def __init__(self, argv: Sequence[str], result: subprocess.CompletedProcess[bytes], hint: str = "") -> None:
        self.returncode = result.returncode
        self.stdout = result.stdout or b""
        self.stderr = result.stderr or b""
        said = (self.stderr.strip() or self.stdout.strip()).decode("utf-8", "replace").splitlines()
        super().__init__(f"`{shlex.join(argv)}` exited with {result.returncode}: {said[-1] if said else 'no output'}", hint)


def run(
    *argv: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    stdin: bytes | None = None,
    check: bool = True,
    capture: bool = True,
    timeout: float | None = None,
    hint: str = "",
) -> subprocess.CompletedProcess[bytes]:
    """Run ``argv`` (never through a shell), log the command, return the result with bytes in stdout and stderr.

    ``env`` is added to this process's environment; None takes a variable away. ``capture=False`` lets the program write to the terminal.
    Raises CommandFailed (with ``hint``) when ``check`` and the exit status is not 0, FapError when the program is
    missing or runs past ``timeout`` seconds.
    """
    args = [str(a) for a in argv]
    log.debug("$ %s%s", shlex.join(args), f"   (in {cwd})" if cwd else "")
    pipe = subprocess.PIPE if capture else None
    environment = {name: value for name, value in {**os.environ, **(env or {})}.items() if value is not None}
    try:
        result = subprocess.run(
            args, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, timeout=timeout, check=False,
            **({"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}),
        )
    except FileNotFoundError as e:
        if cwd is not None and not cwd.is_dir():
            raise FapError(f"{cwd} is not a folder", "run `make status`") from e
        raise FapError(f"{args[0]} is not installed", f"install {args[0]} and try again") from e
    except subprocess.TimeoutExpired as e:
        raise FapError(f"`{shlex.join(args)}` did not finish within {timeout:.0f} s", hint) from e
    if check and result.returncode != 0:
        raise CommandFailed(args, result, hint)
    return result
