"""Move tensors between the ranks of a group, with torch.distributed alone.

All sums are in the order of the ranks, so that a result has the same bits in every run.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

_MOST_TENSORS = 8  # that a Passing sends to one rank

# The name is new in torch 2.13, which warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return x of all ranks, (world, *x.shape). All have the same shape."""
    return _gathering(x, group)()


def _gathering(x: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], torch.Tensor]:
    world = dist.get_world_size(group)
    sent, found = x.contiguous().view(-1), x.new_empty(world * x.numel())
    work = _all_gather(found, sent, group=group, async_op=True)

    def wait() -> torch.Tensor:
        work.wait()
        return found.view(world, *x.shape)

    return wait


def gathering_flat(tensors: Sequence, sizes: Sequence, group: dist.ProcessGroup) -> Callable[[], list]:
    """Begin to gather several tensors of one dtype. sizes: for each rank the shapes of its tensors. If they
    differ, there is one message, as long as the longest.

    Returns a function that waits, on a GPU in its stream, and returns for each tensor the list of those of
    all ranks.
    """
    if all(shapes == sizes[0] for shapes in sizes):
        waits = [_gathering(x, group) for x in tensors]
        return lambda: [list(wait()) for wait in waits]
    lengths = [sum(map(_numel, shapes)) for shapes in sizes]
    # What a shorter message leaves over is never read, but must be something.
    make = tensors[0].new_empty if min(lengths) == max(lengths) else tensors[0].new_zeros
    message = make(max(lengths))
    _pack(tensors, message)
    wait = _gathering(message, group)
    return lambda: list(zip(*(_unpack(row, shapes) for row, shapes in zip(wait(), sizes))))


def all_to_all(parts: Sequence, shapes: Sequence, group: dist.ProcessGroup) -> list:
    """Send parts[s], a list of tensors of one dtype, to rank s. shapes[s]: those of the list that rank s
    sends to this rank. Returns the lists received.
    """
    return exchanging(parts, shapes, group)()


def exchanging(parts: Sequence, shapes: Sequence, group: dist.ProcessGroup) -> Callable[[], list]:
    """Begin `all_to_all`. Returns a function that waits, on a GPU in its stream, and returns the lists."""
    sent = [sum(x.numel() for x in part) for part in parts]
    received = [sum(map(_numel, part)) for part in shapes]
    like = parts[0][0]
    message, found = like.new_empty(sum(sent)), like.new_empty(sum(received))
    for part, room in zip(parts, message.split(sent)):
        _pack(part, room)
    work = dist.all_to_all_single(found, message, received, sent, group=group, async_op=True)

    def wait() -> list:
        work.wait()
        return [_unpack(room, part) for room, part in zip(found.split(received), shapes)]

    return wait


def add_up(lists: Sequence) -> list:
    """Add lists of tensors, in their order."""
    total = list(lists[0])
    for tensors in lists[1:]:
        for x, y in zip(total, tensors):
            x.add_(y)
    return total


class Passing:
    """Tensors on their way to other ranks, while others come, each in a message of its own: nothing is copied
    into a common one.
    """

    def __init__(
        self, sent: Mapping, shapes: Mapping, like: torch.Tensor, group: dist.ProcessGroup, tag: int
    ) -> None:
        """sent: for each rank of the group the tensors that it gets. shapes: for each rank those of the
        tensors that come from it. like: has the dtype and device of all. tag: tells the messages of a step
        apart.
        """
        self._received = {rank: [like.new_empty(shape) for shape in given] for rank, given in shapes.items()}
        steps = []
        for way, messages in ((dist.isend, sent), (dist.irecv, self._received)):
            for rank, tensors in messages.items():
                peer = dist.get_global_rank(group, rank)
                for i, x in enumerate(tensors):
                    if x.numel():
                        steps.append(dist.P2POp(way, x.contiguous(), peer, group, _MOST_TENSORS * tag + i))
        self._steps = steps  # with what is on its way
        self._works = dist.batch_isend_irecv(steps) if steps else []

    def wait(self) -> dict:
        """Return what came, for each rank. On a GPU its stream waits."""
        for work in self._works:
            work.wait()
        return self._received


def _numel(shape: Sequence) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _pack(tensors: Sequence, room: torch.Tensor) -> None:
    at = 0
    for x in tensors:
        room[at : at + x.numel()].view(x.shape).copy_(x)
        at += x.numel()


def _unpack(message: torch.Tensor, shapes: Sequence) -> list:
    found, at = [], 0
    for shape in shapes:
        count = _numel(shape)
        found.append(message[at : at + count].view(shape))
        at += count
    return found
