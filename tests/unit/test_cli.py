"""Test the command line: one line for a fault that a user can correct, the right exit code, one run at a
time, and no harm from an interruption.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fap
from fapatch.base import locking, process
from fapatch.base.errors import FapError
from fapatch.series import apply, state
from toy import shell

FAP = Path(fap.__file__)


def start(toy, *argv: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, FAP, "--root", toy.root, *argv],
        env={**os.environ, **env},
        start_new_session=True,
        # A background job of a shell ignores the signal, and so would the programs that these tests
        # interrupt.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def slow_git(tmp_path, verb: str) -> dict[str, str]:
    """Make a git that waits for a long time when asked to do ``verb``, and creates the file `reached`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "git"
    script.write_text(
        f'#!/bin/sh\ncase " $* " in *" {verb} "*) touch {tmp_path}/reached; sleep 60;; esac\nexec '
        f'{shutil.which("git")} "$@"\n'
    )
    script.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_half_way(toy, tmp_path, sign):
    toy.replace(toy.overlay / "toy" / "ours.py", "1", "2")
    head = toy.git("rev-parse", "HEAD")
    run = start(toy, "apply", **slow_git(tmp_path, "am"))
    wait_for(tmp_path / "reached")
    os.killpg(run.pid, sign)
    said = run.communicate(timeout=30)[1]
    assert run.returncode == 130 and said.startswith("interrupted") and len(said.splitlines()) == 1
    assert not toy.leftovers() and toy.git("rev-parse", "HEAD") == head
    toy.fap("refresh")
    assert "clean" in toy.fap("status")


def test_killed_half_way(toy, tmp_path):
    toy.replace(toy.overlay / "toy" / "ours.py", "1", "2")
    run = start(toy, "apply", **slow_git(tmp_path, "am"))
    wait_for(tmp_path / "reached")
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate(timeout=30)
    assert toy.leftovers()
    toy.fap("refresh")
    assert "clean" in toy.fap("status") and not toy.leftovers()


def test_second_run_waits_for_the_first(fresh, tmp_path):
    """Three runs start from an empty store at one moment, when the lock of this test ends. One makes the tree
    while the others wait for it."""
    with locking.exclusive(fresh.project(), "test"):
        runs = [start(fresh, "apply") for _ in range(3)]
        waiting = [run.stderr.readline() for run in runs]
    said = [run.communicate(timeout=120) for run in runs]
    assert waiting == [f"waiting for process {os.getpid()} (test)\n"] * 3
    assert [run.returncode for run in runs] == [0, 0, 0], said
    assert (
        sum("is ready" in out for out, _ in said) == 1 and sum("Nothing to do" in out for out, _ in said) == 2
    )


def test_waiting_ends_with_the_number_of_the_process(toy, monkeypatch):
    monkeypatch.setenv("FAP_LOCK_WAIT", "0.2")
    with locking.exclusive(toy.project(), "wheel"):
        waiting = start(toy, "apply")
        said = waiting.communicate(timeout=30)[1]
    assert waiting.returncode == 1 and f"process {os.getpid()} (wheel) has worked in" in said
    assert "Nothing to do" in toy.fap("apply")


def test_unknown_release_and_family(toy, monkeypatch):
    monkeypatch.setenv("VERSION", "9.9")
    said = toy.fap("status", code=2)
    assert "VERSION=9.9 is not a release of toy" in said and "choose one of: 1.0, 1.1" in said
    monkeypatch.setenv("VERSION", "")
    monkeypatch.setenv("FAMILY", "other")
    found = fap.main(["--root", str(toy.root), "status"])
    assert found == 2


def test_version_chooses_the_release(toy, monkeypatch):
    monkeypatch.setenv("VERSION", "1.1")
    assert "build/src/toy/1.1" in toy.fap("apply")


