"""Attention without softmax over sequences that are cut over several processes or GPUs.

    layout.py     which tokens lie on which rank
    plan.py       ContextParallel: the plan, and moving tensors into and out of its order
    exchange.py   the messages, by torch.distributed alone
    agreement.py  compares the ranks before anything moves
    problem.py    the call as the whole sequences see it, and its blocks
    methods/      state, ulysses, allgather and ring
    decode.py     a cache whose keys lie on several ranks
    attention.py  chooses the method, and runs the call with its derivatives
    dtensor.py    how DTensors may be sharded

docs/distributed.md has the design. Imports torch.distributed, so nothing of flash_attn imports it by itself.
"""

# Here and not at the first call: an import below it keeps the frames of its importers, with their groups.
from . import attention as attention
from .plan import ContextParallel

try:  # torch 2.5
    from . import dtensor as dtensor
except ImportError:
    pass

__all__ = ["ContextParallel"]
