"""Test the patched tree: whole or not at all, exact, and never made at the cost of a user's work."""

from __future__ import annotations

import os
import subprocess

import pytest

from fapatch.base import git
from fapatch.series import state
from fapatch.series.series import Patch, name_for, rewrite, with_name, without_name

CORE_PATCH = "core-change-line-eight.patch"
DOS_PATCH = "dos-change-a-file-with-carriage-returns.patch"


def stamps(toy):
    return {p: p.stat().st_mtime_ns for p in toy.source.rglob("*") if p.is_file()}


def test_tree_is_upstream_overlay_and_series(fresh):
    said = fresh.fap("apply")
    assert "the patched tree was not made yet" in said and "is ready: 2 patches, 1 overlay files" in said
    assert "line eight\n" in (fresh.source / "toy" / "core.py").read_text()
    assert (fresh.source / "toy" / "dos.py").read_bytes() == b"first\r\n2nd\r\nthird\r\n"
    assert (fresh.source / "toy" / "ours.py").read_text() == "ours = 1\n"
    assert not (fresh.source / "toy" / "left_out").exists() and not (fresh.source / "csrc").exists()
    subjects = fresh.git("log", "--format=%s", "@{upstream}..").splitlines()
    assert subjects == [
        "[dos] Change a file with carriage returns",
        "[core] Change line eight",
        "[overlay] Add our own files",
    ]


def test_git_is_a_file_there(fresh):
    """Upstream's setup.py runs `git submodule update` if .git is a folder."""
    fresh.fap("apply")
    assert (fresh.source / ".git").is_file()


def test_second_run_does_nothing_and_says_why(toy):
    before = stamps(toy)
    said = toy.fap("apply")
    assert "is up to date: 2 patches, 1 overlay files, upstream tree" in said and said.rstrip().endswith(
        "Nothing to do."
    )
    assert stamps(toy) == before


def test_equal_inputs_give_equal_commits(fresh, toy):
    fresh.fap("apply")
    assert fresh.git("rev-parse", "HEAD") == state.read(toy.project()).commit


def test_an_edited_overlay_needs_no_refresh(toy):
    toy.replace(toy.overlay / "toy" / "ours.py", "1", "2")
    old, lock = state.read(toy.project()).tree, (toy.root / "upstream.toml").read_bytes()
    assert "overlay changed: toy/ours.py" in toy.fap("apply")
    assert state.read(toy.project()).tree == toy.git("rev-parse", "HEAD^{tree}") != old
    assert "Nothing to do" in toy.fap("apply") and (toy.root / "upstream.toml").read_bytes() == lock


@pytest.mark.parametrize(
    "old, new, told",
    [
        ("-line 8\n", "-line 8888\n", "toy/core.py, hunk 1 of 1 (line 5)"),
        ("-line 30\n", "-line 333\n", "toy/core.py, hunk 1 of 1 (line 27)"),
        ("a/toy/dos.py", "a/toy/gone.py", "toy/gone.py: does not exist in index"),
        ("@@ -27,7 +27,7 @@", "@@ -27,9 +27,9 @@", "cannot be read as a patch"),
    ],
)
def test_failure_names_patch_file_and_hunk_and_changes_nothing(toy, old, new, told):
    patch = toy.patches / (CORE_PATCH if "8888" in new else DOS_PATCH)
    text = patch.read_bytes().decode()
    assert old in text
    if "gone" in new:
        text = text.replace("b/toy/dos.py", "b/toy/gone.py")
    before = stamps(toy)
    patch.write_bytes(text.replace(old, new).encode())
    said = toy.fap("apply", code=1)
    assert patch.name in said and told in said
    assert stamps(toy) == before and not toy.leftovers()
    patch.write_bytes(text.replace("gone.py", "dos.py").encode())
    assert "Nothing to do" in toy.fap("apply")


