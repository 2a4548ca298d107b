"""Define the exceptions for faults that a user can correct, each with its exit code."""

from __future__ import annotations


class FapError(Exception):
    """A failure to be shown as one line: what was wrong, with the values, and what to do next.

    ``message`` says what happened, ``hint`` the next step. ``fap.py`` prints both and exits with
    ``exit_code``.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}  ->  {self.hint}" if self.hint else self.message


class UsageError(FapError):
    """The command line or an environment variable asks for something that does not exist."""

    exit_code = 2
