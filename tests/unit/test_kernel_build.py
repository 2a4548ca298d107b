"""Test the build options of the CUDA extension: the sources and flags that a build gets."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import kernel_build
import pytest

STOCK = [
    "csrc/flash_attn/flash_api.cpp",
    "csrc/flash_attn/src/flash_fwd_hdim64_bf16_sm80.cu",
    "csrc/flash_attn/src/flash_fwd_hdim64_fp16_causal_sm80.cu",
    "csrc/flash_attn/src/flash_bwd_hdim128_bf16_causal_sm80.cu",
    "csrc/flash_attn/src/flash_fwd_split_hdim64_bf16_sm80.cu",
]


def subset(**options: str):
    return kernel_build.subset_from({"ARCHS": "90", **options})


def kept(**options: str) -> list[str]:
    return [source for source in STOCK if source in subset(**options)]


def test_without_options_every_source_is_built():
    assert kept() == STOCK


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"HEAD_DIMS": "64"}, [0, 1, 2, 4]),
        ({"DTYPES": "bf16"}, [0, 1, 3, 4]),
        ({"PASSES": "fwd"}, [0, 1, 2]),
        ({"PASSES": "bwd,splitkv"}, [0, 3, 4]),
        ({"NO_SOFTMAX_ONLY": "1"}, [0]),
    ],
)
def test_subset_of_sources(options, expected):
    assert kept(**options) == [STOCK[i] for i in expected]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of that of setup.py."""
    monkeypatch.setattr(kernel_build, "ROOT", tmp_path)
    return tmp_path


def configured(sources: list[str], **options: str) -> list[str]:
    """List the files that setup.py compiles, of its `sources` and of ours, after its call of `configure`."""
    extension = SimpleNamespace(sources=sources, extra_compile_args={"cxx": [], "nvcc": []})
    kernel_build.configure(extension, {"ARCHS": "90", **options})
    return extension.sources


def test_own_kernels_follow_the_options(root):
    folder = "build/nosoftmax_kernels"
    shared = [f"csrc/flash_attn/src/{name}" for name in kernel_build.OWN_FILES]
    own = configured(STOCK, HEAD_DIMS="64,128", DTYPES="fp16", PASSES="fwd", NO_SOFTMAX_ONLY="1")
    assert own == [STOCK[0], f"{folder}/fwd_hdim64_fp16.cu", f"{folder}/fwd_hdim128_fp16.cu", *shared]
    everything = configured(STOCK)
    assert everything[: len(STOCK)] == STOCK and everything[-len(shared) :] == shared
    assert len({*everything}) == len(STOCK) + 3 * 6 * 2 + len(shared)
    assert all((root / source).is_file() for source in everything if source.startswith(folder))


def test_each_own_kernel_file_instantiates_what_its_name_says(root):
    found = {path.stem: path.read_text() for path in subset().own_sources() if "build" in path.parts}
    assert len({*found.values()}) == len(found) == 36
    functions = {"fwd": "run_mha_fwd_", "bwd": "run_mha_bwd_", "splitkv": "run_mha_fwd_splitkv_"}
    types = {"fp16": "half_t", "bf16": "bfloat16_t"}
    for name, text in found.items():
        of_pass, head_dim, dtype = name.split("_")
        args = f"cutlass::{types[dtype]}, {head_dim.removeprefix('hdim')}"
        assert f"template void {functions[of_pass]}nosoftmax<{args}>(" in text


def test_a_second_build_writes_what_differs_and_nothing_else(root):
    """ninja decides by time stamps what to compile."""
    kernels = [path for path in subset().own_sources() if path.is_relative_to(root / "build")]
    changed, *untouched = kernels
    text = changed.read_text()
    for path in kernels:
        os.utime(path, (0, 0))
    changed.write_text("another")
    subset().own_sources()
    assert changed.read_text() == text
    assert {path.stat().st_mtime for path in untouched} == {0}


def test_a_kernel_that_no_rule_knows_is_named_and_built(root, capsys):
    new = "csrc/flash_attn/src/flash_fwd_split_align_hdim64_bf16_sm80.cu"
    assert new in subset(HEAD_DIMS="128", PASSES="bwd") and kernel_build.unknown([*STOCK, new]) == [
        Path(new).name
    ]
    sources = configured([*STOCK, new], HEAD_DIMS="128")
    assert capsys.readouterr().out == f"kernel_build: no option leaves these out: {Path(new).name}\n"
    assert new in sources and STOCK[1] not in sources


def test_macros_list_what_is_built():
    assert subset(HEAD_DIMS="32,64", DTYPES="fp16", PASSES="fwd,splitkv", NO_SOFTMAX_ONLY="1").macros() == [
        "-DFLASH_BUILT_HEAD_DIMS=32,64",
        "-DFLASH_BUILT_DTYPES=fp16",
        "-DFLASH_BUILT_PASSES=fwd,splitkv",
        "-DFLASH_BUILT_ARCHS=90",
        "-DFLASH_BUILT_WITH_SOFTMAX=false",
    ]


def test_every_macro_is_one_that_the_extension_reads():
    header = Path(kernel_build.__file__).with_name("src") / "built_kernels.h"
    for flag in subset().macros():
        name, _, _ = flag.removeprefix("-D").partition("=")
        assert re.search(rf"\b{name}\b", header.read_text()), flag


@pytest.mark.parametrize(
    "option, value", [("HEAD_DIMS", "63"), ("DTYPES", "fp8"), ("PASSES", "forward"), ("ARCHS", "75")]
)
def test_an_unknown_item_names_option_and_value(option, value):
    with pytest.raises(ValueError, match=f"{option}='{value}'"):
        kernel_build.subset_from({"ARCHS": "90", option: value})


def test_architectures_replace_those_of_upstream():
    flags = ["-O3", "-gencode", "arch=compute_80,code=sm_80", "--threads", "4"]
    assert kernel_build.nvcc_flags(flags, ("90",)) == [
        "-O3",
        "--threads",
        "4",
        "-gencode",
        "arch=compute_90,code=sm_90",
    ]


@pytest.mark.parametrize(
    "torch_version, standard", [("2.11.0+cu130", "c++17"), ("2.14.0", "c++20"), ("3.0.0a0", "c++20")]
)
def test_language_standard_follows_torch(torch_version, standard):
    assert kernel_build.language_standard(["-std=c++17"], torch_version) == [f"-std={standard}"]