def test_no_fuzz(toy):
    """GNU patch accepts a hunk with wrong context at its edge (fuzz); apply must not."""
    patch = toy.patches / CORE_PATCH
    wrong = patch.read_bytes().replace(b" line 5\n", b" line five\n")
    assert wrong != patch.read_bytes()
    copy = toy.root / "copy"
    toy.git("worktree", "add", "--quiet", "--detach", copy, "@{upstream}")
    assert (
        subprocess.run(
            ["patch", "-p1", "--dry-run"], cwd=copy, input=wrong, capture_output=True, check=False
        ).returncode
        == 0
    )
    patch.write_bytes(wrong)
    assert "hunk 1 of 1" in toy.fap("apply", code=1)


def test_zero_context_deletion_is_not_taken_as_applied(toy):
    """`git apply -R --check --unidiff-zero` reports such a patch as applied, so only contents can decide."""
    deletion = (
        b"diff --git a/toy/core.py b/toy/core.py\n--- a/toy/core.py\n+++ b/toy/core.py\n@@ -10 +9,0 "
        b"@@\n-line 10\n"
    )
    check = ["git", "apply", "--unidiff-zero", "--check"]
    for args in (check, [*check, "-R"]):
        assert (
            subprocess.run(
                [*args, "-"], cwd=toy.source, input=deletion, capture_output=True, check=False
            ).returncode
            == 0
        )
    message = (toy.patches / CORE_PATCH).read_bytes().partition(b"diff --git")[0]
    (toy.patches / "zero.patch").write_bytes(message + deletion)
    with (toy.patches / "series").open("a") as series:
        series.write("zero.patch\n")
    assert "zero.patch" in toy.fap("apply", code=1)
    assert "line 10\n" in (toy.source / "toy" / "core.py").read_text()


def test_git_apply_in_a_nested_folder_is_a_silent_no_op_and_we_do_not_use_it(toy):
    nested = toy.root / "build" / "unpacked"
    (nested / "toy").mkdir(parents=True)
    (nested / "toy" / "core.py").write_text("not even the right file\n")
    trap = subprocess.run(
        ["git", "apply", toy.patches / CORE_PATCH], cwd=nested, capture_output=True, check=False
    )
    assert trap.returncode == 0 and (nested / "toy" / "core.py").read_text() == "not even the right file\n"
    toy.fap("clean")
    toy.fap("apply")
    assert "line eight" in (toy.source / "toy" / "core.py").read_text()


@pytest.mark.parametrize("what", ["edit", "new file", "commit"])
def test_work_in_the_tree_is_never_thrown_away(toy, what):
    core = toy.source / "toy" / "core.py"
    if what == "new file":
        (toy.source / "toy" / "new.py").write_text("new\n")
    else:
        toy.replace(core, "line 10\n", "line ten\n")
    if what == "commit":
        toy.git("commit", "--quiet", "-a", "-m", "mine")
    before, head = stamps(toy), toy.git("rev-parse", "HEAD")
    toy.replace(toy.overlay / "toy" / "ours.py", "1", "2")
    said = toy.fap("apply", code=1)
    assert "source changed" in said and "make clean FORCE=1" in said
    assert stamps(toy) == before and toy.git("rev-parse", "HEAD") == head
    assert "source changed" in toy.fap("clean", code=1) and core.exists()


def test_a_file_that_python_left_there_is_no_change(toy):
    (toy.source / "toy" / "__pycache__").mkdir()
    (toy.source / "toy" / "__pycache__" / "core.pyc").write_bytes(b"x")
    assert "Nothing to do" in toy.fap("apply")


def test_am_left_in_the_middle_is_refused_then_recovered(toy):
    wrong = (toy.patches / CORE_PATCH).read_bytes().replace(b"-line 8\n", b"-line 4444\n")
    subprocess.run(["git", "am"], cwd=toy.source, input=wrong, capture_output=True, check=False)
    assert "`git am` is in progress" in toy.fap("status", code=2)
    assert "`git am` is in progress" in toy.fap("apply", code=1)
    toy.git("am", "--abort")
    assert "Nothing to do" in toy.fap("apply")


