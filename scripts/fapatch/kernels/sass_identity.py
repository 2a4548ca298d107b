"""Compare the machine code of upstream's own kernels, pristine against patched: with softmax on, nothing may
change.

Upstream's .cu files are compiled in both trees with the flags of the wheel's build, and the encodings of each
kernel are compared by mangled name, word for word. A patch that takes a fix over from a later upstream
release (Upstream-Status: Backport) is on both sides.

Without options six files are compared: head dimension 32 in fp16. HEAD_DIMS, DTYPES and PASSES choose others,
FULL=1 means all 72, ARCHS works as for the wheel. Object files are kept in build/sass-identity, and the next
run compiles only what has changed. Exit code 0 if all kernels are identical, 1 if one differs or none was
found.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ninja.ninja_syntax import Writer

from .. import workers
from ..base import env, git
from ..base.errors import FapError
from ..base.process import CommandFailed, run
from ..base.project import Project
from ..series import apply, series, state
from ..series.series import Patch
from ..source import fetch
from ..wheel import build_copy, build_progress, cuda_toolkit, wheel
from ..wheel.cuda_toolkit import Toolkit, Torch

EXCLUSIVE = True
NEEDS_EXTENSION = True
SIDES = ("pristine", "patched")
CHOICES = ("HEAD_DIMS", "DTYPES", "PASSES")
SMALL_SET = {"HEAD_DIMS": "32", "DTYPES": "fp16"}
# The kernels include torch's CUDA headers. A torch without CUDA has all of them but this one, which says how
# torch's library was linked.
GENERATED_HEADER = "c10/cuda/impl/cuda_cmake_macros.h"
NEEDED_HEADER = "ATen/cuda/PhiloxCudaState.h"

ARCH = re.compile(r"^\s*arch = (\S+)")
FUNCTION = re.compile(r"^\s*Function : (\S+)")
ENCODING = re.compile(r"/\* (0x[0-9a-f]{16}) \*/")

Kernels = dict[tuple[str, str], tuple[str, ...]]


def parse_listing(listing: str) -> Kernels:
    """Read a `cuobjdump -sass` listing: (architecture, mangled name) -> encodings, 64-bit words in
    hexadecimal.

    The listing itself cannot be compared: its columns depend on the longest name.
    """
    kernels: dict[tuple[str, str], list[str]] = {}
    arch = ""
    words: list[str] = []
    for line in listing.splitlines():
        if match := ARCH.match(line):
            arch = match[1]
        elif match := FUNCTION.match(line):
            words = kernels.setdefault((arch, match[1]), [])
        else:
            words += ENCODING.findall(line)
    return {key: tuple(encodings) for key, encodings in kernels.items()}


@dataclass(frozen=True)
class Comparison:
    """The kernels of one file: their number, and (architecture, name, words before, words after) of each that
    differs.
    """

    kernels: int
    different: tuple[tuple[str, str, int, int], ...]

    @classmethod
    def of(cls, pristine: Kernels, patched: Kernels) -> Comparison:
        """Compare both sides. A kernel that only one side has counts as different, with 0 words on the other
        side.
        """
        names = sorted(pristine.keys() | patched.keys())
        different = (name for name in names if pristine.get(name) != patched.get(name))
        return cls(
            len(names),
            tuple((*name, len(pristine.get(name, ())), len(patched.get(name, ()))) for name in different),
        )


def backports(project: Project) -> tuple[Patch, ...]:
    """The patches of the series that backport a fix from a later upstream release than the project's."""
    return tuple(
        patch
        for patch in series.load(project)
        if patch.is_backport and patch.applies_to(project.release.version)
    )


