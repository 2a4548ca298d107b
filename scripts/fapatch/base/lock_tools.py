"""Renew requirements.lock: versions and hashes of all packages of .venv, for every Python from 3.10 on.

pyproject.toml names the packages, uv resolves them for all platforms at once, and pip's own index (index-url)
gives the hashes of all files of a version. A version that still fits stays; --upgrade takes the newest
versions. The hashes of wheels in pip's find-links folders are added if they are builds of a version in the
lock, such as torch 2.13.0+cpu, so that pip may install them too.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from . import env, files
from .errors import FapError
from .pip import local_wheels, settings
from .process import run
from .project import Project

EXCLUSIVE = True
HEADER = """\
# All that `make env` and `make toolchain` put into .venv: pip checks these hashes (--require-hashes).
# Written by `make lock-tools` from pyproject.toml. Do not edit.
"""
_HASH = re.compile(r"--hash=(sha256:\w+)")


def resolve(
    root: Path, python: Path, old: str, upgrade: bool, oldest: tuple[int, int] = env.LEAST_PYTHON
) -> str:
    """Resolve the lock with uv for Python from ``oldest`` on, starting from the text of the ``old`` one.
    Raises FapError if no set of versions fits, or the index cannot be reached.
    """
    # Passed in the environment: an address may hold a password, and error messages show arguments.
    of_pip = settings(python, "install")
    variables = {
        "UV_DEFAULT_INDEX": of_pip.get("index-url"),
        "SSL_CERT_FILE": of_pip.get("cert") or os.environ.get("SSL_CERT_FILE"),
    }
    least = ".".join(map(str, oldest))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / env.LOCK
        out.write_text(old, encoding="utf-8")  # uv keeps its versions
        options = ["--universal", "--python-version", least, "--generate-hashes", "--all-extras"]
        options += ["--only-binary", ":all:", "--no-annotate", "--no-header", "--no-config", "--quiet"]
        options += ["--upgrade"] if upgrade else []
        uv = python.with_name("uv")
        where = ("--python", python, "--output-file", out, root / "pyproject.toml")
        run(uv, "pip", "compile", *options, *where, env=variables, hint="mend pyproject.toml, or connect")
        return out.read_text(encoding="utf-8")


def key(entry: str) -> tuple[str, str]:
    """(package, version) of an entry of the lock."""
    return env.canonical(entry), re.search(r"==([^\s;]+)", entry)[1]


def with_hashes(entry: str, more: Iterable[str]) -> str:
    lines = [entry.split(" \\\n")[0], *sorted({*_HASH.findall(entry), *more})]
    return " \\\n    --hash=".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--upgrade",
        action="store_true",
        default=bool(os.environ.get("UPGRADE")),
        help="take the newest versions (environment: UPGRADE)",
    )


def main(project: Project, args: argparse.Namespace) -> int:
    python = env.venv_python(project.venv)
    if not python.exists():
        raise FapError(".venv is missing", "make env")
    lock = project.root / env.LOCK
    env.install_missing(python, lock, env.dependencies(project.root / "pyproject.toml")["lock"])
    old = lock.read_text(encoding="utf-8")
    # Keep the hash of a local build that lies on another machine.
    known = {key(entry): _HASH.findall(entry) for entry in env.entries(old)}
    for wheel in local_wheels(python):
        name, version = wheel.name.split("-")[:2]
        public = env.canonical(name), version.partition("+")[0]
        known.setdefault(public, []).append(f"sha256:{files.sha256(wheel)}")
    new = env.entries(resolve(project.root, python, old, args.upgrade))
    files.write(lock, HEADER + "".join(with_hashes(entry, known.get(key(entry), ())) for entry in new))
    changed = sorted({key(entry) for entry in new} ^ {key(entry) for entry in env.entries(old)})
    names = ", ".join(dict.fromkeys(name for name, _ in changed)) or "no version changed"
    print(f"{env.LOCK} has {len(new)} entries; changed: {names}")
    return 0
