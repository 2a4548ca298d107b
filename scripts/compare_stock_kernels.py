"""Compares the machine code of kernels in two sets of object files, by mangled name.

    compare_stock_kernels.py --before pristine/*.o --after patched/*.o

Encodings are compared, not the listing: its columns depend on the longest name. Needs cuobjdump from the CUDA toolkit.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fapatch.errors import FapError
from fapatch.process import run

ARCH = re.compile(r"^\s*arch = (\S+)")
FUNCTION = re.compile(r"^\s*Function : (\S+)")
ENCODING = re.compile(r"/\* (0x[0-9a-f]{16}) \*/")

Kernels = dict[tuple[str, str], tuple[str, ...]]


def parse_listing(listing: str) -> Kernels:
    """Encodings of each function of a `cuobjdump -sass` listing, by architecture and mangled name."""
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


def kernels_of(objects: Sequence[Path]) -> Kernels:
    kernels: Kernels = {}
    for path in objects:
        kernels |= parse_listing(run("cuobjdump", "-sass", path, hint="cuobjdump comes with the CUDA toolkit").stdout.decode())
    return kernels


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, nargs="+", required=True)
    parser.add_argument("--after", type=Path, nargs="+", required=True)
    arguments = parser.parse_args(argv)
    try:
        before, after = kernels_of(arguments.before), kernels_of(arguments.after)
    except FapError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    different = sorted(key for key in before if before[key] != after.get(key))
    for arch, name in different:
        print(f"different: {arch} {name}: {len(before[arch, name])} -> {len(after.get((arch, name), ()))} words")
    print(f"files {len(arguments.before)}, kernels {len(before)}, identical {len(before) - len(different)}, "
          f"different {len(different)}")
    return 1 if different or not before else 0


if __name__ == "__main__":
    sys.exit(main())