@dataclass(frozen=True)
class Extension:
    """What upstream's setup.py would compile. ``sources`` are relative to its folder; ``include_dirs`` are
    absolute.
    """

    sources: tuple[str, ...]
    include_dirs: tuple[str, ...]
    nvcc_flags: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path, python: Path, toolkit: Toolkit, variables: Mapping[str, str]) -> Extension:
        """Read it from setup.py in ``folder``. Raises FapError with the last line of its error, such as an
        option with an unknown value.
        """
        script = workers.HERE / "setup_extension.py"
        try:
            said = json.loads(run(python, "-I", script, toolkit.home, cwd=folder, env=variables).stdout)
        except CommandFailed as e:
            raise FapError(
                f"upstream's setup.py failed: {e.stderr.decode('utf-8', 'replace').strip().splitlines()[-1]}",
                "correct that option; `fap.py sass-identity --help` lists them",
            ) from e
        return cls(**{name: tuple(items) for name, items in said.items()})


@dataclass(frozen=True)
class Workshop:
    """A folder that holds both trees, the CUTLASS headers that they share, and the object files of earlier
    runs.
    """

    folder: Path

    def tree(self, side: str) -> Path:
        return self.folder / side

    def object(self, side: str, source: str) -> Path:
        return self.folder / "objects" / side / f"{Path(source).stem}.fatbin"

    def lay_out(self, project: Project, pristine: str, patched: str) -> None:
        """Check out two git trees. Unchanged files keep their time stamps, by which ninja decides what to
        compile.
        """
        for side, tree in zip(SIDES, (pristine, patched)):
            folder = self.tree(side)
            folder.mkdir(parents=True, exist_ok=True)
            index = {"GIT_INDEX_FILE": str(self.folder / f"{side}.index")}
            command = (f"--work-tree={folder}", "read-tree", "--reset", "-u", tree)
            git.git(*command, repo=project.store, cwd=folder, env=index)
            cutlass = folder / project.family.cutlass_submodule
            if not cutlass.is_symlink():
                cutlass.symlink_to(os.path.relpath(self.folder / "cutlass", cutlass.parent))
        fetch.export_cutlass(project, self.folder / "cutlass")

    def include_dirs(self, extension: Extension, side: str) -> list[str]:
        """The include folders of ``extension``, which name the patched tree, moved to the tree of
        ``side``.
        """
        patched, folder = self.tree("patched"), self.tree(side)
        own = [
            folder / Path(path).relative_to(patched) if Path(path).is_relative_to(patched) else path
            for path in extension.include_dirs
        ]
        return [*map(str, own), *self._stand_in(extension)]

    def _stand_in(self, extension: Extension) -> list[str]:
        folders = [Path(path) for path in extension.include_dirs]
        if not any((folder / NEEDED_HEADER).is_file() for folder in folders):
            raise FapError(
                f"the torch of .venv has no {NEEDED_HEADER}",
                "make env PYTHON= with an interpreter whose torch has CUDA",
            )
        if any((folder / GENERATED_HEADER).is_file() for folder in folders):
            return []
        target = self.folder / "torch-headers" / GENERATED_HEADER
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("#pragma once\n")
        return [str(self.folder / "torch-headers")]

    def compile(
        self, sources: Sequence[str], extension: Extension, toolkit: Toolkit, variables: Mapping[str, str]
    ) -> None:
        """Bring the objects of ``sources`` up to date on both sides. Raises FapError that names the log.

        Only the device code is compiled, to the fatbin that nvcc would embed in the object file of the wheel.
        """
        log = self.folder / "log"
        with (self.folder / "build.ninja").open("w", encoding="utf-8") as file:
            ninja = Writer(file, width=10000)
            nvcc = shlex.join([str(toolkit.nvcc), *extension.nvcc_flags])
            ninja.rule(
                "fatbin",
                f"{nvcc} $include -MD -MF $out.d -fatbin $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="$out",
            )
            for side in SIDES:
                include = shlex.join(f"-I{path}" for path in self.include_dirs(extension, side))
                for source in sources:
                    ninja.build(
                        str(self.object(side, source)),
                        "fatbin",
                        str(self.tree(side) / source),
                        variables={"include": include},
                    )
        try:
            with log.open("wb") as file:
                run(
                    sys.executable,
                    "-m",
                    "ninja",
                    "-C",
                    self.folder,
                    "-j",
                    variables["MAX_JOBS"],
                    env=variables,
                    on_line=build_progress.Progress(file, afterwards="comparing"),
                )
        except CommandFailed as e:
            print(build_progress.errors_in(log), flush=True)
            raise FapError("nvcc failed", f"the whole output is in {log}; what was compiled is kept") from e

    def compare(self, source: str, cuobjdump: Path) -> Comparison:
        """Compare the kernels of one source, from the objects of both sides."""
        hint = "`make toolchain` installs cuobjdump and nvdisasm"
        listings = (
            run(cuobjdump, "-sass", self.object(side, source), hint=hint).stdout.decode() for side in SIDES
        )
        return Comparison.of(*map(parse_listing, listings))


