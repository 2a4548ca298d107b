"""Test that compilers accept the hooks in upstream's C++, on every machine: nvcc's front end parses the
kernels without generating code, and g++ parses the extension's interface.

A template is parsed at its definition, which finds syntax errors and undeclared names in seconds. Errors that
depend on the template's arguments are left to the tests that compile kernels.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import generate_nosoftmax_kernels
import kernel_build
import pytest
import torch

from fapatch.base.errors import FapError
from fapatch.base.process import run
from fapatch.base.project import Project
from fapatch.source import fetch

pytestmark = [pytest.mark.source, pytest.mark.slow]
REAL = Project.open(family="flash-attn", version="")
SRC = Path("csrc/flash_attn/src")
# The extension's standard: C++20 would accept an undeclared f<T>(x), to be looked up by its argument.
STANDARD = kernel_build.language_standard(["-std=c++17"], torch.__version__)


@dataclass(frozen=True)
class Reader:
    """The compilers, and a folder with the patched tree, CUTLASS and headers that replace torch's."""

    nvcc: Path
    folder: Path

    @property
    def headers(self) -> list[str]:
        own = [self.folder / SRC, self.folder / SRC.parent, self.folder / "cutlass" / "include"]
        of_torch = Path(torch.__file__).parent / "include"
        folders = [*own, of_torch, of_torch / "torch" / "csrc" / "api" / "include", self.folder / "stand-in"]
        return [f"-I{folder}" for folder in folders]

    def kernels(self) -> None:
        """Parse all kernels. Raises FapError with the errors."""
        written = generate_nosoftmax_kernels.write(
            self.folder / "kernels", kernel_build.PASSES, ["64"], ["fp16"]
        )
        source = self.folder / "kernels.cu"
        source.write_text("".join(f'#include "{path}"\n' for path in [*written, *kernel_build.OWN_FILES]))
        # Replaces torch's header, which includes all of ATen and takes longer to parse than the kernels.
        generator = self.folder / "brief" / "ATen" / "cuda" / "CUDAGeneratorImpl.h"
        generator.parent.mkdir(parents=True, exist_ok=True)
        generator.write_text("#pragma once\n#include <ATen/cuda/PhiloxCudaState.h>\n")
        options = [*STANDARD, "-arch=sm_90", "--expt-relaxed-constexpr", "--expt-extended-lambda"]
        options += [f"-I{self.folder / 'brief'}", *self.headers]
        says = run(self.nvcc, "--dryrun", "-cuda", *options, source, env={"TMPDIR": str(self.folder)})
        for command in front_end(says.stderr.decode()):
            self.read(*command)

    def interface(self) -> None:
        """Parse flash_api.cpp. Raises FapError with the errors."""
        include = [self.nvcc.parents[1] / "include", sysconfig.get_path("include")]
        defined = ["-DTORCH_EXTENSION_NAME=flash_attn_2_cuda", *kernel_build.KernelSubset().macros()]
        self.read(
            "g++", *STANDARD, "-fsyntax-only", "-w", *defined, *self.headers, *(f"-I{i}" for i in include),
            self.folder / "csrc" / "flash_attn" / "flash_api.cpp",
        )  # fmt: skip

    def read(self, *command: str | Path) -> None:
        path = os.pathsep.join([str(self.nvcc.parent), os.environ["PATH"]])
        done = run(*command, cwd=self.folder, env={"PATH": path}, check=False)
        if done.returncode:
            said = (done.stderr + done.stdout).decode("utf-8", "replace")
            raise FapError("\n".join(line for line in said.splitlines() if "error" in line) or said)


def front_end(dryrun: str) -> Iterator[list[str]]:
    """Pick two of the commands that nvcc would start: the preprocessor of the host's pass, and cudafe++,
    which reads its output.
    """
    lines = [line.removeprefix("#$ ") for line in dryrun.splitlines()]
    yield shlex.split(next(line for line in lines if " -E " in line))
    yield shlex.split(next(line for line in lines if line.startswith("cudafe++ ")))


@pytest.fixture(scope="module")
def reader(make, tmp_path_factory) -> Reader:
    """A Reader of the release that the series is written for, in a copy that a test may change."""
    nvcc = next((n for path in sys.path for n in Path(path).glob("nvidia/*/bin/nvcc")), None)
    if nvcc is None or shutil.which("g++") is None:
        pytest.skip("needs g++, and the package cuda-toolkit[nvcc] of CUDA 13 or newer")
    made = make(REAL.family.default)
    folder = tmp_path_factory.mktemp("hooks")
    shutil.copytree(made.built.folder / "csrc", folder / "csrc")
    fetch.export_cutlass(made.project, folder / "cutlass")
    # A torch without CUDA lacks only this header, which says how its library was linked.
    macros = folder / "stand-in" / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    macros.parent.mkdir(parents=True)
    macros.write_text("#pragma once\n")
    return Reader(nvcc, folder)


def test_the_kernels_are_well_formed(reader):
    reader.kernels()


def test_the_interface_is_well_formed(reader):
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("needs the headers of Python (python3-dev)")
    reader.interface()


FAULTS = [
    ("flash_fwd_kernel.h", "kUseSoftmax<Kernel_traits>", "kNoSuchName<Kernel_traits>", "kNoSuchName"),
    ("flash_bwd_kernel.h", "&& kUseSoftmax<", "&& (kUseSoftmax<", "expected a"),
    ("rotary.h", "saturate<T>(", "no_such_name<T>(", "no_such_name"),
]


@pytest.fixture(scope="module")
def errors(reader) -> str:
    """The errors of the front end about all faults at once, which it reads as fast as one."""
    before = {file: (reader.folder / SRC / file).read_text() for file, *_ in FAULTS}
    try:
        for file, hook, fault, _ in FAULTS:
            assert hook in before[file]
            (reader.folder / SRC / file).write_text(before[file].replace(hook, fault, 1))
        with pytest.raises(FapError) as raised:
            reader.kernels()
    finally:
        for file, text in before.items():
            (reader.folder / SRC / file).write_text(text)
    return str(raised.value)


@pytest.mark.parametrize("file, error", [(file, error) for file, *_, error in FAULTS])
def test_a_fault_in_a_hook_is_found(errors, file, error):
    assert re.search(rf"{file}.*error.*{error}", errors), errors


def test_the_host_does_not_ask_traits_for_the_dtype(reader):
    """There Kernel_traits::Element is half_t for every kernel: a launch takes the dtype from its own template
    arguments.
    """
    launches = (reader.folder / SRC / "flash_nosoftmax_launch_template.h").read_text(encoding="utf-8")
    code = "\n".join(line.partition("//")[0] for line in launches.splitlines())
    asked = re.findall(r"\w*(?:raits\w*)::Element\b|\bkScaleAtEnd\b", code)
    assert "own_slopes_at_end<T," in code and asked == []
