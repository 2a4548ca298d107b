"""The CUDA extension of this package: what it takes."""

from typing import Optional

import torch

from .. import backends
from ..call import Call

_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_HEAD_DIMS = (32, 64, 96, 128, 192, 256)  # of the kernels: others are padded to the next one
_PAGE_SIZE = 256  # pages are a multiple of it


def obstacle(call: Call) -> Optional[str]:
    """Why the extension has no kernels for the score function of this call; None if it does. The rest it says itself."""
    if call.q.device.type != "cuda":
        return f"q is on {call.q.device}, it takes CUDA tensors"
    return backends.obstacle(call.use_softmax, call.activation, call.sigmoid_bias, call.normalization)


def runs(call: Call, arch: int) -> bool:
    """Whether the extension would run this call: no obstacle, shapes that it takes, and all kernels in this build.

    arch: the GPU's compute capability, such as 90. Shapes are taken to fit together.
    """
    if obstacle(call) is not None or call.v.shape[-1] != call.q.shape[-1]:
        return False
    if call.block_table is not None and call.k.shape[1] % _PAGE_SIZE:
        return False
    head_dims, dtypes, passes, archs = backends.built()
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v))
    needed = ("fwd", "splitkv", "bwd") if needs_grad else ("fwd", "splitkv")
    return (
        next((size for size in _HEAD_DIMS if call.q.shape[-1] <= size), None) in head_dims
        and _DTYPES.get(call.q.dtype) in dtypes
        and all(name in passes for name in needed)
        and arch in archs
    )
