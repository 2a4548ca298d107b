"""Writes the flash_nosoftmax_*.cu files: one for each pass, head size and element type.

Run it after changing a name here; `--check` says which files differ from what it would write.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
ELEMENT_TYPES = {"fp16": "cutlass::half_t", "bf16": "cutlass::bfloat16_t"}
FUNCTIONS = {
    "fwd": "run_mha_fwd_nosoftmax<{element}, {head_dim}>(Flash_fwd_params &params, cudaStream_t stream)",
    "split": "run_mha_fwd_splitkv_nosoftmax<{element}, {head_dim}>(Flash_fwd_params &params, cudaStream_t "
    "stream)",
    "bwd": "run_mha_bwd_nosoftmax<{element}, {head_dim}>(Flash_bwd_params &params, cudaStream_t stream)",
}
TEMPLATE = """\
// One head size and element type in each file, to compile them side by side.
// Written by generate_nosoftmax_kernels.py.

#include "namespace_config.h"
#include "flash_nosoftmax_launch_template.h"

namespace FLASH_NAMESPACE {{

template void {function};

}}  // namespace FLASH_NAMESPACE
"""


@dataclass(frozen=True)
class KernelFile:
    kind: str
    head_dim: int
    dtype: str

    @property
    def name(self) -> str:
        return f"flash_nosoftmax_{self.kind}_hdim{self.head_dim}_{self.dtype}_sm80.cu"

    @property
    def text(self) -> str:
        function = FUNCTIONS[self.kind].format(element=ELEMENT_TYPES[self.dtype], head_dim=self.head_dim)
        return TEMPLATE.format(function=function)


def kernel_files() -> Iterator[KernelFile]:
    for kind in FUNCTIONS:
        for head_dim in HEAD_DIMS:
            for dtype in ELEMENT_TYPES:
                yield KernelFile(kind, head_dim, dtype)


def differing(directory: Path) -> list[str]:
    """Names of generated files in `directory` that are missing, differ, or should not be there."""
    expected = {file.name: file.text for file in kernel_files()}
    found = {path.name: path.read_text() for path in directory.glob("flash_nosoftmax_*.cu")}
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output-dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a file differs")
    arguments = parser.parse_args(argv)
    if arguments.check:
        names = differing(arguments.output_dir)
        for name in names:
            print(f"{name}: not what generate_nosoftmax_kernels.py writes", file=sys.stderr)
        return 1 if names else 0
    for file in kernel_files():
        (arguments.output_dir / file.name).write_text(file.text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
