"""Install the compiler of the family's kernels from the Python package index into .venv.

For a family that is Python alone, it installs the packages that the family's wheel requires. For the others
it installs the CUDA compiler, for a torch with CUDA on a machine without nvcc.

The CUDA packages have torch's own CUDA version: compiler, headers, runtime library, and cuobjdump for `make
sass-identity`. Their hashes are those of requirements.lock where it has that CUDA version. They go into
.venv/cuda-toolchain, a CUDA_HOME with all its parts, and torch's packages stay as they are. `make wheel`
finds it there. The second run does nothing and says so.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from ..base import env
from ..base.errors import FapError
from ..base.pip import pip
from ..base.process import CommandFailed, run
from ..base.project import Project
from ..series import apply
from ..wheel import cuda_toolkit
from ..wheel.cuda_toolkit import Torch

EXCLUSIVE = True
STAMP = "requirements.txt"  # lists the requirements that the folder was made from
# Earlier packages hold ptxas, but neither nvcc nor cudafe++.
FIRST_CUDA_WITH_NVCC = 13
# The packages below, and what they need.
PARTS = (
    "cuda-toolkit", "nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime",
    "nvidia-cuda-cccl", "nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm",
)  # fmt: skip
PROGRAM = """
#include <cuda_fp16.h>
#include <cuda/std/array>
__global__ void twice(__half *x) { x[threadIdx.x] *= __half(2); }
extern "C" void run(__half *x) { twice<<<1, 1>>>(x); }
"""


def requirements(cuda: str | None) -> list[str]:
    """List the packages for a torch that was built with ``cuda``, such as "13.0". NVIDIA's cuda-toolkit pins
    the version of each part.

    Raises FapError for a torch without CUDA, and for a CUDA version whose nvcc is not on the package index.
    """
    if not cuda:
        raise FapError(
            ".venv has a torch without CUDA, and the compiler must be of torch's CUDA version",
            "make env PYTHON= with an interpreter whose torch has CUDA, then make toolchain",
        )
    release = ".".join(cuda.split(".")[:2])
    major = release.split(".")[0]
    if int(major) < FIRST_CUDA_WITH_NVCC:
        raise FapError(
            f"the Python package index has no nvcc for CUDA {cuda}, which torch was built with (CUDA 13.0 is "
            "the first)",
            f"install the CUDA {release} toolkit and set CUDA_HOME, or make .venv from a torch with CUDA 13 "
            "or newer (PYTHON=)",
        )
    # Any disassembler of the same major version will do: it reads the code of older compilers, and its
    # packages began later.
    return [
        f"cuda-toolkit[cccl,nvcc]=={release}.*",
        f"nvidia-cuda-cuobjdump=={major}.*",
        f"nvidia-cuda-nvdisasm=={major}.*",
    ]


def _link(path: Path, target: str) -> None:
    if not path.exists():
        path.symlink_to(target)


def complete(home: Path) -> None:
    """Add the two names that a linker looks for: the packages lack them, other forms of the toolkit have
    them.
    """
    _link(home / "lib64", "lib")
    for library in (home / "lib").glob("libcudart.so.*"):
        _link(home / "lib" / "libcudart.so", library.name)


def check(home: Path) -> None:
    """Compile and link a kernel. Raises FapError with the compiler's own words."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "twice.cu"
        source.write_text(PROGRAM)
        try:
            options = ("-shared", "-Xcompiler", "-fPIC", "-cudart", "shared")
            run(home / "bin" / "nvcc", *options, "-o", source.with_suffix(".so"), source)
        except CommandFailed as e:
            said = (e.stderr or e.stdout).decode("utf-8", "replace").strip()
            raise FapError(
                f"the compiler was installed and cannot compile a kernel: {said}",
                "nvcc needs a C++ compiler: install g++, then make toolchain",
            ) from e


def locked(lock: Path, cuda: str) -> list[str]:
    """Return the entries of ``lock`` for PARTS, or none if its cuda-toolkit is of another CUDA version."""
    listed = {env.canonical(entry): entry for entry in env.entries(lock.read_text(encoding="utf-8"))}
    release = ".".join(cuda.split(".")[:2])
    if not listed.get("cuda-toolkit", "").startswith(f"cuda-toolkit=={release}."):
        return []
    return [listed[name] for name in PARTS if name in listed]


def _install(python: Path, wanted: list[str], entries: list[str], folder: Path) -> None:
    if entries:
        env.install_locked(python, entries, wanted, "--target", folder)
        return
    print(f"installing {', '.join(wanted)}, whose hashes {env.LOCK} does not have", flush=True)
    pip(
        python, "install", "--only-binary", ":all:", "--target", folder, *wanted, what=", ".join(wanted)
    )  # fmt: skip


def ensure(venv: Path, torch: Torch, lock: Path) -> str:
    """Make the toolchain of ``venv`` match ``torch``; returns one line that says what was done."""
    wanted = requirements(torch.cuda)
    folder = venv / cuda_toolkit.TOOLCHAIN
    entries = locked(lock, torch.cuda)
    stamp = "".join([*(f"{requirement}\n" for requirement in wanted), *entries])
    home = cuda_toolkit.toolchain_home(venv)
    if home and (folder / STAMP).is_file() and (folder / STAMP).read_text() == stamp:
        return (
            f"{home.relative_to(venv.parent)} is up to date: CUDA {cuda_toolkit.version(home)}. Nothing "
            "to do."
        )
    with tempfile.TemporaryDirectory(dir=venv, prefix=f".{cuda_toolkit.TOOLCHAIN}-") as scratch:
        new = Path(scratch) / cuda_toolkit.TOOLCHAIN
        _install(env.venv_python(venv), wanted, entries, new)
        home = cuda_toolkit.toolchain_home(Path(scratch))
        if home is None:
            raise FapError(
                f"the packages {', '.join(wanted)} brought no nvcc",
                "install the CUDA toolkit and set CUDA_HOME",
            )
        complete(home)
        check(home)
        (new / STAMP).write_text(stamp)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    home = cuda_toolkit.toolchain_home(venv)
    return (
        f"{home.relative_to(venv.parent)} is ready: CUDA {cuda_toolkit.version(home)}; `make wheel` "
        "builds with it"
    )


def ensure_requirements(project: Project, python: Path) -> str:
    """Install from requirements.lock the requirements of the release's wheel, with its extra for torch's CUDA
    version if it has one; returns one line that says what was done.
    """
    asked = env.dependencies(apply.ensure(project) / project.family.folder / "pyproject.toml")
    cuda = (Torch.of(python).cuda or "").partition(".")[0]
    wanted = [*asked[""], *asked.get(f"cu{cuda}", ()), *project.family.undeclared]
    # `make env` has chosen torch.
    did = env.install_missing(python, project.root / env.LOCK, wanted, leave=("torch",))
    name = f"{project.family.package} {project.release.version}"
    return f".venv has all that {name} requires" + ("" if did else ". Nothing to do.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def main(project: Project, args: argparse.Namespace) -> int:
    python = env.venv_python(project.venv)
    if not python.exists():
        raise FapError(".venv is missing", "make env")
    print(
        ensure(project.venv, Torch.of(python), project.root / env.LOCK)
        if project.family.extension
        else ensure_requirements(project, python)
    )
    return 0
