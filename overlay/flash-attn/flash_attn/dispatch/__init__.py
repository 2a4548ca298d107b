"""Which backend runs a call of a public attention function.

    choice.py   the rule: the first backend that takes the call, or the one that was asked for
    fa2.py      the CUDA extension: what it takes
    fa4.py      FA4's kernels: what they take, and the call
    public.py   the decorator of the public functions, and flash_attn.explain

What a call is stands in flash_attn/call.py, and each backend says itself what it does not take: flash_attn/linear,
fa4.py, and flash_attn/backends.py for the extension.
"""

from .choice import BACKENDS, Choice
from .public import dispatched, explain

__all__ = ["BACKENDS", "Choice", "dispatched", "explain"]
