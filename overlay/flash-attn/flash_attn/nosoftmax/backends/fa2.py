"""Run calls on this package's CUDA extension, upstream's CUTLASS kernels."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Optional

import torch
import torch.nn.functional as F

from ... import extension
from ..call import Call, needs_grad
from . import Result

_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_HEAD_DIMS = (32, 64, 96, 128, 192, 256)  # of the kernels; other sizes are padded to the next one
_PAGE_SIZE = 256  # page sizes are multiples of this
_CHANNELS = 8  # head_dim is padded to a multiple of this


def obstacle(call: Call) -> Optional[str]:
    """Why the extension has no kernels for this call; None if it has. The extension itself reports kernels
    that its build left out.
    """
    reason = extension.obstacle()
    if reason is not None:
        return reason
    if call.options.mask is not None:
        return "flash_attn_2_cuda has no kernels for mask: install flash-attn-4 on Hopper, or use the CPU"
    if call.options.wide and call.block_table is not None:
        return "block_table with out_dtype=torch.float32: flash_attn_2_cuda returns the dtype of q"
    if call.q.dtype not in _DTYPES:
        return f"q has dtype {call.q.dtype}, flash_attn_2_cuda takes float16 and bfloat16"
    if call.v.shape[-1] != call.q.shape[-1]:
        return (
            f"head_dim={call.q.shape[-1]} and head_dim_v={call.v.shape[-1]}: flash_attn_2_cuda takes one "
            "size for both"
        )
    if call.q.shape[-1] > _HEAD_DIMS[-1]:
        return f"head_dim={call.q.shape[-1]}: flash_attn_2_cuda goes up to {_HEAD_DIMS[-1]}"
    if call.block_table is not None and call.k.shape[1] % _PAGE_SIZE:
        return f"pages of {call.k.shape[1]} keys: flash_attn_2_cuda takes multiples of {_PAGE_SIZE}"
    return None


def _score(call: Call, diagonal: Optional[torch.Tensor]) -> Optional[tuple]:
    """Return the extension's argument `score` (ScoreArguments in csrc/flash_attn/src/use_softmax.h)."""
    o, factors = call.options, call.row_factors
    if (
        o.activation == "identity" and o.normalization is None and o.factor == 1.0 and not o.wide
        and factors is None and call.decay_slopes is None and diagonal is None
    ):  # fmt: skip
        return None
    by_row = factors is not None and (
        factors.dim() == 2 or (call.varlen and factors.shape[0] == call.q.shape[0])
    )
    factors, biases, slopes, diagonal = (
        x if x is None or x.is_contiguous() else x.contiguous()
        for x in (factors, call.sigmoid_biases, call.decay_slopes, diagonal)
    )
    return (
        o.activation, o.sigmoid_bias, biases, o.normalization, o.factor,
        None if by_row else factors, factors if by_row else None, slopes, diagonal, o.wide,
    )  # fmt: skip


def disadvantage(call: Call) -> Optional[str]:
    return None


def runs(call: Call, arch: int) -> bool:
    """Whether the extension would run this call: no obstacle, and all kernels in this build.

    arch: the GPU's compute capability, such as 90.
    """
    if obstacle(call) is not None:
        return False
    head_dims, dtypes, passes, archs = _built()
    needed = ("fwd", "splitkv", "bwd") if needs_grad(call) else ("fwd", "splitkv")
    return (
        next((size for size in _HEAD_DIMS if call.q.shape[-1] <= size), None) in head_dims
        and _DTYPES[call.q.dtype] in dtypes
        and all(name in passes for name in needed)
        and arch in archs
    )


@cache
def _built() -> tuple:
    """Return the head sizes, dtypes, passes and compute capabilities of the extension, which must be
    installed."""
    module = extension.load()
    return module.built_head_dims, module.built_dtypes, module.built_passes, module.built_archs


