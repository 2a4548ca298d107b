"""Test the environments of `make test-transformers`: locks, and the versions that code and docs name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fapatch.base import env
from fapatch.integrations import transformers_test

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = list(transformers_test.VERSIONS)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_lock_has_hashes_for_what_the_project_does_not_share(version):
    text = transformers_test.lock_of(ROOT, version).read_text()
    entries = env.entries(text)
    assert text == transformers_test.HEADER + "".join(entries)
    assert all(re.fullmatch(r".+==.+( \\\n    --hash=sha256:[0-9a-f]{64})+\n", entry) for entry in entries)
    assert any(entry.startswith(f"transformers=={version} ") for entry in entries)
    shared = set(map(env.canonical, env.entries((ROOT / env.LOCK).read_text())))
    assert not shared & set(map(env.canonical, entries))


def test_the_oldest_version_is_the_one_that_the_package_asks_for():
    overlay = ROOT / "overlay/flash-attn/flash_attn/integrations/transformers/versions.py"
    needed = re.search(r'^NEEDED = "(.+)"', overlay.read_text(), re.MULTILINE)[1]
    assert VERSIONS[0].startswith(f"{needed}.")
    assert f"OLDEST = ({needed.replace('.', ', ')})" in overlay.read_text()
    page = (ROOT / "docs" / "transformers.md").read_text()
    assert f"transformers {needed} or newer" in page and all(version in page for version in VERSIONS)
