"""Choose the kernels that the extension is built with. setup.py calls `configure` on its extension.

Options, from the environment. An option that is left out means everything:
    HEAD_DIMS         head dimensions of the kernels, such as "64,128" (32, 64, 96, 128, 192, 256)
    DTYPES            "fp16", "bf16" or both
    PASSES            "fwd", "bwd", "splitkv" (KV cache, decoding), or several
    NO_SOFTMAX_ONLY   1: only the kernels for use_softmax=False
    ARCHS             compute capabilities, such as "80,90" (80, 90, 100, 120); by default those of the GPUs
                      present, else FLASH_ATTN_CUDA_ARCHS, else 80 and 90
A call that needs a kernel outside the build raises an error that names the option (src/built_kernels.h).
Kernel files of upstream that no rule knows belong to every build, which prints their names.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import generate_nosoftmax_kernels
from generate_nosoftmax_kernels import ELEMENT_TYPES, FUNCTIONS, HEAD_DIMS

DTYPES = tuple(ELEMENT_TYPES)
PASSES = tuple(FUNCTIONS)
ARCHS = ("80", "90", "100", "120")

ROOT = Path(__file__).parents[2]  # where setup.py lies, and its build folder
OWN_FILES = ("slack_rows.cu", "row_factors.cu")  # which every build needs
PASS_OF_FILE = {"fwd": "fwd", "bwd": "bwd", "fwd_split": "splitkv"}
KERNEL_FILE = re.compile(
    r"flash_(?P<kind>fwd|bwd|fwd_split)_hdim(?P<head_dim>\d+)_(?P<dtype>fp16|bf16)_(?:causal_)?sm80\.cu"
)


@dataclass(frozen=True)
class KernelSubset:
    """The kernels of a build; each tuple holds strings from the constants above."""

    head_dims: tuple[str, ...] = HEAD_DIMS
    dtypes: tuple[str, ...] = DTYPES
    passes: tuple[str, ...] = PASSES
    archs: tuple[str, ...] = ("80", "90")
    with_softmax: bool = True

    def __contains__(self, source: str) -> bool:
        """Whether the build compiles this file of upstream's; other files are in every build."""
        match = KERNEL_FILE.fullmatch(Path(source).name)
        return match is None or (
            self.with_softmax
            and match["head_dim"] in self.head_dims
            and match["dtype"] in self.dtypes
            and PASS_OF_FILE[match["kind"]] in self.passes
        )

    def own_sources(self) -> list[Path]:
        """Write the kernels without softmax to the build folder. Returns their files and OWN_FILES."""
        kernels = generate_nosoftmax_kernels.write(
            ROOT / "build" / "nosoftmax_kernels", self.passes, self.head_dims, self.dtypes
        )
        return [*kernels, *(ROOT / "csrc" / "flash_attn" / "src" / name for name in OWN_FILES)]

    def macros(self) -> list[str]:
        """Return the same lists for src/built_kernels.h, as compiler flags."""
        lists = {
            "HEAD_DIMS": self.head_dims,
            "DTYPES": self.dtypes,
            "PASSES": self.passes,
            "ARCHS": self.archs,
        }
        flags = [f"-DFLASH_BUILT_{name}={','.join(items)}" for name, items in lists.items()]
        return [*flags, f"-DFLASH_BUILT_WITH_SOFTMAX={str(self.with_softmax).lower()}"]


def chosen(
    environ: Mapping[str, str], option: str, choices: Sequence[str], default: Sequence[str]
) -> tuple[str, ...]:
    """Return the items of a list option, in the order of `choices`.

    Raises:
        ValueError: an item is not one of the choices.
    """
    items = [item for item in re.split(r"[,;\s]+", environ.get(option, "")) if item]
    unknown = [item for item in items if item not in choices]
    if unknown:
        raise ValueError(
            f"{option}={environ[option]!r}: {', '.join(unknown)} is not among {', '.join(choices)}"
        )
    return tuple(choice for choice in choices if choice in (items or default))


def default_archs(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Those of the GPUs present (8.6 and 8.9 run code for 8.0), else upstream's option, else 80 and 90."""
    import torch

    present = {str(torch.cuda.get_device_capability(i)[0] * 10) for i in range(torch.cuda.device_count())}
    return tuple(sorted(present & set(ARCHS), key=int)) or chosen(
        environ, "FLASH_ATTN_CUDA_ARCHS", ARCHS, ("80", "90")
    )


def subset_from(environ: Mapping[str, str]) -> KernelSubset:
    """Read the options. Raises ValueError that names the option, the value and the choices."""
    flag = environ.get("NO_SOFTMAX_ONLY", "").upper()
    if flag not in ("", "0", "1", "FALSE", "TRUE"):
        raise ValueError(f"NO_SOFTMAX_ONLY={environ['NO_SOFTMAX_ONLY']!r}: neither 0 nor 1")
    return KernelSubset(
        head_dims=chosen(environ, "HEAD_DIMS", HEAD_DIMS, HEAD_DIMS),
        dtypes=chosen(environ, "DTYPES", DTYPES, DTYPES),
        passes=chosen(environ, "PASSES", PASSES, PASSES),
        archs=chosen(environ, "ARCHS", ARCHS, ()) or default_archs(environ),
        with_softmax=flag not in ("1", "TRUE"),
    )


def nvcc_flags(flags: Sequence[str], archs: Sequence[str]) -> list[str]:
    """Return `flags`, but with machine code for `archs`."""
    kept = []
    rest = iter(flags)
    for flag in rest:
        if flag == "-gencode":
            next(rest)
        else:
            kept.append(flag)
    for arch in archs:
        kept += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    return kept


def language_standard(flags: Sequence[str], torch_version: str) -> list[str]:
    """Return `flags`, with C++20 if the headers of PyTorch need it, from 2.14 on."""
    release = tuple(int(part) for part in re.match(r"(\d+)\.(\d+)", torch_version).groups())
    return [flag.replace("c++17", "c++20") for flag in flags] if release >= (2, 14) else list(flags)


def unknown(sources: Sequence[str]) -> list[str]:
    """Return the kernel files among `sources` that no rule knows."""
    names = [Path(source).name for source in sources if source.endswith(".cu")]
    return [name for name in names if not KERNEL_FILE.fullmatch(name)]


def configure(extension, environ: Mapping[str, str] = os.environ) -> None:
    """Set the sources and the flags of the setuptools extension as the options ask."""
    import torch

    subset = subset_from(environ)
    if strange := unknown(extension.sources):
        # fapatch/wheel/build_progress.py shows this line to the user.
        print(f"kernel_build: no option leaves these out: {', '.join(strange)}", flush=True)
    extension.sources = [source for source in extension.sources if source in subset] + [
        os.path.relpath(path, ROOT) for path in subset.own_sources()
    ]
    cxx, nvcc = extension.extra_compile_args["cxx"], extension.extra_compile_args["nvcc"]
    extension.extra_compile_args = {
        "cxx": language_standard(cxx, torch.__version__) + subset.macros(),
        "nvcc": language_standard(nvcc_flags(nvcc, subset.archs), torch.__version__),
    }