def test_missing_git(toy, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    from fapatch.base import git

    git._check_version.cache_clear()
    said = toy.fap("apply", code=1)
    assert said == "error: git is not installed  ->  install git and try again\n"


def test_git_that_is_too_old(toy, monkeypatch, tmp_path):
    old = tmp_path / "git"
    old.write_text("#!/bin/sh\necho git version 2.25.1\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    from fapatch.base import git

    git._check_version.cache_clear()
    assert "git version 2.25.1 is too old" in toy.fap("apply", code=1)
    git._check_version.cache_clear()


def test_no_space_left(toy, monkeypatch):
    """The state is written to /dev/full, which fails like a full disk."""
    toy.fap("clean")
    with monkeypatch.context() as patch:
        patch.setattr(state.files, "write", lambda path, text: Path("/dev/full").write_text(text))
        said = toy.fap("apply", code=1)
    assert "no space left" in said and len(said.strip().splitlines()) == 2
    toy.fap("apply")
    assert "clean" in toy.fap("status")


def test_cache_that_cannot_be_written(fresh):
    shutil.rmtree(fresh.root / ".cache")
    (fresh.root / ".cache").write_text("a file in its place")
    said = fresh.fap("apply", code=1)
    assert said.startswith("error: ") and ".cache" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "error, told",
    [
        (PermissionError(13, "Permission denied", "/x/.cache/lock"), "/x/.cache/lock cannot be written"),
        (OSError(30, "Read-only file system", "/x/.cache"), "check its owner and permissions"),
        (OSError(122, "Disk quota exceeded"), "free some space"),
        (OSError(5, "Input/output error", "/x"), "/x: Input/output error"),
    ],
)
def test_failures_of_the_machine_in_words(error, told):
    assert told in str(fap.explain(error))


def test_broken_lock(toy):
    (toy.root / "upstream.toml").write_text("schema = ")
    assert "upstream.toml cannot be read" in toy.fap("status", code=1)


def test_bundle_is_one_patch_for_a_plain_checkout(toy, upstream, tmp_path):
    said = toy.fap("bundle")
    bundle = toy.root / "dist" / "toy-1.0-nosoftmax.3.patch"
    assert "dist/toy-1.0-nosoftmax.3.patch" in said and b"[core] Change line eight" in bundle.read_bytes()
    plain = tmp_path / "plain"
    shell("git", "clone", "--quiet", "--no-checkout", upstream, plain, cwd=tmp_path)
    (plain / ".git" / "info").mkdir(exist_ok=True)
    (plain / ".git" / "info" / "attributes").write_text("* -text\n")
    shell("git", "checkout", "--quiet", "v1.0", cwd=plain)
    shell("git", "apply", bundle, cwd=plain)
    for path in ("toy/core.py", "toy/dos.py", "toy/ours.py"):
        assert (plain / path).read_bytes() == (toy.source / path).read_bytes()
    before = bundle.read_bytes()
    toy.fap("bundle")
    assert bundle.read_bytes() == before


def test_clean_and_distclean(toy):
    toy.fap("bundle")
    toy.commit("mine", core=("line 20\n", "mine\n"))
    commit = toy.git("rev-parse", "HEAD")
    for command in ("clean", "distclean"):
        said = toy.fap(command, code=1)
        assert "commits on top" in said and f"make {command} FORCE=1" in said and toy.source.exists()
    before = toy.exported()
    assert "build/ removed" in toy.fap("clean", "--force")
    assert "Nothing to do" in toy.fap("clean")
    # Committed work is still in the store, even after FORCE.
    assert (
        shell("git", f"--git-dir={toy.project().store}", "cat-file", "-t", commit, cwd=toy.root).strip()
        == "commit"
    )
    assert "removed: dist, .cache" in toy.fap("distclean")
    assert toy.exported() == before and not (toy.root / ".cache").exists()
    assert (toy.root / "upstream.toml").exists()


def test_force_of_the_environment(toy, monkeypatch):
    toy.replace(toy.source / "toy" / "core.py", "line 20\n", "mine\n")
    monkeypatch.setenv("FORCE", "1")
    assert "build/ removed" in toy.fap("clean")


def test_apply_is_a_function_too(toy):
    assert apply.ensure(toy.project()) == toy.source


def test_verbose_shows_what_is_started(toy):
    shown = start(toy, "-v", "status").communicate(timeout=30)[1]
    assert "$ git status" in shown


@pytest.mark.parametrize("command", fap.COMMANDS)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as ended:
        fap.main([command, "--help"])
    assert ended.value.code == 0 and f"fap.py {command}" in capsys.readouterr().out


def test_a_program_past_its_time_is_ended_with_all_that_it_started(tmp_path):
    """A helper of git, stuck in connect(), keeps the pipe open, and the wait must still end."""
    begin = time.monotonic()
    with pytest.raises(FapError, match="did not finish within 0 s.*try another"):
        process.run("sh", "-c", "sleep 30 & sleep 30", timeout=0.3, hint="try another")
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    "said, told",
    [
        ("fatal: sha1 file write error: No space left on device", "free some space"),
        ("error: insufficient permission: Permission denied", "check the owner"),
        ("fatal: something else", "fap.py -v"),
    ],
)
def test_what_git_says_gets_a_next_step(said, told):
    with pytest.raises(FapError, match=told):
        process.run("sh", "-c", f"echo '{said}' >&2; exit 128")


def test_git_without_a_name_says_how_to_give_one(tmp_path, person):
    person.write_text("[user]\n useConfigOnly = true\n")
    shell("git", "init", "--quiet", tmp_path, cwd=tmp_path)
    with pytest.raises(FapError, match="->  git config --global user.name and user.email, and run this"):
        process.run("git", "commit", "--quiet", "--allow-empty", "--message=x", cwd=tmp_path)


def test_distclean_needs_no_package(toy):
    """`make distclean` runs with a bare Python, because .venv goes too."""
    ended = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(FAP.parent)!r}); import fap; sys.exit(fap.main(['--root', "
            f"{str(toy.root)!r}, 'distclean']))",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0 and "removed: build, .cache" in ended.stdout, ended.stderr
