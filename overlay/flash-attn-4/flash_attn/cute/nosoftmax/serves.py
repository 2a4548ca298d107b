"""Say which calls the Hopper kernels without softmax take. Imports neither cutlass nor a kernel, and launches
nothing.
"""

import functools
import os
import re
from importlib.util import find_spec
from typing import Any, Optional

import torch

from .call import Call, needs_grad

# Beyond this head_dim_v, the backward with head_dim_v > head_dim accesses memory out of bounds.
_WIDEST_LARGER_V = 128
_OTHER_GPUS = (
    "the flash_attn package of this project (FA2 kernels) runs without softmax on Ampere, Ada and later GPUs"
)


def require_dsl() -> None:
    """Raise ImportError with the package to install if the compiler of these kernels is missing."""
    if find_spec("cutlass") is None:
        raise ImportError(
            "flash_attn.cute compiles its kernels with nvidia-cutlass-dsl, which is not installed: "
            'pip install "nvidia-cutlass-dsl[cu13]" for CUDA 13, pip install nvidia-cutlass-dsl for CUDA 12'
        )


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    """Return the capability of the GPU, or of the one that upstream's FLASH_ATTENTION_ARCH names.
    torch.compile does not trace this.
    """
    return _capability_in_this_process(device)


@functools.cache
def _capability_in_this_process(device: torch.device) -> tuple[int, int]:
    # With sm_90, the variable allows compilation without a GPU.
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


def _shape_reason(call: Call) -> Optional[str]:
    q, v = call.q, call.v
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"these kernels take float16 and bfloat16, q is {q.dtype}"
    for name, size in (("head_dim", q.shape[-1]), ("head_dim_v", v.shape[-1])):
        if size % 8 or not 8 <= size <= 256:
            return f"{name} must be a multiple of 8 from 8 to 256, got {size}"
        if call.block_table is not None and size % 16:
            return f"{name} must be a multiple of 16 with pages, got {size}"
    return None


def _grad_reason(call: Call) -> Optional[str]:
    if not needs_grad(call):
        return None
    if call.block_table is not None:
        return "pages have no backward: call this under torch.no_grad(), or detach q, k and v"
    nheads, nheads_k, head_dim, head_dim_v = (
        call.q.shape[-2],
        call.k.shape[-2],
        call.q.shape[-1],
        call.v.shape[-1],
    )
    if nheads != nheads_k and head_dim != head_dim_v:
        return (
            f"the backward with grouped heads needs head_dim == head_dim_v, got {head_dim} and {head_dim_v} "
            f"with {nheads} heads of q and {nheads_k} of k"
        )
    if head_dim_v > max(head_dim, _WIDEST_LARGER_V):
        return (
            f"the backward with head_dim_v > head_dim needs head_dim_v <= {_WIDEST_LARGER_V}, got "
            f"{head_dim_v} and {head_dim}: call it under torch.no_grad(), or pad q and k with zeros to "
            "head_dim_v, with the softmax_scale of the smaller head_dim"
        )
    return None


def obstacle(
    call: Call,
    *,
    learnable_sink: Optional[torch.Tensor] = None,
    qv: Any = None,
    gather_kv_indices: Any = None,
    num_splits: int = 1,
    return_lse: bool = False,
    mask_mod: Any = None,
    block_sparse_tensors: Any = None,
) -> Optional[str]:
    """Why these kernels do not take a checked call without softmax, as text; None if they do. Launches
    nothing.
    """
    for name, is_set in (
        ("dropout_p", call.options.dropout_p != 0.0),
        ("alibi_slopes", call.alibi_slopes is not None),
        ("leftpad_k", call.leftpad_k is not None),
        ("learnable_sink", learnable_sink is not None),
        ("qv", qv is not None),
        ("gather_kv_indices", gather_kv_indices is not None),
    ):
        if is_set:
            return f"the FA4 kernels without softmax have no {name}"
    if num_splits != 1:
        return (
            f"the FA4 kernels without softmax do not split the keys: num_splits must be 1, got {num_splits}"
        )
    if return_lse:
        return "there is no log-sum-exp without softmax: return_lse must be False"
    if mask_mod is not None and call.options.normalization == "1/visible":
        return (
            'normalization="1/visible" counts keys by causal and window_size, it cannot count those of a '
            "mask_mod"
        )
    if block_sparse_tensors is not None and call.options.normalization == "1/visible":
        return (
            'normalization="1/visible" counts keys by causal and window_size, it cannot count sparse blocks'
        )
    return _shape_reason(call) or _device_reason(call.q.device) or _grad_reason(call)
