"""Test the export: commits in the patched tree become patches and overlay, with the same bytes every time,
and nothing gets lost.
"""

from __future__ import annotations

import pytest

from fapatch.base import git
from fapatch.series import state
from toy import MESSAGE

CORE_PATCH = "core-change-line-eight.patch"
DOS_PATCH = "dos-change-a-file-with-carriage-returns.patch"
AUTOSQUASH = ("-c", "sequence.editor=true", "rebase", "--quiet", "-i", "--autosquash", "@{upstream}")


def verdicts(said: str) -> dict[str, str]:
    lines = (line.split() for line in said.splitlines() if line.endswith(".patch"))
    return {words[1]: words[0] for words in lines}


def names(toy):
    return [line for line in (toy.patches / "series").read_text().splitlines() if not line.startswith("#")]


def head_tree(toy):
    return toy.git("rev-parse", "HEAD^{tree}")


def test_export_of_apply_is_what_is_committed(toy):
    before, lock = toy.exported(), (toy.root / "upstream.toml").read_bytes()
    said = toy.fap("refresh")
    assert (
        verdicts(said) == {CORE_PATCH: "untouched", DOS_PATCH: "untouched"}
        and "overlay    no of 1 files" in said
    )
    assert toy.exported() == before and (toy.root / "upstream.toml").read_bytes() == lock


def test_patch_files_carry_nothing_that_churns(toy):
    text = (toy.patches / CORE_PATCH).read_bytes().decode()
    assert text.startswith("From " + "0" * 40) and "Subject: [core] Change line eight\n" in text
    assert (
        "Patch-Name" not in text
        and "\n---\n" not in text
        and "\n-- \n" not in text
        and "file changed" not in text
    )
    index = next(line for line in text.splitlines() if line.startswith("index "))
    assert len(index.split()[1]) == 82  # two full ids and two dots


def test_fixup_changes_its_patch_only(toy):
    commit = toy.git("log", "--format=%H", "--grep=Change line eight")
    toy.commit(f"fixup! {commit}", core=("line 20\n", "line twenty\n"))
    assert "is still a fixup" in toy.fap("refresh", code=1)
    toy.git(*AUTOSQUASH)
    tree = head_tree(toy)
    assert verdicts(toy.fap("refresh")) == {CORE_PATCH: "changed", DOS_PATCH: "refreshed"}
    assert b"+line twenty" in (toy.patches / CORE_PATCH).read_bytes()
    assert head_tree(toy) == tree == state.read(toy.project()).tree
    assert "clean" in toy.fap("status") and "Nothing to do" in toy.fap("apply")


def test_new_title_keeps_the_file(toy):
    toy.git(
        "commit",
        "--quiet",
        "--amend",
        "-m",
        toy.git("log", "-1", "--format=%B").replace("[dos] Change", "[dos] Rewrite"),
    )
    assert verdicts(toy.fap("refresh")) == {CORE_PATCH: "untouched", DOS_PATCH: "changed"}
    assert b"Subject: [dos] Rewrite" in (toy.patches / DOS_PATCH).read_bytes()


def test_new_commit_becomes_a_patch_named_after_its_subject(toy):
    toy.commit(MESSAGE.format(area="ops", title="Go deeper", applies=">=1.0"), **{"ops/deep": ("1", "2")})
    assert verdicts(toy.fap("refresh"))["ops-go-deeper.patch"] == "added"
    assert names(toy) == [CORE_PATCH, DOS_PATCH, "ops-go-deeper.patch"]
    assert (toy.patches / "series").read_text().startswith("# The order matters.\n")
    assert "clean" in toy.fap("status")


def test_dropped_commit_drops_its_patch(toy):
    toy.git("reset", "--quiet", "--hard", "HEAD~1")
    assert verdicts(toy.fap("refresh")) == {CORE_PATCH: "untouched", DOS_PATCH: "dropped"}
    assert names(toy) == [CORE_PATCH] and not (toy.patches / DOS_PATCH).exists()


