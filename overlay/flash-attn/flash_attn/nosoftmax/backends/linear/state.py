"""Run causal attention without softmax as a recurrence, over a long sequence in pieces or one token at a
time.

The state of a key head is S = sum of exp(-slope * (t - j)) k_j^T v_j over the tokens j so far, t the last of
them, float32 (batch, nheads_k, head_dim, head_dim_v), and the output of a query is softmax_scale * q S.
Neither the size of the state nor the time of a step depends on the number of earlier tokens. The state is
kept per key head, because the query heads of a group share it, and without softmax_scale and normalization,
which belong to the query.

Where a gradient is asked for, the piece by itself goes through the operators of nosoftmax/ops.py, and PyTorch
adds what the state contributes: autograd derives both, to any order. Without gradients a dispatch mode, such
as FlopCounterMode, sees the operators at the end of this file. A compiler traces into the functions.
"""

from typing import Any, Optional

import torch

from ... import checks, flops, ops
from ...call import TENSORS, Call, Options, compute_dtype, declared
from ...score import saturate_
from . import primitive
from .chunked import decay_of
from .form import ROW, Form, Given, kind_of_factors

_PIECE = (
    "batch, seqlen, nheads, head_dim",
    "batch, seqlen, nheads_k, head_dim",
    "batch, seqlen, nheads_k, head_dim_v",
)
_PACKED = ("total, nheads, head_dim", "total, nheads_k, head_dim", "total, nheads_k, head_dim_v")
_TOKEN = ("batch, nheads, head_dim", "batch, nheads_k, head_dim", "batch, nheads_k, head_dim_v")


def linear_attention_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: Optional[torch.Tensor] = None,
    softmax_scale: Optional[float] = None,
    *,
    cu_seqlens: Optional[torch.Tensor] = None,
    decay_slopes: Optional[torch.Tensor] = None,
    normalization: Any = None,
    state_indices: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run causal attention over one piece of each sequence, after the pieces that `state` stands for.

    q: (batch, seqlen, nheads, head_dim); k: (batch, seqlen, nheads_k, head_dim); v: (batch, seqlen, nheads_k,
    head_dim_v); one floating dtype (16 bit on CUDA). With cu_seqlens, int32 or int64 (batch + 1,), the pieces
    are packed: (total, nheads, head_dim) and so on. state: None for the first piece, else the state that the
    call for the previous piece returned. softmax_scale: 1 / sqrt(head_dim) by default.

    decay_slopes: float32, not negative, (nheads_k,) or (batch, nheads_k): the state of a key head decays by
    exp(-slope) from token to token (retention, arXiv 2307.08621). normalization: None, a number, or a float32
    tensor (batch,) or (batch, seqlen), packed (batch,) or (total,): the factor on each row of the output.
    state_indices: int32 or int64 (batch,), the entries of `state`, then (slots, nheads_k, head_dim,
    head_dim_v), that belong to the sequences. They are written in place, and there is no gradient. No two may
    be equal, which is checked on the CPU, as the range is.

    Returns out, (batch, seqlen, nheads, head_dim_v) in q's dtype, packed (total, nheads, head_dim_v), and the
    new state, a new tensor, float32 (batch, nheads_k, head_dim, head_dim_v); with state_indices `state`. The
    outputs of the pieces are those of flash_attn_func(causal=True, use_softmax=False) for the whole sequence,
    up to the order of sums. q, k, v and state get gradients from both results; with cu_seqlens on a GPU, a
    call with gradients waits for the lengths. Raises ValueError or TypeError for arguments that do not fit
    together.
    """
    axes = _PIECE if cu_seqlens is None else _PACKED
    call = _checked(
        q, k, v, state, axes, softmax_scale, decay_slopes, normalization, state_indices, cu_seqlens
    )
    if _wants_gradient(q, k, v, state):
        _no_gradient_in_place(state_indices)
        return _derivable_piece(call, state)
    with torch.no_grad():
        before = state if state_indices is None else state.index_select(0, state_indices)
        if _watched():
            out, after = _piece_operator(*call.tensors, before, *call.options)
        else:
            out, after = _piece(call, before)
        return out, after if state_indices is None else state.index_copy_(0, state_indices.long(), after)


def linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    softmax_scale: Optional[float] = None,
    *,
    decay_slopes: Optional[torch.Tensor] = None,
    normalization: Any = None,
    state_indices: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add one token to `state`, and attend with its query. Without gradients `state` is written in place.

    q: (batch, nheads, head_dim); k: (batch, nheads_k, head_dim); v: (batch, nheads_k, head_dim_v); state:
    float32 (batch, nheads_k, head_dim, head_dim_v), as linear_attention_prefill returns it; zeros before the
    first token. normalization: None, a number or a float32 tensor (batch,). The other arguments are those of
    linear_attention_prefill.
    Returns out, (batch, nheads, head_dim_v) in q's dtype, and the state after the token: the tensor that was
    given, or where a gradient is asked for a new one. q, k, v and state get gradients from both results.
    Raises ValueError or TypeError for arguments that do not fit together.
    """
    if state is None:
        raise TypeError("state is None: a step adds to a state, pass zeros before the first token")
    call = _checked(q, k, v, state, _TOKEN, softmax_scale, decay_slopes, normalization, state_indices)
    derived = _wants_gradient(q, k, v, state)
    if derived:
        _no_gradient_in_place(state_indices)
    arguments = (q, k, v, state, call.row_factors, decay_slopes, state_indices)
    scale = call.options.softmax_scale * call.options.factor
    with torch.set_grad_enabled(derived), torch.autocast(q.device.type, enabled=False):
        if derived:
            state = _decayed(state, decay_slopes, 1) + _product(k, v)
            return _read(q, k, state, scale, call.row_factors), state
        return (_step_operator if _watched() else _step)(*arguments, scale), state


