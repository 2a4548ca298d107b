"""Define the toy patch set for the tests of the tools: its upstream, its lock, and a user's actions in a
checkout of it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import fap
from fapatch.base import git
from fapatch.base.project import Project

CORE = "".join(f"line {i}\n" for i in range(1, 41))
RELEASES = {
    "1.0": {"toy/core.py": CORE, "toy/__init__.py": "VERSION = '1.0'\n"},
    "1.1": {"toy/core.py": "# new in 1.1\n" + CORE, "toy/__init__.py": "VERSION = '1.1'\n"},
}
SHARED = {
    "setup.py": "# upstream's own\n",
    "toy/dos.py": "first\r\nsecond\r\nthird\r\n",
    "toy/ops/deep.py": "deep = 1\n",
    "toy/left_out/cute.py": "not ours\n",
    "csrc/cutlass/include/cutlass/cutlass.h": "// cutlass\n",
    "csrc/composable/ck.h": "// not ours either\n",
}
MESSAGE = """[{area}] {title}

Why: the toy needs it.
Upstream-Status: Inappropriate [toy]
Applies-To: {applies}
"""


def upstream_tree(version: str) -> str:
    """The git tree id of the files that the toy takes from upstream."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in release_files(version).items():
            if name == "setup.py" or name.startswith("toy/") and not name.startswith("toy/left_out/"):
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).write_bytes(text.encode())
        return git.tree_of(Path(folder))


def release_files(version: str) -> dict[str, str]:
    return {**SHARED, **RELEASES[version]}


def make_sdist(path: Path, version: str, extra: list[tarfile.TarInfo] | None = None) -> bytes:
    """Make a source distribution as setuptools does; ``extra`` members have no content."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, text in release_files(version).items():
            member = tarfile.TarInfo(f"toy-{version}/{name}")
            member.size = len(text.encode())
            member.mode = 0o755 if name == "setup.py" else 0o644  # modes differ between the two sources
            tar.addfile(member, io.BytesIO(text.encode()))
        for member in extra or []:
            tar.addfile(member)
    data = gzip.compress(raw.getvalue(), mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return data


def lock_text(sdists: dict[str, bytes], commits: dict[str, str], url: str) -> str:
    lines = [
        "# A comment that must stay.",
        "schema = 1",
        'default-family = "toy"',
        "",
        "[family.toy]",
        'default = "1.0"',
        f'url = "{url}"',
        'submodule = "third_party/toy"',
        'cutlass-submodule = "csrc/cutlass"',
        'series = "patches/toy/series"',
        'overlay = "overlay/toy"',
        'package = "toy"',
        "revision = 3  # and this one too",
        'include = ["setup.py", "toy/**/*.py"]',
        'exclude = ["toy/left_out/**"]',
    ]
    for version, data in sdists.items():
        lines += [
            "",
            f'[family.toy.version."{version}"]',
            f'tag = "v{version}"',
            f'commit = "{commits[version]}"',
            f'sdist = {{ name = "toy-{version}.tar.gz", size = {len(data)}, sha256 = '
            f'"{hashlib.sha256(data).hexdigest()}" }}',
            f'tree = "{upstream_tree(version)}"',
        ]
    return "\n".join(lines) + "\n"


def point_pip_at(monkeypatch: pytest.MonkeyPatch, index: str) -> None:
    """Make ``index`` the only place where pip looks, whatever this machine's configuration."""
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", index)


def shell(*argv: str | Path, cwd: Path, check: bool = True, env: dict[str, str] | None = None) -> str:
    """Run a program as a user would, with that user's configuration."""
    result = subprocess.run(
        [str(a) for a in argv], cwd=cwd, check=False, capture_output=True, env={**os.environ, **(env or {})}
    )
    assert not check or result.returncode == 0, result.stderr.decode()
    return result.stdout.decode()


