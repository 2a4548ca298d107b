"""Make .venv, the project's own Python environment: the packages that pyproject.toml names, in the versions
and with the hashes of requirements.lock.

Uses the standard library only, because this command runs before the environment exists. If the interpreter
already has a usable torch (a GPU machine without network), .venv shares its packages and only the missing
ones are installed. The second run does nothing. PYTHON= chooses the interpreter, for this command and for
those after it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .. import workers
from . import files
from .errors import FapError, UsageError
from .lock import tomllib
from .pip import local_wheels, pip
from .process import CommandFailed, run
from .project import Project

EXCLUSIVE = True
GROUPS = ("torch", "build", "test", "lint")
LOCK = "requirements.lock"
STAMP = "fapatch.json"  # inside .venv
LEAST_PYTHON = (3, 10)
LEAST_TORCH = (2, 4)  # the first with torch.library.custom_op, which the patched package needs
ABOUT = """
import json, sys
try:
    import torch
    version = torch.__version__
except Exception:
    version = ""
print(json.dumps({"python": list(sys.version_info[:3]), "torch": version}))
"""


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _stamp(venv: Path) -> dict:
    try:
        return json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def _write_stamp(venv: Path, **facts: str) -> None:
    files.write(venv / STAMP, json.dumps(facts) + "\n")


def content_hash(root: Path, base: Path, groups: list[str]) -> str:
    """Hash what determines the environment: the packages, their lock, the interpreter, the chosen groups."""
    texts = [(root / name).read_bytes() for name in ("pyproject.toml", LOCK)]
    return hashlib.sha256(b"\0".join([*texts, str(base).encode(), " ".join(groups).encode()])).hexdigest()


def _runs(python: Path) -> bool:
    """Whether ``python`` of .venv starts and finds pip. It fails after its base was upgraded or the checkout
    was moved.
    """
    return python.exists() and run(python, "-c", "import pip", check=False).returncode == 0


def base_interpreter(venv: Path, before: str) -> Path:
    """Choose the interpreter to make .venv from: PYTHON= if set; else ``before``, from which .venv was made,
    if it still exists; else the interpreter that runs this. Raises UsageError if PYTHON= is not an executable
    or lies in .venv.
    """
    wanted = os.environ.get("PYTHON")
    if not wanted:
        own = Path(sys.prefix).resolve() == venv.resolve()
        return Path(
            before if before and shutil.which(before) else sys._base_executable if own else sys.executable
        )
    found = shutil.which(wanted)
    if found is None:
        raise UsageError(f"PYTHON={wanted} is not an executable", "give the path of a Python 3.10 or newer")
    if venv.absolute() in Path(found).absolute().parents:
        raise UsageError(
            f"PYTHON={wanted} lies in .venv itself",
            "leave PYTHON= out: .venv stays with the Python that it was made from",
        )
    return Path(found)


def about(base: Path) -> dict:
    """Return the versions of ``base`` and of its torch ("" for none). Raises UsageError for an old Python."""
    facts = json.loads(run(base, "-c", ABOUT).stdout)
    if tuple(facts["python"]) < LEAST_PYTHON:
        version = ".".join(map(str, facts["python"]))
        raise UsageError(
            f"{base} is Python {version}, 3.10 or newer is needed", "make env PYTHON=/path/to/python3.11"
        )
    return facts


def has_usable_torch(version: str) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and tuple(map(int, found.groups())) >= LEAST_TORCH


def _why_anew(venv: Path, base: Path, before: str) -> str:
    """Why ``venv``, made from ``before``, can't be kept; "" when it can."""
    if not _runs(venv_python(venv)):
        return "its Python does not run"
    if not before:
        return "this command has not made it"
    return f"it was made from {before}, and PYTHON={base} asks for another" if before != str(base) else ""


def create(venv: Path, base: Path, shared: bool) -> None:
    """Make an empty environment from ``base``; ``shared``: with the packages of ``base``."""
    # --clear removes what an interrupted run or another interpreter left there.
    options = ["--clear"] + (["--system-site-packages"] if shared else [])
    try:
        run(base, "-m", "venv", *options, venv)
    except CommandFailed as e:
        raise FapError(
            f"{base} cannot make a virtual environment: {e.message}", "install python3-venv, or set PYTHON="
        ) from e


def share_packages(venv: Path, base: Path) -> None:
    """Let ``venv`` import the packages of ``base`` if ``base`` is a virtual environment itself, which
    --system-site-packages skips.
    """
    folders = json.loads(
        run(base, "-c", "import json, site; print(json.dumps(site.getsitepackages()))").stdout
    )
    own = json.loads(
        run(
            venv_python(venv),
            "-c",
            "import json, sysconfig; print(json.dumps(sysconfig.get_path('purelib')))",
        ).stdout
    )
    (Path(own) / "fapatch-shared.pth").write_text(
        "".join(f"{folder}\n" for folder in folders), encoding="utf-8"
    )


