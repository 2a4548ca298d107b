"""A call of flash_attn.cute's own functions with its derivative: as an autograd.Function, and as operators
for torch.compile.

What an operator does at each call costs the host several times what the call itself does, so eager calls go
without. A score_mod or mask_mod of the user is no argument that an operator takes: these calls are always the
autograd.Function.
"""

from collections.abc import Callable
from typing import Optional

import torch
from flash_attn.cute.nosoftmax import hopper
from flash_attn.cute.nosoftmax.call import TENSORS, Call, Options
from torch.autograd.function import once_differentiable


class Attention(torch.autograd.Function):
    """hopper.forward with hopper.backward as its derivative: (*tensors of a Call, options, extras) -> out."""

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, ctx.options, ctx.extras = inputs
        # Lengths too: a change of theirs before the backward is noticed.
        ctx.save_for_backward(*tensors, ctx.extras.seqused_q)
        return hopper.forward(Call(*tensors, ctx.options), ctx.extras)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        *tensors, _ = ctx.saved_tensors
        grads = hopper.backward(Call(*tensors, ctx.options), dout, ctx.extras)
        return *grads, *(None,) * (TENSORS - 1)


def _operator(name: str) -> Callable:
    """The function as torch.ops.flash_attn_4_nosoftmax.<name>, without what torch.library.custom_op checks at
    each call.
    """

    def define(function):
        operator = f"flash_attn_4_nosoftmax::{name}"
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(operator, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(operator, "cuda", function)
        return getattr(torch.ops.flash_attn_4_nosoftmax, name).default

    return define


def arguments(call: Call, extras: hopper.Extras) -> tuple:
    """What the operators take for a call."""
    o, tensors = (
        call.options,
        (call.cu_seqlens_q, call.cu_seqlens_k, extras.seqused_q, call.seqused_k, call.block_table),
    )
    options = (
        o.softmax_scale,
        o.window_left,
        o.window_right,
        o.softcap,
        o.deterministic,
        o.activation,
        o.sigmoid_bias,
        o.normalization,
    )
    return *call.tensors[:3], *tensors, *options, *extras.longest, extras.pack_gqa


def _call(
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table, softmax_scale, window_left,
    window_right, softcap, deterministic, activation, sigmoid_bias, normalization, max_seqlen_q,
    max_seqlen_k, pack_gqa,
) -> tuple[Call, hopper.Extras]:  # fmt: skip
    options = Options(
        max_seqlen_q or 0, max_seqlen_k or 0, 0.0, softmax_scale, window_left, window_right, softcap,
        deterministic, False, activation, sigmoid_bias, normalization,
    )  # fmt: skip
    call = Call(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, None, page_table, None, options)
    return call, hopper.Extras((max_seqlen_q, max_seqlen_k), seqused_q=seqused_q, pack_gqa=pack_gqa)


@_operator("forward")
def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: Optional[torch.Tensor],
    cu_seqlens_k: Optional[torch.Tensor],
    seqused_q: Optional[torch.Tensor],
    seqused_k: Optional[torch.Tensor],
    page_table: Optional[torch.Tensor],
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    deterministic: bool,
    activation: str,
    sigmoid_bias: Optional[float],
    normalization: Optional[str],
    max_seqlen_q: Optional[int],
    max_seqlen_k: Optional[int],
    pack_gqa: Optional[bool],
) -> torch.Tensor:
    return hopper.forward(
        *_call(
            q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table, softmax_scale,
            window_left, window_right, softcap, deterministic, activation, sigmoid_bias, normalization,
            max_seqlen_q, max_seqlen_k, pack_gqa,
        )
    )  # fmt: skip


@torch.library.register_fake(forward)
def _(q, k, v, *args):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@_operator("backward")
def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: Optional[torch.Tensor],
    cu_seqlens_k: Optional[torch.Tensor],
    seqused_q: Optional[torch.Tensor],
    seqused_k: Optional[torch.Tensor],
    page_table: Optional[torch.Tensor],
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    deterministic: bool,
    activation: str,
    sigmoid_bias: Optional[float],
    normalization: Optional[str],
    max_seqlen_q: Optional[int],
    max_seqlen_k: Optional[int],
    pack_gqa: Optional[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    call, extras = _call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table, softmax_scale, window_left,
        window_right, softcap, deterministic, activation, sigmoid_bias, normalization, max_seqlen_q,
        max_seqlen_k, pack_gqa,
    )  # fmt: skip
    return hopper.backward(call, dout, extras)


@torch.library.register_fake(backward)
def _(dout, q, k, v, *args):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


_LENGTHS = 8  # q, k, v and what says which rows of them count


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:_LENGTHS])
    ctx.rest, ctx.num_inputs = inputs[_LENGTHS:], len(inputs)


def _backward(ctx, dout):
    return *backward(dout, *ctx.saved_tensors, *ctx.rest), *(None,) * (ctx.num_inputs - 3)


torch.library.register_autograd(forward, _backward, setup_context=_setup_context)
