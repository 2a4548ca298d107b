"""Sends each attention call to the backend of its tensors: the compiled extension (CUDA) or flash_attn.cpu (CPU).

This module stands where upstream imports the extension. It has the extension's five functions with the extension's
positional arguments (csrc/flash_attn/flash_api.cpp) and, after those, four that may be left out:

    use_softmax: bool = True, activation: str = "identity", sigmoid_bias: Optional[float] = 0.0,
    normalization: Optional[str] = None

which mean what flash_attn/score_function.py says; sigmoid_bias None is "-log n". With use_softmax=True the extension
gets exactly upstream's arguments. With use_softmax=False softmax_lse is empty, and the backward functions don't read
``out`` and ``softmax_lse``.

A machine without the extension imports this module like any other: only a call with CUDA tensors fails.
"""

import os
from collections.abc import Callable
from typing import Any, Optional, Union

import torch

from . import cpu
from .tracing import constant_when_traced

USE_TRITON_ROCM = os.getenv("FLASH_ATTENTION_TRITON_AMD_ENABLE", "FALSE") == "TRUE"

_SIGNATURES = {
    "fwd": "q k v out alibi_slopes dropout_p softmax_scale causal window_size_left window_size_right softcap "
    "return_softmax gen",
    "varlen_fwd": "q k v out cu_seqlens_q cu_seqlens_k seqused_k leftpad_k block_table alibi_slopes max_seqlen_q "
    "max_seqlen_k dropout_p softmax_scale zero_tensors causal window_size_left window_size_right softcap "
    "return_softmax gen",
    "bwd": "dout q k v out softmax_lse dq dk dv alibi_slopes dropout_p softmax_scale causal window_size_left "
    "window_size_right softcap deterministic gen rng_state",
    "varlen_bwd": "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k alibi_slopes max_seqlen_q "
    "max_seqlen_k dropout_p softmax_scale zero_tensors causal window_size_left window_size_right softcap "
    "deterministic gen rng_state",
    "fwd_kvcache": "q kcache vcache k v seqlens_k rotary_cos rotary_sin cache_batch_idx leftpad_k block_table "
    "alibi_slopes out softmax_scale causal window_size_left window_size_right softcap rotary_interleaved num_splits",
}
_SCORE_FUNCTION_DEFAULTS = (True, "identity", 0.0, None)
_BUILD = "build the CUDA wheel with `make wheel BACKEND=cuda` on a machine with nvcc and install it"


def _device(names: list[str], args: tuple[Any, ...]) -> torch.device:
    """The one device of all tensors. A tensor without dimensions is a number, which any device can be given."""
    devices = {n: a.device for n, a in zip(names, args) if isinstance(a, torch.Tensor) and a.dim() > 0}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"the tensors of one attention call must be on one device, got {listed}: move them with .to()")
    return devices["q"]


def _gpu_extension() -> Any:
    if USE_TRITON_ROCM:
        from .flash_attn_triton_amd import interface_fa

        return interface_fa
    try:
        import flash_attn_2_cuda
    except ImportError as error:
        raise ImportError(
            f"this flash_attn can't run on CUDA tensors, its compiled extension did not load ({error}); "
            f"{_BUILD}, or move the tensors to the CPU"
        ) from error
    return flash_attn_2_cuda


def obstacle(
    use_softmax: bool, activation: str, sigmoid_bias: Union[float, str, None], normalization: Optional[str]
) -> Optional[str]:
    """Why the extension can't run calls with this score function, with a way out; None if it can."""
    missing = _missing(use_softmax)
    if missing is not None or use_softmax or (activation, sigmoid_bias, normalization) == ("identity", 0.0, None):
        return missing
    return (
        f"flash_attn_2_cuda has no kernels for activation={activation!r}, sigmoid_bias="
        f"{'-log n' if sigmoid_bias is None else sigmoid_bias!r}, normalization={normalization!r}; on Hopper flash-attn-4 of "
        "this patch set has them (make wheel FAMILY=flash-attn-4), and flash_attn.cpu has: move the tensors to the CPU"
    )


@constant_when_traced
def built() -> tuple[tuple[Any, ...], ...]:
    """The head sizes, dtypes, passes and compute capabilities of the extension, which must be there."""
    extension = _gpu_extension()
    return extension.built_head_dims, extension.built_dtypes, extension.built_passes, extension.built_archs


@constant_when_traced
def _missing(use_softmax: bool) -> Optional[str]:
    """What this installation lacks to run any call on CUDA tensors. Nothing for torch.compile to trace."""
    try:
        extension = _gpu_extension()
    except ImportError as error:
        return str(error)
    if use_softmax:
        return None
    if USE_TRITON_ROCM or torch.version.hip is not None:
        return "use_softmax=False has no ROCm kernels: run it on an NVIDIA GPU or on CPU tensors"
    if not getattr(extension, "has_use_softmax", False):
        return (
            f"{extension.__name__} has no kernels for use_softmax=False, it was built from unpatched sources; "
            f"{_BUILD}, or move the tensors to the CPU"
        )
    return None


def _entry(function: str) -> Callable[..., Any]:
    names = _SIGNATURES[function].split()

    def call(*args: Any) -> Any:
        upstream, given = args[: len(names)], args[len(names) :]
        if len(upstream) < len(names):
            raise TypeError(f"{function}() lacks its last arguments: {', '.join(names[len(upstream):])}")
        device = _device(names, args)
        if device.type == "cpu":
            return getattr(cpu, function)(*args)
        if device.type != "cuda":
            raise NotImplementedError(f"q is on {device}: attention runs on CUDA and CPU tensors, move them with .to()")
        extension = _gpu_extension()
        use_softmax, *score_function = given + _SCORE_FUNCTION_DEFAULTS[len(given) :]
        if use_softmax:
            return getattr(extension, function)(*upstream)
        reason = obstacle(False, *score_function)
        if reason is not None:
            raise NotImplementedError(reason)
        if "softmax_lse" in names:
            # It checks the shape of `out`, which it does not read without softmax and our callers don't keep: q has it.
            upstream = tuple(args[names.index("q")] if name == "out" else arg for name, arg in zip(names, upstream))
        return getattr(extension, function)(*upstream, False)

    call.__name__ = call.__qualname__ = function
    call.__doc__ = f"{function}({', '.join(names)}, use_softmax, activation, sigmoid_bias, normalization)"
    return call


fwd = _entry("fwd")
varlen_fwd = _entry("varlen_fwd")
bwd = _entry("bwd")
varlen_bwd = _entry("varlen_bwd")
fwd_kvcache = _entry("fwd_kvcache")
