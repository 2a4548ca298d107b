"""Says on a terminal that a kernel is being compiled, which takes seconds and would look like a hang."""

import sys

from flash_attn.cute.nosoftmax.plan import recorded


def announcing(cache_class: type) -> type:
    """The class of a compile cache whose misses say so, for upstream compiles right after a miss, and whose kernels can be recorded."""

    class Announcing(cache_class):
        def __contains__(self, key) -> bool:
            found = super().__contains__(key)
            if not found and sys.stderr.isatty():
                print("flash_attn.cute: compiling a kernel, once; this takes some seconds", file=sys.stderr, flush=True)
            return found

        def __getitem__(self, key):
            return recorded(super().__getitem__(key))

    return Announcing