def _piece(call: Call, state: Optional[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    given = Given(call.row_factors, call.decay_slopes)
    return primitive.attend_with_state(*call.tensors[:3], _form(call), state, call.cu_seqlens_q, given)


def _step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    row_factors: Optional[torch.Tensor],
    decay_slopes: Optional[torch.Tensor],
    state_indices: Optional[torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """Return the output, and write the state in place."""
    if primitive.has_kernels(q):
        given = Given(row_factors, decay_slopes)
        return primitive.kernels().step(q, k, v, state, scale, given, state_indices)
    own = state if state_indices is None else state.index_select(0, state_indices)
    if decay_slopes is not None:
        factor, loss = decay_of(-decay_slopes[..., None, None])
        own.mul_(factor).addcmul_(own, loss)
    own.add_(_product(k, v))
    if state_indices is not None:
        state.index_copy_(0, state_indices.long(), own)
    return _read(q, k, own, scale, row_factors)


def _product(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return what a token adds to the state: elementwise, so that no product rounds to TF32."""
    return k.float()[..., :, None] * v.float()[..., None, :]


def _read(
    q: torch.Tensor, k: torch.Tensor, state: torch.Tensor, scale: float, row_factors: Optional[torch.Tensor]
) -> torch.Tensor:
    """Return the output of a token after the state, elementwise too."""
    queries = q.float().unflatten(1, (k.shape[1], -1))
    out = ((queries[..., None] * state[:, :, None]).sum(-2) * scale).flatten(1, 2)
    if row_factors is not None:
        out = out * row_factors[:, None, None]
    return _rounded(out, q.dtype)


def _wants_gradient(*tensors: Optional[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _no_gradient_in_place(state_indices: Optional[torch.Tensor]) -> None:
    if state_indices is not None:
        raise ValueError(
            "state_indices: these states are written in place and have no gradient: call this under "
            "torch.no_grad(), or pass state[state_indices] as the state"
        )


def _form(call: Call) -> Form:
    o, slopes = call.options, call.decay_slopes
    return Form(
        o.softmax_scale, causal=True, factor=o.factor, row_factors=kind_of_factors(call),
        decay=None if slopes is None else tuple(slopes.shape),
    )  # fmt: skip


def _derivable_piece(call: Call, state: Optional[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, slopes = *call.tensors[:3], call.decay_slopes
    form, given = _form(call), Given(call.row_factors, slopes)
    if slopes is not None:  # the public functions have a slope for each query head
        slopes = slopes.repeat_interleave(q.shape[-2] // k.shape[-2], dim=-1)
    out = ops.attend(call._replace(decay_slopes=slopes), "linear").out
    with torch.autocast(q.device.type, enabled=False):
        if not call.varlen:
            before, after = _across(q, k, v, state, form, given)
            return _with_before(out, before), after
        starts, states = call.cu_seqlens_q.tolist(), []
        outs = [out[: starts[0]]]
        for b, (start, stop) in enumerate(zip(starts, starts[1:])):
            own = slice(start, stop)
            earlier = None if state is None else state[b : b + 1]
            before, after = _across(*(x[None, own] for x in (q, k, v)), earlier, form,
                                    given.of_sequence(form, b, own))  # fmt: skip
            outs.append(_with_before(out[None, own], before)[0])
            states.append(after)
        if not states:
            return out, q.new_zeros(0, k.shape[-2], q.shape[-1], v.shape[-1], dtype=torch.float32)
        return torch.cat([*outs, out[starts[-1] :]]), torch.cat(states)


def _across(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: Optional[torch.Tensor], form: Form, given: Given
) -> tuple[Optional[torch.Tensor], torch.Tensor]:
    """Return what the outputs of dense pieces get from the state before them, in the compute dtype (None
    without one), and the state after them.
    """
    wide, (factors, slopes, _) = compute_dtype(q.dtype), given
    keys, from_state, before = k.to(wide), 1.0, None
    if slopes is not None:
        slopes = slopes.to(wide)[..., None, :, None]
        at = torch.arange(q.shape[1], device=q.device)[:, None, None]
        from_state = torch.exp(-slopes * (at + 1))[..., None]
        keys = keys * torch.exp(-slopes * (q.shape[1] - 1 - at))
    if state is not None:
        queries = q.to(wide).unflatten(2, (k.shape[2], -1))
        before = torch.einsum("bthgd,bhde->bthge", queries, state.to(wide)) * from_state
        before = before.flatten(2, 3) * (form.softmax_scale * form.factor)
        if factors is not None:
            factors = factors if form.row_factors == ROW else factors[:, None]
            before = before * factors.to(wide)[..., None, None]
    grown = torch.einsum("bthd,bthe->bhde", keys, v.to(wide)).float()
    return before, grown if state is None else _decayed(state, given.decay_slopes, q.shape[1]) + grown


def _decayed(state: torch.Tensor, slopes: Optional[torch.Tensor], tokens: int) -> torch.Tensor:
    """Return the state after a number of tokens that add nothing."""
    if slopes is None:
        return state
    factor, loss = decay_of(-slopes[..., None, None] * tokens)
    state = state * factor
    return state + state * loss


def _with_before(out: torch.Tensor, before: Optional[torch.Tensor]) -> torch.Tensor:
    return out if before is None else _rounded(out.to(before.dtype) + before, out.dtype)


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Saturate x and convert it to dtype. The gradient is that of an output that does not saturate."""
    if dtype != torch.float16 or not x.requires_grad:
        return saturate_(x, dtype).to(dtype)
    # x - x.detach() is exactly 0, whatever the size of x, and carries the gradient.
    return (saturate_(x.detach().clone(), dtype) + (x - x.detach())).to(dtype)


def _checked(q: torch.Tensor, *arguments: Any) -> Call:
    call = checks.state(q, *arguments)
    if q.device.type == "cuda" and not primitive.has_kernels(q):
        raise TypeError(f"q has dtype {q.dtype}: on CUDA give float16 or bfloat16, with triton installed")
    return call


# ---- As operators ----


def _watched() -> bool:
    """Whether a dispatch mode must see a call without gradients as an operator."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


_TENSORS, _OPTIONS = declared(Call, Call._fields[:TENSORS]), declared(Options)


def _call_and_state(arguments: tuple) -> tuple[Call, Optional[torch.Tensor]]:
    """Return the arguments of the operator linear_prefill."""
    *tensors, state = arguments[: TENSORS + 1]
    return Call(*tensors, Options(*arguments[TENSORS + 1 :])), state


@ops.operator("linear_prefill", f"({_TENSORS}, Tensor? state, {_OPTIONS}) -> (Tensor, Tensor)")
def _piece_operator(*arguments):
    call, state = _call_and_state(arguments)
    out, after = _piece(call, state)
    return out.contiguous(), after.clone() if after is state else after.contiguous()


@ops.fake("linear_prefill")
def _(*arguments):
    call, _ = _call_and_state(arguments)
    q, k, v = call.tensors[:3]
    after = q.new_empty(call.batch, k.shape[-2], q.shape[-1], v.shape[-1], dtype=torch.float32)
    return q.new_empty(*q.shape[:-1], v.shape[-1]), after


@ops.operator(
    "linear_step",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor? row_factors, Tensor? decay_slopes, "
    "Tensor? state_indices, float scale) -> Tensor",
)
def _step_operator(*arguments):
    return _step(*arguments).contiguous()


@ops.fake("linear_step")
def _(q, k, v, *arguments):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _piece_flops(*arguments):
    call, state = _call_and_state(arguments)
    return flops.of_piece(call, state is not None)


def _step_flops(q, k, v, *arguments):
    return flops.of_state(q.shape[0], q.shape[1] + k.shape[1], q.shape[2], v.shape[2])


if ops.CAN_DEFINE:
    flops.register({_piece_operator: _piece_flops, _step_operator: _step_flops})
