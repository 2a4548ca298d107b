"""Attention without softmax in linear time.

With f the identity and without softcap, dropout, ALiBi and window, attention is associative: Q (K^T V) costs N d^2 in place
of N^2 d. The causal form needs one state per head, the sum of k_j^T v_j so far; docs/linear.md has the design.

    form.py     the three masks and the normalization
    chunked.py  the primitive in PyTorch, any device
    kernels.py  the primitive in Triton, 16-bit CUDA tensors
    backend.py  which of the two
    ops.py      as torch operators, with the derivative
    choice.py   when it is exact, when it pays
    public.py   a call of flash_attn_func and its kin
    state.py    prefill, continue and step with a recurrent state
    checks.py   what the last two check
"""

from .choice import ALGORITHMS
from .state import linear_attention_prefill, linear_attention_step

__all__ = ["ALGORITHMS", "linear_attention_prefill", "linear_attention_step"]