def find_cuobjdump(venv: Path, torch: Torch, toolkit: Toolkit) -> Path:
    found = cuda_toolkit.find_program("cuobjdump", venv, torch, toolkit)
    if found is None:
        raise FapError(
            f"{toolkit.home} has no cuobjdump, which reads the machine code, and neither .venv nor PATH has "
            "one",
            "`make toolchain` installs it, and so does `.venv/bin/pip install nvidia-cuda-cuobjdump "
            "nvidia-cuda-nvdisasm`",
        )
    return found


def options(environ: Mapping[str, str], full: bool) -> dict[str, str]:
    """The build options that choose the kernels: those of ``environ``, else the small set unless ``full``."""
    asked = {name: environ[name] for name in CHOICES if environ.get(name)}
    return asked or ({} if full else SMALL_SET)


def report(workshop: Workshop, sources: Sequence[str], cuobjdump: Path) -> bool:
    """Print a line for each file and each different kernel, and the sums. Returns whether there are kernels
    and all are identical.
    """
    kernels = different = 0
    for source in sources:
        found = workshop.compare(source, cuobjdump)
        verdict = f"{len(found.different)} different" if found.different else "identical"
        print(f"{Path(source).name:<42} {found.kernels:3} kernels  {verdict}", flush=True)
        for arch, name, before, after in found.different:
            print(f"  different: {arch} {name}: {before} -> {after} words")
        kernels += found.kernels
        different += len(found.different)
    print(f"files {len(sources)}, kernels {kernels}, identical {kernels - different}, different {different}")
    return kernels > 0 and not different


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--full",
        action="store_true",
        default=os.environ.get("FULL") == "1",
        help="compare every upstream file (FULL=1)",
    )


def main(project: Project, args: argparse.Namespace) -> int:
    python = env.venv_python(project.venv)
    if not python.exists():
        raise FapError(".venv is missing", "make env")
    torch = Torch.of(python)
    toolkit = cuda_toolkit.find(project.venv, torch).require(
        "make sass-identity", f"{wheel.TOOLCHAIN_HINT}; or set CUDA_HOME"
    )
    cuobjdump = find_cuobjdump(project.venv, torch, toolkit)
    patched = build_copy.verified(project, apply.ensure(project)).tree
    both = backports(project)
    for patch in both:
        print(f"on both sides: {patch.name}, a backport from a later upstream release")
    workshop = Workshop(project.build / "sass-identity" / project.family.name / project.release.version)
    workshop.lay_out(
        project,
        git.tree_with(state.read(project).base_tree, (patch.data for patch in both), repo=project.store),
        patched,
    )
    variables = {
        **wheel.build_environment(project, "cuda"),
        **cuda_toolkit.build_environment(toolkit, torch.packages),
        **dict.fromkeys((*CHOICES, "NO_SOFTMAX_ONLY"), ""),
        **options(os.environ, args.full),
    }
    extension = Extension.of(workshop.tree("patched"), python, toolkit, variables)
    sources = [
        source
        for source in extension.sources
        if source.endswith(".cu") and (workshop.tree("pristine") / source).is_file()
    ]
    print(
        f"comparing {len(sources)} files of upstream's {project.release.version}, compiled by "
        f"{toolkit.nvcc} ({toolkit.origin}), {variables['MAX_JOBS']} compilers at once (MAX_JOBS=)",
        flush=True,
    )
    workshop.compile(sources, extension, toolkit, variables)
    return 0 if report(workshop, sources, cuobjdump) else 1
