"""Start processes that form a group, and run functions in all of them.

The processes are forked from one server that has imported torch and the package, and stay for many cases.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "parallel_cases"])
_NUMBERS = count()


def _serve(rank: int, world: int, store: str, seconds: float, pipe) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
    )
    while True:
        function, arguments = pipe.recv()
        if function is None:
            dist.destroy_process_group()
            os._exit(0)  # gloo's threads may be waiting for a rank that is gone
        try:
            pipe.send((function(rank, world, *arguments), None))
        except Exception as error:
            pipe.send((None, (type(error), str(error), traceback.format_exc())))


class Ranks:
    """`world` processes with a gloo group whose timeout is `seconds`."""

    def __init__(self, world: int, folder: Path, seconds: float = 60.0) -> None:
        store = str(folder / f"store{next(_NUMBERS)}")
        self.world, self._pipes, self._processes = world, [], []
        for rank in range(world):
            here, there = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(rank, world, store, seconds, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def start(self, function: Callable, *arguments) -> None:
        """Begin function(rank, world, *arguments) in all processes."""
        for pipe in self._pipes:
            pipe.send((function, arguments))

    def result(self, rank: int, seconds: float = 120.0) -> tuple:
        """Return (result, error) of one rank; error: (class, message, traceback) or None. A process that ends
        without a result is an EOFError."""
        if not self._pipes[rank].poll(seconds):
            raise TimeoutError(f"rank {rank} of {self.world} has no result after {seconds} s")
        return self._pipes[rank].recv()

    def run(self, function: Callable, *arguments) -> list:
        """Return the results of all ranks. Raises AssertionError with the traceback of a rank that raised."""
        self.start(function, *arguments)
        found = [self.result(rank) for rank in range(self.world)]
        for rank, (_, error) in enumerate(found):
            assert error is None, f"rank {rank}: {error[2]}"
        return [result for result, _ in found]

    def errors(self, function: Callable, *arguments) -> list:
        """Return (class, message) of the error of each rank; None where there was none."""
        self.start(function, *arguments)
        found = [self.result(rank) for rank in range(self.world)]
        return [None if error is None else error[:2] for _, error in found]

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes):
            try:
                pipe.send((None, None))
            except OSError:  # it is gone
                pass
            process.join(10)
            if process.is_alive():
                process.kill()
