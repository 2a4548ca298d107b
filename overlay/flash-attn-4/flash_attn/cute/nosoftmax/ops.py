"""Custom operators of the activations: torch.compile keeps a call as one node. Users' score_mods run eagerly."""

from typing import Optional

import torch
from flash_attn.cute.nosoftmax import launch
from flash_attn.cute.nosoftmax.score_mods import of_activation


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


def compile_or_run(
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


forward = torch.library.custom_op("flash_attn_4_nosoftmax::forward", compile_or_run, mutates_args=())


@forward.register_fake
def _(q, k, v, *args):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@torch.library.custom_op("flash_attn_4_nosoftmax::backward", mutates_args=())
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


@backward.register_fake
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


forward.register_autograd(_backward, setup_context=_setup_context)


class UserScoreMod(torch.autograd.Function):
    """The same for a score_mod or mask_mod of the user, which a custom operator cannot take."""

    @staticmethod
    def forward(
        ctx, q, k, v, call, pack_gqa, page_table, deterministic, block_sparse_tensors, block_sparse_tensors_bwd
    ):  # fmt: skip
        ctx.save_for_backward(q, k, v)
        ctx.call = call
        ctx.deterministic = deterministic
        ctx.block_sparse_tensors_bwd = block_sparse_tensors_bwd
        return launch.forward(call, q, k, v, pack_gqa, page_table, block_sparse_tensors)

    @staticmethod
    def backward(ctx, dout):
        grads = launch.backward(ctx.call, dout, *ctx.saved_tensors, ctx.deterministic, ctx.block_sparse_tensors_bwd)
        return *grads, *(None,) * 6
