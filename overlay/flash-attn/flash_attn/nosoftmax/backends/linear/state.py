"""Run causal attention without softmax as a recurrence, over a long sequence in pieces or one token at a
time.

The state of a key head is S = sum of k_j^T v_j over the tokens so far, float32 (batch, nheads_k, head_dim,
head_dim_v), and the output of a query is softmax_scale * q S. Neither the size of the state nor the time of a
step depends on the number of earlier tokens. The state is kept per key head, because the query heads of a
group share it, and without softmax_scale, which belongs to the query.
"""

from typing import Optional

import torch

from ... import checks
from ...score import saturate_
from . import primitive
from .form import Form

_PIECE = (
    "batch, seqlen, nheads, head_dim",
    "batch, seqlen, nheads_k, head_dim",
    "batch, seqlen, nheads_k, head_dim_v",
)
_TOKEN = ("batch, nheads, head_dim", "batch, nheads_k, head_dim", "batch, nheads_k, head_dim_v")


def linear_attention_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: Optional[torch.Tensor] = None,
    softmax_scale: Optional[float] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run causal attention over one piece of a sequence, after the pieces that `state` stands for.

    q: (batch, seqlen, nheads, head_dim); k: (batch, seqlen, nheads_k, head_dim); v: (batch, seqlen, nheads_k,
    head_dim_v); one floating dtype (16 bit on CUDA). state: None for the first piece, else the state that the
    call for the previous piece returned. softmax_scale: 1 / sqrt(head_dim) by default.
    Returns out, (batch, seqlen, nheads, head_dim_v) in q's dtype, and the new state, a new tensor, float32
    (batch, nheads_k, head_dim, head_dim_v). The outputs of the pieces are those of
    flash_attn_func(causal=True, use_softmax=False) for the whole sequence, up to the order of sums. There is
    no gradient. Raises ValueError or TypeError for arguments that do not fit together.
    """
    form = Form(_checked(q, k, v, state, _PIECE, softmax_scale), causal=True)
    with torch.no_grad():
        return primitive.attend_with_state(q, k, v, form, state)


def linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    softmax_scale: Optional[float] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add one token to `state` in place, and attend with its query.

    q: (batch, nheads, head_dim); k: (batch, nheads_k, head_dim); v: (batch, nheads_k, head_dim_v); state:
    float32 (batch, nheads_k, head_dim, head_dim_v), as linear_attention_prefill returns it; zeros before the
    first token.
    Returns out, (batch, nheads, head_dim_v) in q's dtype, and state, the tensor that was given. There is no
    gradient. Raises ValueError or TypeError for arguments that do not fit together.
    """
    if state is None:
        raise TypeError("state is None: a step adds to a state, pass zeros before the first token")
    scale = _checked(q, k, v, state, _TOKEN, softmax_scale)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        # Elementwise, so that no product rounds to TF32.
        state += k.float()[..., :, None] * v.float()[..., None, :]
        queries = q.float().unflatten(1, (k.shape[1], -1))
        out = (queries[..., None] * state[:, :, None]).sum(-2).mul_(scale).flatten(1, 2)
        return saturate_(out, q.dtype).to(q.dtype), state


def _checked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: Optional[torch.Tensor],
    axes: tuple[str, str, str],
    softmax_scale: Optional[float],
) -> float:
    scale = checks.state(q, k, v, state, axes, softmax_scale)
    if q.device.type == "cuda" and not primitive.has_kernels(q):
        raise TypeError(f"q has dtype {q.dtype}: on CUDA give float16 or bfloat16, with triton installed")
    return scale
