"""The primitive with its derivative, and as operators of torch where something follows those.

An operator costs the host as much as all the rest of a call. So a call goes without, unless torch.compile or another that must see
one node, and not what is inside, is looking.
"""

from functools import wraps
from typing import Optional

import torch
from torch.autograd import forward_ad

from . import backend
from .form import Form

_CAN_DEFINE = hasattr(torch.library, "infer_schema")  # torch 2.5
# An argument of another type is a tensor with its own dispatch, or a number that is not known yet.
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, int, float, bool, str, type(None)))


def _followed(arguments: tuple) -> bool:
    """Whether a compiler, a dispatch mode, a functorch transform or a tensor's own type is to see which operators are called."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or not _PLAIN.issuperset(map(type, arguments))
    )


def _operator(name: str):
    """Defines torch.ops.flash_attn.<name>, which the function then goes through where it is followed; not in an older torch.

    torch.library.custom_op would do the same, and at each call things that are not needed here and take longer.
    """

    def define(function):
        if not _CAN_DEFINE:
            return function
        qualified, schema = f"flash_attn::{name}", torch.library.infer_schema(function, mutates_args=())
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, ("cpu", "cuda"), function)
        operator = getattr(torch.ops.flash_attn, name).default

        @wraps(function)
        def call(*arguments):
            return operator(*arguments) if _followed(arguments) else function(*arguments)

        return call

    return define


def _fake(name: str):
    return torch.library.register_fake(f"flash_attn::{name}") if _CAN_DEFINE else lambda function: function


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


@_fake("_linear_attention")
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


@_fake("_linear_attention_backward")
def _(dout, q, k, v, *options):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


class _LinearAttention(torch.autograd.Function):
    """The primitive with its derivative, which is the primitive again: any number of derivatives can be taken."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *form):
        # One tensor for both is handed in once, as torch.compile wants it.
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k)
        ctx.longest, ctx.form = (max_seqlen_q, max_seqlen_k), form
        return _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *form)

    @staticmethod
    def backward(ctx, dout):
        q, k, v, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        lengths = (cu_seqlens_q, cu_seqlens_k, *ctx.longest)
        if not torch.is_grad_enabled():
            return (*_gradients(dout, q, k, v, *lengths, *ctx.form), *(None,) * 8)
        scale, causal, transposed, normalization = ctx.form
        swapped = (cu_seqlens_k, cu_seqlens_q, *ctx.longest[::-1], scale, causal, not transposed, normalization)
        return (
            attend(dout, v, k, *lengths, *ctx.form),
            attend(v, dout, q, *swapped),
            attend(k, q, dout, *swapped),
            *(None,) * 8,
        )


def attend(q, k, v, cu_seqlens_q, cu_seqlens_k, *options) -> torch.Tensor:
    """The operator _linear_attention with derivatives; `options` are its other arguments. cu_seqlens_k: None if it is cu_seqlens_q."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad) or forward_ad._current_level >= 0:
        return _LinearAttention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
    return _attend(q, k, v, cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, *options)
