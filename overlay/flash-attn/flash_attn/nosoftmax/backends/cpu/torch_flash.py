"""Run plain softmax calls, causal or full, in PyTorch's own flash attention for the CPU."""

import torch

from .sequences import Sequences

_ATEN = torch.ops.aten
# The operator is not public. Without it, forward_loop.py and backward_loop.py run the call.
_IS_THERE = hasattr(_ATEN, "_scaled_dot_product_flash_attention_for_cpu")
# Below this the operator's blocking gains nothing over two matrix products, and costs a call for each head of
# a group.
_MIN_SEQLEN_Q = 32


def fits(sequences: Sequences) -> bool:
    """Whether PyTorch's operator computes the same: plain softmax, either over all keys or causal with
    seqlen_q = seqlen_k.

    PyTorch aligns the causal mask at the top left. It scales after masking, so that a softmax_scale of 0 or
    less would make the mask NaN or +inf.
    """
    options, visibility = sequences.options, sequences.visibility
    window = visibility.window
    square_causal = window.left is None and window.right == 0 and visibility.offset == 0
    return (
        _IS_THERE
        and sequences.use_softmax
        and options.softmax_scale > 0.0
        and options.softcap == 0.0
        and sequences.alibi_slopes is None
        and sequences.dropout is None
        and (square_causal or not window.is_limited)
        and visibility.seqlen_q >= _MIN_SEQLEN_Q
        and visibility.seqlen_k > 0
    )


def _heads_first(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.transpose(1, 2).to(dtype)


def forward(
    sequences: Sequences,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
) -> None:
    """Takes the arguments of forward_loop.forward. Calls the operator once for each query head of a group, so
    that key heads are not repeated.
    """
    dtype, causal = sequences.compute_dtype, sequences.visibility.window.is_limited
    k, v = (_heads_first(x, dtype) for x in (k, v))
    group = q.shape[2] // k.shape[1]
    for i in range(group):
        result, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            _heads_first(q[:, :, i::group], dtype), k, v, 0.0, causal, scale=sequences.options.softmax_scale
        )
        out[:, :, i::group] = result.transpose(1, 2)
        softmax_lse[:, i::group] = lse


def backward(
    sequences: Sequences,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    softmax_d: torch.Tensor,
) -> None:
    """Takes the arguments of backward_loop.backward."""
    dtype, causal = sequences.compute_dtype, sequences.visibility.window.is_limited
    softmax_d.copy_((dout.to(dtype) * out.to(dtype)).sum(dim=-1).transpose(1, 2))
    k, v = (_heads_first(x, dtype) for x in (k, v))
    group = q.shape[2] // k.shape[1]
    sum_dk, sum_dv = torch.zeros_like(k), torch.zeros_like(v)
    for i in range(group):
        one = (_heads_first(x[:, :, i::group], dtype) for x in (dout, q, out))
        dout_i, q_i, out_i = one
        dq_i, dk_i, dv_i = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            dout_i,
            q_i,
            k,
            v,
            out_i,
            softmax_lse[:, i::group].to(dtype),
            0.0,
            causal,
            scale=sequences.options.softmax_scale,
        )
        dq[:, :, i::group] = dq_i.transpose(1, 2)
        sum_dk += dk_i
        sum_dv += dv_i
    dk.copy_(sum_dk.transpose(1, 2))
    dv.copy_(sum_dv.transpose(1, 2))
