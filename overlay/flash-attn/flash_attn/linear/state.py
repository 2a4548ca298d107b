"""Causal attention without softmax as a recurrence: a long sequence in pieces, and one token at a time.

The state of a key head is S = sum of k_j^T v_j over the tokens so far, float32 (batch, nheads_k, head_dim, head_dim_v), and
the output of a query is softmax_scale * q S: its size and the time of a step do not depend on how many tokens came before.
It is kept per key head, as the query heads of a group share it, and without softmax_scale, which belongs to the query.
"""

from typing import Optional

import torch

from ..cpu import checks
from . import backend
from .checks import alike
from .form import Form

_STATE_AXES = "batch, nheads_k, head_dim, head_dim_v"


def linear_attention_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: Optional[torch.Tensor] = None,
    softmax_scale: Optional[float] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of a piece of a sequence, after the pieces that `state` stands for.

    q: (batch, seqlen, nheads, head_dim); k: (batch, seqlen, nheads_k, head_dim); v: (batch, seqlen, nheads_k, head_dim_v);
    one floating dtype (16 bit on CUDA). state: None for the first piece, or what the call for the piece before returned.
    softmax_scale: 1 / sqrt(head_dim) by default.
    Returns out, (batch, seqlen, nheads, head_dim_v) in q's dtype, and the new state, a new tensor, float32 (batch, nheads_k,
    head_dim, head_dim_v). Pieces give what flash_attn_func(causal=True, use_softmax=False) gives for the whole, up to the
    order of sums. There is no gradient. Raises ValueError or TypeError for arguments that do not fit together.
    """
    axes = "batch, seqlen, nheads, head_dim"
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.rank(name, x, axes)
    batch, seqlen, nheads, head_dim = q.shape
    checks.shape("k", k, batch, seqlen, k.shape[2], head_dim, axes="batch, seqlen, nheads_k, head_dim")
    checks.shape("v", v, *k.shape[:3], v.shape[3], axes="batch, seqlen, nheads_k, head_dim_v")
    checks.heads(nheads, k.shape[2], head_dim)
    _check(q, k, v, state, (batch, k.shape[2], head_dim, v.shape[3]))
    form = Form(head_dim**-0.5 if softmax_scale is None else softmax_scale, causal=True)
    with torch.no_grad():
        return backend.attend_with_state(q, k, v, form, state)


def linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    softmax_scale: Optional[float] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One more token: adds it to `state`, in place, and attends with its query.

    q: (batch, nheads, head_dim); k: (batch, nheads_k, head_dim); v: (batch, nheads_k, head_dim_v); state: float32 (batch,
    nheads_k, head_dim, head_dim_v), as linear_attention_prefill returns it; zeros before the first token.
    Returns out, (batch, nheads, head_dim_v) in q's dtype, and state, which is the tensor that was given. There is no
    gradient. Raises ValueError or TypeError for arguments that do not fit together.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.rank(name, x, "batch, nheads, head_dim")
    batch, nheads, head_dim = q.shape
    checks.shape("k", k, batch, k.shape[1], head_dim, axes="batch, nheads_k, head_dim")
    checks.shape("v", v, *k.shape[:2], v.shape[2], axes="batch, nheads_k, head_dim_v")
    checks.heads(nheads, k.shape[1], head_dim)
    if state is None:
        raise TypeError("state is None: a step adds to a state, pass zeros before the first token")
    _check(q, k, v, state, (batch, k.shape[1], head_dim, v.shape[2]))
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        # Elementwise, so that no product rounds to TF32.
        state += k.float()[..., :, None] * v.float()[..., None, :]
        queries = q.float().unflatten(1, (k.shape[1], -1))
        out = (queries[..., None] * state[:, :, None]).sum(-2).mul_(scale).flatten(1, 2)
        if q.dtype.itemsize < out.dtype.itemsize:
            out.clamp_(torch.finfo(q.dtype).min, torch.finfo(q.dtype).max)
        return out.to(q.dtype), state


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: Optional[torch.Tensor], state_shape: tuple[int, ...]
) -> None:
    if q.device.type == "cuda" and not backend.has_kernels(q):
        raise TypeError(f"q has dtype {q.dtype}: on CUDA give float16 or bfloat16, with triton installed")
    alike(q, k, v, state=state)
    if state is not None:
        checks.shape("state", state, *state_shape, axes=_STATE_AXES)
        if state.dtype != torch.float32:
            raise TypeError(f"state has dtype {state.dtype}, expected torch.float32")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, state)):
        raise ValueError("the functions with a state have no gradient: call them under torch.no_grad(), or detach the tensors")
