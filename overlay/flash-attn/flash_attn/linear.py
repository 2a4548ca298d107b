"""Run causal attention without softmax as a recurrence, for decoding and for long sequences in pieces.

These two functions carry the state (docs/linear.md). flash_attn_func and the other functions choose the
linear algorithm on their own where it is exact and faster.
"""

from .nosoftmax.backends.linear.state import linear_attention_prefill, linear_attention_step

__all__ = ["linear_attention_prefill", "linear_attention_step"]
