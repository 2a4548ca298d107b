"""Attention without softmax: all of flash_attn's functions come here with use_softmax=False.

    score.py      what is computed: the contract, and a row for each activation and normalization
    interface.py  the door: the decorator of upstream's functions, `forward` and `backward`
    call.py       a call: its tensors and options under one set of names
    checks.py     all checks of arguments
    choice.py     which backend runs a call
    ops.py        a call with its derivatives
    backends/     linear, fa4, fa2, cpu

`forward` and `backward` are attention without autograd. REVISION says that the package is patched, and with
what.
"""

from .interface import backward, explain, forward
from .revision import REVISION

__all__ = ["REVISION", "backward", "explain", "forward"]
