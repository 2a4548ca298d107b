"""What is said while a kernel is compiled: on a terminal that it is, for it takes seconds and would look like
a hang.
"""

import sys
import warnings

from flash_attn.cute.nosoftmax.plan import recorded

# At every kernel the compiler warns, in 600 characters, of upstream's parameter aux_data: a tuple that is
# empty in most calls.
warnings.filterwarnings("ignore", "Argument aux_data ", UserWarning)


def announcing(cache_class: type) -> type:
    """The class of a compile cache whose misses say so, for upstream compiles right after a miss, and whose
    kernels can be recorded.
    """

    class Announcing(cache_class):
        def __contains__(self, key) -> bool:
            found = super().__contains__(key)
            if not found and sys.stderr.isatty():
                print(
                    "flash_attn.cute: compiling a kernel, once; this takes some seconds",
                    file=sys.stderr,
                    flush=True,
                )
            return found

        def __getitem__(self, key):
            return recorded(super().__getitem__(key))

    return Announcing
