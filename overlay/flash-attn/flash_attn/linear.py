"""Causal attention without softmax as a recurrence, for decoding and for long sequences in pieces:
docs/linear.md.

flash_attn_func and its kin take linear time by themselves where it is exact and faster; these two carry the
state.
"""

from .nosoftmax.backends.linear.state import linear_attention_prefill, linear_attention_step

__all__ = ["linear_attention_prefill", "linear_attention_step"]
