"""Which algorithm a call gets: linear where that is exact and predicted faster, else quadratic, unless the caller says."""

from typing import Optional

import torch

from .backend import has_kernels

ALGORITHMS = ("auto", "quadratic", "linear")

# Where the two algorithms take the same time, forward and backward together: seqlen_q = seqlen_k = slope * head_dim + offset,
# as (slope, offset) for each mask. From the crossovers that benchmarks/linear_vs_quadratic.py prints, rounded up; docs/linear.md
# says where it ran. "auto" is quadratic on a device type that was not measured.
CROSSOVERS = {
    "cpu": {"full": (1.0, 64.0), "causal": (2.0, 64.0)},
}


def obstacle(
    q: torch.Tensor,
    dropout_p: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Optional[torch.Tensor],
    block_table: Optional[torch.Tensor],
    use_softmax: bool,
    activation: str,
    normalization: Optional[str],
) -> Optional[str]:
    """The option, with its value, for which there is no exact algorithm in linear time; None if there is one."""
    if use_softmax:
        return "use_softmax=True"
    if activation != "identity":
        return f"activation={activation!r}"
    if softcap > 0.0:
        return f"softcap={softcap}"
    if dropout_p > 0.0:
        return f"dropout_p={dropout_p}"
    if alibi_slopes is not None:
        return "alibi_slopes"
    if window_size[0] >= 0 or (window_size[1] >= 0 and not causal):
        return f"window_size={tuple(window_size)}"
    if block_table is not None:
        return "block_table"
    if normalization == "1/visible" and causal and has_kernels(q):
        return "normalization='1/visible' with causal=True on CUDA tensors"
    return None


def predicted_faster(device: torch.device, head_dim: int, causal: bool, seqlen_q: float, seqlen_k: float) -> bool:
    """Whether linear time is less time, for sequences of these mean lengths.

    Quadratic costs seqlen_q * seqlen_k, linear seqlen_q + seqlen_k: what counts is their harmonic mean.
    """
    if device.type not in CROSSOVERS:
        return False
    slope, offset = CROSSOVERS[device.type]["causal" if causal else "full"]
    return 2 * seqlen_q * seqlen_k > (slope * head_dim + offset) * (seqlen_q + seqlen_k)
