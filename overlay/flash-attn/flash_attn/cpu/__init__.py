"""The CPU backend: the five functions of the compiled extension, in PyTorch, with softmax and without.

Same names, same positional arguments and same results as ``flash_attn_2_cuda`` (csrc/flash_attn/flash_api.cpp), and the
four trailing arguments use_softmax, activation, sigmoid_bias, normalization, whose meaning is stated in
:mod:`flash_attn.score_function`. Blocked over the queries, so memory grows with the sequence length, not its square.
"""

from .dense import bwd, fwd
from .kvcache import fwd_kvcache
from .varlen import varlen_bwd, varlen_fwd

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]
