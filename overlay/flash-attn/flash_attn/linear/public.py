"""What the public functions call before their quadratic path."""

import math
from typing import Optional, Union

import torch

from ..cpu import checks
from .backend import has_kernels
from .checks import alike
from .choice import ALGORITHMS, obstacle, predicted_faster
from .ops import LinearAttention

_DENSE = ("batch, seqlen_q, nheads, head_dim", "batch, seqlen_k, nheads_k, head_dim")
_PACKED = ("total_q, nheads, head_dim", "total_k, nheads_k, head_dim")
_MAX_HEAD_DIM = 256


def in_linear_time(
    algorithm: str,
    tensors: tuple[torch.Tensor, ...],
    dropout_p: float,
    softmax_scale: Optional[float],
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Optional[torch.Tensor],
    return_attn_probs: bool,
    use_softmax: bool,
    activation: str,
    sigmoid_bias: Optional[float],
    normalization: Optional[str],
    cu_seqlens_q: Optional[torch.Tensor] = None,
    cu_seqlens_k: Optional[torch.Tensor] = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    block_table: Optional[torch.Tensor] = None,
) -> Union[None, torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The result of flash_attn_func, or of flash_attn_varlen_func if cu_seqlens_q is given, in linear time; None if the
    quadratic path shall run.

    tensors: (q, k, v), (q, kv) or (qkv,), the latter packed along their axis -3. The other arguments are those of these
    functions, the score function's checked by score_function.resolve. With return_attn_probs the result is (out, empty
    log-sum-exp, empty S_dmask). Raises ValueError if algorithm is none of ALGORITHMS; ValueError or TypeError if it is
    "linear" and an option or a tensor does not fit it.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r} is not one of {ALGORITHMS}")
    if algorithm == "quadratic" or (algorithm == "auto" and use_softmax):
        return None
    q, k, v = _unpacked(tensors)
    inexact = obstacle(
        q, dropout_p, causal, window_size, softcap, alibi_slopes, block_table, use_softmax, activation, normalization
    )
    if algorithm == "auto":
        if inexact is not None or not _fits(q, k, v, cu_seqlens_q) or not _pays(q, k, causal, cu_seqlens_q):
            return None
    elif inexact is not None:
        raise ValueError(
            f'algorithm="linear" is not possible with {inexact}: leave that out, or pass algorithm="auto" or "quadratic"'
        )
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if not abs(softmax_scale) < math.inf:  # math.isfinite can't be traced with dynamic shapes
        raise ValueError(f"softmax_scale={softmax_scale}: give a finite number, or None for 1/sqrt(head_dim)")
    # One query sees every key either way, and the full form is the cheaper one.
    causal = causal and (q.shape[1] if cu_seqlens_q is None else max_seqlen_q) > 1
    distinct_k = None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k
    out = LinearAttention.apply(
        q, k, v, cu_seqlens_q, distinct_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, False, normalization
    )
    if not return_attn_probs:
        return out
    return out, q.new_empty(0, dtype=torch.float32), q.new_empty(0)


def _unpacked(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if len(tensors) == 3:
        return tensors
    *first, packed = tensors
    name, count = ("kv", 2) if first else ("qkv", 3)
    if packed.dim() < 3 or packed.shape[-3] != count:
        raise ValueError(f"{name} has shape {tuple(packed.shape)}, expected {count} as its third axis from the end")
    return (*first, *packed.unbind(-3))


def _fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: Optional[torch.Tensor]) -> bool:
    """Whether the primitive takes these tensors; what is wrong with them otherwise, the quadratic path says."""
    axes = 4 if cu_seqlens_q is None else 3
    return (q.device.type == "cpu" or has_kernels(q)) and q.dim() == k.dim() == v.dim() == axes


def _pays(q: torch.Tensor, k: torch.Tensor, causal: bool, cu_seqlens_q: Optional[torch.Tensor]) -> bool:
    batch = 1 if cu_seqlens_q is None else max(cu_seqlens_q.shape[0] - 1, 1)
    return predicted_faster(q.device, q.shape[-1], causal, q.shape[-3] / batch, k.shape[-3] / batch)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: Optional[torch.Tensor],
    cu_seqlens_k: Optional[torch.Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> None:
    """Shapes, dtypes and devices; the values of cu_seqlens on the CPU alone, since reading them would stop a GPU."""
    axes_q, axes_k = _DENSE if cu_seqlens_q is None else _PACKED
    checks.rank("q", q, axes_q)
    checks.rank("k", k, axes_k)
    expected = (*q.shape[:-3], *k.shape[-3:-1], q.shape[-1])
    checks.shape("k", k, *expected, axes=axes_k)
    checks.shape("v", v, *expected, axes=axes_k)
    checks.heads(q.shape[-2], k.shape[-2], q.shape[-1])
    alike(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if has_kernels(q) and q.shape[-1] > _MAX_HEAD_DIM:
        raise ValueError(f"head_dim={q.shape[-1]}: the kernels go up to {_MAX_HEAD_DIM}")
    if cu_seqlens_q is None:
        return
    checks.rank("cu_seqlens_q", cu_seqlens_q, "batch + 1")
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError("cu_seqlens_q is empty: it has batch + 1 entries, the first of them 0")
    for name, x, total, longest in (
        ("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q),
        ("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k),
    ):
        if x.dtype != torch.int32:
            raise TypeError(f"{name} has dtype {x.dtype}, expected torch.int32")
        checks.shape(name, x, cu_seqlens_q.shape[0], axes="batch + 1")
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            checks.cu_seqlens(name, x.tolist(), total, longest)
