"""Run causal attention without softmax as a recurrence, over a long sequence in pieces or one token at a
time.

The state of a key head is S = sum of k_j^T v_j over the tokens so far, float32 (batch, nheads_k, head_dim,
head_dim_v), and the output of a query is softmax_scale * q S. Neither the size of the state nor the time of a
step depends on the number of earlier tokens. The state is kept per key head, because the query heads of a
group share it, and without softmax_scale, which belongs to the query.

Where a gradient is asked for, the piece by itself goes through the operators of nosoftmax/ops.py, and PyTorch
adds what the state contributes: autograd derives both, to any order.
"""

from typing import Optional

import torch

from ... import checks, ops
from ...call import TENSORS, Call
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
    flash_attn_func(causal=True, use_softmax=False) for the whole sequence, up to the order of sums. q, k, v
    and state get gradients from both results. Raises ValueError or TypeError for arguments that do not fit
    together.
    """
    scale = _checked(q, k, v, state, _PIECE, softmax_scale)
    if _wants_gradient(q, k, v, state):
        return _derivable_piece(q, k, v, state, scale)
    with torch.no_grad():
        return primitive.attend_with_state(q, k, v, Form(scale, causal=True), state)


def linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    softmax_scale: Optional[float] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add one token to `state`, and attend with its query. Without gradients `state` is written in place.

    q: (batch, nheads, head_dim); k: (batch, nheads_k, head_dim); v: (batch, nheads_k, head_dim_v); state:
    float32 (batch, nheads_k, head_dim, head_dim_v), as linear_attention_prefill returns it; zeros before the
    first token.
    Returns out, (batch, nheads, head_dim_v) in q's dtype, and the state after the token: the tensor that was
    given, or where a gradient is asked for a new one. q, k, v and state get gradients from both results.
    Raises ValueError or TypeError for arguments that do not fit together.
    """
    if state is None:
        raise TypeError("state is None: a step adds to a state, pass zeros before the first token")
    scale = _checked(q, k, v, state, _TOKEN, softmax_scale)
    derived = _wants_gradient(q, k, v, state)
    with torch.set_grad_enabled(derived), torch.autocast(q.device.type, enabled=False):
        # Elementwise, so that no product rounds to TF32.
        token = k.float()[..., :, None] * v.float()[..., None, :]
        state = state + token if derived else state.add_(token)
        queries = q.float().unflatten(1, (k.shape[1], -1))
        out = (queries[..., None] * state[:, :, None]).sum(-2) * scale
        return _rounded(out.flatten(1, 2), q.dtype), state


def _wants_gradient(*tensors: Optional[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _derivable_piece(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: Optional[torch.Tensor], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    length = q.shape[1]
    options = checks.options(
        q.shape[-1], length, length, 0.0, scale, True, (-1, -1), 0.0, False, False, "identity", 0.0, None
    )
    out = ops.attend(Call(q, k, v, *(None,) * (TENSORS - 3), options), "linear").out
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        if state is not None:
            queries = q.to(wide).unflatten(2, (k.shape[2], -1))
            before = torch.einsum("bthgd,bhde->bthge", queries, state.to(wide)).flatten(2, 3)
            out = _rounded(out.to(wide) + before * scale, q.dtype)
        grown = torch.einsum("bthd,bthe->bhde", k.to(wide), v.to(wide)).float()
        return out, grown if state is None else state + grown


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Saturate x and convert it to dtype. The gradient is that of an output that does not saturate."""
    if dtype != torch.float16 or not x.requires_grad:
        return saturate_(x, dtype).to(dtype)
    # x - x.detach() is exactly 0, whatever the size of x, and carries the gradient.
    return (saturate_(x.detach().clone(), dtype) + (x - x.detach())).to(dtype)


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