def test_what_a_killed_run_left_is_dropped(toy):
    new = toy.source.with_name(".new-1.0")
    toy.git("worktree", "add", "--quiet", "--detach", new, "@{upstream}")
    wrong = (toy.patches / CORE_PATCH).read_bytes().replace(b"-line 8\n", b"-line 4444\n")
    subprocess.run(["git", "am"], cwd=new, input=wrong, capture_output=True, check=False)
    toy.fap("clean", "--force")
    new.mkdir(parents=True)
    (new / "half").write_text("made")
    toy.fap("apply")
    assert not toy.leftovers() and toy.fap("status") and not (toy.source / "half").exists()


def test_every_patch_that_does_not_apply_is_named(toy):
    for name, old in ((CORE_PATCH, "-line 8\n"), (DOS_PATCH, "-line 30\n")):
        toy.replace(toy.patches / name, old, "-line 99\n")
    said = toy.fap("apply", code=1)
    assert f"2 patches do not apply to 1.0: {CORE_PATCH} (toy/core.py, hunk 1 of 1" in said
    assert f"; {DOS_PATCH} (toy/core.py, hunk" in said and len(said.splitlines()) == 2


@pytest.mark.parametrize("command", ["apply", "refresh", "bundle"])
def test_a_release_outside_applies_to_is_refused(toy, command):
    """A release without a patch that it needs would be half patched and look complete."""
    for patch in toy.patches.glob("*.patch"):
        toy.replace(patch, "Applies-To: >=1.0", "Applies-To: >=1.0,<1.1")
    said = toy.fap(command, code=1, version="1.1")
    assert f"not carried yet: 1.1 is outside the Applies-To of {CORE_PATCH}, {DOS_PATCH}" in said
    assert "make rebase VERSION=1.1" in said and not toy.project("1.1").source.exists()


def test_a_release_that_needs_no_backport_is_carried_without_it(toy):
    patch = toy.patches / CORE_PATCH
    toy.replace(patch, "Applies-To: >=1.0", "Applies-To: >=1.0,<1.1")
    toy.replace(patch, "Inappropriate [toy]", "Backport [1.1]")
    assert f"skipped {CORE_PATCH}: 1.1 is outside its Applies-To" in toy.fap("apply", version="1.1")
    assert "line eight" not in (toy.project("1.1").source / "toy" / "core.py").read_text()
    assert "is up to date: 1 patches" in toy.fap("apply", version="1.1")
    assert "clean, 1 patches" in toy.fap("status", version="1.1")


def test_one_of_two_forms_of_a_patch_is_enough(toy):
    """Of two files with one subject, each release takes the file whose Applies-To includes it."""
    new = (toy.patches / CORE_PATCH).read_bytes().replace(b">=1.0", b">=1.1")
    (toy.patches / "core-change-line-eight-1-1.patch").write_bytes(new.replace(b"+line eight", b"+line new"))
    toy.replace(toy.patches / CORE_PATCH, ">=1.0", ">=1.0,<1.1")
    toy.replace(toy.patches / "series", DOS_PATCH, f"core-change-line-eight-1-1.patch\n{DOS_PATCH}")
    for version, line in (("1.0", "line eight\n"), ("1.1", "line new\n")):
        toy.fap("apply", version=version)
        assert line in (toy.project(version).source / "toy" / "core.py").read_text()
    before = toy.exported()
    toy.fap("refresh")
    assert toy.exported() == before


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda t: (t.patches / CORE_PATCH).unlink(), "there is no such file"),
        (lambda t: (t.patches / "series").write_text(f"{CORE_PATCH}\n{CORE_PATCH}\n"), "twice"),
        (lambda t: (t.patches / "series").unlink(), "series is missing"),
        (
            lambda t: (t.patches / "series").write_text("../../upstream.toml\n"),
            "there is no such file beside it",
        ),
        (
            lambda t: (t.patches / CORE_PATCH).write_bytes(
                (t.patches / CORE_PATCH).read_bytes().replace(b"\n", b"\r\n")
            ),
            "Windows line ends",
        ),
        (lambda t: t.replace(t.patches / CORE_PATCH, ">=1.0", "one"), "not a version specifier"),
        (lambda t: (t.overlay / "toy" / "core.py").write_text("mine\n"), "which upstream has too"),
        (lambda t: (t.overlay / "toy" / "link.py").symlink_to("ours.py"), "symbolic link"),
    ],
)
def test_bad_input_is_named(toy, damage, told):
    damage(toy)
    assert told in toy.fap("apply", code=1) and not toy.leftovers()


