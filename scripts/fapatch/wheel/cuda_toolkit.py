"""Find the CUDA toolkit: the folder that a build gets as CUDA_HOME, and the headers that torch's packages
add.

A toolkit can be used if it has both bin/nvcc and include/cuda_runtime.h, and the major version that torch was
built with. The nvcc on the PATH may be a wrapper script in a folder without headers, which torch takes for
the toolkit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base.errors import FapError
from ..base.process import run

USUAL_HOME = Path("/usr/local/cuda")
TOOLCHAIN = "cuda-toolchain"  # inside .venv, made by `make toolchain`
# Headers of libraries that torch's own headers include. A toolkit of the compiler alone lacks them.
LIBRARY_HEADERS = ("cublas_v2.h", "cusolverDn.h", "cusparse.h")
ABOUT = """
import json, platform, sys, torch
from torch.utils.cpp_extension import CUDA_HOME
print(json.dumps({"python": platform.python_version(), "version": torch.__version__,
    "cuda": torch.version.cuda,
                  "gpu": torch.cuda.is_available(), "home": CUDA_HOME, "packages": sys.path}))
"""


@dataclass(frozen=True)
class Torch:
    """The torch of a Python. ``cuda``: the CUDA version it was built with, or None; ``gpu``: whether it can
    use a GPU; ``home``: the toolkit that it would take; ``packages``: the folders that this Python imports
    from.
    """

    python: str
    version: str
    cuda: str | None
    gpu: bool
    home: str | None
    packages: tuple[str, ...]

    @classmethod
    def of(cls, python: Path) -> Torch:
        facts = json.loads(run(python, "-c", ABOUT, hint="make env").stdout)
        return cls(**{**facts, "packages": tuple(facts["packages"])})


@dataclass(frozen=True)
class Toolkit:
    """A toolkit that can be used, and how it was found."""

    home: Path
    origin: str

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"


@dataclass(frozen=True)
class Search:
    """The toolkit that was found, if any, and a sentence for each that was refused before it."""

    toolkit: Toolkit | None
    refused: tuple[str, ...]

    def require(self, what: str, hint: str) -> Toolkit:
        """Return the toolkit. Raises FapError, which says that ``what`` needs one and why each toolkit found
        was refused.
        """
        if self.toolkit is None:
            found = "; ".join(self.refused) or "neither CUDA_HOME nor PATH leads to an nvcc"
            raise FapError(f"{what} needs the CUDA compiler: {found}", hint)
        return self.toolkit


def toolchain_home(venv: Path) -> Path | None:
    """The toolkit that `make toolchain` installed into ``venv``."""
    return next((nvcc.parents[1] for nvcc in (venv / TOOLCHAIN).glob("nvidia/*/bin/nvcc")), None)


def version(home: Path) -> str:
    """Read the CUDA version of a toolkit, such as 13.0, from its headers; "" if they do not say."""
    header = home / "include" / "cuda_runtime_api.h"
    found = (
        re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text(errors="replace"))
        if header.is_file()
        else None
    )
    return f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}" if found else ""


def _candidates(venv: Path, torch: Torch, environ: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    on_path = shutil.which("nvcc", path=environ.get("PATH", ""))
    places = {
        "CUDA_HOME": environ.get("CUDA_HOME") or environ.get("CUDA_PATH"),
        "make toolchain": toolchain_home(venv),
        "torch's guess": torch.home,
        "nvcc on the PATH": on_path and Path(on_path).resolve().parents[1],
        "the usual place": USUAL_HOME if USUAL_HOME.is_dir() else None,
    }
    seen = set()
    for origin, place in places.items():
        if place and str(place) not in seen:
            seen.add(str(place))
            yield origin, Path(place)


def _fault(home: Path, torch: Torch) -> str:
    """Say why a build cannot use the toolkit at ``home``; "" if it can."""
    if not os.access(home / "bin" / "nvcc", os.X_OK):
        return f"{home} has no bin/nvcc"
    if not (home / "include" / "cuda_runtime.h").is_file():
        return f"{home / 'bin' / 'nvcc'} has no headers: {home / 'include' / 'cuda_runtime.h'} is missing"
    found = version(home)
    if torch.cuda and found and found.split(".")[0] != torch.cuda.split(".")[0]:
        return f"{home} is CUDA {found}, and torch was built with CUDA {torch.cuda}"
    return ""


def find(venv: Path, torch: Torch, environ: Mapping[str, str] = os.environ) -> Search:
    """Look for a toolkit in CUDA_HOME, the toolchain in ``venv``, torch's guess, beside the nvcc on the PATH,
    and in the usual place.
    """
    refused = []
    for origin, home in _candidates(venv, torch, environ):
        fault = _fault(home, torch)
        if not fault:
            return Search(Toolkit(home, origin), tuple(refused))
        refused.append(f"{fault} ({origin})")
    return Search(None, tuple(refused))


def build_environment(
    toolkit: Toolkit, packages: Sequence[str], environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The variables for a build with ``toolkit``. Library headers that it lacks come from torch's packages in
    ``packages``. Compilers search CPATH and LIBRARY_PATH last, so the toolkit's own files win.
    """
    lacking = [header for header in LIBRARY_HEADERS if not (toolkit.home / "include" / header).is_file()]
    found = (
        path
        for folder in packages
        for header in lacking
        for path in Path(folder).glob(f"nvidia/*/include/{header}")
    )
    include = list(dict.fromkeys(str(path.parent) for path in found))
    variables = {"CPATH": include, "LIBRARY_PATH": [str(Path(folder).parent / "lib") for folder in include]}
    added = {
        name: os.pathsep.join([*filter(None, [environ.get(name)]), *folders])
        for name, folders in variables.items()
        if folders
    }
    return {"CUDA_HOME": str(toolkit.home), **added}


def find_program(
    name: str, venv: Path, torch: Torch, toolkit: Toolkit | None, environ: Mapping[str, str] = os.environ
) -> Path | None:
    """Find a program of the toolkit such as cuobjdump: in the toolkit, a package of torch's Python (Triton
    has one) or on the PATH.
    """
    home = toolchain_home(venv)
    folders = [known / "bin" for known in (toolkit and toolkit.home, home) if known]
    for folder in map(Path, torch.packages):
        folders += [*folder.glob("nvidia/*/bin"), folder / "triton" / "backends" / "nvidia" / "bin"]
    path = os.pathsep.join([*map(str, folders), environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    return Path(found) if found else None
