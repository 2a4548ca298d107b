"""Test that with softmax on, the machine code of upstream's kernels is that of pristine upstream, for a few
kernels compiled on both sides.

`make sass-identity` compares whole files. This test instantiates one kernel of each kind, which takes a
minute or two.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fapatch.base import git
from fapatch.base.errors import FapError
from fapatch.base.project import Project
from fapatch.kernels import sass_identity
from fapatch.kernels.sass_identity import Comparison, Extension, Workshop
from fapatch.wheel import cuda_toolkit, wheel
from fapatch.wheel.cuda_toolkit import Toolkit, Torch

pytestmark = pytest.mark.source
REAL = Project.open(family="flash-attn", version="")
VERSIONS = [release.version for release in REAL.family.releases]
SRC = "csrc/flash_attn/src"
# Each argument after the traits switches a feature; `true` stands for even sizes.
ATTENTION = """
template __global__ void flash_fwd_kernel<Fwd, false, false, false, false, true, true, false, false>(
    KERNEL_PARAM_MODIFIER const Flash_fwd_params);
template __global__ void flash_fwd_splitkv_kernel<Split, false, false, false, true, true, false, /*Split=*/true, false>(
    KERNEL_PARAM_MODIFIER const Flash_fwd_params);
template __global__ void flash_fwd_splitkv_kernel<Split, true, false, false, false, true, false, true, /*Append_KV=*/true>(
    KERNEL_PARAM_MODIFIER const Flash_fwd_params);
template __global__ void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Bwd, false, false, false, false, true, true, false>(
    KERNEL_PARAM_MODIFIER const Flash_bwd_params);
"""  # noqa: E501
COMBINE = """
template __global__ void flash_fwd_splitkv_combine_kernel<Split, /*kBlockM=*/16, /*Log_max_splits=*/1, /*Is_even_K=*/true>(
    KERNEL_PARAM_MODIFIER const Flash_fwd_params);
"""  # noqa: E501
PROGRAM = """
#include "flash_fwd_launch_template.h"
#include "flash_bwd_launch_template.h"

namespace FLASH_NAMESPACE {{
// What the launches copy to the GPU: the parameters of the calls without softmax lie in what was padding.
static_assert(sizeof(Flash_fwd_params) == 472 && sizeof(Flash_bwd_params) == 648);
// Small tiles, which compile in half of the time: what is compared is the code, not upstream's choice of tiles.
using Fwd = Flash_fwd_kernel_traits<32, 64, 32, 4, false, false, cutlass::half_t>;
using Split = Flash_fwd_kernel_traits<32, 64, 32, 4, false, false, cutlass::half_t>;
using Bwd = Flash_bwd_kernel_traits<32, 64, 64, 8, 4, 4, 4, true, false, cutlass::half_t>;
{kernels}
}}
"""  # noqa: E501
# Replaces torch's header, which includes all of ATen: parsing it would take longer than compiling the
# kernels.
GENERATOR_HEADER = "#pragma once\n#include <ATen/cuda/PhiloxCudaState.h>\n"


def pristine_tree(made, patches) -> str:
    return git.tree_with(made.base.tree, (patch.data for patch in patches), repo=made.project.store)


@pytest.fixture(scope="module")
def tools() -> tuple[Toolkit, Path]:
    """nvcc and cuobjdump; skips the test if one is missing, with the message of `make sass-identity`."""
    torch = Torch.of(Path(sys.executable))
    try:
        toolkit = cuda_toolkit.find(REAL.venv, torch).require("this test", "make toolchain")
        return toolkit, sass_identity.find_cuobjdump(REAL.venv, torch, toolkit)
    except FapError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def workshop(make, tmp_path_factory) -> Workshop:
    """Both trees of the release that the series is written for."""
    made = make(REAL.family.default)
    shop = Workshop(tmp_path_factory.mktemp("sass"))
    pristine = pristine_tree(made, sass_identity.backports(made.project))
    shop.lay_out(made.project, pristine, made.built.tree)
    return shop


@pytest.fixture(scope="module")
def compare(tools: tuple[Toolkit, Path], workshop: Workshop):
    """Return a function (name, kernels) -> Comparison of a file with these instantiations, added to both
    trees and compiled with the wheel's flags.
    """
    toolkit, cuobjdump = tools
    variables = {
        **wheel.build_environment(REAL, "cuda"),
        "ARCHS": "90",
        "MAX_JOBS": str(min(2, len(os.sched_getaffinity(0)))),
    }
    stand_in = workshop.folder / "stand-in"
    (stand_in / "ATen" / "cuda").mkdir(parents=True)
    (stand_in / "ATen" / "cuda" / "CUDAGeneratorImpl.h").write_text(GENERATOR_HEADER)
    asked = Extension.of(workshop.tree("patched"), Path(sys.executable), toolkit, variables)
    extension = replace(asked, include_dirs=(str(stand_in), *asked.include_dirs))

    def compared(name: str, kernels: str) -> Comparison:
        source = f"{SRC}/{name}.cu"
        for side in sass_identity.SIDES:
            path = workshop.tree(side) / source
            if not path.is_file():
                path.write_text(PROGRAM.format(kernels=kernels))
        workshop.compile([source], extension, toolkit, variables)
        return workshop.compare(source, cuobjdump)

    return compared


def test_kernels_with_softmax_are_those_of_upstream(compare):
    assert compare("attention", ATTENTION) == Comparison(kernels=4, different=())


def test_a_changed_header_is_noticed(compare, workshop):
    """The comparison can fail, and a changed header is compiled again. The smallest kernel shows it."""
    assert compare("combine", COMBINE) == Comparison(kernels=1, different=())
    path = workshop.tree("patched") / SRC / "flash_fwd_kernel.h"
    before = path.read_text()
    # This statement adds up the sums of the splits.
    changed = before.replace("expf(lse_accum(0) - lse_max)", "expf(lse_accum(0) - 2.0f * lse_max)")
    assert changed != before
    path.write_text(changed)
    try:
        found = compare("combine", COMBINE)
    finally:
        path.write_text(before)
    ((arch, name, *words),) = found.different
    assert (
        found.kernels == 1
        and arch == "sm_90"
        and "flash_fwd_splitkv_combine_kernel" in name
        and min(words) > 0
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_backports_are_on_both_sides_and_nothing_else_is(make, version):
    made = make(version)
    found = sass_identity.backports(made.project)
    marked = [p.name for p in made.applied if "Backport" in p.header.fields["Upstream-Status"]]
    assert [p.name for p in found] == marked
    tree = pristine_tree(made, found)
    assert (tree == made.base.tree) == (not found)
    assert tree != made.built.tree


def test_a_fix_that_upstream_has_by_now_is_no_backport(make):
    older, newer = (
        {patch.name for patch in sass_identity.backports(make(v).project)}
        for v in ("2.8.3.post1", "2.8.3.post2")
    )
    assert older - newer == {"bwd-int64-dq-accum-offsets.patch"}
