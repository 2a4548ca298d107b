"""Pass keys and values on from rank to rank, and compute with those that are here while the next ones come.

Outputs are sums over the ranks, in float32, and so are dk and dv, which travel with their keys and are home
after one round. A rank adds to them in the order in which they pass, which is always the same.
"""

from typing import Optional

import torch

from ...nosoftmax.score import saturate_
from ..exchange import Passing, pack, unpack
from ..layout import Part
from ..problem import Keys, Problem

_KEYS, _GRADIENTS = 1, 2  # tags


def obstacle(problem: Problem) -> Optional[str]:
    if problem.call.options.mask is not None:
        return "mask names keys of the whole sequence, of which only a part is here at a time"
    return None


def moved(problem: Problem, backward: bool) -> int:
    """Keys and values visit world - 1 other ranks, their gradients return home as well."""
    cp, k = problem.cp, problem.call.k
    numbers = max(sum(_numel(shape) for shape in _shapes(problem, rank)) for rank in range(cp.world))
    others = cp.world - 1
    return numbers * (others * k.element_size() + (cp.world * problem.wide.itemsize if backward else 0))


def blocks(problem: Problem) -> list:
    """A block of each of this rank's parts, with its own keys."""
    call = problem.call
    return [
        problem.block(part, keys, call.q, True)
        for part in problem.parts
        for keys in _keys(problem, problem.cp.rank, call.k, call.v)
    ]


def forward(problem: Problem) -> tuple:
    q, k, v = problem.call.tensors[:3]
    total = q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=problem.wide)
    for source, k, v in _round(problem):
        for part in problem.parts:
            for keys in _keys(problem, source, k, v):
                if problem.sees(part, keys.starts, keys.lengths):
                    problem.cut(total, part.rows).add_(problem.forward(problem.block(part, keys, q, True)))
    return saturate_(total, q.dtype).to(q.dtype), ()


def backward(problem: Problem, dout: torch.Tensor, kept: tuple) -> tuple:
    q, cp = problem.call.q, problem.cp
    dq = torch.zeros_like(q, dtype=problem.wide)
    coming = None
    for source, k, v in _round(problem):
        own = torch.zeros(k.numel() + v.numel(), dtype=problem.wide, device=k.device)
        dk, dv = unpack(own, (k.shape, v.shape))
        for part in problem.parts:
            for keys, where in zip(_keys(problem, source, k, v), cp.plan.parts[source]):
                if problem.sees(part, keys.starts, keys.lengths):
                    block = problem.block(part, keys, q, True)
                    parts = problem.backward(block, problem.cut(dout, part.rows))
                    problem.cut(dq, part.rows).add_(parts[0])
                    problem.cut(dk, where.rows).add_(parts[1])
                    problem.cut(dv, where.rows).add_(parts[2])
        if coming is not None:
            own = coming.wait().add_(own)
        # The next rank has these keys next. What comes are gradients of the keys before them.
        size = sum(_numel(shape) for shape in _shapes(problem, (source - 1) % cp.world))
        coming = Passing(own, size, cp.group, _GRADIENTS)
    k, v = problem.call.k, problem.call.v
    dk, dv = unpack(coming.wait(), (k.shape, v.shape))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _round(problem: Problem):
    """Yield (rank, k, v) for the keys of each rank, this one's first, while the next ones are coming."""
    cp = problem.cp
    message = pack([problem.call.k, problem.call.v])
    for step in range(cp.world):
        source = (cp.rank - step) % cp.world
        coming = None
        if step + 1 < cp.world:
            size = sum(_numel(shape) for shape in _shapes(problem, (source - 1) % cp.world))
            coming = Passing(message, size, cp.group, _KEYS)
        yield source, *unpack(message, _shapes(problem, source))
        if coming is not None:
            message = coming.wait()


def _keys(problem: Problem, source: int, k: torch.Tensor, v: torch.Tensor) -> list:
    """The keys of each part of a rank."""
    return [_of_part(problem, part, k, v) for part in problem.cp.plan.parts[source]]


def _of_part(problem: Problem, part: Part, k: torch.Tensor, v: torch.Tensor) -> Keys:
    return Keys(problem.cut(k, part.rows), problem.cut(v, part.rows), part.starts, part.lengths)


def _shapes(problem: Problem, rank: int) -> list:
    """The shapes of a rank's k and v."""
    dim, size = problem.dim, problem.cp.plan.sizes[rank]
    return [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for x in problem.call.tensors[1:3]]


def _numel(shape: tuple) -> int:
    return torch.Size(shape).numel()
