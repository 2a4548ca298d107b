"""Test the rebase to another release: replayed, stopped at a conflict with the list of files, continued or
dropped without loss.
"""

from __future__ import annotations

import pytest

from fapatch.base import files
from fapatch.series import forms, series
from toy import RELEASES, make_sdist, release_files, shell

CORE_PATCH = "core-change-line-eight.patch"
DOS_PATCH = "dos-change-a-file-with-carriage-returns.patch"
NEW_FORM = "core-change-line-eight-1-2.patch"


@pytest.fixture
def clash(toy, monkeypatch):
    """A release 1.2 in the lock, not yet patched, in which upstream changed the line that a patch changes."""
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
    assert "carrying 2 patches from 1.0 to 1.1" in said and "= 2:" in said and "makes it the default" in said
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
    said = clash.fap("rebase", "--continue")
    assert "! 2:" in said and f"added      {NEW_FORM}" in said
    assert b"+line eight of 1.2" in (clash.patches / NEW_FORM).read_bytes()
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
    clash.fap("rebase", "--continue")
    assert b"of 1.2" in (clash.patches / NEW_FORM).read_bytes()


def test_the_old_form_stays_beside_the_new_one_and_no_release_takes_both(clash):
    old = (clash.patches / CORE_PATCH).read_bytes()
    clash.fap("rebase", code=1, version="1.2")
    mend(clash)
    clash.fap("rebase", "--continue")
    kept, new = (series.Patch(n, (clash.patches / n).read_bytes()) for n in (CORE_PATCH, NEW_FORM))
    assert kept.data == old.replace(b"Applies-To: >=1.0", b"Applies-To: >=1.0,<1.2")
    assert (kept.applies, new.applies) == (">=1.0,<1.2", ">=1.2")
    clash.fap("refresh")
    for version in ("1.0", "1.1", "1.2"):
        clash.fap("apply", version=version)
        assert "clean, 2 patches" in clash.fap("status", version=version)
    # The rebase to the next release starts from the release that takes the new form.
    make_sdist(clash.root / ".cache" / "downloads" / "toy-1.3.tar.gz", "1.2")
    clash.fap("lock", "add", "1.3")
    assert "carrying 2 patches from 1.2 to 1.3" in clash.fap("rebase", version="1.3")


def test_what_the_target_has_already_stays_for_the_other_releases(clash):
    clash.replace(
        clash.patches / CORE_PATCH, "Upstream-Status: Inappropriate [toy]", "Upstream-Status: Backport [1.2]"
    )
    clash.fap("apply")
    clash.fap("rebase", code=1, version="1.2")
    clash.git("checkout", "HEAD", "--", ".", cwd=clash.root / "build" / "rebase" / "toy")
    assert "dropped" not in clash.fap("rebase", "--continue")
    assert series.Patch(CORE_PATCH, (clash.patches / CORE_PATCH).read_bytes()).applies == ">=1.0,<1.2"
    for version, count in (("1.0", 2), ("1.1", 2), ("1.2", 1)):
        assert f"{count} patches" in clash.fap("apply", version=version)


def test_a_patch_of_which_nothing_is_left_is_not_lost(clash):
    before = clash.exported()
    clash.fap("rebase", code=1, version="1.2")
    clash.git("checkout", "HEAD", "--", ".", cwd=clash.root / "build" / "rebase" / "toy")
    said = clash.fap("rebase", "--continue", code=1)
    assert f"{CORE_PATCH} has nothing left in 1.2" in said and "Upstream-Status: Backport [1.2]" in said
    clash.fap("rebase", "--abort")
    assert clash.exported() == before


