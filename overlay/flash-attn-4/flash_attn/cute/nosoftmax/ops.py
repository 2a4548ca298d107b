"""A call with its derivative: as an autograd.Function, and as operators, of which torch.compile keeps a call as one node.

What an operator does at each call costs the host several times what the call itself does, so eager calls go without. A
score_mod or mask_mod of the user is no argument that an operator takes: these calls are always the autograd.Function.
"""

from typing import Callable, Optional

import torch
from flash_attn.cute.nosoftmax import launch
from flash_attn.cute.nosoftmax.score_mods import of_activation
from torch.autograd.function import once_differentiable


def _call(
    softmax_scale,
    causal,
    window_left,
    window_right,
    softcap,
    activation,
    sigmoid_bias,
    normalization,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_q,
    seqused_k,
    max_seqlen_q,
    max_seqlen_k,
) -> launch.Call:
    return launch.Call(
        of_activation(activation, sigmoid_bias, softcap, normalization),
        softmax_scale,
        causal,
        (window_left, window_right),
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        max_seqlen_q,
        max_seqlen_k,
    )


def _operator(name: str) -> Callable:
    """The function as torch.ops.flash_attn_4_nosoftmax.<name>, without what torch.library.custom_op checks at each call."""

    def define(function):
        operator = f"flash_attn_4_nosoftmax::{name}"
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(operator, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(operator, "cuda", function)
        return getattr(torch.ops.flash_attn_4_nosoftmax, name).default

    return define


@_operator("forward")
def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_left: Optional[int],
    window_right: Optional[int],
    softcap: float,
    activation: str,
    sigmoid_bias: Optional[float],
    normalization: Optional[str],
    cu_seqlens_q: Optional[torch.Tensor],
    cu_seqlens_k: Optional[torch.Tensor],
    seqused_q: Optional[torch.Tensor],
    seqused_k: Optional[torch.Tensor],
    max_seqlen_q: Optional[int],
    max_seqlen_k: Optional[int],
    page_table: Optional[torch.Tensor],
    pack_gqa: Optional[bool],
    deterministic: bool,
) -> torch.Tensor:
    call = _call(
        softmax_scale, causal, window_left, window_right, softcap, activation, sigmoid_bias, normalization,
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    return launch.forward(call, q, k, v, pack_gqa=pack_gqa, page_table=page_table)


@torch.library.register_fake(forward)
def _(q, k, v, *args):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@_operator("backward")
def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_left: Optional[int],
    window_right: Optional[int],
    softcap: float,
    activation: str,
    sigmoid_bias: Optional[float],
    normalization: Optional[str],
    cu_seqlens_q: Optional[torch.Tensor],
    cu_seqlens_k: Optional[torch.Tensor],
    seqused_q: Optional[torch.Tensor],
    seqused_k: Optional[torch.Tensor],
    max_seqlen_q: Optional[int],
    max_seqlen_k: Optional[int],
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    call = _call(
        softmax_scale, causal, window_left, window_right, softcap, activation, sigmoid_bias, normalization,
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    return launch.backward(call, dout, q, k, v, deterministic=deterministic)


@torch.library.register_fake(backward)
def _(dout, q, k, v, *args):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, *options, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_q, max_k, _, _, deterministic = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    ctx.options = options
    ctx.lengths = (max_q, max_k)
    ctx.deterministic = deterministic
    ctx.num_inputs = len(inputs)


def _backward(ctx, dout):
    q, k, v, *sequences = ctx.saved_tensors
    grads = backward(dout, q, k, v, *ctx.options, *sequences, *ctx.lengths, ctx.deterministic)
    return *grads, *(None,) * (ctx.num_inputs - 3)


torch.library.register_autograd(forward, _backward, setup_context=_setup_context)


class Attention(torch.autograd.Function):
    """launch.forward with launch.backward as its derivative."""

    @staticmethod
    def forward(
        ctx, q, k, v, call, pack_gqa, page_table, deterministic, block_sparse_tensors, block_sparse_tensors_bwd
    ):  # fmt: skip
        # Of the lengths this keeps no more than `call` does, but a change of theirs before the backward is noticed.
        ctx.save_for_backward(q, k, v, call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_q, call.seqused_k)
        ctx.call = call
        ctx.deterministic = deterministic
        ctx.block_sparse_tensors_bwd = block_sparse_tensors_bwd
        return launch.forward(call, q, k, v, pack_gqa, page_table, block_sparse_tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, *_ = ctx.saved_tensors
        grads = launch.backward(ctx.call, dout, q, k, v, ctx.deterministic, ctx.block_sparse_tensors_bwd)
        return *grads, *(None,) * 6
