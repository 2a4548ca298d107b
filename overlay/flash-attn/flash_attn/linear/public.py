"""A call of a public function in linear time."""

import math
from typing import Union

import torch

from ..call import Call
from ..cpu import checks
from . import ops
from .backend import has_kernels
from .checks import alike

_DENSE = ("batch, seqlen_q, nheads, head_dim", "batch, seqlen_k, nheads_k, head_dim")
_PACKED = ("total_q, nheads, head_dim", "total_k, nheads_k, head_dim")
_MAX_HEAD_DIM = 256


def attend(call: Call) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Run a call that choice.obstacle has nothing against, in linear time; what the public function returns.

    Raises ValueError or TypeError for tensors that do not fit together.
    """
    _check(call)
    q, k = call.q, call.k
    softmax_scale = q.shape[-1] ** -0.5 if call.softmax_scale is None else call.softmax_scale
    if not abs(softmax_scale) < math.inf:  # math.isfinite can't be traced with dynamic shapes
        raise ValueError(f"softmax_scale={softmax_scale}: give a finite number, or None for 1/sqrt(head_dim)")
    # One query sees every key either way, and the full form is the cheaper one.
    causal = call.causal and (call.max_seqlen_q if call.varlen else q.shape[1]) > 1
    distinct_k = None if call.cu_seqlens_k is call.cu_seqlens_q else call.cu_seqlens_k
    lengths = (call.cu_seqlens_q, distinct_k, call.max_seqlen_q, call.max_seqlen_k)
    return call.result(ops.attend(q, k, call.v, *lengths, softmax_scale, causal, False, call.normalization))


def _check(call: Call) -> None:
    """Shapes, dtypes and devices; the values of cu_seqlens on the CPU alone, since reading them would stop a GPU."""
    q, k, v, cu_seqlens_q, cu_seqlens_k = call.q, call.k, call.v, call.cu_seqlens_q, call.cu_seqlens_k
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
        ("cu_seqlens_q", cu_seqlens_q, q.shape[0], call.max_seqlen_q),
        ("cu_seqlens_k", cu_seqlens_k, k.shape[0], call.max_seqlen_k),
    ):
        if x.dtype != torch.int32:
            raise TypeError(f"{name} has dtype {x.dtype}, expected torch.int32")
        checks.shape(name, x, cu_seqlens_q.shape[0], axes="batch + 1")
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            checks.cu_seqlens(name, x.tolist(), total, longest)
