"""Repeat recorded launches, without the work that upstream's host code does anew at each call.

Calls with the same options whose tensors look the same launch the same kernels with the same arguments,
except for the tensors. The first call goes through upstream's functions, and its launches are recorded. Later
calls repeat these launches with their own tensors.

The lengths of packed sequences are among these tensors: only the device knows their contents, so no launch
depends on them.
"""

import threading
from typing import Any, Callable, Optional

import torch

_ALIGNMENT = 16  # bytes; upstream copies a less aligned tensor before the launch
_MOST_PLANS = 512
_MOST_KEPT = 2**16  # bytes


class _Recording(threading.local):
    launches: Optional[list[tuple[Callable, tuple]]] = None
    not_read: Optional[list[torch.Tensor]] = None
    not_used: Optional[list[torch.Tensor]] = None


_recording = _Recording()


def recorded(kernel: Callable) -> Callable:
    """Wrap a kernel from upstream's compile cache so that its launches are recorded, if a recording is
    active."""
    launches = _recording.launches
    if launches is None:
        return kernel

    def launch(*args):
        launches.append((kernel, args))
        return kernel(*args)

    return launch


def not_read(*memory: torch.Tensor) -> Any:
    """Declare that no launch reads these tensors before one writes them, so that a plan need not zero them.
    Returns the first.
    """
    if _recording.not_read is not None:
        _recording.not_read.extend(memory)
    return memory[0]


def not_used(*memory: torch.Tensor) -> None:
    """Declare that no launch reads or writes these tensors, which are arguments of a kernel all the same. A
    plan keeps small ones, because making one takes the host about as long as a launch.
    """
    if _recording.not_used is not None:
        _recording.not_used.extend(memory)


class _Plan:
    """The launches of one call. Their tensor arguments are the call's own, or other memory that is zero or
    never read before it is written.
    """

    def __init__(
        self,
        launches: list[tuple[Callable, tuple]],
        tensors: tuple[torch.Tensor, ...],
        not_read: list[torch.Tensor],
        not_used: list[torch.Tensor],
    ) -> None:
        memory = list(tensors)  # the call's tensors, then others in the order of the launches
        slots = {x.data_ptr(): i for i, x in enumerate(memory)}
        self.complete = True
        used = set()
        self._launches = []
        for kernel, args in launches:
            # Upstream's AuxData holds tensors too, as a list.
            lists = [(i, x) for i, x in enumerate(args) if getattr(x, "tensors", None)]
            places = [(i, x) for i, x in enumerate(args) if isinstance(x, torch.Tensor)]
            for x in (*(x for _, x in places), *(x for _, aux in lists for x in aux.tensors)):
                if x.data_ptr() not in slots:
                    slots[x.data_ptr()] = len(memory)
                    memory.append(x)
                    self.complete &= x.is_contiguous()
                same = memory[slots[x.data_ptr()]]
                self.complete &= (x.shape, x.stride(), x.dtype) == (same.shape, same.stride(), same.dtype)
            places = [(i, slots[x.data_ptr()]) for i, x in places]
            lists = [
                (i, x._replace(tensors=None), [slots[y.data_ptr()] for y in x.tensors]) for i, x in lists
            ]
            used.update(slot for _, slot in places)
            used.update(slot for _, _, some in lists for slot in some)
            kept = list(args)  # without tensors: a plan must not keep the memory of a call
            for i, *_ in (*places, *lists):
                kept[i] = None
            self._launches.append((kernel, kept, places, lists))
        # Incomplete if upstream launched nothing or launched on a copy, or if two tensors share memory.
        self.complete &= used.issuperset(range(len(tensors)))
        unused = {x.data_ptr() for x in not_used}
        unread = unused | {x.data_ptr() for x in not_read}
        self._more = [
            x
            if x.data_ptr() in unused and x.nbytes <= _MOST_KEPT
            else (torch.empty if x.data_ptr() in unread else torch.zeros, x.shape, x.dtype)
            for x in memory[len(tensors) :]
        ]

    def __call__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        device = tensors[0].device
        memory = [*tensors]
        for x in self._more:
            if type(x) is tuple:
                new, shape, dtype = x
                x = new(shape, dtype=dtype, device=device)
            memory.append(x)
        for kernel, args, places, lists in self._launches:
            args = args.copy()
            for i, slot in places:
                args[i] = memory[slot]
            for i, aux, some in lists:
                args[i] = aux._replace(tensors=[memory[slot] for slot in some])
            kernel(*args)


def run(
    plans: Optional[dict],
    options: tuple,
    tensors: tuple[torch.Tensor, ...],
    results: tuple[torch.Tensor, ...],
    launch: Callable[[], Any],
) -> None:
    """Call launch(), or repeat the launches of an earlier call with the same options and like tensors.

    plans: the plans of one formula, or None to call launch() always. tensors: all tensors that the call
    reads. results: new tensors that it writes, whose looks follow from the formula, the options and the
    tensors. The call's own memory is in neither, and must be zero.
    """
    if plans is None or any(type(x) is not torch.Tensor or x.data_ptr() % _ALIGNMENT for x in tensors):
        launch()
        return
    key = (*options, *[(x.shape, x.stride(), x.dtype, x.device) for x in tensors])
    if plan := plans.get(key):
        plan((*tensors, *results))
        return
    _recording.launches, _recording.not_read, _recording.not_used = found = [], [], []
    try:
        launch()
    finally:
        _recording.launches = _recording.not_read = _recording.not_used = None
    launches, *declared = found
    plan = _Plan(launches, (*tensors, *results), *declared)
    if plan.complete:
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        plans[key] = plan
