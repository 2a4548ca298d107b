"""Says on a terminal that a kernel is being compiled, which takes seconds and would look like a hang."""

import sys


def announcing(cache_class: type) -> type:
    """The class of a compile cache whose misses say so: upstream compiles right after a miss."""

    class Announcing(cache_class):
        def __contains__(self, key) -> bool:
            found = super().__contains__(key)
            if not found and sys.stderr.isatty():
                print("flash_attn.cute: compiling a kernel, once; this takes some seconds", file=sys.stderr, flush=True)
            return found

    return Announcing
