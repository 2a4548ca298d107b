"""The primitive as operators of torch, so that torch.compile sees one node and not what is inside, and its derivative."""

from typing import Optional

import torch

from . import backend
from .form import Form

_CAN_DEFINE = hasattr(torch.library, "infer_schema")  # torch 2.5


def _operator(name: str):
    """The function as torch.ops.flash_attn.<name>; in an older torch itself, which can't be compiled.

    torch.library.custom_op would do the same, and at each call things that are not needed here and take longer.
    """

    def define(function):
        if not _CAN_DEFINE:
            return function
        operator, schema = f"flash_attn::{name}", torch.library.infer_schema(function, mutates_args=())
        torch.library.define(operator, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(operator, ("cpu", "cuda"), function)
        return getattr(torch.ops.flash_attn, name).default

    return define


def _fake(operator):
    return torch.library.register_fake(operator) if _CAN_DEFINE else lambda function: function


@_operator("_linear_attention")
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: Optional[torch.Tensor],
    cu_seqlens_k: Optional[torch.Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    transposed: bool,
    normalization: Optional[str],
) -> torch.Tensor:
    form = Form(softmax_scale, causal, transposed, normalization)
    return backend.attend(q, k, v, form, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


@_fake(_attend)
def _(q, k, v, *options):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@_operator("_linear_attention_backward")
def _gradients(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: Optional[torch.Tensor],
    cu_seqlens_k: Optional[torch.Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    transposed: bool,
    normalization: Optional[str],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    form = Form(softmax_scale, causal, transposed, normalization)
    return backend.gradients(dout, q, k, v, form, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


@_fake(_gradients)
def _(dout, q, k, v, *options):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


class LinearAttention(torch.autograd.Function):
    """The primitive with its derivative, which is the primitive again: any number of derivatives can be taken."""

    @staticmethod
    def forward(
        ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, causal, transposed=False, normalization=None,
    ):
        # One tensor for both is handed in once, as torch.compile wants it.
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k)
        ctx.longest, ctx.form = (max_seqlen_q, max_seqlen_k), (softmax_scale, causal, transposed, normalization)
        return _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.longest, *ctx.form)

    @staticmethod
    def backward(ctx, dout):
        q, k, v, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        lengths = (cu_seqlens_q, cu_seqlens_k, *ctx.longest)
        if not torch.is_grad_enabled():
            return (*_gradients(dout, q, k, v, *lengths, *ctx.form), *(None,) * 8)
        scale, causal, transposed, normalization = ctx.form
        swapped = (cu_seqlens_k, cu_seqlens_q, *ctx.longest[::-1], scale, causal, not transposed, normalization)
        return (
            LinearAttention.apply(dout, v, k, *lengths, *ctx.form),
            LinearAttention.apply(v, dout, q, *swapped),
            LinearAttention.apply(k, q, dout, *swapped),
            *(None,) * 8,
        )
