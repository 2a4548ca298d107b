"""Tell the user on a terminal that a kernel is being compiled, which takes seconds and would look like a
hang.
"""

import sys
import warnings

from flash_attn.cute.nosoftmax.plan import recorded

# The compiler warns at every kernel, in 600 characters, about upstream's parameter aux_data, a tuple that is
# empty in most calls.
warnings.filterwarnings("ignore", "Argument aux_data ", UserWarning)


def announcing(cache_class: type) -> type:
    """Return a class of compile cache that announces misses, because upstream compiles right after a miss,
    and whose kernels can be recorded.
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
