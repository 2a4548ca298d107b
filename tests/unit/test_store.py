"""Test that a store in a carried .cache runs no program and changes no byte, in the tools' git or in the git
of a user who works in the patched tree afterwards.
"""

from __future__ import annotations

import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from fapatch.base import git
from fapatch.source import store
from toy import Toy, shell

ATTRIBUTE = "*.py filter=evil\n"


@dataclass
class Carried:
    """A store that somebody else may have changed. ``program`` records that it ran."""

    store: Path
    program: Path
    elsewhere: Path

    def configure(self, text: str) -> None:
        with (self.store / "config").open("a") as config:
            config.write(text.format(program=self.program, elsewhere=self.elsewhere))

    def write(self, name: str, text: str) -> Path:
        path = self.store / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def id(self, revision: str) -> str:
        return git.resolve(revision, repo=self.store)

    def hook(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("post-checkout", "post-commit", "applypatch-msg", "reference-transaction"):
            shutil.copy(self.program, folder / name)


def replace_refs(had: Carried) -> None:
    evil = git.output("hash-object", "-w", "--stdin", repo=had.store)  # an empty file
    git.git(
        "update-ref", f"refs/replace/{had.id('refs/upstream/toy/1.0:toy/ops/deep.py')}", evil, repo=had.store
    )


def grafts(had: Carried) -> None:
    had.write("info/grafts", f"{had.id('toy/1.0')} {had.id('refs/upstream/toy/1.0')}\n")


def shallow(had: Carried) -> None:
    had.write("shallow", had.id("toy/1.0") + "\n")


def filters(had: Carried) -> None:
    had.configure('[filter "evil"]\n smudge = {program}\n clean = {program}\n')
    had.write("info/attributes", ATTRIBUTE)


def attributes(had: Carried) -> None:
    had.write("info/attributes", "*.py text eol=crlf\n")


def hooks(had: Carried) -> None:
    had.hook(had.store / "hooks")


def included_settings(had: Carried) -> None:
    had.hook(had.elsewhere / "hooks")
    (had.elsewhere / "config").write_text(f"[core]\n hooksPath = {had.elsewhere}/hooks\n")
    had.configure("[include]\n path = {elsewhere}/config\n")


def worktree_settings(had: Carried) -> None:
    had.hook(had.elsewhere / "hooks")
    had.configure("[extensions]\n worktreeConfig = true\n")
    had.write("config.worktree", f"[core]\n hooksPath = {had.elsewhere}/hooks\n bare = true\n")


def programs_in_settings(had: Carried) -> None:
    had.configure("[core]\n fsmonitor = {program}\n editor = {program}\n pager = {program}\n")


def promised_objects(had: Carried) -> None:
    """A partial clone fetches a missing object with a program from its settings."""
    had.configure(
        '[core]\n repositoryformatversion = 1\n[extensions]\n partialClone = evil\n[remote "evil"]\n'
        " url = {elsewhere}\n promisor = true\n uploadpack = {program}\n"
    )
    promised = had.id("refs/upstream/toy/1.0:toy/ops/deep.py")
    names = git.output(
        "cat-file", "--batch-all-objects", "--batch-check=%(objectname)", repo=had.store
    ).split()
    kept = "".join(f"{name}\n" for name in names if name != promised).encode()
    pack = had.elsewhere / "pack"
    git.git("pack-objects", "--quiet", pack, repo=had.store, stdin=kept)
    shutil.rmtree(had.store / "objects")
    (had.store / "objects" / "pack").mkdir(parents=True)
    for file in had.elsewhere.glob("pack-*"):
        shutil.move(file, had.store / "objects" / "pack" / file.name)
        (had.store / "objects" / "pack" / file.with_suffix(".promisor").name).touch()


def alternates(had: Carried) -> None:
    shutil.move(had.store / "objects", had.elsewhere / "objects")
    had.write("objects/info/alternates", f"{had.elsewhere}/objects\n")


def another_common_folder(had: Carried) -> None:
    shutil.copytree(had.store, had.elsewhere / "git")
    hooks(Carried(had.elsewhere / "git", had.program, had.elsewhere))
    filters(Carried(had.elsewhere / "git", had.program, had.elsewhere))
    had.write("commondir", f"{had.elsewhere}/git\n")


def forged_object(had: Carried) -> None:
    """Store an object under the id of another content. No ref leads to it, but git would use it when that
    content is written.
    """
    name = had.id("refs/upstream/toy/1.0:toy/ops/deep.py")
    path = had.store / "objects" / name[:2] / name[2:]
    path.chmod(0o644)
    path.write_bytes(zlib.compress(b"blob 9\0evil = 1\n"))
    shutil.rmtree(had.store / "refs" / "upstream")


@pytest.fixture
def carried(toy: Toy, tmp_path: Path) -> Carried:
    """The cache of the toy, for a checkout in which nothing is built yet."""
    shutil.rmtree(toy.root / "build")
    shutil.rmtree(toy.project().store / "worktrees")
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho $0 $@ >> {tmp_path}/ran\n")
    program.chmod(0o755)
    (tmp_path / "elsewhere").mkdir()
    return Carried(toy.project().store, program, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "tamper",
    [
        replace_refs,
        grafts,
        shallow,
        filters,
        attributes,
        hooks,
        included_settings,
        worktree_settings,
        programs_in_settings,
        promised_objects,
        alternates,
        another_common_folder,
        forged_object,
    ],
    ids=lambda tamper: tamper.__name__,
)
def test_what_a_carried_store_holds_is_ignored(toy, carried, tmp_path, tamper):
    expected = git.output("rev-parse", "toy/1.0^{tree}", repo=carried.store)
    tamper(carried)
    said = toy.fap("apply")
    # The user works in the tree.
    (toy.source / "toy" / "ops" / "deep.py").unlink()
    toy.git("checkout", "--", ".")
    toy.git("status")
    toy.git("commit", "--quiet", "--allow-empty", "-m", "mine")
    assert git.tree_of(toy.source, store.EXCLUDE) == expected
    assert toy.git("rev-parse", "HEAD^{tree}") == expected
    assert (
        toy.git("rev-list", "--count", "@{upstream}..") == "4"
    )  # the overlay, two patches, the user's commit
    assert not (tmp_path / "ran").exists()
    shutil.rmtree(carried.elsewhere)
    toy.git("fsck")
    assert "warning: dropped from .cache/store.git" in said or tamper in (replace_refs, forged_object)
    assert "dropped" not in toy.fap("status", code=1)


def test_a_store_of_one_s_own_keeps_name_and_branches_without_a_word(toy):
    shell("git", "config", "user.name", "A. Person", cwd=toy.source)
    before = (toy.project().store / "config").read_text()
    assert "dropped" not in toy.fap("status")
    assert "dropped" not in toy.fap("status")
    assert shell("git", "config", "user.name", cwd=toy.source) == "A. Person\n"
    assert 'branch "toy/1.0"' in before and toy.git("rev-parse", "@{upstream}")


@pytest.mark.parametrize("name", ["store.git/logs/HEAD", "lock"])
def test_a_link_in_a_carried_cache_is_not_followed(toy, carried, tmp_path, name):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    link = toy.root / ".cache" / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(precious)
    said = toy.fap("apply", code=1)
    assert name in said and "symbolic link" in said and len(said.splitlines()) == 1
    assert precious.read_text() == "precious"
