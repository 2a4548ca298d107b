"""Pass keys and values on from rank to rank, and compute with those that are here while the next ones come.

Outputs are sums over the ranks, in float32, and so are dk and dv, which travel behind their keys and come
home in the end. A rank adds to them in the order in which they pass, which is always the same.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Optional

import torch

from .. import cuts
from ..exchange import Passing
from ..problem import Problem

_KEYS, _GRADIENTS = 1, 2  # tags


def obstacle(problem: Problem) -> Optional[str]:
    if problem.call.options.mask is not None:
        return "mask names keys of the whole sequence, of which only a part is here at a time"
    return None


def moved(problem: Problem, backward: bool) -> int:
    """Keys and values visit world - 1 other ranks, and so do their gradients, home included."""
    cp, k = problem.cp, problem.call.k
    numbers = max(sum(_numel(shape) for shape in _shapes(problem, rank)) for rank in range(cp.world))
    return numbers * (cp.world - 1) * (k.element_size() + (problem.wide.itemsize if backward else 0))


def blocks(problem: Problem) -> list:
    """A block of each of this rank's parts, with its own keys."""
    call, parts = problem.call, problem.parts
    return [
        problem.block(part, cuts.cut(problem, where, call.k, call.v), call.q, True)
        for part in parts
        for where in parts
    ]


def forward(problem: Problem) -> tuple:
    rank, outputs = problem.cp.rank, cuts.Outputs(problem)
    for source, k, v in _round(problem):
        pairs = cuts.own(problem) if source == rank else cuts.of(problem, rank, source)
        for part, where in pairs:
            outputs.add(part, cuts.cut(problem, where, k, v))
    return outputs.result(), ()


def backward(problem: Problem, dout: torch.Tensor, kept: tuple) -> tuple:
    """This rank's own keys are met first by its first queries, while other keys come, and in the end by the
    others, while the gradients of these keys come home.
    """
    cp, (k, v) = problem.cp, problem.call.tensors[1:3]
    grads, own, coming = cuts.Gradients(problem, dout), None, None
    first, rest = cuts.own_in_two(problem)
    for source, keys, values in _round(problem):
        if source == cp.rank:
            own = grads.of_all(first, k, v)
            continue
        sums = grads.of_all(cuts.of(problem, cp.rank, source), keys, values)
        if coming is not None:
            sums = [x.add_(y) for x, y in zip(coming(), sums)]
        # The next rank has these keys next. What comes are gradients of the keys before them.
        coming = _passing(problem, sums, source, _GRADIENTS)
    own = grads.of_all(rest, k, v, own)
    return grads.result(*(x.add_(y) for x, y in zip(coming(), own)))


def _round(problem: Problem) -> Iterator[tuple]:
    """Yield (rank, k, v) for the keys of each rank, this one's first, while the next ones are coming."""
    cp, here = problem.cp, problem.call.tensors[1:3]
    for step in range(cp.world):
        source, is_last = (cp.rank - step) % cp.world, step + 1 == cp.world
        coming = None if is_last else _passing(problem, here, source, _KEYS)
        yield source, *here
        if coming is not None:
            here = coming()


def _passing(problem: Problem, tensors: Sequence, source: int, tag: int) -> Callable[[], list]:
    """Begin to send what belongs to a rank's keys to the next rank, and to receive the same for the keys
    before them from the previous one. Returns a function that waits for it.
    """
    cp = problem.cp
    after, before = ((cp.rank + step) % cp.world for step in (1, -1))
    come = {before: _shapes(problem, (source - 1) % cp.world)}
    passing = Passing({after: tensors}, come, tensors[0], cp.group, tag)
    return lambda: passing.wait()[before]


def _shapes(problem: Problem, rank: int) -> list:
    """The shapes of a rank's k and v."""
    return problem.shapes_of_keys(problem.cp.plan.sizes[rank])


def _numel(shape: tuple) -> int:
    return torch.Size(shape).numel()
