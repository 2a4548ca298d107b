"""Describe the CUDA device under test, time calls on it, and read its allocated memory."""

from __future__ import annotations

import importlib
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence

import torch
from gpu_record import tera_per_second

EXTENSION = "flash_attn_2_cuda"
HEAD_START = 20  # cache flushes queued ahead, about 2 ms: the GPU then never waits for a launch
MIN_ROUNDS, MAX_ROUNDS = 7, 50
COPY_BYTES = 2 * 10**9
MATMUL_SIZE = 8192


def rounds_for(budget_ms: float, round_ms: float) -> int:
    """How often to repeat a round of ``round_ms``: as often as fits the budget, from MIN_ROUNDS to
    MAX_ROUNDS.
    """
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget_ms / round_ms)))


class Gpu:
    """The current CUDA device. ``budget_ms`` is the time for one comparison, if MIN_ROUNDS fit."""

    device = "cuda"
    cache_bytes = 256 * 2**20  # more than the L2 cache of any GPU

    def __init__(self, budget_ms: float) -> None:
        self.budget_ms = budget_ms
        self._cache = torch.empty(self.cache_bytes, dtype=torch.int8, device=self.device)

    @staticmethod
    def missing() -> str | None:
        """Say what this machine lacks for the benchmark, and what to do; None if nothing."""
        if not torch.cuda.is_available():
            return (
                f"torch {torch.__version__} sees no CUDA device: run it on a machine with a GPU and a "
                "torch with CUDA"
            )
        try:
            for name in ("flash_attn", EXTENSION):
                importlib.import_module(name)
        except ImportError as error:
            return f"{name} is not there ({error}): build and install it with `make wheel BACKEND=cuda`"
        return None

    def describe(self) -> dict[str, object]:
        """Name, driver and versions, and the build options of the installed extension."""
        driver = "unknown"
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = (
                subprocess.run(query, capture_output=True, text=True, check=False).stdout.partition("\n")[0]
                or driver
            )
        extension = importlib.import_module(EXTENSION)
        return {
            "device": torch.cuda.get_device_name(),
            "driver": driver,
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            "build": {
                name: getattr(extension, name, None)
                for name in ("built_head_dims", "built_with_softmax", "built_archs")
            },
        }

    def medians(self, functions: Sequence[Callable[[], object]]) -> list[float]:
        """The median time of each function on the device, in ms.

        They are called in turn, so that a drift of the clock affects all of them, each time with a cold L2
        cache.
        """
        self._times(functions, 1)  # loads the kernels
        round_ms = sum(times[0] for times in self._times(functions, 1))
        return [
            statistics.median(times) for times in self._times(functions, rounds_for(self.budget_ms, round_ms))
        ]

    def _times(self, functions: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
        events = [
            [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
            for _ in functions
        ]
        for _ in range(HEAD_START):
            self._cache.zero_()
        for i in range(rounds):
            for pairs, function in zip(events, functions):
                self._cache.zero_()
                pairs[i][0].record()
                function()
                pairs[i][1].record()
        torch.cuda.synchronize()
        return [[start.elapsed_time(end) for start, end in pairs] for pairs in events]

    def captured(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        """Return a function that replays all calls as a CUDA graph, without the time that Python needs to
        launch them.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def copy_bandwidth(self) -> float:
        """TB/s of a copy from device memory to device memory; bytes read and bytes written both count."""
        source = torch.ones(COPY_BYTES, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return tera_per_second(2 * COPY_BYTES, self.medians([lambda: target.copy_(source)])[0])

    def matmul_tflops(self, dtype: torch.dtype) -> float:
        """TFLOP/s of cuBLAS on square matrices of MATMUL_SIZE, with random numbers as attention gets them."""
        a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype, device=self.device) for _ in range(2))
        return tera_per_second(2 * MATMUL_SIZE**3, self.medians([lambda: a @ b])[0])

    def allocated(self) -> int:
        """Bytes that tensors hold now. Restarts the peak."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a reused block may be larger than its tensor, and counts whole
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """The most bytes that tensors have held since the last allocated()."""
        return torch.cuda.max_memory_allocated()
