"""Attention without softmax: runs the functions of flash_attn if use_softmax=False.

    score.py      the contract, and an entry for each activation and normalization
    interface.py  the decorator of upstream's functions, `explain`, `forward` and `backward`
    call.py       a call: its tensors and options under one set of names
    checks.py     all checks of arguments
    choice.py     which backend runs a call
    ops.py        a call with its derivatives
    backends/     linear, fa4, fa2, cpu

`forward` and `backward` are attention without autograd. REVISION shows that the package is patched, and names
the revision of the patch set.
"""

from .interface import backward, explain, forward
from .revision import REVISION

__all__ = ["REVISION", "backward", "explain", "forward"]
