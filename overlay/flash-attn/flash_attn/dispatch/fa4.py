"""FA4's CuTe-DSL kernels, of this patch set's flash-attn-4, for calls without softmax on Hopper.

The package is imported at the first call that it may take: that takes seconds, and it has requirements of its own.
"""

import functools
from importlib import import_module, metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any, Optional, Union

import torch

from ..call import Call
from ..tracing import constant_when_traced
from . import fa2

_PACKAGE = "flash_attn.cute"
_DEVICE_TYPE = "cuda"
_HOPPER = 9
# The work of a forward, in floating-point operations, from which on FA4 takes less time than the extension. It is the faster
# kernel, but is launched from Python, which costs the host as much or more. docs/backends.md has what was measured.
MIN_WORK = 60e9
# What it takes with every value that the public functions take: its `unsupported` does not ask for it.
_ANY_VALUE = ("causal", "deterministic", "use_softmax", "sigmoid_bias", "max_seqlen_q", "max_seqlen_k")


def obstacle(call: Call) -> Optional[str]:
    """Why FA4 does not take this call; None if it does."""
    if call.use_softmax:
        return "use_softmax=True, and softmax stays on the backend of the tensors' device"
    if call.q.device.type != _DEVICE_TYPE:
        return f"q is on {call.q.device}, it takes CUDA tensors"
    if call.cached:
        return "flash_attn_with_kvcache appends to a cache, which it does not"
    reason = _unavailable(call.q.device.index)
    if reason is not None:
        return reason
    from ..cute.nosoftmax.checks import unsupported

    checked = {name: value for name, value in options(call).items() if name not in _ANY_VALUE}
    return unsupported(call.q, call.k, call.v, dropout_p=call.dropout_p, alibi_slopes=call.alibi_slopes, **checked)


def disadvantage(call: Call) -> Optional[str]:
    """Why "auto" passes FA4 over though it takes the call: the extension runs it too, and sooner. None if not."""
    work = forward_work(call)
    if work >= MIN_WORK or not fa2.runs(call, arch=10 * _HOPPER):
        return None
    return f"{work / 1e9:.3g} GFLOP are less than the {MIN_WORK / 1e9:.0f} at which it overtakes the extension (docs/backends.md)"


def forward_work(call: Call) -> float:
    """Floating-point operations of the two matrix products of a forward, of visible scores alone.

    With cu_seqlens all sequences are taken to have the mean length, and with pages the longest: reading lengths would stop a GPU.
    """
    q, k = call.q, call.k
    seqlen_q, seqlen_k, queries = q.shape[-3], k.shape[-3], q.shape[0] if call.varlen else q.shape[0] * q.shape[1]
    if call.varlen:
        sequences = max(call.cu_seqlens_q.shape[0] - 1, 1)
        seqlen_q /= sequences
        seqlen_k = seqlen_k / sequences if call.block_table is None else call.max_seqlen_k
    left, right = call.window_size
    right = 0 if call.causal else right
    keys = seqlen_k - min(seqlen_q, seqlen_k) / 2 if right == 0 else seqlen_k  # of a query, in the mean
    if left >= 0 and right >= 0:
        keys = min(keys, left + 1 + right)
    return 2.0 * queries * q.shape[-2] * keys * (q.shape[-1] + call.v.shape[-1])


def attend(call: Call) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Run a call that has no obstacle; what the public function returns."""
    from .. import cute

    function = cute.flash_attn_varlen_func if call.varlen else cute.flash_attn_func
    given = options(call)
    if call.block_table is not None:
        given["seqused_k"] = call.cu_seqlens_k.diff()
    returned = function(call.q, call.k, call.v, **given)
    return call.result(returned[0] if isinstance(returned, tuple) else returned)


def options(call: Call) -> dict[str, Any]:
    """The call's keyword arguments for flash_attn.cute.flash_attn_func or flash_attn_varlen_func."""
    given: dict[str, Any] = {
        "softmax_scale": call.softmax_scale,
        "causal": call.causal,
        "window_size": tuple(None if size < 0 else size for size in call.window_size),
        "softcap": call.softcap,
        "deterministic": call.deterministic,
        "use_softmax": False,
        "activation": call.activation,
        "sigmoid_bias": call.sigmoid_bias,
        "normalization": call.normalization,
    }
    if not call.varlen:
        return given
    given.update(cu_seqlens_q=call.cu_seqlens_q, max_seqlen_q=call.max_seqlen_q, max_seqlen_k=call.max_seqlen_k)
    if call.block_table is None:
        return {**given, "cu_seqlens_k": call.cu_seqlens_k}
    # Pages do not lie one after the other: it takes the lengths of their sequences (seqused_k) and no offsets.
    return {**given, "page_table": call.block_table}


@constant_when_traced
def _unavailable(device_index: Optional[int]) -> Optional[str]:
    """Why FA4 does not run on this GPU, whatever the call. Nothing for torch.compile to trace."""
    return _unavailable_in_this_process(device_index)


@functools.cache
def _unavailable_in_this_process(device_index: Optional[int]) -> Optional[str]:
    if torch.version.hip is not None:
        return "it has no ROCm kernels"
    try:
        major, minor = torch.cuda.get_device_capability(device_index)
    except (AssertionError, RuntimeError) as error:  # tensors without a GPU: those of a FakeTensorMode
        return f"torch does not reach the GPU ({error})"
    if major != _HOPPER:
        return f"compute capability {major}.{minor}, its kernels without softmax run on Hopper (9.0)"
    return _not_importable()


def _not_importable() -> Optional[str]:
    """Finds the package without importing it, and imports it if it is the one with this patch set."""
    spec = find_spec(_PACKAGE)
    if spec is None:
        return "flash-attn-4 is not installed: install the wheel of this patch set (make wheel FAMILY=flash-attn-4)"
    if PathFinder.find_spec(f"{_PACKAGE}.nosoftmax", spec.submodule_search_locations or []) is None:
        return (
            f"flash-attn-4 {_version()} is installed without this patch set: install the wheel of "
            "make wheel FAMILY=flash-attn-4 in its place"
        )
    try:
        import_module(f"{_PACKAGE}.nosoftmax.checks")
        import_module(_PACKAGE).flash_attn_func  # noqa: B018 - whatever it loads late is loaded now
    except Exception as error:  # whatever its requirements raise: another backend serves
        return f"flash-attn-4 {_version()} does not import ({type(error).__name__}: {error}): install it with its requirements"
    return None


def _version() -> str:
    try:
        return metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:
        return "of unknown version"
