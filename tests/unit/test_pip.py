"""Test that each failure of pip gets its own hint."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from fapatch.base.errors import FapError
from fapatch.base.pip import pip

OS_ERROR = "ERROR: Could not install packages due to an OSError:"
NOT_FOUND = "ERROR: No matching distribution found for x"


@pytest.mark.parametrize(
    "said, told",
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "do not use that file"),
        (f"{OS_ERROR} [Errno 28] No space left on device", "free some space"),
        (f"{OS_ERROR} [Errno 122] Disk quota exceeded", "free some space"),
        (f"{OS_ERROR} [Errno 13] Permission denied: 'x'", "check the owner"),
        (f"{OS_ERROR} HTTPSConnectionPool(host='x', port=443): Max retries exceeded", "connect to a package"),
        (f"WARNING: Retrying (Retry(total=4)) after connection broken\n{NOT_FOUND}", "connect to a package"),
        (NOT_FOUND, "ask another index"),
    ],
)
def test_each_failure_has_its_own_hint(tmp_path, said, told):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncat >&2 <<'X'\n{said}\nX\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(FapError, match=f"pip could not get it: .*->  {told}") as caught:
        pip(python, "install", "x", what="it", or_else=", or do without")
    assert ("or do without" in caught.value.hint) == (told in ("connect to a package", "ask another index"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "index, told", [("http://127.0.0.1:9/simple", "connect to"), ("file:///nowhere", "ask another")]
)
def test_pip_itself_without_network_and_without_the_package(monkeypatch, index, told):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", index)
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(FapError, match=f"No matching distribution found for x.*->  {told}"):
        pip(Path(sys.executable), "download", "x==1", what="x")
