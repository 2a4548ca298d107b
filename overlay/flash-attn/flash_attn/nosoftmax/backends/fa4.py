"""Run calls on FA4's CuTe-DSL kernels for Hopper, from this patch set's flash-attn-4.

The package is imported at the first call that it may run, because the import takes seconds and has its own
requirements. flash_attn/cute/nosoftmax says which calls its kernels take.
"""

import functools
from importlib import import_module, metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Optional

import torch

from ..call import Call, forward_work
from ..revision import REVISION
from . import Result, fa2

_PACKAGE = "flash_attn.cute"
_HOPPER = 9
# The floating-point operations of a forward pass above which FA4 takes less time than the extension. Its
# kernel is faster, but its launch from Python costs the host as much or more. docs/backends.md has the
# measurements.
MIN_WORK = 60e9


def obstacle(call: Call) -> Optional[str]:
    """Why FA4 does not take this call; None if it does."""
    if call.cache is not None:
        return "flash_attn_with_kvcache appends to a cache, which it does not"
    reason = _unavailable(call.q.device.index)
    return _hopper().obstacle(call) if reason is None else reason


def disadvantage(call: Call) -> Optional[str]:
    """Why "auto" passes over FA4 although it takes the call: the extension runs it sooner. None if not."""
    work = forward_work(call)
    if work >= MIN_WORK or not fa2.runs(call, arch=10 * _HOPPER):
        return None
    return (
        f"{work / 1e9:.3g} GFLOP are less than the {MIN_WORK / 1e9:.0f} at which it overtakes the "
        "extension (docs/backends.md)"
    )


def forward(call: Call) -> Result:
    return Result(_hopper().forward(call))


def backward(call: Call, dout: torch.Tensor, rng_state: Optional[torch.Tensor]) -> tuple:
    return _hopper().backward(call, dout)


@functools.cache
def _hopper() -> ModuleType:
    return import_module(f"{_PACKAGE}.nosoftmax.hopper")


@functools.cache
def _unavailable(device_index: Optional[int]) -> Optional[str]:
    """Why FA4 does not run on this GPU, whatever the call."""
    if torch.version.hip is not None:
        return "it has no ROCm kernels"
    try:
        major, minor = torch.cuda.get_device_capability(device_index)
    except (AssertionError, RuntimeError) as error:  # tensors without a GPU: those of a FakeTensorMode
        return f"torch does not reach the GPU ({error})"
    if major != _HOPPER:
        return f"compute capability {major}.{minor}, its kernels without softmax run on Hopper (9.0)"
    return not_importable()


def not_importable() -> Optional[str]:
    """Why the package can't be imported; None if it can. Imports it only if it has this patch set."""
    spec = find_spec(_PACKAGE)
    if spec is None:
        return (
            "flash-attn-4 is not installed: install the wheel of this patch set (make wheel "
            "FAMILY=flash-attn-4)"
        )
    if PathFinder.find_spec(f"{_PACKAGE}.nosoftmax", spec.submodule_search_locations or []) is None:
        return (
            f"flash-attn-4 {_version()} is installed without this patch set: install the wheel of "
            "make wheel FAMILY=flash-attn-4 in its place"
        )
    try:
        revision = _revision()
        if revision != REVISION:
            return (
                f"flash-attn-4 {_version()} has revision {revision} of this patch set, flash_attn has "
                f"revision {REVISION}: install two wheels of one revision"
            )
        import_module(f"{_PACKAGE}.nosoftmax.hopper")
    except Exception as error:  # a requirement may raise anything, and another backend can run the call
        return (
            f"flash-attn-4 {_version()} does not import ({type(error).__name__}: {error}): install it "
            "with its requirements"
        )
    return None


def _revision() -> object:
    """Return the revision of the flash-attn-4 wheel. Revision 1 has no such module."""
    try:
        return import_module(f"{_PACKAGE}.nosoftmax.revision").REVISION
    except ModuleNotFoundError as error:
        if error.name != f"{_PACKAGE}.nosoftmax.revision":
            raise
        return 1


def _version() -> str:
    try:
        return metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:
        return "of unknown version"
