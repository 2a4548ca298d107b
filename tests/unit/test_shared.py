"""Test a file that two families share: stored once, edited from either patched tree, lost from neither."""

from __future__ import annotations

from pathlib import Path

import pytest

HOME = "overlay/other/other/meaning.py"
HERE = "toy/meaning.py"
OTHER = """
[family.other]
default = "7"
url = "https://example.org/other.git"
series = "patches/other/series"
overlay = "overlay/other"
package = "other"
revision = 1
include = ["other/**/*.py"]

[family.other.version."7"]
sdist = { name = "other-7.tar.gz", size = 1, sha256 = "" }
"""


@pytest.fixture
def sharing(toy):
    """A toy, applied, whose overlay shares a file of another family."""
    path = toy.root / "upstream.toml"
    path.write_text(
        path.read_text().replace("revision = 3", f'shared = {{ "{HERE}" = "{HOME}" }}\nrevision = 3') + OTHER
    )
    home(toy).parent.mkdir(parents=True)
    home(toy).write_text("meaning = 1\n")
    toy.fap("refresh")
    return toy


def home(toy) -> Path:
    return toy.root / HOME


def test_it_lies_in_the_tree_and_a_change_of_it_is_noticed(sharing):
    assert (sharing.source / HERE).read_text() == "meaning = 1\n" and not (sharing.overlay / HERE).exists()
    assert "clean" in sharing.fap("status")
    home(sharing).write_text("meaning = 2\n")
    assert f"overlay changed: {HERE}" in sharing.fap("status", code=1)


def test_edited_in_the_tree_it_is_written_to_its_home(sharing):
    (sharing.source / HERE).write_text("meaning = 3\n")
    sharing.git("commit", "--quiet", "--all", "-m", "another meaning")
    assert "FAMILY=" not in sharing.fap("refresh")
    assert home(sharing).read_text() == "meaning = 3\n" and not (sharing.overlay / HERE).exists()
    assert "clean" in sharing.fap("status")


def test_removed_from_the_tree_it_stays_where_it_is(sharing):
    sharing.git("rm", "--quiet", HERE)
    sharing.git("commit", "--quiet", "-m", "no meaning")
    assert f"{HERE} is gone from the patched tree" in sharing.fap("refresh", code=1)
    assert home(sharing).is_file()


def test_without_its_home_nothing_is_made(sharing):
    home(sharing).unlink()
    assert f"{HOME} is missing" in sharing.fap("apply", code=1)


def test_a_second_copy_is_refused(sharing):
    (sharing.overlay / HERE).write_text("meaning = 1\n")
    assert f"overlay/toy/{HERE} is a copy of {HOME}" in sharing.fap("apply", code=1)
