"""Replace upstream's import of its compiled extension: send softmax calls to the extension (CUDA) or to the
CPU.

The five functions take exactly the extension's positional arguments (csrc/flash_attn/flash_api.cpp). Calls
without softmax go to flash_attn/nosoftmax instead. Without the extension this module still imports, and only
a call with CUDA tensors fails.
"""

import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, Optional

import torch

USE_TRITON_ROCM = os.getenv("FLASH_ATTENTION_TRITON_AMD_ENABLE", "FALSE") == "TRUE"

# Upstream's argument names, which `make apply` compares with flash_api.cpp. [name]: some releases lack the
# argument, and the CPU ignores it. name/other: the name differs between releases.
SIGNATURES = {
    "fwd": "q k v out alibi_slopes p_dropout softmax_scale is_causal window_size_left window_size_right "
    "softcap return_softmax gen/unused_generator_compat",
    "varlen_fwd": "q k v out cu_seqlens_q cu_seqlens_k seqused_k leftpad_k block_table alibi_slopes "
    "max_seqlen_q max_seqlen_k p_dropout softmax_scale zero_tensors is_causal window_size_left "
    "window_size_right softcap return_softmax gen/unused_generator_compat",
    "bwd": "dout q k v out softmax_lse dq dk dv alibi_slopes p_dropout softmax_scale is_causal "
    "window_size_left window_size_right softcap deterministic gen/unused_generator_compat rng_state",
    "varlen_bwd": "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k alibi_slopes max_seqlen_q "
    "max_seqlen_k p_dropout softmax_scale zero_tensors is_causal window_size_left window_size_right softcap "
    "deterministic gen/unused_generator_compat rng_state",
    "fwd_kvcache": "q kcache vcache k v seqlens_k rotary_cos rotary_sin cache_batch_idx leftpad_k "
    "block_table alibi_slopes out softmax_scale is_causal window_size_left window_size_right softcap "
    "is_rotary_interleaved num_splits",
}
_BUILD = "build the CUDA wheel with `make wheel BACKEND=cuda` on a machine with nvcc and install it"
# For packages that call this one only because it is installed.
_INSTEAD = (
    'move the tensors to the CPU, or let the caller take another attention: attn_implementation="sdpa" in '
    "transformers"
)


def load(otherwise: str = "move the tensors to the CPU") -> Any:
    """Return the extension, or its replacement for ROCm. Raises ImportError that says how to build the
    extension, or what to do `otherwise`.
    """
    module, error = _found()
    if module is None:
        raise ImportError(
            f"this flash_attn can't run on CUDA tensors, its compiled extension did not load ({error}); "
            f"{_BUILD}, or {otherwise}"
        ) from error
    return module


def attribute_of_interface(name: str) -> Any:
    """Provide flash_attn_interface.flash_attn_gpu, by which other packages find the extension. Raises
    AttributeError without the extension, so that they don't mistake this module for it.
    """
    if name == "flash_attn_gpu" and _found()[0] is not None:
        return sys.modules[__name__]
    raise AttributeError(f"module 'flash_attn.flash_attn_interface' has no attribute {name!r}")


@cache
def _found() -> tuple[Any, Optional[ImportError]]:
    # Cached: a failing import is slow, and the installation does not change while a process runs.
    try:
        if USE_TRITON_ROCM:
            from .flash_attn_triton_amd import interface_fa

            return interface_fa, None
        import flash_attn_2_cuda
    except ImportError as error:
        # Its traceback would keep the first call's frames, and so its tensors and groups, for ever.
        return None, error.with_traceback(None)
    return flash_attn_2_cuda, None


@cache
def obstacle() -> Optional[str]:
    """Say why this installation can't run calls without softmax on CUDA tensors, and what to do; None if it
    can.
    """
    try:
        extension = load()
    except ImportError as error:
        return str(error)
    if USE_TRITON_ROCM or torch.version.hip is not None:
        return "use_softmax=False has no ROCm kernels: run it on an NVIDIA GPU or on CPU tensors"
    if not getattr(extension, "has_use_softmax", False):
        return (
            f"{extension.__name__} has no kernels for use_softmax=False, it was built from unpatched "
            f"sources; {_BUILD}, or move the tensors to the CPU"
        )
    return None


def _device(names: list[str], args: tuple[Any, ...]) -> torch.device:
    """Return the device of all tensors. A 0-d tensor counts as a number, and may be on any device."""
    devices = {n: a.device for n, a in zip(names, args) if isinstance(a, torch.Tensor) and a.dim() > 0}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(
            f"the tensors of one attention call must be on one device, got {listed}: move them with .to()"
        )
    return devices["q"]


def _entry(function: str) -> Callable[..., Any]:
    table = SIGNATURES[function].split()
    everywhere = [name for name in table if not name.startswith("[")]
    # Keyed by count, as a release has all or none of the arguments in brackets.
    forms = {len(names): [name.strip("[]") for name in names] for names in (table, everywhere)}

    def call(*args: Any) -> Any:
        if len(args) not in forms:
            raise TypeError(
                f"{function}() takes {' or '.join(map(str, sorted(forms)))} arguments "
                f"({', '.join(table)}) and got {len(args)}: call it with all of them, by position"
            )
        names = forms[len(args)]
        device = _device(names, args)
        if device.type == "cpu":
            from .nosoftmax.backends.cpu import softmax

            return getattr(softmax, function)(*[a for name, a in zip(names, args) if name in everywhere])
        if device.type != "cuda":
            raise NotImplementedError(
                f"q is on {device}: attention runs on CUDA and CPU tensors, move them with .to()"
            )
        return getattr(load(_INSTEAD), function)(*args)

    call.__name__ = call.__qualname__ = function
    call.__doc__ = f"{function}({', '.join(table)})"
    return call


fwd = _entry("fwd")
varlen_fwd = _entry("varlen_fwd")
bwd = _entry("bwd")
varlen_bwd = _entry("varlen_bwd")
fwd_kvcache = _entry("fwd_kvcache")
