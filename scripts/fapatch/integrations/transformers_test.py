"""Run tests/integrations with the oldest and the newest transformers that are supported.

Each has an environment of its own in .venv/transformers, which shares torch, flash_attn and pytest with
.venv, and a lock beside the tests with the versions and hashes of what it adds. The second run installs
nothing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from ..base import env, files, lock_tools
from ..base.errors import FapError
from ..base.process import run
from ..base.project import Project

EXCLUSIVE = True
VERSIONS = {"4.57.6": (3, 10), "5.24.0": (3, 11)}  # the oldest Python that each takes
TESTS = Path("tests") / "integrations"
HEADER = """\
# What `make test-transformers` adds to .venv for this transformers: pip checks these (--require-hashes).
# Written by `make test-transformers LOCK=1`. Do not edit.
"""


def lock_of(root: Path, version: str) -> Path:
    return root / TESTS / f"transformers-{version}.lock"


def renew(root: Path, python: Path, version: str) -> None:
    """Write the lock of one version of transformers. Raises FapError without the package index."""
    lock = lock_of(root, version)
    old = lock.read_text(encoding="utf-8") if lock.exists() else ""
    with tempfile.TemporaryDirectory() as scratch:
        asked = f'[project]\nname = "asked"\nversion = "1"\ndependencies = ["transformers=={version}"]\n'
        Path(scratch, "pyproject.toml").write_text(asked, encoding="utf-8")
        found = env.entries(lock_tools.resolve(Path(scratch), python, old, True, VERSIONS[version]))
    shared = set(map(env.canonical, env.entries((root / env.LOCK).read_text(encoding="utf-8"))))
    new = [entry for entry in found if env.canonical(entry) not in shared]
    files.write(lock, HEADER + "".join(lock_tools.with_hashes(entry, ()) for entry in new))
    print(f"{lock.name} has {len(new)} entries")


def environment(project: Project, version: str) -> Path:
    """Return the interpreter of the environment with one version of transformers, which is made if needed."""
    venv, shared = project.venv / "transformers" / version, env.venv_python(project.venv)
    python = env.venv_python(venv)
    if not python.exists():
        env.create(venv, shared, shared=False)
        env.share_packages(venv, shared)
    env.install_missing(python, lock_of(project.root, version), [f"transformers=={version}"])
    return python


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lock",
        action="store_true",
        default=bool(os.environ.get("LOCK")),
        help="renew the locks with the newest versions, and run nothing (environment: LOCK)",
    )
    parser.add_argument("--only", choices=VERSIONS, help="one version of transformers")


def main(project: Project, args: argparse.Namespace) -> int:
    shared = env.venv_python(project.venv)
    if not shared.exists():
        raise FapError(".venv is missing", "make wheel")
    versions = [args.only] if args.only else VERSIONS
    if args.lock:
        asked = env.dependencies(project.root / "pyproject.toml")["lock"]
        env.install_missing(shared, project.root / env.LOCK, asked)
        for version in versions:
            renew(project.root, shared, version)
        return 0
    failed = []
    for version in versions:
        if tuple(env.about(shared)["python"]) < VERSIONS[version]:
            print(
                f"transformers {version} is not run: it needs Python {'.'.join(map(str, VERSIONS[version]))}"
            )
            continue
        python = environment(project, version)
        options = ("-q", "-n", str(os.cpu_count() or 1), "-p", "no:cacheprovider", TESTS)
        done = run(
            python, "-m", "pytest", *options, cwd=project.root, env={"OMP_NUM_THREADS": "1"}, capture=False,
            check=False,
        )  # fmt: skip
        failed += [version] if done.returncode else []
    if failed:
        raise FapError(f"tests/integrations fails with transformers {', '.join(failed)}")
    return 0