def test_order_of_commits_is_the_order_of_the_series(toy):
    commits = toy.git("log", "--reverse", "--format=%H", "@{upstream}..").splitlines()
    toy.git("reset", "--quiet", "--hard", commits[0])
    toy.git("cherry-pick", commits[2], commits[1])
    toy.fap("refresh")
    assert names(toy) == [DOS_PATCH, CORE_PATCH]


def test_overlay_files_are_exported_too(toy):
    toy.replace(toy.source / "toy" / "ours.py", "1", "2")
    (toy.source / "toy" / "more.py").write_text("more = 1\n")
    toy.git("add", "--all")
    toy.git("commit", "--quiet", "-m", "our own files")
    said = toy.fap("refresh")
    assert "overlay    2 of 2 files changed" in said and set(verdicts(said).values()) == {"untouched"}
    assert (toy.overlay / "toy" / "ours.py").read_text() == "ours = 2\n" and (
        toy.overlay / "toy" / "more.py"
    ).exists()
    toy.git("rm", "--quiet", "toy/more.py")
    toy.git("commit", "--quiet", "-m", "no more")
    toy.fap("refresh")
    assert not (toy.overlay / "toy" / "more.py").exists() and "clean" in toy.fap("status")


def test_commit_over_both_is_taken_apart(toy):
    toy.replace(toy.source / "toy" / "ours.py", "1", "2")
    toy.commit(
        MESSAGE.format(area="core", title="Hook ours in", applies=">=1.0"),
        core=("line 20\n", "import ours\n"),
    )
    toy.fap("refresh")
    assert b"ours.py" not in (toy.patches / "core-hook-ours-in.patch").read_bytes()
    assert (toy.overlay / "toy" / "ours.py").read_text() == "ours = 2\n"


def test_refresh_leaves_the_lock_alone(toy):
    lock = (toy.root / "upstream.toml").read_bytes()
    toy.replace(toy.overlay / "toy" / "ours.py", "1", "5")
    assert "patched tree" in toy.fap("refresh") and "clean" in toy.fap("status")
    assert (toy.root / "upstream.toml").read_bytes() == lock


def test_overlay_edited_in_the_checkout_and_other_files_in_the_tree_are_merged(toy):
    toy.replace(toy.overlay / "toy" / "ours.py", "1", "5")
    toy.commit(MESSAGE.format(area="core", title="Mine", applies=">=1.0"), core=("line 20\n", "mine\n"))
    toy.fap("refresh")
    assert (toy.overlay / "toy" / "ours.py").read_text() == "ours = 5\n" and "core-mine.patch" in names(toy)
    assert "clean" in toy.fap("status")


@pytest.mark.parametrize(
    "change, told",
    [
        (
            lambda t: t.replace(t.overlay / "toy" / "ours.py", "1", "7"),
            "toy/ours.py changed in overlay/ and in the patched tree",
        ),
        (
            lambda t: t.replace(t.patches / CORE_PATCH, "Why:", "Why: indeed,"),
            f"{CORE_PATCH} changed in patches/",
        ),
    ],
)
def test_changed_in_both_places_is_refused_and_nothing_is_written(toy, change, told):
    toy.replace(toy.source / "toy" / "ours.py", "1", "2")
    toy.commit("both", core=("line 20\n", "mine\n"))
    change(toy)
    before, head = toy.exported(), toy.git("rev-parse", "HEAD")
    assert told in toy.fap("refresh", code=1)
    assert toy.exported() == before and toy.git("rev-parse", "HEAD") == head


def test_uncommitted_edit_must_be_committed_first(toy):
    toy.replace(toy.source / "toy" / "core.py", "line 20\n", "mine\n")
    assert "--fixup" in toy.fap("refresh", code=1)


def test_merge_commit_is_no_patch(toy):
    toy.git("checkout", "--quiet", "-b", "side", "HEAD~1")
    toy.commit("side", **{"ops/deep": ("1", "2")})
    toy.git("checkout", "--quiet", "toy/1.0")
    toy.git("merge", "--quiet", "--no-edit", "side")
    assert "is a merge" in toy.fap("refresh", code=1)


