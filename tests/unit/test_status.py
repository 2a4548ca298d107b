"""Test that `status` names each difference, and its exit code: 0 clean, 1 out of date or edited, 2 in the
middle of a git operation.
"""

from __future__ import annotations

import subprocess

import pytest

CORE_PATCH = "core-change-line-eight.patch"


def reorder(toy):
    series = toy.patches / "series"
    first, second = (line for line in series.read_text().splitlines() if not line.startswith("#"))
    series.write_text(f"{second}\n{first}\n")


def add_patch(toy):
    (toy.patches / "new.patch").write_bytes((toy.patches / CORE_PATCH).read_bytes())
    with (toy.patches / "series").open("a") as series:
        series.write("new.patch\n")


def conflict(toy, *command):
    toy.commit("mine", core=("line 20\n", "line twenty\n"))
    subprocess.run(
        ["git", *command],
        cwd=toy.source,
        capture_output=True,
        check=False,
        input=(toy.patches / CORE_PATCH).read_bytes().replace(b"-line 8\n", b"-line 9999\n"),
    )


@pytest.mark.parametrize(
    "change, code, told",
    [
        (lambda t: None, 0, "clean, 2 patches, patched tree"),
        (
            lambda t: t.replace(t.patches / CORE_PATCH, ">=1.0", ">=1.0,<1.1"),
            1,
            f"not carried yet: 1.1 is outside the Applies-To of {CORE_PATCH}  ->  make rebase VERSION=1.1",
        ),
        (lambda t: t.fap("clean"), 1, "the patched tree was not made yet"),
        (
            lambda t: t.replace(t.patches / CORE_PATCH, "Why: ", "Why: indeed "),
            1,
            f"patch changed: {CORE_PATCH}",
        ),
        (add_patch, 1, "patch added: new.patch"),
        (lambda t: t.replace(t.patches / "series", CORE_PATCH + "\n", ""), 1, f"patch removed: {CORE_PATCH}"),
        (reorder, 1, "the series has another order"),
        (lambda t: t.replace(t.overlay / "toy" / "ours.py", "1", "2"), 1, "overlay changed: toy/ours.py"),
        (lambda t: (t.overlay / "toy" / "more.py").write_text(""), 1, "overlay changed: toy/more.py"),
        (lambda t: (t.overlay / "toy" / "ours.py").unlink(), 1, "overlay changed: toy/ours.py"),
        (
            lambda t: t.replace(t.source / "toy" / "core.py", "line 9\n", "line nine\n"),
            1,
            "source changed, not committed: toy/core.py",
        ),
        (
            lambda t: (t.source / "toy" / "mine.py").write_text(""),
            1,
            "source changed, not committed: toy/mine.py",
        ),
        (lambda t: t.commit("my own", core=("line 9\n", "nine\n")), 1, "my own"),
        (lambda t: t.git("reset", "--quiet", "--hard", "HEAD~1"), 1, "commits were dropped"),
        (lambda t: conflict(t, "am"), 2, "`git am` is in progress"),
        (
            lambda t: conflict(t, "rebase", "--exec", "false", "HEAD~1"),
            2,
            "a rebase is in progress in build/src/toy/1.0",
        ),
        (
            lambda t: (
                (t.source / ".git").write_text("gitdir: nowhere\n")
                and t.replace(t.source / "setup.py", "own", "mine")
            ),
            2,
            "not as they were made",
        ),
    ],
)
def test_states(toy, change, code, told):
    change(toy)
    assert told in toy.fap("status", code=code)


def test_many_files_are_counted(toy):
    for i in range(7):
        (toy.source / "toy" / f"f{i}.py").write_text("")
    assert "f3.py and 3 more" in toy.fap("status", code=1)


def test_every_reason_says_something_else():
    from fapatch.series.state import Reason

    assert len({r.text for r in Reason}) == len(Reason) and {r.code for r in Reason} == {1, 2}


def test_unreadable_state_means_apply_again(toy):
    state = next((toy.root / "build" / "state").rglob("*.json"))
    state.write_text("{")
    assert "not made yet" in toy.fap("status", code=1)
    toy.fap("apply")
    assert "clean" in toy.fap("status")