@dataclass
class Toy:
    """A checkout of the toy patch set, and a user's actions in it."""

    root: Path
    capsys: pytest.CaptureFixture[str] | None = None

    def project(self, version: str = "1.0") -> Project:
        return Project.open(self.root, "toy", version)

    @property
    def source(self) -> Path:
        return self.project().source

    @property
    def patches(self) -> Path:
        return self.root / "patches" / "toy"

    @property
    def overlay(self) -> Path:
        return self.root / "overlay" / "toy"

    def fap(self, *argv: str, code: int = 0, version: str = "") -> str:
        """Run fap.py, check its exit code, return what it printed."""
        if self.capsys:
            self.capsys.readouterr()
        options = ["--root", str(self.root)] + (["--release", version] if version else [])
        found = fap.main([*options, *argv])
        said = "".join(self.capsys.readouterr()) if self.capsys else ""
        assert found == code, f"exit code {found}, expected {code}: {said}"
        return said

    def git(self, *argv: str | Path, cwd: Path | None = None, check: bool = True) -> str:
        return shell("git", *argv, cwd=cwd or self.source, check=check).strip()

    def replace(self, path: Path, old: str, new: str) -> None:
        """Edit a file; the old text must be there."""
        text = path.read_bytes().decode()
        assert old in text
        path.write_bytes(text.replace(old, new).encode())

    def commit(self, message: str, **edits: tuple[str, str]) -> str:
        """Edit toy/<name>.py in the patched tree and commit that; returns the commit."""
        for name, (old, new) in edits.items():
            self.replace(self.source / "toy" / f"{name}.py", old, new)
        self.git("add", "--all")
        self.git("commit", "--quiet", "-m", message)
        return self.git("rev-parse", "HEAD")

    def exported(self) -> dict[str, bytes]:
        """Every file that `refresh` may write."""
        files = [
            p for folder in (self.patches, self.overlay) for p in sorted(folder.rglob("*")) if p.is_file()
        ]
        return {p.relative_to(self.root).as_posix(): p.read_bytes() for p in files}

    def leftovers(self) -> list[str]:
        """List files that a failed run must not leave behind."""
        hidden = [
            *self.root.glob("build/src/*/.new*"),
            *self.root.glob(".cache/.*"),
            *self.root.glob(".cache/downloads/.part*"),
            *self.root.rglob("*.rej"),
            *self.root.rglob("*.orig"),
        ]
        return [str(p) for p in hidden]


def make_upstream(folder: Path) -> dict[str, str]:
    """Make the toy's git repository: the sdist's files without vendored folders, and files that no sdist has.
    Returns version -> commit.
    """
    shell("git", "init", "--quiet", folder, cwd=folder.parent)
    commits = {}
    for version in RELEASES:
        only_git = {"docs/readme.md": "docs\n", ".gitattributes": "*.py text eol=crlf\n", "AGENTS.md": ""}
        for name, text in {**release_files(version), **only_git}.items():
            if not name.startswith("csrc/cutlass"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(text.encode())
        (folder / "AGENTS.md").unlink()
        (folder / "AGENTS.md").symlink_to("docs/readme.md")
        # Store the bytes as they are, despite .gitattributes, as many repositories do with such files.
        blobs = [
            line
            for p in sorted(folder.rglob("*"))
            if p.is_file() and ".git" not in p.relative_to(folder).parts[:1] and not p.is_symlink()
            for line in [(p, shell("git", "hash-object", "-w", "--no-filters", p, cwd=folder).strip())]
        ]
        for path, blob in blobs:
            shell(
                "git",
                "update-index",
                "--add",
                "--cacheinfo",
                f"100644,{blob},{path.relative_to(folder)}",
                cwd=folder,
            )
        shell("git", "add", "AGENTS.md", cwd=folder)
        shell(
            "git",
            "-c",
            "user.name=up",
            "-c",
            "user.email=up@example.org",
            "commit",
            "--quiet",
            "-m",
            version,
            cwd=folder,
        )
        shell("git", "tag", f"v{version}", cwd=folder)
        commits[version] = shell("git", "rev-parse", "HEAD", cwd=folder).strip()
    return commits
