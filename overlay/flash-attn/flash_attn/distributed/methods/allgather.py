"""Gather the keys and values of all ranks, and add up their gradients.

Each rank runs its queries against the keys that they may see: one call for a contiguous layout, two for a
zigzag one. So no output is a sum of parts, each dq is complete, and a mask finds all keys that it names. dk
and dv are sums over the ranks, in float32.
"""

from typing import Optional

import torch

from ...nosoftmax.call import needs_grad
from ..layout import Part
from ..problem import Keys, Problem


def obstacle(problem: Problem) -> Optional[str]:
    return None


def moved(problem: Problem, backward: bool) -> int:
    k, v = problem.call.k, problem.call.v
    others = (problem.cp.world - 1) * max(problem.cp.plan.sizes)
    numbers = others * k.shape[-2] * (k.shape[-1] + v.shape[-1]) * (1 if problem.dim == 0 else k.shape[0])
    return numbers * (k.element_size() + (problem.wide.itemsize if backward else 0))


def blocks(problem: Problem) -> list:
    """All blocks, with keys and values that take no memory."""
    k, v = (
        x.new_empty(1).expand(*x.shape[: problem.dim], problem.cp.plan.total, *x.shape[problem.dim + 1 :])
        for x in (problem.call.k, problem.call.v)
    )
    return [
        problem.block(part, _seen(problem, part, k, v), problem.call.q, wide)
        for part in problem.parts
        for wide in ((False, True) if needs_grad(problem.call) else (False,))
    ]


def forward(problem: Problem) -> tuple:
    q = problem.call.q
    k, v = problem.cp.gathered([problem.call.k, problem.call.v], problem.dim)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    for part in problem.parts:
        keys = _seen(problem, part, k, v)
        if problem.sees(part, keys.starts, keys.lengths):
            problem.cut(out, part.rows).copy_(problem.forward(problem.block(part, keys, q, False)))
    return out, ()


def backward(problem: Problem, dout: torch.Tensor, kept: tuple) -> tuple:
    q, dim = problem.call.q, problem.dim
    k, v = problem.cp.gathered([problem.call.k, problem.call.v], dim)
    dq = torch.zeros_like(q)
    dk, dv = (torch.zeros_like(x, dtype=problem.wide) for x in (k, v))
    for part in problem.parts:
        keys = _seen(problem, part, k, v)
        if not problem.sees(part, keys.starts, keys.lengths):
            continue
        block = problem.block(part, keys, q, True)
        *grads, dv_part = problem.backward(block, problem.cut(dout, part.rows))
        problem.cut(dq, part.rows).copy_(grads[0])
        own = slice(keys.starts[0], keys.starts[0] + keys.lengths[0]) if dim == 1 else slice(None)
        problem.cut(dk, own).add_(grads[1])
        problem.cut(dv, own).add_(dv_part)
    dk, dv = problem.cp.scattered([dk, dv], dim)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _seen(problem: Problem, part: Part, k: torch.Tensor, v: torch.Tensor) -> Keys:
    """The keys that the part's queries may see: of dense tensors a range, of packed ones all."""
    lengths = problem.cp.plan.lengths
    if problem.dim == 0:
        return Keys(k, v, (0,) * len(lengths), lengths)
    (first,), (count,), (n,) = part.starts, part.lengths, lengths
    o = problem.call.options
    start = 0 if o.window_left < 0 else min(max(first - o.window_left, 0), n)
    stop = n if o.window_right < 0 else min(first + count + o.window_right, n)
    keys = slice(start, max(start, stop))
    return Keys(k[:, keys], v[:, keys], (keys.start,), (keys.stop - keys.start,))