def test_a_dropped_release_takes_its_form_of_a_patch_with_it(clash):
    clash.fap("rebase", code=1, version="1.2")
    mend(clash)
    clash.fap("rebase", "--continue")
    assert "1.0 is the default" in clash.fap("lock", "drop", "1.0", code=2)
    commit = clash.project("1.1").release.commit
    clash.fap("lock", "add", "1.2", "--commit", commit)
    assert "1.2 is the default" in clash.fap("lock", "default", "1.2")
    assert f"160000 {commit}" in clash.git("ls-files", "--stage", "third_party/toy", cwd=clash.root)
    clash.fap("lock", "drop", "1.0")
    assert f"removed    {CORE_PATCH}" in clash.fap("lock", "drop", "1.1")
    assert [r.version for r in clash.project("1.2").family.releases] == ["1.2"]
    assert sorted(p.name for p in clash.patches.glob("*.patch")) == [NEW_FORM, DOS_PATCH]
    assert (clash.root / "upstream.toml").read_text().startswith("# A comment that must stay.")
    clash.fap("refresh", version="1.2")


def test_outside_applies_to_it_is_named_and_widened_when_asked(clash):
    for patch in clash.patches.glob("*.patch"):
        clash.replace(patch, "Applies-To: >=1.0", "Applies-To: >=1.0,<1.2")
    before = clash.exported()
    said = clash.fap("rebase", code=1, version="1.2")
    assert f"outside    {CORE_PATCH}: Applies-To >=1.0,<1.2" in said and DOS_PATCH in said
    assert "1.2 is outside the Applies-To of 2 patches  ->  make rebase VERSION=1.2 WIDEN=1" in said
    assert clash.exported() == before
    assert "stopped at: [core]" in clash.fap("rebase", "--widen", code=1, version="1.2")
    mend(clash)
    clash.fap("rebase", "--continue")
    applies = {p.name: series.Patch(p.name, p.read_bytes()).applies for p in clash.patches.glob("*.patch")}
    assert applies == {CORE_PATCH: ">=1.0,<1.2", NEW_FORM: ">=1.2,<=1.2", DOS_PATCH: ">=1.0,<=1.2"}
    assert "clean" in clash.fap("status", version="1.2")


def test_patch_that_the_target_does_not_need_is_left_out_and_kept(clash):
    clash.replace(clash.patches / CORE_PATCH, "Applies-To: >=1.0", "Applies-To: >=1.0,<1.2")
    clash.replace(clash.patches / CORE_PATCH, "Inappropriate [toy]", "Backport [1.2]")
    clash.fap("refresh")
    assert "carrying 1 patches" in clash.fap("rebase", version="1.2")
    assert (clash.patches / CORE_PATCH).exists() and CORE_PATCH in (clash.patches / "series").read_text()


