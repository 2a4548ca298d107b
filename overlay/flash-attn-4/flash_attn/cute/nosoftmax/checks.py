"""What the Hopper kernels without softmax serve. Imports neither cutlass nor a kernel, and launches nothing."""

import functools
import math
import os
import re
from importlib.util import find_spec
from typing import Any, Optional

import torch

from .score_function import ACTIVATIONS, NORMALIZATIONS

# Beyond it the backward with head_dim_v > head_dim accesses memory that is not its own.
_WIDEST_LARGER_V = 128
_OTHER_GPUS = "the flash_attn package of this project (FA2 kernels) runs without softmax on Ampere, Ada and later GPUs"


def require_dsl() -> None:
    """Raises ImportError with the package to install if the compiler of these kernels is missing."""
    if find_spec("cutlass") is None:
        raise ImportError(
            "flash_attn.cute compiles its kernels with nvidia-cutlass-dsl, which is not installed: "
            'pip install "nvidia-cutlass-dsl[cu13]" for CUDA 13, pip install nvidia-cutlass-dsl for CUDA 12'
        )


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    """Of the GPU, or of the one that upstream's FLASH_ATTENTION_ARCH names. Nothing for torch.compile to trace."""
    return _capability_in_this_process(device)


@functools.cache
def _capability_in_this_process(device: torch.device) -> tuple[int, int]:
    # With sm_90 the variable lets kernels be compiled where there is no GPU.
    if arch := re.search(r"(\d+)(\d)", os.environ.get("FLASH_ATTENTION_ARCH", "")):
        return int(arch[1]), int(arch[2])
    return torch.cuda.get_device_capability(device)


def _device_reason(device: torch.device) -> Optional[str]:
    if device.type != "cuda":
        return f"these kernels run on CUDA tensors, got a tensor on {device}"
    major, minor = _capability(device)
    if major != 9:
        return (
            f"these kernels are written for Hopper (compute capability 9.0), {device} has {major}.{minor}; "
            f"{_OTHER_GPUS}"
        )
    return None


def _shape_reason(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed_q: bool, packed_k: bool, paged: bool
) -> Optional[str]:
    for name, x, packed in (("q", q, packed_q), ("k", k, packed_k), ("v", v, packed_k)):
        dims = 3 if packed else 4
        if x.dim() != dims:
            return f"{name} has {x.dim()} dimensions, expected {dims}: {tuple(x.shape)}"
        if x.dtype not in (torch.float16, torch.bfloat16):
            return f"these kernels take float16 and bfloat16, {name} is {x.dtype}"
        if x.dtype != q.dtype:
            return f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        if x.device != q.device:
            return f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}"
    for name, size in (("head_dim", q.shape[-1]), ("head_dim_v", v.shape[-1])):
        if size % 8 or not 8 <= size <= 256:
            return f"{name} must be a multiple of 8 from 8 to 256, got {size}"
        if paged and size % 16:
            return f"{name} must be a multiple of 16 with a page_table, got {size}"
    if k.shape[-1] != q.shape[-1]:
        return f"q has head size {q.shape[-1]}, k has {k.shape[-1]}"
    if k.shape[:-1] != v.shape[:-1]:
        return f"k {tuple(k.shape)} and v {tuple(v.shape)} differ in more than the head size"
    nheads, nheads_k = q.shape[-2], k.shape[-2]
    if nheads_k == 0 or nheads % nheads_k:
        return f"the heads of q ({nheads}) must be a multiple of the heads of k ({nheads_k})"
    if not packed_q and not packed_k and not paged and q.shape[0] != k.shape[0]:
        return f"q has batch size {q.shape[0]}, k has {k.shape[0]}"
    return None


