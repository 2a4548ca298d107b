"""Build options of the CUDA extension: which sources and flags a build gets."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

OVERLAY = Path(__file__).parents[2] / "overlay" / "flash-attn" / "csrc" / "flash_attn"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


kernel_build = load(OVERLAY / "kernel_build.py")
generator = load(OVERLAY / "src" / "generate_nosoftmax_kernels.py")

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


def test_a_kernel_that_no_rule_knows_is_named_and_built(monkeypatch, capsys):
    new = "csrc/flash_attn/src/flash_fwd_split_align_hdim64_bf16_sm80.cu"
    assert new in subset(HEAD_DIMS="128", PASSES="bwd") and kernel_build.unknown([*STOCK, new]) == [
        Path(new).name
    ]
    extension = SimpleNamespace(sources=[*STOCK, new], extra_compile_args={"cxx": [], "nvcc": []})
    kernel_build.configure(extension, {"ARCHS": "90", "HEAD_DIMS": "128"})
    assert capsys.readouterr().out == f"kernel_build: no option leaves these out: {Path(new).name}\n"
    assert new in extension.sources and STOCK[1] not in extension.sources


def test_generated_kernels_follow_the_options():
    names = [file.name for file in generator.kernel_files()]
    chosen = [
        name
        for name in names
        if name in subset(HEAD_DIMS="64,128", DTYPES="fp16", PASSES="fwd", NO_SOFTMAX_ONLY="1")
    ]
    assert chosen == ["flash_nosoftmax_fwd_hdim64_fp16_sm80.cu", "flash_nosoftmax_fwd_hdim128_fp16_sm80.cu"]


def test_macros_list_what_is_built():
    assert subset(HEAD_DIMS="32,64", DTYPES="fp16", PASSES="fwd,splitkv", NO_SOFTMAX_ONLY="1").macros() == [
        "-DFLASH_BUILT_HEAD_DIMS=32,64",
        "-DFLASH_BUILT_DTYPES=fp16",
        "-DFLASH_BUILT_PASSES=fwd,splitkv",
        "-DFLASH_BUILT_ARCHS=90",
        "-DFLASH_BUILT_WITH_SOFTMAX=false",
    ]


def test_every_macro_is_one_that_the_extension_reads():
    header = (OVERLAY / "src" / "built_kernels.h").read_text()
    for flag in subset().macros():
        name, _, _ = flag.removeprefix("-D").partition("=")
        assert re.search(rf"\b{name}\b", header), flag


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


def test_generated_files_are_what_the_generator_writes(tmp_path):
    assert generator.differing(OVERLAY / "src") == []
    assert generator.main(["-o", str(tmp_path)]) == 0
    changed = tmp_path / "flash_nosoftmax_bwd_hdim64_bf16_sm80.cu"
    changed.write_text(changed.read_text() + "\n")
    assert generator.differing(tmp_path) == [changed.name]
    assert generator.main(["-o", str(tmp_path), "--check"]) == 1
