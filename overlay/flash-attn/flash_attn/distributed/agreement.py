"""Compare the ranks before anything moves: an error on one rank, or a difference, raises on all."""

import hashlib
from typing import Callable

import torch
import torch.distributed as dist

from .exchange import gather


def agree(group: dist.ProcessGroup, check: bool, prepare: Callable) -> object:
    """Return what prepare() returns. It returns a pair (result, facts); facts: what all ranks must have in
    common, by name, with values that have a repr.

    check: whether to compare. Raises the error of prepare() on its own rank, and RuntimeError with its text
    on the others. Raises ValueError on all ranks if their facts differ, with the names and values that do.
    """
    if not check or dist.get_world_size(group) == 1:
        return prepare()[0]
    error, result, facts = None, None, {}
    try:
        result, facts = prepare()
    except Exception as raised:  # it is raised below, after the others have heard of it
        error = raised
    # A rank in error says so by a negative number. The others have a hash of their facts.
    digest = hashlib.blake2b(repr(sorted(facts.items())).encode(), digest_size=8).digest()
    number = -1 if error is not None else int.from_bytes(digest, "little") >> 1
    numbers = gather(torch.tensor([number], device=_device(group)), group).view(-1).tolist()
    if min(numbers) >= 0 and len(set(numbers)) == 1:
        return result
    told: list = [None] * len(numbers)
    text = None if error is None else f"{type(error).__name__}: {error}"
    dist.all_gather_object(told, (text, facts), group=group)
    if error is not None:
        try:
            raise error
        finally:
            del error  # else it keeps this frame, and the frame keeps it and the group
    failed = [f"rank {rank} raised {text}" for rank, (text, _) in enumerate(told) if text is not None]
    if failed:
        raise RuntimeError("no rank has begun: " + "; ".join(failed))
    raise ValueError(_difference([facts for _, facts in told]))


def _difference(facts: list) -> str:
    lines = []
    for name in sorted(set().union(*facts)):
        values = [own.get(name) for own in facts]
        if any(value != values[0] for value in values):
            lines.append(f"{name} is " + ", ".join(f"{x!r} on rank {rank}" for rank, x in enumerate(values)))
    return "the ranks of a context-parallel call differ: " + "; ".join(lines)


def _device(group: dist.ProcessGroup) -> torch.device:
    """A device whose tensors the group moves: the CPU if it can."""
    kinds = [device.type for device in group._device_types]
    return torch.device("cpu") if "cpu" in kinds else torch.device(kinds[0], torch.cuda.current_device())
