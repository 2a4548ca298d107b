"""Print as JSON what upstream's setup.py in the current folder would compile, without compiling it. Run by
.venv's Python.

    python -I setup_extension.py CUDA_HOME  ->  {"sources": [...], "include_dirs": [...], "nvcc_flags": [...]}

Runs setup.py up to its call of setup(), in the environment of a build, so that sources and flags are exactly
the build's own.
"""

from __future__ import annotations

import contextlib
import json
import runpy
import sys

import setuptools
from torch.utils import cpp_extension


def main(argv: list[str]) -> int:
    caught = {}
    setuptools.setup = lambda **arguments: caught.update(arguments)
    cpp_extension.CUDA_HOME = argv[0]  # a torch without CUDA leaves it empty
    sys.argv = ["setup.py"]
    with contextlib.redirect_stdout(sys.stderr):
        runpy.run_path("setup.py", run_name="__main__")
    (extension,) = caught["ext_modules"]
    # torch puts its own flags before those of the extension.
    flags = [*cpp_extension.COMMON_NVCC_FLAGS, *extension.extra_compile_args["nvcc"]]
    json.dump(
        {
            "sources": extension.sources,
            "include_dirs": [*map(str, extension.include_dirs)],
            "nvcc_flags": flags,
        },
        sys.stdout,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
