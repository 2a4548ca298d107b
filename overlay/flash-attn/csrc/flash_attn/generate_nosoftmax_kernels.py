"""Write the .cu files of the kernels without softmax: one for each pass, head size and element type.

`configure` in kernel_build.py calls this at build time. The keys below are the choices of its options.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

HEAD_DIMS = ("32", "64", "96", "128", "192", "256")
ELEMENT_TYPES = {"fp16": "cutlass::half_t", "bf16": "cutlass::bfloat16_t"}
FUNCTIONS = {
    "fwd": "run_mha_fwd_nosoftmax<{element}, {head_dim}>(const FwdParams &params, cudaStream_t stream)",
    "bwd": "run_mha_bwd_nosoftmax<{element}, {head_dim}>(const BwdParams &params, cudaStream_t stream)",
    "splitkv": "run_mha_fwd_splitkv_nosoftmax<{element}, {head_dim}>(const FwdParams &params, "
    "cudaStream_t stream)",
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


def write(folder: Path, passes: Sequence[str], head_dims: Sequence[str], dtypes: Sequence[str]) -> list[Path]:
    """Write the files of the chosen kernels to `folder` and return their paths.

    A file that already holds its text keeps its time stamp, so that a second build does not compile it again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, head_dim, dtype in product(passes, head_dims, dtypes):
        function = FUNCTIONS[name].format(element=ELEMENT_TYPES[dtype], head_dim=head_dim)
        path, text = folder / f"{name}_hdim{head_dim}_{dtype}.cu", TEMPLATE.format(function=function)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
        paths.append(path)
    return paths