def _taken(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
    """Make the last dimension of tensors of one head size contiguous and a multiple of 8, as the extension
    requires.
    """
    missing = -tensors[0].shape[-1] % _CHANNELS
    if missing:
        return [F.pad(x, (0, missing)) for x in tensors]
    for x in tensors:  # is_contiguous answers sooner than stride, and nearly always with yes
        if not x.is_contiguous():
            return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    return tensors


def _contiguous(x: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _window(call: Call, diagonal: Optional[torch.Tensor]) -> tuple:
    """Return causal, left and right. If causal, the extension sets the right side itself, and takes its
    faster causal kernels if left is unlimited. With a diagonal causal is a window as any other.
    """
    o = call.options
    if diagonal is not None:
        return False, o.window_left, o.window_right
    return o.causal, o.window_left, -1 if o.causal else o.window_right


def forward(call: Call) -> Result:
    if call.cache is not None:
        return _with_cache(call)
    (q, k, v), o, diagonal = _taken(call.q, call.k, call.v), call.options, call.counted_diagonal
    window, score = _window(call, diagonal), _score(call, diagonal)
    s_dmask = o.return_attn_probs and o.dropout_p > 0.0
    if not call.varlen:
        out, _, mask, rng_state = extension.load().fwd(
            q, k, v, None, call.alibi_slopes, *_after_slopes(call, window, s_dmask, score)
        )
    else:
        out, _, mask, rng_state = extension.load().varlen_fwd(
            q, k, v, None, call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_k, call.leftpad_k,
            call.block_table, call.alibi_slopes, o.max_seqlen_q, o.max_seqlen_k, o.dropout_p,
            o.softmax_scale, False, *window, o.softcap, s_dmask, None, False, score,
        )  # fmt: skip
    out = out if q is call.q else _cut(out, call.q)
    return Result(out, rng_state, mask if s_dmask else None) if o.dropout_p > 0.0 else Result(out)


def _after_slopes(call: Call, window: tuple, s_dmask: bool, score: Optional[tuple]) -> tuple:
    """Return the arguments of the extension's fwd after alibi_slopes."""
    o = call.options
    return o.dropout_p, o.softmax_scale, *window, o.softcap, s_dmask, None, False, score


def prepared(call: Call) -> Callable[..., torch.Tensor]:
    arguments = _after_slopes(call, _window(call, None), False, _score(call, None))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        taken = _taken(q, k, v)
        out = extension.load().fwd(*taken, None, None, *arguments)[0]
        return out if taken[0] is q else _cut(out, q)

    return run


def backward(call: Call, dout: torch.Tensor, rng_state: Optional[torch.Tensor]) -> tuple:
    (dout, q, k, v), o, diagonal = _taken(dout, call.q, call.k, call.v), call.options, call.counted_diagonal
    window, score = _window(call, diagonal), _score(call, diagonal)
    # Without softmax the extension reads neither `out` nor the log-sum-exp, but checks them: q has the shape
    # of `out`, and any tensor passes as the log-sum-exp.
    if not call.varlen:
        grads = extension.load().bwd(
            dout, q, k, v, q, q.new_empty(0, dtype=torch.float32), None, None, None, call.alibi_slopes,
            o.dropout_p, o.softmax_scale, *window, o.softcap, o.deterministic, None, rng_state, False, score,
        )  # fmt: skip
    else:
        grads = extension.load().varlen_bwd(
            dout, q, k, v, q, q.new_empty(0, dtype=torch.float32), None, None, None, call.cu_seqlens_q,
            call.cu_seqlens_k, call.alibi_slopes, o.max_seqlen_q, o.max_seqlen_k, o.dropout_p,
            o.softmax_scale, False, *window, o.softcap, o.deterministic, None, rng_state, False, score,
        )  # fmt: skip
    return tuple(_cut(grad, x) for grad, x in zip(grads[:3], (call.q, call.k, call.v)))


def _cut(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x if x.shape[-1] == like.shape[-1] else x[..., : like.shape[-1]]


def _with_cache(call: Call) -> Result:
    q, given, o = _contiguous(call.q), call.cache, call.options
    seqlens = given.cache_seqlens
    if seqlens is None and given.k is None and call.leftpad_k is not None:
        # The extension reads leftpad_k only if lengths are given.
        seqlens = torch.full((q.shape[0],), o.max_seqlen_k, dtype=torch.int32, device=q.device)
    out, _ = extension.load().fwd_kvcache(
        q, call.k, call.v, _contiguous(given.k), _contiguous(given.v), seqlens, given.rotary_cos,
        given.rotary_sin, given.cache_batch_idx, call.leftpad_k, call.block_table, call.alibi_slopes, None,
        o.softmax_scale, *_window(call, None), o.softcap, given.rotary_interleaved, given.num_splits, False,
        _score(call, None),
    )  # fmt: skip
    return Result(out)