def test_crlf_checkout_keeps_the_bytes_of_patches(toy, tmp_path):
    clone = tmp_path / "windows"
    toy.git(
        "clone", "--quiet", "-c", "core.autocrlf=true", "-c", "core.eol=crlf", toy.root, clone, cwd=tmp_path
    )
    for patch in toy.patches.glob("*.patch"):
        assert (clone / "patches" / "toy" / patch.name).read_bytes() == patch.read_bytes()


def test_moved_checkout_keeps_its_work(toy):
    """Git writes absolute paths into a worktree. Ours must survive a move, and a copy must never reach into
    its original.
    """
    original = state.read(toy.project()).commit
    toy.commit("mine", core=("line 10\n", "line ten\n"))
    moved = toy.root.with_name("elsewhere")
    toy.root.rename(moved)
    toy.root = moved
    assert "commits on top" in toy.fap("status", code=1)
    toy.git("reset", "--quiet", "--hard", original)
    assert "Nothing to do" in toy.fap("apply")


def test_copied_checkout_leaves_its_original_alone(made, toy):
    link = (made / "build" / "src" / "toy" / "1.0" / ".git").read_text()
    entries = {
        p: p.read_bytes() for p in (made / ".cache" / "store.git" / "worktrees").rglob("*") if p.is_file()
    }
    toy.replace(toy.overlay / "toy" / "ours.py", "1", "2")
    toy.fap("refresh")
    toy.fap("clean")
    assert (made / "build" / "src" / "toy" / "1.0" / ".git").read_text() == link
    assert {p: p.read_bytes() for p in entries} == entries


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_cache_of_another_user(toy, person):
    """Git refuses a repository of another user, unless safe.directory names it."""
    person.write_text("[user]\n name = A Person\n email = person@example.org\n")
    for path in [toy.root, *toy.root.rglob("*")]:
        os.chown(path, 12345, 12345, follow_symlinks=False)
    refused = subprocess.run(["git", "status"], cwd=toy.source, capture_output=True, check=False)
    assert b"dubious ownership" in refused.stderr
    assert "clean" in toy.fap("status")
    toy.fap("clean")
    assert "is ready" in toy.fap("apply")


def test_name_of_a_patch_travels_in_the_message_and_comes_back():
    patch = Patch(
        "a-b.patch",
        b"From 0\nSubject: [a] b\n\nWhy: x.\n\ndiff --git a/f b/f\n--- a/f\n+++ b/f\n@@ -1 +1 @@\n-a\n+b\n",
    )
    assert b"\n\nPatch-Name: a-b.patch\n\ndiff --git" in with_name(patch)
    assert without_name(with_name(patch)) == ("a-b.patch", patch.data)
    assert without_name(patch.data) == ("", patch.data)


@pytest.mark.parametrize(
    "subject, taken, name",
    [
        ("[core] Keep dq_accum offsets in 64 bits", [], "core-keep-dq-accum-offsets-in-64-bits.patch"),
        ("[core] Ändere", ["core-ndere.patch"], "core-ndere-2.patch"),
        ("…", [], "patch.patch"),
    ],
)
def test_name_of_a_new_patch(subject, taken, name):
    assert name_for(subject, taken) == name


def test_series_keeps_its_comments():
    text = "# head\na.patch\n# about b\nb.patch  # why\n\n# tail\n"
    assert rewrite(text, ["a.patch", "b.patch"]) == text
    assert (
        rewrite(text, ["b.patch", "new.patch"]) == "# head\n# about b\nb.patch  # why\nnew.patch\n\n# tail\n"
    )
    assert (
        rewrite("# head\n", ["a.patch"]) == "# head\na.patch\n" and rewrite(text, []) == "# head\n\n# tail\n"
    )


def test_blob_id_is_git_s():
    assert git.blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
