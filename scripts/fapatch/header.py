"""The message of a patch file: subject and the fields that CONTRIBUTING.md asks for.

A patch made with --no-stat has no `---` line, so the message is what stands before the first `diff --git`.
"""

from __future__ import annotations

import email
import email.policy
import re
from dataclasses import dataclass

REQUIRED = ("Why", "What", "Risk", "Drop-when", "Upstream-Status", "Test", "Applies-To")
_FIELD = re.compile(r"([A-Z][A-Za-z-]*):(?:\s+(.*)|$)")


@dataclass(frozen=True)
class Header:
    """``fields``: name -> value, the lines of a value joined by spaces."""

    subject: str
    author: str
    fields: dict[str, str]


def split(raw: bytes) -> tuple[bytes, bytes]:
    """(message, diff) of a patch file; the diff is empty when there is none."""
    start = re.search(rb"^diff --git ", raw, re.MULTILINE)
    return (raw[: start.start()], raw[start.start() :]) if start else (raw, b"")


def parse_fields(body: str) -> dict[str, str]:
    """`Name: value` lines of ``body``; a value goes on until the next field or an empty line."""
    fields: dict[str, str] = {}
    current = ""
    for line in body.splitlines():
        if found := _FIELD.match(line):
            current = found[1]
            fields[current] = found[2] or ""
        elif not line.strip():
            current = ""
        elif current:
            fields[current] = f"{fields[current]} {line.strip()}".strip()
    return fields


def parse(raw: bytes) -> Header:
    """Read the message of a patch file as git format-patch --keep-subject writes it. Never fails: what is
    missing is empty.
    """
    message = email.message_from_bytes(
        re.sub(rb"\AFrom [^\n]*\n", b"", split(raw)[0]), policy=email.policy.default
    )
    body = message.get_content() if message.get_content_maintype() == "text" else ""
    return Header(str(message["Subject"] or ""), str(message["From"] or ""), parse_fields(body))
