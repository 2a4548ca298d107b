"""Gather the keys and values of all ranks, and add up their gradients.

Each rank runs its queries against the keys that they may see: one call for a contiguous layout, two for a
zigzag one, for each share of the heads. So no output is a sum of parts, each dq is complete, and a mask finds
all keys that it names. dk and dv are sums over the ranks, in float32. While a share is computed, the keys and
values of the next ones come, and the gradients of those before it go.
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
    q, v = problem.call.q, problem.call.v
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    shares, coming = _begin(problem)
    for share, keys_of, place in zip(shares, coming, out.chunk(len(shares), -2)):
        k, v = keys_of()
        for part in problem.parts:
            keys = _seen(share, part, k, v)
            if share.sees(part, keys.starts, keys.lengths):
                rows = share.forward(share.block(part, keys, share.call.q, False))
                problem.cut(place, part.rows).copy_(rows)
    return out, ()


def backward(problem: Problem, dout: torch.Tensor, kept: tuple) -> tuple:
    dim = problem.dim
    dq, dk, dv = (torch.zeros_like(x) for x in problem.call.tensors[:3])
    shares, coming = _begin(problem)
    douts, places, sums = dout.chunk(len(shares), -2), dq.chunk(len(shares), -2), []
    for share, keys_of, dout, place in zip(shares, coming, douts, places):
        k, v = keys_of()
        seen = [(part, _seen(share, part, k, v)) for part in problem.parts]
        total: list = [None, None]
        # The part that sees most keys comes first, so that its gradients become the sums.
        for part, keys in sorted(seen, key=lambda pair: -sum(pair[1].lengths)):
            if not share.sees(part, keys.starts, keys.lengths):
                continue
            block = share.block(part, keys, share.call.q, True)
            dq_part, *grads = share.backward(block, problem.cut(dout, part.rows))
            problem.cut(place, part.rows).copy_(dq_part)
            own = slice(keys.starts[0], keys.starts[0] + keys.lengths[0]) if dim == 1 else slice(None)
            total = [_added(problem, x, own, grad, like) for x, grad, like in zip(total, grads, (k, v))]
        total = [torch.zeros_like(x, dtype=problem.wide) if y is None else y for x, y in zip((k, v), total)]
        sums.append(problem.cp.scattering(total, dim))  # on its way while the next heads are computed
    for i, found in enumerate(sums):
        for x, part in zip((dk, dv), found()):
            x.chunk(len(shares), -2)[i].copy_(part)
    return dq, dk, dv


# A message this long takes as long as a wait for it. Shorter ones are not cut further.
_SHORTEST_MESSAGE, _MOST_SHARES = 2**23, 4


def _begin(problem: Problem) -> tuple:
    """Begin to gather the keys and values, by shares of the heads: all but the first are on their way while
    those before them are computed. Returns the problems of the shares, and functions that wait for k and v.
    """
    cp, k, v = problem.cp, problem.call.k, problem.call.v
    size = (k.numel() + v.numel()) * k.element_size() * (cp.world - 1)
    count = max(
        n
        for n in range(1, _MOST_SHARES + 1)
        if k.shape[-2] % n == 0 and (n == 1 or size >= n * _SHORTEST_MESSAGE)
    )
    shares = [problem.of_heads(i, count) for i in range(count)]
    return shares, [cp.gathering([x.call.k, x.call.v], problem.dim) for x in shares]


def _added(
    problem: Problem, total: Optional[torch.Tensor], own: slice, part: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """Add the gradients of some keys to the sum for all keys. like: all keys, or values."""
    if total is None and part.shape == like.shape:
        return part
    total = torch.zeros_like(like, dtype=problem.wide) if total is None else total
    problem.cut(total, own).add_(part)
    return total


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
