"""Run git the same way on every machine: no user or system settings, fixed identity and language, no prompts,
no hooks.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .errors import FapError
from .process import run

CONFIG = Path(__file__).with_name("gitconfig")
LEAST_VERSION = (
    2,
    32,
)  # the first that reads GIT_CONFIG_GLOBAL, without which a user's diff.noprefix leaks into patches
# The date of commits that the tools make, so that equal content has an equal commit id everywhere.
FIXED_DATE = "1000000000 +0000"
_KEPT = ("GIT_EXEC_PATH", "GIT_SSL_", "GIT_PROXY_", "GIT_TRACE")


def environment() -> dict[str, str | None]:
    """Return the variables to add to the environment of a git command; None removes a variable."""
    scrubbed: dict[str, str | None] = {
        name: None for name in os.environ if name.startswith("GIT_") and not name.startswith(_KEPT)
    }
    return {
        **scrubbed,
        "GIT_CONFIG_GLOBAL": str(CONFIG),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "include.path",
        "GIT_CONFIG_VALUE_0": str(CONFIG),
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "true",
        "SSH_ASKPASS": "true",
        "GIT_SSH_COMMAND": "ssh -oBatchMode=yes",
        "LC_ALL": "C",
        "TZ": "UTC",
    }


@cache
def _check_version() -> None:
    said = run("git", "version", hint="install git").stdout.decode()
    found = re.search(r"(\d+)\.(\d+)", said)
    if not found or tuple(map(int, found.groups())) < LEAST_VERSION:
        raise FapError(
            f"{said.strip()} is too old: it would mix your settings into the patches",
            "install git 2.32 or newer",
        )


def git(
    *args: str | Path,
    cwd: Path | None = None,
    repo: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    stdin: bytes | None = None,
    check: bool = True,
    timeout: float | None = None,
    hint: str = "",
) -> subprocess.CompletedProcess[bytes]:
    """Run git in the worktree ``cwd`` or on the bare repository ``repo``. Raises as ``process.run`` does."""
    _check_version()
    where = (f"--git-dir={repo}",) if repo else ()
    return run(
        "git",
        *where,
        *args,
        cwd=cwd,
        env={**environment(), **(env or {})},
        stdin=stdin,
        check=check,
        timeout=timeout,
        hint=hint,
    )


def output(
    *args: str | Path,
    cwd: Path | None = None,
    repo: Path | None = None,
    env: Mapping[str, str | None] | None = None,
) -> str:
    """Run git and return its output, without line ends at the end."""
    return git(*args, cwd=cwd, repo=repo, env=env).stdout.decode("utf-8", "surrogateescape").rstrip("\n")


def resolve(revision: str, *, cwd: Path | None = None, repo: Path | None = None) -> str:
    """The object id of ``revision``, or "" when there is none."""
    result = git("rev-parse", "--verify", "--quiet", revision, cwd=cwd, repo=repo, check=False)
    return result.stdout.decode().strip() if result.returncode == 0 else ""


def blob_id(data: bytes) -> str:
    """The id that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def list_tree(revision: str, *, cwd: Path | None = None, repo: Path | None = None) -> dict[str, str]:
    """Path -> blob id of every plain file of ``revision``; symbolic links and submodules are not listed."""
    entries = (
        git("ls-tree", "-r", "-z", revision, cwd=cwd, repo=repo)
        .stdout.decode("utf-8", "surrogateescape")
        .split("\0")
    )
    split = (entry.split("\t", 1) for entry in entries if entry.startswith("100"))
    return {path: about.split()[2] for about, path in split}


def read_tree(
    revision: str, wanted: Callable[[str], bool], *, cwd: Path | None = None, repo: Path | None = None
) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of every plain file of ``revision`` whose path is ``wanted``, without applying
    attributes or conversions.
    """
    chosen = {path: blob for path, blob in list_tree(revision, cwd=cwd, repo=repo).items() if wanted(path)}
    data = git(
        "cat-file", "--batch", cwd=cwd, repo=repo, stdin="".join(f"{b}\n" for b in chosen.values()).encode()
    ).stdout
    position = 0
    for path in chosen:
        end = data.index(b"\n", position)
        head = data[position:end].split()
        if len(head) != 3:
            raise FapError(
                f"{path} of {revision} is missing from {repo or cwd}", "fetch that repository again"
            )
        size = int(head[2])
        yield path, data[end + 1 : end + 1 + size]
        position = end + size + 2


@dataclass(frozen=True)
class Index:
    """A temporary index in a bare repository, for trying patches without a worktree."""

    repo: Path
    env: Mapping[str, str]

    def apply(self, patch: bytes) -> str:
        """Apply ``patch`` and return "". If it does not apply, leave the index as it was and return git's
        error.
        """
        done = git("apply", "--cached", "-", repo=self.repo, env=self.env, stdin=patch, check=False)
        return (done.stderr.decode("utf-8", "replace") or "git apply failed") if done.returncode else ""

    def write(self) -> str:
        """Write the index to the repository as a tree and return its id."""
        return output("write-tree", repo=self.repo, env=self.env)


@contextmanager
def index_of(tree: str, *, repo: Path) -> Iterator[Index]:
    """Make an index that holds ``tree`` while the block runs."""
    with tempfile.TemporaryDirectory() as scratch:
        index = Index(repo, {"GIT_INDEX_FILE": str(Path(scratch) / "index")})
        git("read-tree", tree, repo=repo, env=index.env)
        yield index


def tree_with(tree: str, patches: Iterable[bytes], *, repo: Path) -> str:
    """Apply ``patches`` to ``tree``, write the result to ``repo`` and return its id. Raises FapError if one
    does not apply.
    """
    with index_of(tree, repo=repo) as index:
        for patch in patches:
            if said := index.apply(patch):
                raise FapError(f"a patch does not apply: {said.strip().splitlines()[0]}", "make refresh")
        return index.write()


def tree_of(folder: Path, ignore: str = "") -> str:
    """Compute the tree id of the files in ``folder``, in a throw-away repository. ``ignore``: lines of a
    .gitignore.
    """
    with tempfile.TemporaryDirectory() as scratch:
        repo = Path(scratch) / "git"
        git("init", "--quiet", "--bare", repo)
        (repo / "info").mkdir(exist_ok=True)
        (repo / "info" / "exclude").write_text(ignore, encoding="utf-8")
        git(f"--work-tree={folder}", "add", "--all", ".", repo=repo, cwd=folder)
        return output("write-tree", repo=repo)
