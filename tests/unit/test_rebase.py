"""To another release: replayed, stopped at a conflict with the list of files, gone on or dropped without
loss.
"""

from __future__ import annotations

import pytest

from fapatch.base import files
from toy import RELEASES, make_sdist, release_files, shell

CORE_PATCH = "core-change-line-eight.patch"


@pytest.fixture
def clash(toy, monkeypatch):
    """A release 1.2 in which upstream changed the line that a patch changes; in the lock, not yet patched."""
    monkeypatch.setitem(
        RELEASES,
        "1.2",
        {
            "toy/core.py": release_files("1.0")["toy/core.py"].replace("line 8\n", "line VIII\n"),
            "toy/__init__.py": "VERSION = '1.2'\n",
        },
    )
    make_sdist(toy.root / ".cache" / "downloads" / "toy-1.2.tar.gz", "1.2")
    toy.fap("lock", "add", "1.2")
    return toy


def mend(toy):
    folder = toy.root / "build" / "rebase" / "toy"
    core = folder / "toy" / "core.py"
    text = core.read_text()
    start, end = text.index("<<<<<<<"), text.index("\n", text.index(">>>>>>>")) + 1
    core.write_text(text[:start] + "line eight of 1.2\n" + text[end:])
    shell("git", "add", "toy/core.py", cwd=folder)


def test_without_conflict(toy):
    before = toy.exported()
    said = toy.fap("rebase", version="1.1")
    assert "carrying 2 patches from 1.0 to 1.1" in said and "= 2:" in said and "make it the default" in said
    assert {p for p, data in toy.exported().items() if data != before[p]} <= {
        f"patches/toy/{CORE_PATCH}",
        "patches/toy/dos-change-a-file-with-carriage-returns.patch",
    }
    assert (
        b"@@ -28,7 +28,7 @@" in (toy.patches / "dos-change-a-file-with-carriage-returns.patch").read_bytes()
    )
    assert (
        "clean" in toy.fap("status", version="1.1") and not (toy.root / "build" / "rebase" / "toy").exists()
    )
    toy.fap("refresh")
    assert toy.exported() == before


def test_conflict_then_continue(clash):
    said = clash.fap("rebase", code=1, version="1.2")
    assert (
        "stopped at: [core] Change line eight" in said
        and "conflict in toy/core.py" in said
        and "rebase-continue" in said
    )
    assert "a rebase is in progress in build/rebase/toy" in clash.fap("status", code=2)
    assert "is going on" in clash.fap("rebase", code=1, version="1.2")
    assert "not mended yet: toy/core.py" in clash.fap("rebase", "--continue", code=1)
    assert "a rebase is in progress" in clash.fap("clean", code=1)
    mend(clash)
    said = clash.fap("rebase", "--continue", code=1)
    assert (
        "! 2:" in said
        and "changed    core-change-line-eight.patch" in said
        and "1.0: tree ids not renewed" in said
    )
    assert b"+line eight of 1.2" in (clash.patches / CORE_PATCH).read_bytes()
    assert "clean" in clash.fap("status", version="1.2")
    assert "line eight of 1.2" in (clash.project("1.2").source / "toy" / "core.py").read_text()


def test_conflict_then_abort(clash):
    before = clash.exported()
    clash.fap("rebase", code=1, version="1.2")
    assert "as they were" in clash.fap("rebase", "--abort")
    assert clash.exported() == before and "clean" in clash.fap("status")
    assert "no rebase is going on" in clash.fap("rebase", "--abort", code=1)
    clash.fap("rebase", code=1, version="1.2")


def test_patches_that_changed_meanwhile_stop_it(clash):
    clash.fap("rebase", code=1, version="1.2")
    mend(clash)
    clash.replace(clash.patches / CORE_PATCH, "Why:", "Why: indeed,")
    before = clash.exported()
    assert f"{CORE_PATCH} changed since the rebase began" in clash.fap("rebase", "--continue", code=1)
    assert clash.exported() == before
    clash.replace(clash.patches / CORE_PATCH, "Why: indeed,", "Why:")
    clash.fap("rebase", "--continue", code=1)
    assert b"of 1.2" in (clash.patches / CORE_PATCH).read_bytes()


def test_patch_that_the_target_does_not_take_is_left_out_and_kept(clash):
    clash.replace(clash.patches / CORE_PATCH, "Applies-To: >=1.0", "Applies-To: >=1.0,<1.2")
    clash.fap("refresh")
    assert "carrying 1 patches" in clash.fap("rebase", version="1.2")
    assert (clash.patches / CORE_PATCH).exists() and CORE_PATCH in (clash.patches / "series").read_text()


def test_onto_itself_or_nowhere(toy):
    assert "is on 1.0 already" in toy.fap("rebase", code=2)
    assert "VERSION=9 is not a release" in toy.fap("rebase", code=2, version="9")


def test_work_in_the_way_is_refused(toy):
    toy.commit("mine", core=("line 20\n", "mine\n"))
    assert "commits on top" in toy.fap("rebase", code=1, version="1.1")


def test_lock_add_fills_in_the_entry(clash, monkeypatch):
    text = (clash.root / "upstream.toml").read_text()
    assert text.startswith("# A comment that must stay.") and "revision = 3  # and this one too" in text
    release = clash.project("1.2").release
    assert (
        release.tag == "v1.2"
        and len(release.sdist.sha256) == 64
        and len(release.tree) == 40
        and release.patched_tree == ""
    )
    monkeypatch.setenv("VERSION", "7.7")
    assert "in upstream.toml already" in clash.fap("lock", "add", "1.2", code=2)
    assert "is not a version" in clash.fap("lock", "add", "one", code=2)
    clash.fap("refresh", version="1.0", code=1)  # 1.2 has a conflict
    assert clash.project("1.2").release.patched_tree == ""


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_text("old")
    monkeypatch.setattr(
        "os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError):
        files.write(path, b"new")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
