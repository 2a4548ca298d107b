"""Test fetching upstream's files: verified before use, equal from every source, and available offline once
fetched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fapatch.base import git
from fapatch.base.files import matches
from fapatch.source import fetch
from toy import RELEASES, SHARED, lock_text, make_sdist, point_pip_at, release_files, shell, upstream_tree


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Serve a package index on this machine; returns the folder of its files and pages."""
    folder = tmp_path / "index" / "simple" / "toy"
    folder.mkdir(parents=True)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "index"))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_pip_at(monkeypatch, f"http://127.0.0.1:{server.server_port}/simple")
    yield folder
    server.shutdown()


def offer(index, data: bytes, version: str = "1.0", sha256: str | None = None) -> None:
    """Put a source distribution on the index, with the hash of ``data`` unless another hash is given."""
    digest = hashlib.sha256(data).hexdigest() if sha256 is None else sha256
    (index / f"toy-{version}.tar.gz").write_bytes(data)
    link = f"toy-{version}.tar.gz" + (f"#sha256={digest}" if digest else "")
    (index / "index.html").write_text(f'<a href="{link}">toy-{version}.tar.gz</a>')


@contextmanager
def monkeyed_release(version: str, setup: str):
    """A release of the toy like 1.1, with another setup.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RELEASES, version, RELEASES["1.1"])
        patch.setitem(SHARED, "setup.py", setup)
        yield


def tree(toy, version="1.0"):
    return git.resolve(f"refs/upstream/toy/{version}^{{tree}}", repo=toy.project().store)


def stored(toy, version="1.0"):
    return dict(git.read_tree(f"refs/upstream/toy/{version}", lambda _: True, repo=toy.project().store))


def sdist(toy, version="1.0"):
    return toy.root / ".cache" / "downloads" / f"toy-{version}.tar.gz"


def pin(toy, data: bytes) -> None:
    """Make the lock name ``data`` as the sdist of 1.0, and drop the trees."""
    commits = {r.version: r.commit for r in toy.project().family.releases}
    lines = lock_text({"1.0": data, "1.1": sdist(toy, "1.1").read_bytes()}, commits, "/nowhere")
    (toy.root / "upstream.toml").write_text(lines)


def test_sdist_gives_the_wanted_files_only(fresh):
    said = fresh.fap("fetch")
    assert "toy 1.0 fetched from toy-1.0.tar.gz, tree" in said
    files = release_files("1.0")
    assert stored(fresh) == {
        n: files[n].encode()
        for n in ("setup.py", "toy/__init__.py", "toy/core.py", "toy/dos.py", "toy/ops/deep.py")
    }
    modes = git.output("ls-tree", "-r", "refs/upstream/toy/1.0", repo=fresh.project().store).splitlines()
    assert {line.split()[0] for line in modes} == {"100644"}
    assert not fresh.leftovers()


def test_second_run_does_nothing_and_says_why(fresh):
    fresh.fap("fetch")
    assert "is in the store already" in fresh.fap("fetch")


def test_works_without_network_once_the_cache_is_filled(fresh, index_is_far):
    for version in ("1.0", "1.1"):
        fresh.fap("apply", version=version)
    sdist(fresh).unlink()
    fresh.fap("clean")
    fresh.fap("apply")


def test_without_cache_and_network_it_says_what_to_do(fresh, index_is_far):
    sdist(fresh).unlink()
    said = fresh.fap("fetch", code=1)
    assert "toy-1.0.tar.gz was not found: 127.0.0.1: [Errno 111] Connection refused  ->  " in said
    assert str(sdist(fresh).parent) in said
    assert not fresh.leftovers()


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda data: data[:-100], "cut short or another file"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "has sha256"),
    ],
)
def test_wrong_file_in_the_cache_is_refused_by_name(fresh, damage, told):
    sdist(fresh).write_bytes(damage(sdist(fresh).read_bytes()))
    said = fresh.fap("fetch", code=1)
    assert "toy-1.0.tar.gz" in said and told in said
    assert not tree(fresh) and not fresh.leftovers()


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda data: data[:-100], "cut short or another file"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "has sha256"),
    ],
)
def test_wrong_download_never_reaches_the_cache(fresh, index, damage, told):
    good = sdist(fresh).read_bytes()
    sdist(fresh).unlink()
    offer(index, damage(good))
    assert told in fresh.fap("fetch", code=1)
    assert not sdist(fresh).exists() and not tree(fresh) and not fresh.leftovers()


def test_archive_that_is_cut_short_but_pinned_so(fresh):
    data = sdist(fresh).read_bytes()[:-40]
    sdist(fresh).write_bytes(data)
    pin(fresh, data)
    assert "toy-1.0.tar.gz is damaged or cut short" in fresh.fap("fetch", code=1)
    assert not tree(fresh) and not fresh.leftovers()


def bad_member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@pytest.mark.parametrize(
    "member, told",
    [
        (bad_member("toy-1.0/toy/link.py", tarfile.SYMTYPE, "/etc/passwd"), "toy/link.py' is a link"),
        (bad_member("toy-1.0/docs/link", tarfile.LNKTYPE, "toy-1.0/setup.py"), "docs/link' is a link"),
        (bad_member("toy-1.0/pipe", tarfile.FIFOTYPE), "pipe' is a link or a device"),
        (bad_member("toy-1.0/../../evil.py"), "would leave the archive's folder"),
        (bad_member("/etc/evil.py"), "would leave the archive's folder"),
        (bad_member("toy-1.0/toy/new\nline.py"), "not a name that a source file has"),
        (bad_member("toy-1.0/toy/not-utf-8-\udcff.py"), r"toy/not-utf-8-\udcff.py' is not a name"),
        (bad_member("toy-1.0/toy/.git/hooks/evil.py"), "a path that git keeps for itself"),
        (bad_member("toy-1.0/.GIT/config"), "a path that git keeps for itself"),
        (bad_member("toy-1.0/setup.py"), "setup.py' is there twice"),
        (bad_member("another/setup.py"), "another/setup.py' is there twice"),
        (bad_member("toy-1.0/setup.py/evil.py"), "makes one path a file and a folder"),
        (bad_member("toy-1.0/setup.py", tarfile.DIRTYPE), "makes one path a file and a folder"),
        (bad_member("toy-1.0/toy"), "makes one path a file and a folder"),
    ],
)
def test_archive_with_what_does_not_belong_there(fresh, tmp_path, member, told):
    pin(fresh, make_sdist(sdist(fresh), "1.0", [member]))
    said = fresh.fap("fetch", code=1)
    assert "toy-1.0.tar.gz" in said and told in said and len(said.splitlines()) == 1
    assert not tree(fresh) and not fresh.leftovers() and not list(tmp_path.rglob("evil.py"))


def test_source_that_is_pinned_but_has_another_tree(fresh):
    fresh.replace(
        fresh.root / "upstream.toml", f'tree = "{fresh.project().release.tree}"', f'tree = "{"0" * 40}"'
    )
    said = fresh.fap("fetch", code=1)
    assert "upstream.toml says 0000" in said and not tree(fresh)


def add_submodule(toy, upstream, commit):
    entry = f"160000,{commit},third_party/toy"
    (toy.root / ".gitmodules").write_text(
        f'[submodule "third_party/toy"]\n\tpath = third_party/toy\n\turl = {upstream}\n'
    )
    toy.git("update-index", "--add", "--cacheinfo", entry, cwd=toy.root)


def test_submodule_gives_the_same_tree_as_the_sdist(fresh, upstream):
    """The submodule may have files that the sdist lacks, links, and attributes that would change line
    ends.
    """
    expected = fresh.project().release.tree
    add_submodule(fresh, upstream, fresh.project().release.commit)
    said = fresh.fap("fetch", "--source", "submodule")
    assert "fetched from third_party/toy at" in said and tree(fresh) == expected
    assert (
        shell("git", "rev-parse", "HEAD", cwd=fresh.root / "third_party" / "toy").strip()
        == fresh.project().release.commit
    )


def test_submodule_that_is_there_serves_other_releases_by_commit_and_tag(fresh, upstream, index_is_far):
    shutil.rmtree(fresh.root / ".cache")
    shell("git", "clone", "--quiet", upstream, fresh.root / "third_party" / "toy", cwd=fresh.root)
    (fresh.root / "third_party" / "toy" / "setup.py").write_text("an edit that must not be taken\n")
    assert "fetched from third_party/toy" in fresh.fap("fetch", version="1.1")
    fresh.replace(fresh.root / "upstream.toml", fresh.project().release.commit, "")
    assert "fetched from third_party/toy at v1.0" in fresh.fap("fetch")
    assert tree(fresh) == fresh.project().release.tree


def test_submodule_that_cannot_be_reached_falls_back_and_says_so_when_asked_for(fresh, tmp_path):
    add_submodule(fresh, tmp_path / "nowhere", fresh.project().release.commit)
    assert "fetched from toy-1.0.tar.gz" in fresh.fap("fetch")
    said = fresh.fap("fetch", "--source", "submodule", code=1)
    assert "nowhere" in said and "SOURCE=sdist" in said


def test_own_checkout_that_is_the_release(fresh, upstream, monkeypatch):
    shell("git", "clone", "--quiet", "--branch", "v1.0", upstream, "own", cwd=fresh.root.parent)
    own = fresh.root.parent / "own"
    for path in own.rglob("*.py"):
        path.write_bytes(path.read_bytes().replace(b"\r\r\n", b"\r\n"))
    for name, text in release_files("1.0").items():
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_bytes(text.encode())
    monkeypatch.setenv("FA_SRC_DIR", str(own))
    said = fresh.fap("apply")
    assert "warning" not in said and tree(fresh) == fresh.project().release.tree


def test_own_checkout_that_differs_is_used_with_a_warning_and_not_compared(toy, tmp_path, monkeypatch):
    own = tmp_path / "own"
    for name, text in release_files("1.0").items():
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_bytes(text.replace("line 20\n", "line twenty\n").encode())
    monkeypatch.setenv("FA_SRC_DIR", str(own))
    said = toy.fap("apply")
    assert "is not 1.0 as released" in said and "made from other upstream files" in said
    text = (toy.source / "toy" / "core.py").read_text()
    assert "line twenty" in text and "line eight" in text
    assert "Nothing to do" in toy.fap("apply")
    monkeypatch.delenv("FA_SRC_DIR")
    assert "made from other upstream files" in toy.fap("status", code=1)
    toy.fap("apply")
    assert "line twenty" not in (toy.source / "toy" / "core.py").read_text()


@pytest.mark.parametrize("name, told", [(b"\xff.py", r"toy/\udcff.py'"), (b".git/x.py", "toy/.git/x.py'")])
def test_own_checkout_with_a_file_of_a_wrong_name(fresh, tmp_path, monkeypatch, name, told):
    for path, text in release_files("1.0").items():
        (tmp_path / "own" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / path).write_text(text)
    odd = tmp_path / "own" / "toy" / os.fsdecode(name)
    odd.parent.mkdir(exist_ok=True)
    odd.touch()
    monkeypatch.setenv("FA_SRC_DIR", str(tmp_path / "own"))
    said = fresh.fap("fetch", code=1)
    assert told in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "value, told", [("/nowhere", "which is no folder"), (".", "is not a checkout of toy")]
)
def test_own_checkout_that_is_none(toy, monkeypatch, value, told):
    monkeypatch.setenv("FA_SRC_DIR", value)
    assert told in toy.fap("fetch", code=2)


def test_carried_cache(toy, tmp_path, index_is_far):
    """Only .cache is copied, to another path, and the store still lists worktrees that do not exist there."""
    other = tmp_path / "another machine"
    shutil.copytree(toy.root, other, ignore=shutil.ignore_patterns("build"))
    shutil.rmtree(toy.root)
    toy.root = other
    assert "not made yet" in toy.fap("status", code=1)
    assert "is ready" in toy.fap("apply") and "clean" in toy.fap("status")


@pytest.mark.parametrize("damage", ["blob", "everything", "head"])
def test_damaged_store_is_set_aside_and_filled_again(toy, damage):
    project = toy.project()
    if damage == "blob":
        blob = git.resolve("refs/upstream/toy/1.0:toy/core.py", repo=project.store)
        path = project.store / "objects" / blob[:2] / blob[2:]
        path.chmod(0o644)
        path.write_bytes(b"garbage")
    elif damage == "everything":
        shutil.rmtree(project.store / "objects")
        (project.store / "objects").mkdir()
    else:
        (project.store / "HEAD").unlink()
    said = toy.fap("apply")
    assert "is ready" in said or "Nothing to do" in said
    assert "clean" in toy.fap("status") and "line eight" in (toy.source / "toy" / "core.py").read_text()
    assert list((toy.root / ".cache").glob("store.broken-*"))  # the old store may hold commits


def test_store_that_is_gone_does_not_take_work_with_it(toy):
    toy.replace(toy.source / "toy" / "core.py", "line 10\n", "line ten\n")
    shutil.rmtree(toy.project().store)
    assert "not as they were made" in toy.fap("status", code=2)
    assert "not as they were made" in toy.fap("apply", code=1)
    assert "line ten" in (toy.source / "toy" / "core.py").read_text()


def test_store_that_is_gone_is_made_again_when_nothing_would_be_lost(toy):
    shutil.rmtree(toy.project().store)
    assert "as it was made" in toy.fap("status", code=1)
    assert "is ready" in toy.fap("apply")


def test_cutlass_headers_are_laid_out(fresh, tmp_path):
    fresh.fap("fetch")
    folder = tmp_path / "csrc" / "cutlass"
    assert fetch.export_cutlass(fresh.project(), folder) == 1
    header = folder / "include" / "cutlass" / "cutlass.h"
    assert header.read_text() == "// cutlass\n"
    before = header.stat().st_mtime_ns
    fetch.export_cutlass(fresh.project(), folder)
    assert header.stat().st_mtime_ns == before


def test_a_release_is_added_from_the_index_and_nothing_of_it_runs(fresh, index, tmp_path):
    """The archive's setup.py would leave a file. The lock gets the data of the index and the archive."""
    ran = tmp_path / "ran"
    with monkeyed_release("1.2", f"open({str(ran)!r}, 'w')\n"):
        data = make_sdist(tmp_path / "sdist.tar.gz", "1.2")
        offer(index, data, "1.2")
        said = fresh.fap("lock", "add", "1.2")
        release = fresh.project("1.2").release
        assert "downloading toy-1.2.tar.gz" in said and "carried: 2 patches apply as they are" in said
        assert (release.sdist.sha256, release.sdist.size) == (hashlib.sha256(data).hexdigest(), len(data))
        assert release.tree == upstream_tree("1.2") and not ran.exists() and not fresh.leftovers()


