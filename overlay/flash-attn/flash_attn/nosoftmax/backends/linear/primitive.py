"""Run the linear-attention primitive: Triton kernels for 16-bit CUDA tensors, else PyTorch in chunks."""

import importlib.util
from functools import cache
from types import ModuleType
from typing import Any, Optional

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
) -> torch.Tensor:
    """Compute one form of linear attention (see Form and chunked.attend). With cu_seqlens, q, k and v are
    packed: (total, heads, d). given: the tensors that the form mentions.

    Returns out, as q with v's last dimension, in the form's dtype. Rows that belong to no sequence are 0.
    """
    if has_kernels(q):
        return kernels().attend(q, k, v, form, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, given)
    if cu_seqlens_q is None:
        return _dense(q, k, v, form, given)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=form.out_dtype(q.dtype))
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        rows, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        own = given.of_sequence(form, b, keys if form.transposed else rows)
        out[rows] = _dense(q[None, rows], k[None, keys], v[None, keys], form, own)[0]
    return out


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, given: Given) -> torch.Tensor:
    """Compute a form in PyTorch over dense sequences, at once if they have one diagonal."""
    diagonals = given.diagonal.tolist() if form.diagonal else []
    if len(set(diagonals)) <= 1:
        diagonal = diagonals[0] if diagonals else None
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute dq, dk and dv of `attend`, as the forms F(dO, V, K; M), F(V, dO, Q; Mt) and F(K, Q, dO; Mt)."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if has_kernels(q):
        return kernels().gradients(dout, q, k, v, form, *lengths, given)
    swapped = (cu_seqlens_k, cu_seqlens_q, max_seqlen_k, max_seqlen_q)
    return (
        attend(dout, v, k, form.of_dq(), *lengths, given),
        attend(v, dout, q, form.of_dk(), *swapped, given),
        attend(k, q, dout, form.of_dv(), *swapped, given),
    )


# ---- Pieces of sequences on several devices ----


def attend_between(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    form: Form,
    given: Given,
    before: Optional[torch.Tensor],
    behind: Optional[torch.Tensor] = None,
    inside: Any = None,
    out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Compute a form over a dense piece of each sequence, as many rows as keys, with the states of what is
    not here: see `state` and `behind` of chunked.attend. inside: what `state_of` returned beside the state of
    this piece, if the form is causal. out: a contiguous tensor of the result's shape and dtype, which may
    become the result, and spares it to be copied there.
    """
    if has_kernels(q):
        states = _states(form, before, behind)
        return kernels().attend(q, k, v, form, None, None, 0, 0, given, *states, states=inside, out=out)
    return chunked.attend(q, k, v, form, before, given, behind=behind)[0]


def gradients_between(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    form: Form,
    given: Given,
    there: tuple[Optional[torch.Tensor], Optional[torch.Tensor]],
    back: tuple[Optional[torch.Tensor], Optional[torch.Tensor]],
    inside: Any = None,
    outs: tuple = (None, None, None),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute dq, dk and dv of `attend_between`. there: its states before and behind. back: those of q and
    dout, for the transposed form. inside: as there, beside the state of q and dout. outs: as `out` there.
    """
    if has_kernels(q):
        states = _states(form, *there), _states(form, *back)
        return kernels().gradients(dout, q, k, v, form, None, None, 0, 0, given, *states, inside, outs)
    turned = tuple(None if x is None else x.mT.contiguous() for x in (*there, *back))
    return (
        attend_between(dout, v, k, form.of_dq(), given, *turned[:2]),
        attend_between(v, dout, q, form.of_dk(), given, *turned[2:]),
        attend_between(k, q, dout, form.of_dv(), given, *back),
    )


def _states(form: Form, before: Optional[torch.Tensor], behind: Optional[torch.Tensor]) -> tuple:
    """The states that the kernels start from: a full form that decays has two walks, any other one."""
    return (before, behind) if not form.causal and form.decay is not None else (before,)


def state_of(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, form: Form, given: Given, late: bool
) -> tuple[torch.Tensor, Any]:
    """Return the sum of keys^T values over a dense piece of each sequence, decayed to its last position if
    late, else to its first, and what spares attend_between or gradients_between another pass over keys and
    values, None where nothing does. rows: a tensor with the heads of the rows and as many tokens, of which
    none is read. Factors of the form count if it is transposed, and the keys are its queries.
    """
    if not form.transposed:
        form, given = form._replace(row_factors=None), given._replace(row_factors=None)
    if has_kernels(keys):
        return kernels().state_of(rows, keys, values, form, given, late)
    # Without rows, a causal walk takes all keys, and an anticausal one those from the diagonal on.
    if not late:
        form = form._replace(causal=True, transposed=True)
    else:  # the first walk of a full form is a causal one
        form = form._replace(causal=not form.transposed)
    diagonal = None if late else 0
    return chunked.attend(rows[:, :0], keys, values, form, given=given, diagonal=diagonal)[1], None