@pytest.fixture
def fork(toy, tmp_path, monkeypatch):
    """A user's own checkout, named by FA_SRC_DIR, in which the line that a patch changes is different."""
    for name, text in release_files("1.1").items():
        (tmp_path / "fork" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fork" / name).write_bytes(text.replace("line 8\n", "line VIII\n").encode())
    monkeypatch.setenv("FA_SRC_DIR", str(tmp_path / "fork"))
    return tmp_path / "fork"


def test_a_checkout_is_a_source_like_any_other(toy, fork, monkeypatch):
    said = toy.fap("apply", code=1, version="1.2.dev0")
    assert f"1 patch does not apply to {fork} (1.2.dev0): {CORE_PATCH} (toy/core.py" in said
    assert f"make rebase FA_SRC_DIR={fork} VERSION=1.2.dev0 carries the series to it" in said
    assert f"1.0 is a release in upstream.toml, and {fork} is a checkout" in toy.fap("rebase", code=2)
    toy.fap("rebase", code=1, version="1.2.dev0")
    mend(toy)
    monkeypatch.delenv("FA_SRC_DIR")  # a rebase that continues remembers its checkout
    assert f"are written against {fork} (1.2.dev0) now" in toy.fap("rebase", "--continue")
    monkeypatch.setenv("FA_SRC_DIR", str(fork))
    for command in ("apply", "refresh"):
        toy.fap(command, version="1.2.dev0")
    assert "line eight of 1.2" in (toy.project("1.2.dev0").source / "toy" / "core.py").read_text()
    monkeypatch.delenv("FA_SRC_DIR")
    toy.fap("refresh")
    for version in ("1.0", "1.1"):
        assert "clean, 2 patches" in toy.fap("apply", version=version) + toy.fap("status", version=version)
    assert "is not a release of toy" in toy.fap("apply", code=2, version="1.2.dev0")
    toy.fap("lock", "drop", "1.1")
    assert (
        toy.patches / "core-change-line-eight-1-2-dev0.patch"
    ).exists()  # no release of the lock takes this patch
    # The user's next checkout starts from this one.
    monkeypatch.setenv("FA_SRC_DIR", str(fork))
    said = toy.fap("rebase", "--from", "1.2.dev0", version="1.2.dev1")
    assert "carrying 2 patches from 1.2.dev0 to" in said


@pytest.mark.parametrize(
    "applies, version, expected",
    [
        (">=2.8.0,<2.9", "2.9.0", ">=2.8.0,<=2.9.0"),
        (">=2.8.0,<2.9", "2.7.4.post1", ">=2.7.4.post1,<2.9"),
        (">=4.0.0b32,<4.1", "4.0.0b30", ">=4.0.0b30,<4.1"),
        (">=1.0,!=1.2,<2", "1.2", ">=1.0,<2"),
        ("==1.1", "1.2", ">=1.1,<=1.2"),
        ("==1.1", "1.0", ">=1.0,<=1.1"),
    ],
)
def test_widened_as_far_as_needed(applies, version, expected):
    assert forms.widened(applies, version) == expected


@pytest.mark.parametrize(
    "version, newest, expected",
    [
        ("2.8.4", True, (">=2.8.0,<2.8.4", ">=2.8.4,<2.9")),
        ("2.8.2", False, (">=2.8.0,<2.9,!=2.8.2", "==2.8.2")),
    ],
)
def test_split_into_two_that_are_apart(version, newest, expected):
    assert forms.split(">=2.8.0,<2.9", version, newest) == expected


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
    assert release.tag == "v1.2" and len(release.sdist.sha256) == 64 and len(release.tree) == 40
    monkeypatch.setenv("VERSION", "7.7")
    assert "in upstream.toml already" in clash.fap("lock", "add", "1.2", code=2)
    assert "is not a version" in clash.fap("lock", "add", "one", code=2)
    assert "--commit abc is not a commit" in clash.fap("lock", "add", "1.2", "--commit", "abc", code=2)
    assert "1.2 names no commit for third_party/toy" in clash.fap("lock", "default", "1.2", code=1)
    assert "VERSION=9 is not a release" in clash.fap("lock", "drop", "9", code=2)


def test_lock_add_says_whether_the_series_serves_the_release(toy):
    for version, change, told in (
        ("1.2", ("", ""), "carried: 2 patches apply as they are"),
        ("1.3", ("line 8\n", "VIII\n"), f"not carried yet: {CORE_PATCH} do not apply  ->  make rebase"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            core = RELEASES["1.1"]["toy/core.py"].replace(*change)
            patch.setitem(RELEASES, version, {**RELEASES["1.1"], "toy/core.py": core})
            make_sdist(toy.root / ".cache" / "downloads" / f"toy-{version}.tar.gz", version)
        assert told in toy.fap("lock", "add", version)
    for name in (CORE_PATCH, DOS_PATCH):
        toy.replace(toy.patches / name, ">=1.0", ">=1.0,<1.4")
    make_sdist(toy.root / ".cache" / "downloads" / "toy-1.4.tar.gz", "1.1")
    said = toy.fap("lock", "add", "1.4")
    assert f"not carried yet: 1.4 is outside the Applies-To of {CORE_PATCH}, {DOS_PATCH}" in said


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