def dependencies(pyproject: Path) -> dict[str, list[str]]:
    """Read the requirements in ``pyproject``: group -> its optional dependencies, and "" -> the other
    dependencies.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return {"": project.get("dependencies", []), **project.get("optional-dependencies", {})}


def install_missing(python: Path, lock: Path, wanted: list[str], leave: Iterable[str] = ()) -> bool:
    """Install from ``lock`` the packages of ``wanted``, and their dependencies, that the environment of
    ``python`` lacks. Returns whether any was installed. ``leave``: packages to leave as they are.

    Raises FapError if the lock has no suitable version of a package, or pip cannot get it.
    """
    listed = entries(lock.read_text(encoding="utf-8"))
    tried: set[str] = set()
    while lacking := missing(python, lock, wanted, leave):
        names = {canonical(requirement): requirement for requirement in lacking}
        chosen = [entry for entry in listed if canonical(entry) in names]
        if unknown := sorted(names.keys() & tried or names.keys() - set(map(canonical, chosen))):
            raise FapError(
                f"{lock.name} has no {names[unknown[0]]} for this machine and the Python of {python}",
                "make env PYTHON= with a Python from 3.10 to 3.13, or `make lock-tools`",
            )
        install_locked(python, chosen, lacking)
        tried.update(names)
    return bool(tried)


def entries(lock: str) -> list[str]:
    """Split a lock's text into entries: a package, a version, a marker where there are several, hashes."""
    return re.findall(r"^\w(?:.*\\\n)*.*\n", lock, re.MULTILINE)


def canonical(requirement: str) -> str:
    """Return the package name in ``requirement``, normalised so that all spellings of one name are equal."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def missing(python: Path, lock: Path, wanted: list[str], leave: Iterable[str] = ()) -> list[str]:
    """List the requirements that the environment of ``python`` lacks (workers/missing.py), except those in
    ``leave``.
    """
    said = run(python, "-I", workers.HERE / "missing.py", lock, *wanted).stdout
    return [requirement for requirement in json.loads(said) if canonical(requirement) not in leave]


def install_locked(python: Path, chosen: list[str], what: list[str], *options: str | Path) -> None:
    """Install the lock's entries ``chosen``, and nothing else, with pip's ``options``. ``what``: their names
    for people.
    """
    print(f"installing {', '.join(what)}", flush=True)
    names = set(map(canonical, chosen))
    # pip prefers a file whose hash it was told to one that it must read first. A local build (2.13.0+cpu)
    # lies in a folder that states no hashes, so this page states them.
    links = "".join(
        f'<a href="{wheel.resolve().as_uri()}#sha256={files.sha256(wheel)}">{wheel.name}</a>\n'
        for wheel in local_wheels(python)
        if canonical(wheel.name.partition("-")[0]) in names
    )
    with tempfile.TemporaryDirectory() as scratch:
        page, listed = Path(scratch) / "wheels.html", Path(scratch) / "requirements.txt"
        page.write_text(links, encoding="utf-8")
        listed.write_text("".join(chosen), encoding="utf-8")
        pip(
            python,
            "install",
            "--no-deps",
            "--require-hashes",
            "--only-binary=:all:",
            f"--find-links={page}",
            f"--requirement={listed}",
            *options,
            what=f"{', '.join(what)}, which .venv lacks",
            or_else=", or set PYTHON= to an interpreter that has them; `scripts/fap.py env --groups "
            "torch,build` is enough for a wheel",
        )


def ensure(root: Path, venv: Path, groups: list[str]) -> str:
    """Make ``venv`` match ``root``/pyproject.toml; returns one line that says what was done."""
    python, stamp = venv_python(venv), _stamp(venv)
    base = base_interpreter(venv, stamp.get("base", ""))
    key = content_hash(root, base, groups)
    if stamp.get("hash") == key and _runs(python):
        return f".venv is up to date: Python {stamp['python']}, torch {stamp['torch']}"

    facts = about(base)
    shared = has_usable_torch(facts["torch"])
    if why := _why_anew(venv, base, stamp.get("base", "")):
        if venv.exists():
            print(f".venv is made anew, and its packages are installed again: {why}", flush=True)
        create(venv, base, shared)
        if shared and not has_usable_torch(about(python)["torch"]):
            share_packages(venv, base)
    _write_stamp(venv, base=str(base))  # no hash: until the end the environment counts as half made
    # A shared torch keeps its version, which fits the driver and the compiler of that machine.
    leave = ("torch",) if shared and has_usable_torch(about(python)["torch"]) else ()
    asked = dependencies(root / "pyproject.toml")
    install_missing(python, root / LOCK, [line for group in groups for line in asked[group]], leave)
    have = about(python)
    version, torch = ".".join(map(str, have["python"])), have["torch"] or "absent"
    _write_stamp(venv, base=str(base), hash=key, python=version, torch=torch)
    source = f", shared with {base}" if shared else ""
    return f".venv is ready: Python {version}, torch {torch}{source}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--groups",
        default=",".join(GROUPS),
        help="optional dependencies of pyproject.toml (default: %(default)s)",
    )


def main(project: Project, args: argparse.Namespace) -> int:
    groups = args.groups.split(",")
    if unknown := sorted(set(groups) - set(GROUPS)):
        raise UsageError(
            f"--groups {','.join(unknown)} is not in pyproject.toml", f"choose from {','.join(GROUPS)}"
        )
    print(ensure(project.root, project.venv, groups))
    return 0