def test_patch_edited_by_hand_comes_out_as_git_writes_it(toy):
    patch = toy.patches / CORE_PATCH
    original = patch.read_bytes()
    patch.write_bytes(original.replace(b"From " + b"0" * 40, b"From " + b"1" * 40) + b"-- \n2.39.5\n")
    said = toy.fap("refresh")
    assert patch.read_bytes() == original and verdicts(said)[CORE_PATCH] == "refreshed"


def test_lines_that_moved_are_a_refresh_not_a_change(toy):
    """With equal patch id and equal message, only `index` and `@@` lines differ."""
    patch = toy.patches / DOS_PATCH
    original = patch.read_bytes()
    moved = original.replace(b"@@ -27,7 +27,7 @@", b"@@ -25,7 +25,7 @@")
    assert moved != original
    patch.write_bytes(moved)
    assert verdicts(toy.fap("refresh")) == {CORE_PATCH: "untouched", DOS_PATCH: "refreshed"}
    assert patch.read_bytes() == original


def test_skipped_patch_keeps_its_place(toy):
    patch = toy.patches / CORE_PATCH
    toy.replace(patch, "Applies-To: >=1.0", "Applies-To: >=1.1")
    toy.replace(patch, "Inappropriate [toy]", "Backport [0.9]")
    toy.fap("refresh")
    assert names(toy) == [CORE_PATCH, DOS_PATCH] and b">=1.1" in patch.read_bytes()
    toy.commit(MESSAGE.format(area="ops", title="Go deeper", applies=">=1.0"), **{"ops/deep": ("1", "2")})
    toy.fap("refresh")
    assert names(toy) == [CORE_PATCH, DOS_PATCH, "ops-go-deeper.patch"]


def test_release_that_is_not_carried_is_left_out_and_no_fault(toy):
    toy.replace(toy.patches / CORE_PATCH, ">=1.0", ">=1.0,<1.1")
    assert f"left out   not carried yet: 1.1 is outside the Applies-To of {CORE_PATCH}" in toy.fap("refresh")


def test_release_that_the_series_no_longer_serves_is_named_and_the_rest_is_written(toy):
    toy.commit(
        MESSAGE.format(area="init", title="Change what 1.1 has not", applies=">=1.0"),
        __init__=("VERSION = '1.0'", "VERSION = 'ours'"),
    )
    said = toy.fap("refresh", code=1)
    assert "warning: 1.1: does not apply any more: init-change-what-1-1-has-not.patch (toy/__init__" in said
    assert "init-change-what-1-1-has-not.patch" in names(toy) and "clean" in toy.fap("status")


def test_release_that_cannot_be_fetched_is_named_and_the_rest_is_written(toy, index_is_far):
    (toy.root / ".cache" / "downloads" / "toy-1.1.tar.gz").unlink()
    git.git("update-ref", "-d", "refs/upstream/toy/1.1", repo=toy.project().store)
    toy.replace(toy.overlay / "toy" / "ours.py", "1", "5")
    assert "warning: 1.1 was not tried: toy-1.1.tar.gz was not found" in toy.fap("refresh", code=1)
    assert "Nothing to do" in toy.fap("apply")


def test_interrupted_while_writing_goes_on(toy, monkeypatch):
    """After a kill between two writes the tree still has the commits, and the written files do not conflict
    with them.
    """
    commit = toy.git("log", "--format=%H", "--grep=Change line eight")
    toy.commit(f"fixup! {commit}", core=("line 20\n", "line twenty\n"))
    toy.git(*AUTOSQUASH)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fapatch.series.refresh.check_others", interrupt)
        toy.fap("refresh", code=130)
    assert b"line twenty" in (toy.patches / CORE_PATCH).read_bytes() and not toy.leftovers()
    toy.fap("refresh")
    assert "clean" in toy.fap("status") and state.read(toy.project()).tree == head_tree(toy)
