"""Which algorithm a call gets: linear where that is exact and predicted faster, else quadratic, unless the caller says."""

from typing import Optional

import torch

from ..call import Call
from .backend import has_kernels

ALGORITHMS = ("auto", "quadratic", "linear")

# Where the two algorithms take the same time, forward and backward together: seqlen_q = seqlen_k = slope * head_dim + offset,
# as (slope, offset) for each mask. From benchmarks/linear_vs_quadratic.py, on CPUs rounded up and on CUDA the shortest sequences
# that were measured; docs/linear.md says where it ran. "auto" is quadratic on a device type that was not measured.
CROSSOVERS = {
    "cpu": {"full": (1.0, 64.0), "causal": (2.0, 64.0)},
    "cuda": {"full": (0.0, 1000.0), "causal": (0.0, 1000.0)},
}
# And the scores of all heads and sequences, as masked ones count too, from which on a quadratic kernel takes a GPU longer than the
# host takes for the more launches of linear time. Of an H100: one sequence of 4k and 16 of 1k tokens with 16 heads each.
MIN_SCORES = {"cuda": 250e6}


def obstacle(call: Call) -> Optional[str]:
    """Why there is no exact algorithm in linear time for this call, by the first thing in the way; None if there is one."""
    if call.cached:
        return "in place of a cache it has a state: flash_attn.linear.linear_attention_step"
    option = _inexact(call)
    return None if option is None else f"{option} has no exact algorithm in linear time"


def _inexact(call: Call) -> Optional[str]:
    if call.use_softmax:
        return "use_softmax=True"
    if call.activation != "identity":
        return f"activation={call.activation!r}"
    if call.softcap > 0.0:
        return f"softcap={call.softcap}"
    if call.dropout_p > 0.0:
        return f"dropout_p={call.dropout_p}"
    if call.alibi_slopes is not None:
        return "alibi_slopes"
    if call.window_size[0] >= 0 or (call.window_size[1] >= 0 and not call.causal):
        return f"window_size={tuple(call.window_size)}"
    if call.block_table is not None:
        return "block_table"
    return None


def disadvantage(call: Call) -> Optional[str]:
    """Why "auto" passes linear time over where it is exact; None if it takes it."""
    q, k = call.q, call.k
    # What is wrong with tensors that it does not take, the quadratic path says.
    if q.device.type != "cpu" and not has_kernels(q):
        return f"no kernels for {q.dtype} on {q.device}: they take float16 and bfloat16, with triton"
    axes = 3 if call.varlen else 4
    if not q.dim() == k.dim() == call.v.dim() == axes:
        return f"q, k and v must have {axes} axes"
    sequences = max(call.cu_seqlens_q.shape[0] - 1, 1) if call.varlen else 1
    heads = q.shape[-2] * (sequences if call.varlen else q.shape[0])
    if not predicted_faster(q.device, q.shape[-1], call.causal, q.shape[-3] / sequences, k.shape[-3] / sequences, heads):
        return "not predicted faster at these lengths, this head_dim and this number of heads (docs/linear.md)"
    return None


def predicted_faster(device: torch.device, head_dim: int, causal: bool, seqlen_q: float, seqlen_k: float, heads: int) -> bool:
    """Whether linear time is less time, for sequences of these mean lengths and `heads` heads in all of them.

    Quadratic costs seqlen_q * seqlen_k, linear seqlen_q + seqlen_k: what counts is their harmonic mean.
    """
    if device.type not in CROSSOVERS:
        return False
    slope, offset = CROSSOVERS[device.type]["causal" if causal else "full"]
    longer = 2 * seqlen_q * seqlen_k > (slope * head_dim + offset) * (seqlen_q + seqlen_k)
    return longer and heads * seqlen_q * seqlen_k >= MIN_SCORES.get(device.type, 0)
