"""Pytest plugin that runs upstream's own tests, written for a GPU, on the CPU backend.

Upstream's test files say ``device="cuda"`` and ask for the compute capability while they are imported, so
without a GPU they cannot even be collected. This plugin

- sends every ``"cuda"`` that a torch function is given to the CPU,
- answers what the files ask of ``torch.cuda`` (capability, properties, synchronize, memory counters),
- says that a block of the kernel is a whole row: the CPU backend returns exp(s - row maximum) where the GPU
  kernels return exp(s - maximum so far), which is the same thing for one block (see
  ``normalize_flash_attn_S`` in upstream's file).

On a machine with GPUs and the compiled extension it only spreads the test processes over the GPUs.
Use: ``pytest -p cpu_as_cuda`` with this folder on PYTHONPATH.
"""

from __future__ import annotations

import importlib.util
import os
import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

A100 = (8, 0)  # upstream's files skip nothing for this capability
WHOLE_ROW = 1 << 30


def on_gpu() -> bool:
    """Whether upstream's tests can run as they are: a GPU and an extension compiled for it."""
    return torch.cuda.is_available() and importlib.util.find_spec("flash_attn_2_cuda") is not None


def _to_cpu(value: Any) -> Any:
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return "cpu"
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


class CpuAsCuda(TorchFunctionMode):
    """In this mode torch's functions and tensor methods use the CPU if they are given a CUDA device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*map(_to_cpu, args), **{name: _to_cpu(value) for name, value in (kwargs or {}).items()})


def _memory() -> int:
    """Physical memory in bytes, in place of the GPU's, by which upstream's files skip their largest cases."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30


def _answer_for_torch_cuda() -> None:
    properties = types.SimpleNamespace(
        name="cpu",
        major=A100[0],
        minor=A100[1],
        total_memory=_memory(),
        multi_processor_count=os.cpu_count() or 1,
    )
    answers = {
        "get_device_capability": A100,
        "get_device_properties": properties,
        "get_device_name": "cpu",
        "current_device": 0,
        "synchronize": None,
        "empty_cache": None,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, _answer=answer, **kwargs: _answer)


def activate() -> None:
    """Make this process use the CPU where upstream's tests look for a GPU. Does nothing on a machine with a
    GPU.
    """
    if on_gpu():
        return
    _answer_for_torch_cuda()
    import flash_attn.flash_attn_interface as interface

    interface._get_block_size_n = lambda device, head_dim, is_dropout, is_causal: WHOLE_ROW
    CpuAsCuda().__enter__()


def device_of(worker: str, gpus: int) -> int:
    """The GPU of a process of pytest-xdist, which names them gw0, gw1 and so on."""
    return int(worker.removeprefix("gw")) % gpus


def pytest_configure(config) -> None:
    activate()
    if on_gpu() and (worker := os.environ.get("PYTEST_XDIST_WORKER")):
        torch.cuda.set_device(device_of(worker, torch.cuda.device_count()))


def pytest_runtest_teardown() -> None:
    """Free the memory of the test's reference computations, because several processes share a GPU."""
    if on_gpu():
        torch.cuda.empty_cache()
