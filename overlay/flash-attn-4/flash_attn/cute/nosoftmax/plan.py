"""Launches without what upstream's host code checks and derives anew at each call.

Calls with the same options whose tensors look the same launch the same kernels with the same arguments but
for the tensors. The first one goes through upstream's functions, and what they launch is recorded; a later
one repeats that with its own tensors.

The lengths of packed sequences are such tensors: only the device knows what they hold, so no launch depends
on it.
"""

import threading
from typing import Any, Callable, Optional

import torch

_ALIGNMENT = 16  # bytes; upstream copies a tensor that has less before it launches
_MOST_PLANS = 512


class _Recording(threading.local):
    launches: Optional[list[tuple[Callable, tuple]]] = None
    not_read: Optional[list[torch.Tensor]] = None


_recording = _Recording()


def recorded(kernel: Callable) -> Callable:
    """What a compile cache of upstream's gives out for `kernel`."""
    launches = _recording.launches
    if launches is None:
        return kernel

    def launch(*args):
        launches.append((kernel, args))
        return kernel(*args)

    return launch


def not_read(*memory: torch.Tensor) -> Any:
    """Says that no launch reads these, so that a plan need not zero them; returns the first."""
    if _recording.not_read is not None:
        _recording.not_read.extend(memory)
    return memory[0]


class _Plan:
    """The launches of one call. Tensors among their arguments are the call's own, or memory that has to be
    zero or is not read.
    """

    def __init__(
        self,
        launches: list[tuple[Callable, tuple]],
        tensors: tuple[torch.Tensor, ...],
        not_read: list[torch.Tensor],
    ) -> None:
        memory = list(tensors)  # those of the call, then the rest as the launches come to it
        slots = {x.data_ptr(): i for i, x in enumerate(memory)}
        self.complete = True
        used = set()
        self._launches = []
        for kernel, args in launches:
            places = [(i, x) for i, x in enumerate(args) if isinstance(x, torch.Tensor)]
            for i, x in places:
                if x.data_ptr() not in slots:
                    slots[x.data_ptr()] = len(memory)
                    memory.append(x)
                    self.complete &= x.is_contiguous()
                same = memory[slots[x.data_ptr()]]
                self.complete &= (x.shape, x.stride(), x.dtype) == (same.shape, same.stride(), same.dtype)
            places = [(i, slots[x.data_ptr()]) for i, x in places]
            used.update(slot for _, slot in places)
            self._launches.append(
                (kernel, [None if isinstance(x, torch.Tensor) else x for x in args], places)
            )
        # Not so where upstream launched nothing, or on a copy, and where two tensors are the same memory.
        self.complete &= used.issuperset(range(len(tensors)))
        unread = {x.data_ptr() for x in not_read}
        more = memory[len(tensors) :]
        self._more = [
            (torch.empty if x.data_ptr() in unread else torch.zeros, x.shape, x.dtype) for x in more
        ]

    def __call__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        device = tensors[0].device
        memory = (*tensors, *(new(shape, dtype=dtype, device=device) for new, shape, dtype in self._more))
        for kernel, args, places in self._launches:
            args = args.copy()
            for i, slot in places:
                args[i] = memory[slot]
            kernel(*args)


def run(
    plans: Optional[dict], options: tuple, tensors: tuple[torch.Tensor, ...], launch: Callable[[], Any]
) -> None:
    """launch(), or what it launched when it was last called for the same options and tensors of the same
    looks.

    plans: where the plans of one formula are kept; None: always launch(). tensors: all that the call reads
    and writes, but for memory of its own that it takes to be zero.
    """
    if plans is None or any(type(x) is not torch.Tensor or x.data_ptr() % _ALIGNMENT for x in tensors):
        launch()
        return
    key = (*options, *[(x.shape, x.stride(), x.dtype, x.device) for x in tensors])
    if plan := plans.get(key):
        plan(tensors)
        return
    _recording.launches, _recording.not_read = launches, unread = [], []
    try:
        launch()
    finally:
        _recording.launches = _recording.not_read = None
    plan = _Plan(launches, tensors, unread)
    if plan.complete:
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        plans[key] = plan