def _grad_reason(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, paged: bool) -> Optional[str]:
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        return None
    if paged:
        return "there is no backward with a page_table: call it under torch.no_grad()"
    if q.shape[-2] != k.shape[-2] and q.shape[-1] != v.shape[-1]:
        return (
            f"the backward with grouped heads needs head_dim == head_dim_v, got {q.shape[-1]} and {v.shape[-1]} "
            f"with {q.shape[-2]} heads of q and {k.shape[-2]} of k"
        )
    if v.shape[-1] > max(q.shape[-1], _WIDEST_LARGER_V):
        return (
            f"the backward with head_dim_v > head_dim needs head_dim_v <= {_WIDEST_LARGER_V}, got {v.shape[-1]} and "
            f"{q.shape[-1]}: call it under torch.no_grad(), or pad q and k with zeros to head_dim_v, with the softmax_scale "
            "of the smaller head_dim"
        )
    return None


def unsupported(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: Optional[torch.Tensor] = None,
    cu_seqlens_k: Optional[torch.Tensor] = None,
    seqused_q: Optional[torch.Tensor] = None,
    seqused_k: Optional[torch.Tensor] = None,
    page_table: Optional[torch.Tensor] = None,
    softmax_scale: Optional[float] = None,
    softcap: float = 0.0,
    activation: str = "identity",
    normalization: Optional[str] = None,
    window_size: tuple[Optional[int], Optional[int]] = (None, None),
    dropout_p: float = 0.0,
    alibi_slopes: Optional[torch.Tensor] = None,
    leftpad_k: Optional[torch.Tensor] = None,
    learnable_sink: Optional[torch.Tensor] = None,
    qv: Any = None,
    gather_kv_indices: Any = None,
    num_splits: int = 1,
    return_lse: bool = False,
    mask_mod: Any = None,
    block_sparse_tensors: Any = None,
) -> Optional[str]:
    """Why these kernels do not serve a call without softmax, for people; None if they do. Launches nothing.

    q: (batch, seqlen_q, nheads, head_dim), or (total_q, nheads, head_dim) with cu_seqlens_q. k, v: the same for keys,
    or (num_pages, page_size, nheads_k, head_dim) with page_table.
    """
    paged = page_table is not None
    for name, is_set in (
        ("dropout_p", dropout_p != 0.0),
        ("alibi_slopes", alibi_slopes is not None),
        ("leftpad_k", leftpad_k is not None),
        ("learnable_sink", learnable_sink is not None),
        ("qv", qv is not None),
        ("gather_kv_indices", gather_kv_indices is not None),
    ):
        if is_set:
            return f"the FA4 kernels without softmax have no {name}"
    if num_splits != 1:
        return f"the FA4 kernels without softmax do not split the keys: num_splits must be 1, got {num_splits}"
    if return_lse:
        return "there is no log-sum-exp without softmax: return_lse must be False"
    if activation not in ACTIVATIONS or normalization not in NORMALIZATIONS:
        return f"activation={activation!r}, normalization={normalization!r} are not known"
    if softcap < 0.0 or (softcap > 0.0 and softmax_scale is not None and softmax_scale <= 0.0):
        return f"softcap needs softcap > 0 and softmax_scale > 0, got softcap={softcap}, softmax_scale={softmax_scale}"
    if softmax_scale is not None and not abs(softmax_scale) < math.inf:  # math.isfinite can't be traced
        return f"softmax_scale={softmax_scale}: give a finite number, or None for 1/sqrt(head_dim)"
    if any(side is not None and side < -1 for side in window_size):
        return f"window_size={window_size}: give None or -1 for no limit, else a number of keys"
    if paged and cu_seqlens_k is not None:
        return "page_table goes with seqused_k, not with cu_seqlens_k"
    if mask_mod is not None and normalization == "1/visible":
        return 'normalization="1/visible" counts keys by causal and window_size, it cannot count those of a mask_mod'
    if block_sparse_tensors is not None and normalization == "1/visible":
        return 'normalization="1/visible" counts keys by causal and window_size, it cannot count sparse blocks'
    return (
        _shape_reason(q, k, v, cu_seqlens_q is not None, cu_seqlens_k is not None, paged)
        or _device_reason(q.device)
        or _grad_reason(q, k, v, paged)
    )
