"""Run a call of flash_attn.cute's own functions with its derivative: as an autograd.Function, and as
operators for torch.compile.

An operator costs the host several times as much per call as the call itself, so eager calls avoid operators,
but where a dispatch mode such as FlopCounterMode watches. An operator takes no score_mod or mask_mod of the
user: these calls always use the autograd.Function.
"""

from collections.abc import Callable

import torch
from flash_attn.cute.nosoftmax import flops, hopper
from flash_attn.cute.nosoftmax.call import TENSORS, Call, Options, declared
from torch.autograd.function import once_differentiable


class Attention(torch.autograd.Function):
    """hopper.forward with hopper.backward as its derivative: (*tensors of a Call, options, extras) -> out."""

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, ctx.options, ctx.extras = inputs
        # Save lengths too, so that autograd notices if they change before the backward.
        ctx.save_for_backward(*tensors, ctx.extras.seqused_q)
        return hopper.forward(Call(*tensors, ctx.options), ctx.extras)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        *tensors, _ = ctx.saved_tensors
        grads = hopper.backward(Call(*tensors, ctx.options), dout, ctx.extras)
        return *grads, *(None,) * (TENSORS - 1)


_FAKE = torch._C._TorchDispatchModeKey.FAKE


def followed(extras: hopper.Extras) -> bool:
    """Whether a compiler or a dispatch mode must see the call as an operator, and can. Under fake tensors
    alone a call compiles its kernels.
    """
    if extras.of_user:
        return False
    if torch.compiler.is_compiling():
        return True
    modes = torch._C._len_torch_dispatch_stack()
    return modes > 0 and modes > (torch._C._get_dispatch_mode(_FAKE) is not None)


def arguments(call: Call, extras: hopper.Extras) -> tuple:
    """Return the arguments of the operators for a call."""
    return *call.tensors, extras.seqused_q, *call.options, *extras.longest, extras.pack_gqa


_ARGUMENTS = (
    f"{declared(Call, Call._fields[:TENSORS])}, Tensor? seqused_q, {declared(Options)}, SymInt? longest_q, "
    "SymInt? longest_k, bool? pack_gqa"
)


def _split(inputs: tuple) -> tuple[Call, hopper.Extras]:
    tensors, (seqused_q, *options, longest_q, longest_k, pack_gqa) = inputs[:TENSORS], inputs[TENSORS:]
    extras = hopper.Extras((longest_q, longest_k), seqused_q=seqused_q, pack_gqa=pack_gqa)
    return Call(*tensors, Options(*options)), extras


def _operator(name: str, schema: str) -> Callable:
    """Define torch.ops.flash_attn_4_nosoftmax.<name>, without the checks that torch.library.custom_op adds to
    each call.
    """

    def define(function):
        operator = f"flash_attn_4_nosoftmax::{name}"
        torch.library.define(operator, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(operator, "cuda", function)
        return getattr(torch.ops.flash_attn_4_nosoftmax, name).default

    return define


@_operator("forward", f"({_ARGUMENTS}) -> Tensor")
def forward(*inputs):
    return hopper.forward(*_split(inputs))


@torch.library.register_fake(forward)
def _(q, k, v, *args):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@_operator("backward", f"(Tensor dout, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
def backward(dout, *inputs):
    call, extras = _split(inputs)
    return hopper.backward(call, dout, extras)


@torch.library.register_fake(backward)
def _(dout, q, k, v, *args):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[: TENSORS + 1])
    ctx.rest = inputs[TENSORS + 1 :]


def _backward(ctx, dout):
    grads = backward(dout, *ctx.saved_tensors, *ctx.rest)
    return *grads, *(None,) * (TENSORS - 2 + len(ctx.rest))


torch.library.register_autograd(forward, _backward, setup_context=_setup_context)


def _forward_flops(*inputs):
    call, extras = _split(inputs)
    return flops.of_forward(call, extras.seqused_q)


def _backward_flops(dout, *inputs):
    call, extras = _split(inputs)
    return flops.of_backward(call, extras.seqused_q)


flops.register({forward: _forward_flops, backward: _backward_flops})
