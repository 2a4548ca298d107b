"""Run the linear-attention primitive: Triton kernels for 16-bit CUDA tensors, else PyTorch in chunks."""

import importlib.util
from functools import cache
from types import ModuleType
from typing import Optional

import torch

from . import chunked
from .form import NOTHING, Form, Given

_TRITON = importlib.util.find_spec("triton") is not None


def has_kernels(x: torch.Tensor) -> bool:
    """Whether the Triton kernels take tensors like x."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and _TRITON


@cache
def kernels() -> ModuleType:
    """Return the module of the Triton kernels, which is imported at the first call that it runs."""
    from . import kernels as module

    return module


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    form: Form,
    cu_seqlens_q: Optional[torch.Tensor] = None,
    cu_seqlens_k: Optional[torch.Tensor] = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    given: Given = NOTHING,
    diagonals: Optional[list] = None,
) -> torch.Tensor:
    """Compute one form of linear attention (see Form and chunked.attend). With cu_seqlens, q, k and v are
    packed: (total, heads, d). given: the tensors that the form mentions. diagonals: for each sequence the key
    of the attention that query 0 is aligned with, not with the Triton kernels.

    Returns out, as q with v's last dimension. Rows of out that belong to no sequence are 0.
    """
    if has_kernels(q):
        return kernels().attend(q, k, v, form, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, given)
    if cu_seqlens_q is None:
        return _dense(q, k, v, form, given, diagonals)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=form.out_dtype(q.dtype))
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        rows, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        own = given.of_sequence(form, b, keys if form.transposed else rows)
        diagonal = None if diagonals is None else diagonals[b : b + 1]
        out[rows] = _dense(q[None, rows], k[None, keys], v[None, keys], form, own, diagonal)[0]
    return out


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, given: Given, diagonals: Optional[list]
) -> torch.Tensor:
    """Compute a form in PyTorch over dense sequences, at once if they have one diagonal."""
    if diagonals is None or len(set(diagonals)) == 1:
        diagonal = None if diagonals is None else diagonals[0]
        return chunked.attend(q, k, v, form, given=given, diagonal=diagonal)[0]
    out = q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=form.out_dtype(q.dtype))
    for b, diagonal in enumerate(diagonals):
        own, one = given.of_entry(b), slice(b, b + 1)
        out[one] = chunked.attend(q[one], k[one], v[one], form, given=own, diagonal=diagonal)[0]
    return out


def attend_with_state(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    form: Form,
    state: Optional[torch.Tensor],
    cu_seqlens: Optional[torch.Tensor] = None,
    given: Given = NOTHING,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the causal form over one piece of each sequence. state: (batch, nheads_k, d, d_v), the states
    before the pieces, None for zeros. With cu_seqlens, q, k and v are packed. given: the tensors that the
    form mentions, with slopes of key heads. Returns out and the float32 states after the pieces.
    """
    if has_kernels(q):
        return kernels().attend_with_state(q, k, v, form, state, cu_seqlens, given)
    if cu_seqlens is None:
        out, state = chunked.attend(q, k, v, form, state, given)
        return out, state.float()
    starts, out = cu_seqlens.tolist(), q.new_zeros(*q.shape[:-1], v.shape[-1])
    states = q.new_zeros(len(starts) - 1, k.shape[-2], q.shape[-1], v.shape[-1], dtype=torch.float32)
    for b, (start, stop) in enumerate(zip(starts, starts[1:])):
        rows, before = slice(start, stop), None if state is None else state[b : b + 1]
        own = given.of_sequence(form, b, rows)
        piece = chunked.attend(q[None, rows], k[None, rows], v[None, rows], form, before, own)
        out[rows], states[b] = piece[0][0], piece[1][0].float()
    return out, states


def gradients(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    form: Form,
    cu_seqlens_q: Optional[torch.Tensor] = None,
    cu_seqlens_k: Optional[torch.Tensor] = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    given: Given = NOTHING,
    diagonals: Optional[list] = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute dq, dk and dv of `attend`, as the forms F(dO, V, K; M), F(V, dO, Q; Mt) and F(K, Q, dO; Mt)."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if has_kernels(q):
        return kernels().gradients(dout, q, k, v, form, *lengths, given)
    swapped = (cu_seqlens_k, cu_seqlens_q, max_seqlen_k, max_seqlen_q)
    return (
        attend(dout, v, k, form.of_dq(), *lengths, given, diagonals),
        attend(v, dout, q, form.of_dk(), *swapped, given, diagonals),
        attend(k, q, dout, form.of_dv(), *swapped, given, diagonals),
    )
