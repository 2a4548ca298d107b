"""Test the comparison of machine code: encodings by architecture and mangled name, for any columns of the
listing, and the choice of files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fapatch.base.errors import FapError
from fapatch.kernels import sass_identity
from fapatch.kernels.sass_identity import Comparison, Extension, Workshop, parse_listing
from fapatch.wheel.cuda_toolkit import Toolkit, Torch

LISTING = """
Fatbin elf code:
================
arch = sm_90
code version = [1,8]
\tcode for sm_90
\t\tFunction : _Z1fv
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
                                                               /* 0x000fe20000000800 */
\t\tFunction : _Z1gv
        /*0000*/                   EXIT ;                      /* 0x000000000000794d */
                                                               /* 0x000fea0003800000 */
"""
F, G = ("sm_90", "_Z1fv"), ("sm_90", "_Z1gv")


def test_encodings_by_name():
    assert parse_listing(LISTING) == {
        F: ("0x00000a00ff017b82", "0x000fe20000000800"),
        G: ("0x000000000000794d", "0x000fea0003800000"),
    }


def test_columns_do_not_matter_and_a_changed_word_does():
    assert parse_listing(LISTING.replace("      /*", "  /*")) == parse_listing(LISTING)
    assert parse_listing(LISTING.replace("7b82", "7b83")) != parse_listing(LISTING)


def test_differences_are_named_with_their_lengths():
    pristine = parse_listing(LISTING)
    assert Comparison.of(pristine, dict(pristine)) == Comparison(2, ())
    assert Comparison.of(pristine, {**pristine, F: ("0x0",)}) == Comparison(2, ((*F, 2, 1),))


def test_a_kernel_that_one_side_lacks_is_different():
    pristine = parse_listing(LISTING)
    assert Comparison.of(pristine, {F: pristine[F]}) == Comparison(2, ((*G, 2, 0),))
    assert Comparison.of({F: pristine[F]}, pristine) == Comparison(2, ((*G, 0, 2),))


@pytest.mark.parametrize(
    "environ, full, expected",
    [
        ({}, False, sass_identity.SMALL_SET),
        ({}, True, {}),
        ({"HEAD_DIMS": "", "ARCHS": "90"}, False, sass_identity.SMALL_SET),
        ({"HEAD_DIMS": "64"}, False, {"HEAD_DIMS": "64"}),
        ({"PASSES": "bwd"}, True, {"PASSES": "bwd"}),
    ],
)
def test_what_is_compared(environ, full, expected):
    assert sass_identity.options(environ, full) == expected


class Listings(Workshop):
    """Replaces the objects by the kernels on each side of each file."""

    def compare(self, source, cuobjdump):
        pristine = parse_listing(LISTING)
        return Comparison.of(
            *{"same": (pristine, pristine), "other": (pristine, {F: pristine[F]}), "empty": ({}, {})}[
                Path(source).stem
            ]
        )


@pytest.mark.parametrize(
    "sources, good, sums",
    [
        (["a/same.cu", "b/same.cu"], True, "files 2, kernels 4, identical 4, different 0"),
        (["same.cu", "other.cu"], False, "files 2, kernels 4, identical 3, different 1"),
        (["empty.cu"], False, "files 1, kernels 0, identical 0, different 0"),
    ],
)
def test_the_report_fails_where_a_kernel_differs_or_there_is_none(tmp_path, capsys, sources, good, sums):
    assert sass_identity.report(Listings(tmp_path), sources, Path("cuobjdump")) is good
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == sums
    assert ("  different: sm_90 _Z1gv: 2 -> 0 words" in lines) == ("other.cu" in sources)


def test_include_folders_are_those_of_the_side_and_a_torch_without_cuda_gets_its_one_missing_header(tmp_path):
    torch = tmp_path / "torch" / "include"
    (torch / sass_identity.NEEDED_HEADER).parent.mkdir(parents=True)
    extension = Extension((), (str(tmp_path / "patched" / "src"), str(torch)), ())
    with pytest.raises(FapError, match="has no ATen/cuda/PhiloxCudaState.h.*->.*PYTHON="):
        Workshop(tmp_path).include_dirs(extension, "pristine")
    (torch / sass_identity.NEEDED_HEADER).touch()
    *given, made = Workshop(tmp_path).include_dirs(extension, "pristine")
    assert given == [str(tmp_path / "pristine" / "src"), str(torch)]
    assert (Path(made) / sass_identity.GENERATED_HEADER).is_file()
    (torch / sass_identity.GENERATED_HEADER).parent.mkdir(parents=True)
    (torch / sass_identity.GENERATED_HEADER).touch()
    assert Workshop(tmp_path).include_dirs(extension, "patched") == [
        str(tmp_path / "patched" / "src"),
        str(torch),
    ]


def test_without_cuobjdump_the_error_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    torch = Torch(python="3.12.1", version="2.11.0", cuda="13.0", gpu=False, home=None, packages=())
    with pytest.raises(FapError, match="has no cuobjdump.*->.*`make toolchain`.*nvidia-cuda-cuobjdump"):
        sass_identity.find_cuobjdump(tmp_path, torch, Toolkit(tmp_path / "cuda", "CUDA_HOME"))


def test_the_last_words_of_setup_py_are_shown(tmp_path):
    (tmp_path / "setup.py").write_text("raise ValueError(\"HEAD_DIMS='63': 63 is not among 32, 64\")\n")
    with pytest.raises(FapError, match="setup.py failed: ValueError: HEAD_DIMS='63': 63 is not among"):
        Extension.of(tmp_path, Path(sys.executable), Toolkit(tmp_path, "CUDA_HOME"), {})