@pytest.mark.parametrize(
    "sha256, told", [("0" * 64, "has sha256"), ("", "the index gives no sha256 for toy-1.2.tar.gz")]
)
def test_a_release_whose_hash_is_another_is_not_added(fresh, index, sha256, told):
    offer(index, b"another file", "1.2", sha256)
    lock = (fresh.root / "upstream.toml").read_bytes()
    assert told in fresh.fap("lock", "add", "1.2", code=1)
    assert (fresh.root / "upstream.toml").read_bytes() == lock and not fresh.leftovers()
    assert "toy-1.3.tar.gz was not found: 127.0.0.1 does not have it" in fresh.fap(
        "lock", "add", "1.3", code=1
    )


def test_an_index_that_answers_in_json(fresh, index):
    data = sdist(fresh).read_bytes()
    sdist(fresh).unlink()
    offer(index, data)
    file = {"filename": "toy-1.0.tar.gz", "url": "toy-1.0.tar.gz", "hashes": {}}
    (index / "index.html").write_text(json.dumps({"files": [file]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SimpleHTTPRequestHandler.extensions_map, ".html", "application/vnd.pypi.simple.v1+json")
        assert "fetched from toy-1.0.tar.gz" in fresh.fap("fetch")


def test_a_folder_that_pip_looks_into_serves_too(fresh, index_is_far, monkeypatch, tmp_path):
    shutil.move(sdist(fresh), tmp_path / "toy-1.0.tar.gz")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert "fetched from toy-1.0.tar.gz" in fresh.fap("fetch")


def test_user_configuration_does_not_leak(toy, person, monkeypatch, tmp_path):
    """Each of these settings changes the bytes of a patch, or stops git, if git reads it."""
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for hook in ("pre-commit", "applypatch-msg", "pre-applypatch", "post-checkout", "commit-msg"):
        (hooks / hook).write_text("#!/bin/sh\nexit 1\n")
        (hooks / hook).chmod(0o755)
    settings = (
        "[diff]\n noprefix = true\n context = 1\n algorithm = patience\n external = false\n[apply]\n "
        f"whitespace = fix\n[commit]\n gpgsign = true\n[core]\n hooksPath = {hooks}\n autocrlf = true\n "
        "abbrev = 5\n[am]\n threeWay = true\n[format]\n signOff = true\n attach = true\n[user]\n name = "
        "Leak\n email = leak@example.org\n"
    )
    person.write_text(settings)
    with (toy.root / ".cache" / "store.git" / "config").open("a") as config:
        config.write(settings)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_AUTHOR_NAME"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    before, commit = toy.exported(), fetch.current(toy.project())
    toy.fap("clean")
    toy.fap("apply")
    toy.fap("refresh")
    toy.fap("bundle")
    assert toy.exported() == before and fetch.current(toy.project()) == commit
    log = subprocess.run(
        ["git", "log", "--format=%cn"],
        cwd=toy.source,
        capture_output=True,
        check=True,
        env={"PATH": "/usr/bin:/bin:/usr/local/bin", "HOME": str(tmp_path)},
    )
    assert b"Leak" not in log.stdout


@pytest.mark.parametrize(
    "path, patterns, expected",
    [
        ("toy/core.py", ("toy/**/*.py",), True),
        ("toy/ops/a/b.py", ("toy/**/*.py",), True),
        ("other/toy/core.py", ("toy/**/*.py",), False),
        ("toy/core.pyc", ("toy/**/*.py",), False),
        ("a/b.py", ("*.py",), False),
        ("flash_attn/cute/x/y.py", ("flash_attn/cute/**",), True),
        ("setup.py", ("setup.py",), True),
        ("setupXpy", ("setup.py",), False),
    ],
)
def test_path_patterns(path, patterns, expected):
    assert matches(path, patterns) is expected
