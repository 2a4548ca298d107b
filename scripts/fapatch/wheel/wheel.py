"""Build the wheel from the patched tree, check its contents, install it into .venv, and smoke-test it.

Upstream's own build runs in a copy of the patched tree without a .git folder, in which setup.py would start
`git submodule update`. FLASH_ATTENTION_FORCE_BUILD=TRUE keeps it from downloading upstream's own wheel. The
copy is kept, so that a stopped CUDA build resumes with the objects it has. The second run does nothing and
says why.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ..base import env, files, git
from ..base.errors import FapError, UsageError
from ..base.files import sha256
from ..base.lock import Family
from ..base.pip import pip
from ..base.process import CommandFailed, run
from ..base.project import Project
from ..series import apply
from ..series.state import State
from . import build_copy, build_progress, cuda_toolkit, facts, normal, wheel_check
from .cuda_toolkit import Search, Torch

EXCLUSIVE = True
BACKENDS = ("auto", "cpu", "cuda")
# Variables that choose the kernels of a CUDA build; csrc/flash_attn/kernel_build.py reads them.
CUDA_OPTIONS = ("HEAD_DIMS", "DTYPES", "PASSES", "ARCHS", "NO_SOFTMAX_ONLY", "FLASH_ATTN_CUDA_ARCHS")
# nvcc needs less than this for the largest backward file, one architecture after the other.
BYTES_PER_COMPILER = 5 << 30
FREE_BYTES = {"cpu": 200 << 20, "python": 200 << 20, "cuda": 8 << 30}
TOOLCHAIN_HINT = "`make toolchain` installs it from the Python package index"


@dataclass(frozen=True)
class Inputs:
    """All that a wheel depends on; equal inputs give the same wheel."""

    tree: str
    lock: str
    backend: str
    python: str
    torch: str
    options: str

    def changed_from(self, other: dict) -> list[str]:
        return [name for name, value in asdict(self).items() if other.get(name) != value]


@dataclass(frozen=True)
class Backend:
    """The kernels of a wheel. ``hint``: how to get a faster backend on this machine, or ""."""

    name: str
    reason: str
    hint: str = ""


def choose_backend(asked: str, torch: Torch, nvcc: Search) -> Backend:
    """Choose cpu or cuda.

    Raises UsageError for another name, FapError if cuda was asked for and cannot be built here.
    """
    if asked not in BACKENDS:
        raise UsageError(f"BACKEND={asked} is not known", f"choose one of: {', '.join(BACKENDS)}")
    if asked == "cuda":
        if not torch.cuda:
            raise FapError(
                "BACKEND=cuda needs a torch with CUDA, and .venv has one without",
                "make .venv from an interpreter that has it (PYTHON=), or build with BACKEND=cpu",
            )
        nvcc.require(
            "BACKEND=cuda",
            f"{TOOLCHAIN_HINT}; or set CUDA_HOME to a CUDA {torch.cuda} toolkit, or build with BACKEND=cpu",
        )
    if asked == "auto":
        lacking = [
            what
            for what, there in (("GPU", torch.gpu), ("torch with CUDA", torch.cuda), ("nvcc", nvcc.toolkit))
            if not there
        ]
        found = "; ".join(nvcc.refused) or "no nvcc was found"
        hint = (
            f"for the GPU of this machine the CUDA compiler is missing ({found}): {TOOLCHAIN_HINT}"
            if lacking == ["nvcc"]
            else ""
        )
        return (
            Backend("cpu", f"no {' and no '.join(lacking)} here", hint)
            if lacking
            else Backend("cuda", "GPU and nvcc found")
        )
    return Backend(asked, f"BACKEND={asked}")


def without_extension(family: Family, asked: str) -> Backend:
    """The backend of a family that is Python alone. Raises UsageError if another one was asked for."""
    if asked not in ("auto", "python"):
        raise UsageError(
            f"BACKEND={asked}: {family.name} is Python alone, there is nothing to compile",
            "leave BACKEND= out",
        )
    return Backend("python", "its kernels are compiled when they are called")


def max_jobs(cores: int, free_bytes: int) -> int:
    """The number of compilers to run at once: one a core, as far as memory allows (upstream's own rule leaves
    half of the cores idle).
    """
    return max(1, min(cores, free_bytes // BYTES_PER_COMPILER))


def build_environment(project: Project, backend: str) -> dict[str, str]:
    """The variables that upstream's builds read; MAX_JOBS and NVCC_THREADS from the caller's
    environment win.
    """
    jobs = max_jobs(len(os.sched_getaffinity(0)), psutil.virtual_memory().available)
    label = project.family.wheel_label(backend)
    return {
        "MAX_JOBS": os.environ.get("MAX_JOBS") or str(jobs),
        "NVCC_THREADS": os.environ.get("NVCC_THREADS") or "1",
        "FLASH_ATTENTION_FORCE_BUILD": "TRUE",
        "FLASH_ATTN_LOCAL_VERSION": label,
        "FLASH_ATTENTION_SKIP_CUDA_BUILD": "FALSE" if backend == "cuda" else "TRUE",
        "FLASH_ATTENTION_TRITON_AMD_ENABLE": "FALSE",
        # setuptools-scm has no git to ask
        "SETUPTOOLS_SCM_PRETEND_VERSION": f"{project.release.version}+{label}",
        "PYTHONPATH": "",  # the build sees .venv alone
        "SOURCE_DATE_EPOCH": git.FIXED_DATE.split()[0],  # equal inputs, equal bytes
    }


def _state_file(project: Project) -> Path:
    return project.wheel_dir.parent / f"{project.release.version}.json"


def _read_state(project: Project) -> dict:
    try:
        return json.loads(_state_file(project).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def up_to_date(project: Project, inputs: Inputs, state: dict) -> tuple[Path | None, str]:
    """Return (the wheel, "") if ``state`` describes an intact wheel made from ``inputs``, else (None, the
    reason).
    """
    if not state:
        return None, "no wheel was built yet"
    if changed := inputs.changed_from(state["inputs"]):
        return None, "changed since the last wheel: " + ", ".join(changed)
    path = project.dist / state["wheel"]
    if not path.is_file():
        return None, f"{path.relative_to(project.root)} is gone"
    if sha256(path) != state["sha256"]:
        return None, f"{path.relative_to(project.root)} is not the file that was built"
    return path, ""


def build(
    project: Project, backend: str, python: Path, made: State, env: Mapping[str, str] | None = None
) -> Path:
    """Build the tree that ``made`` describes with upstream's own build. ``env`` is added to the variables of
    ``build_environment``.

    Returns the checked wheel in dist/. Raises FapError, which names the log, leaving dist/ as it was.
    """
    project.wheel_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(project.wheel_dir).free
    if free < FREE_BYTES[backend]:
        raise FapError(
            f"{free >> 20} MiB are free in {project.build}, a {backend} build needs "
            f"{FREE_BYTES[backend] >> 20}",
            "free some space, or move the checkout; what was built so far is kept",
        )
    build_copy.sync(project, made.tree, with_cutlass=backend == "cuda")
    fresh = project.wheel_dir / "fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    log = project.wheel_dir.parent / f"{project.release.version}.log"
    environment = {**build_environment(project, backend), **(env or {})}
    if backend == "cuda":
        print(
            f"{environment['MAX_JOBS']} compilers at once (MAX_JOBS=); a build that is stopped goes on where "
            "it was",
            flush=True,
        )
    options = ("--wheel", "--no-isolation", "--skip-dependency-check", "--outdir", fresh)
    command = (python, "-m", "build", *options, project.setup_dir)
    try:
        with log.open("wb") as file:
            run(*command, cwd=project.wheel_dir, env=environment, on_line=build_progress.Progress(file))
    except CommandFailed as e:
        print(build_progress.errors_in(log), flush=True)
        raise FapError(
            f"upstream's build failed: exit code {e.returncode}",
            f"the whole output is in {log.relative_to(project.root)}; what was compiled is kept",
        ) from e
    (built,) = fresh.glob("*.whl")
    normal.rewrite(built, {facts.NAME: facts.text(facts.of(project, made))})
    wheel_check.check(built, project, backend, project.wheel_dir, made)
    project.dist.mkdir(exist_ok=True)
    target = project.dist / built.name
    os.replace(built, target)
    for old in project.dist.glob(f"{project.family.package}-{project.release.version}+*.whl"):
        if old != target:
            old.unlink()
    return target


def install(python: Path, wheel: Path) -> None:
    """Install the wheel in the environment of ``python``, replacing any other of that package."""
    options = ("--quiet", "--no-index", "--no-deps", "--force-reinstall")
    pip(python, "install", *options, wheel, what=wheel.name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = os.environ.get("BACKEND") or "auto"
    parser.add_argument(
        "--backend", default=default, help="auto, cpu or cuda (default: %(default)s; environment: BACKEND)"
    )


def main(project: Project, args: argparse.Namespace) -> int:
    python = env.venv_python(project.venv)
    if not python.exists():
        raise FapError(".venv is missing", "make env")
    torch = Torch.of(python)
    nvcc = cuda_toolkit.find(project.venv, torch)
    family = project.family
    backend = (
        choose_backend(args.backend, torch, nvcc)
        if family.extension
        else without_extension(family, args.backend)
    )
    if backend.hint:
        print(backend.hint, flush=True)
    made = build_copy.verified(project, apply.ensure(project))
    inputs = Inputs(
        tree=made.tree,
        lock=sha256(project.lock.path),
        backend=backend.name,
        python=torch.python,
        torch=torch.version,
        options=" ".join(f"{name}={os.environ.get(name, '')}" for name in CUDA_OPTIONS)
        if backend.name == "cuda"
        else "",
    )
    state = _read_state(project)
    wheel, why = up_to_date(project, inputs, state)
    if wheel and wheel_check.installed(python, wheel):
        print(
            f"{wheel.relative_to(project.root)} is up to date and installed in .venv: patched tree "
            f"{inputs.tree[:12]}, backend {backend.name}, torch {inputs.torch}. Nothing to do."
        )
        return 0
    if wheel is None:
        print(
            f"building {family.package} {project.release.version}, backend {backend.name} "
            f"({backend.reason}): {why}",
            flush=True,
        )
        variables = {}
        if backend.name == "cuda":
            print(f"compiler: {nvcc.toolkit.nvcc} ({nvcc.toolkit.origin})", flush=True)
            variables = cuda_toolkit.build_environment(nvcc.toolkit, torch.packages)
        wheel = build(project, backend.name, python, made, variables)
        state = {"inputs": asdict(inputs), "wheel": wheel.name, "sha256": sha256(wheel)}
        files.write(_state_file(project), json.dumps(state, indent=1) + "\n")
    install(python, wheel)
    print(f"wheel      {wheel.relative_to(project.root)}  {wheel.stat().st_size / 1e6:.1f} MB")
    print(f"sha256     {state['sha256']}")
    print(f"made from  upstream {project.release.version}, patched tree {inputs.tree[:12]}")
    print("installed  into .venv", flush=True)
    # In a separate process, because a broken extension could crash this one.
    smoke = (python, project.root / "scripts" / "fap.py", "--family", family.name, "smoke")
    return run(*smoke, env={"PYTHONPATH": ""}, check=False, capture=False).returncode
