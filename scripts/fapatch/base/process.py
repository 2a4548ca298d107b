"""Start another program, and turn its failure into a FapError."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .errors import FapError

log = logging.getLogger("fapatch")


# Output that shows a fault of the machine or its settings -> the hint. The first match counts.
_HINTS = {
    b"DO NOT MATCH THE HASHES": "do not use that file: pip cache purge, or take another index",
    b"No space left on device": "free some space and run this again; nothing was lost",
    b"Disk quota exceeded": "free some space and run this again; nothing was lost",
    b"Permission denied": "check the owner and the permissions of that file, and run this again",
    b"Read-only file system": "check the owner and the permissions of that file, and run this again",
    b"Please tell me who you are": "git config --global user.name and user.email, and run this again",
}


def hint_for(said: bytes) -> str:
    """Return the hint for a program that failed and ``said`` this; "" if none is known."""
    return next((hint for words, hint in _HINTS.items() if words in said), "")


class CommandFailed(FapError):
    """A program exited with an error; ``returncode``, ``stdout`` and ``stderr`` hold what it said."""

    def __init__(
        self, argv: Sequence[str], result: subprocess.CompletedProcess[bytes], hint: str = ""
    ) -> None:
        self.returncode = result.returncode
        self.stdout = result.stdout or b""
        self.stderr = result.stderr or b""
        said = (self.stderr.strip() or self.stdout.strip()).decode("utf-8", "replace").splitlines()
        hint = hint_for(self.stderr) or hint or "fap.py -v shows what was run"
        super().__init__(
            f"`{shlex.join(argv)}` exited with {result.returncode}: {said[-1] if said else 'no output'}", hint
        )


def _wait(
    process: subprocess.Popen[bytes],
    stdin: bytes | None,
    timeout: float | None,
    on_line: Callable[[bytes], None] | None,
) -> tuple[bytes, bytes]:
    try:
        if on_line is not None:
            for line in process.stdout:
                on_line(line)
            process.wait()
            return b"", b""
        return process.communicate(stdin, timeout)
    except BaseException:
        # Kill the whole group: a helper of git, stuck in connect(), would keep the pipe open.
        if timeout is not None:
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        raise


def run(
    *argv: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    stdin: bytes | None = None,
    check: bool = True,
    capture: bool = True,
    show: bool = False,
    timeout: float | None = None,
    hint: str = "",
    on_line: Callable[[bytes], None] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run ``argv`` (never through a shell), log the command, return the result with bytes in stdout and
    stderr.

    ``env`` is added to this process's environment; None removes a variable. ``capture=False`` lets the
    program write to the terminal; ``show`` does so for stdout alone. ``on_line`` is called with each line of
    stdout and stderr as it comes. The result then holds no output, and ``stdin`` and ``timeout`` cannot be
    used. Raises CommandFailed (with ``hint``) if ``check`` is set and the exit status is not 0, FapError if
    the program is missing or runs past ``timeout`` seconds.
    """
    args = [str(a) for a in argv]
    log.debug("$ %s%s", shlex.join(args), f"   (in {cwd})" if cwd else "")
    pipe = subprocess.PIPE if capture else None
    environment = {name: value for name, value in {**os.environ, **(env or {})}.items() if value is not None}
    try:
        # A new process group only for a time limit: without one, Ctrl-C must reach the program.
        with subprocess.Popen(
            args,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=None if show else pipe,
            stderr=pipe if on_line is None else subprocess.STDOUT,
            start_new_session=timeout is not None,
        ) as process:
            out, err = _wait(process, stdin, timeout, on_line)
        result = subprocess.CompletedProcess(args, process.returncode, out, err)
    except FileNotFoundError as e:
        if cwd is not None and not cwd.is_dir():
            raise FapError(f"{cwd} is not a folder", "run `make status`") from e
        raise FapError(f"{args[0]} is not installed", f"install {args[0]} and try again") from e
    except subprocess.TimeoutExpired as e:
        raise FapError(f"`{shlex.join(args)}` did not finish within {timeout:.0f} s", hint) from e
    if check and result.returncode != 0:
        raise CommandFailed(args, result, hint)
    return result
