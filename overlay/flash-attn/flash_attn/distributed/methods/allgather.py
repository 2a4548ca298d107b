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
    for share, heads, come in _begun(problem, False):
        k, v = come()
        place = _heads_of(out, heads, problem)
        for part in problem.parts:
            keys = _seen(share, part, k, v)
            if share.sees(part, keys.starts, keys.lengths):
                rows = share.forward(share.block(part, keys, share.call.q, False))
                problem.cut(place, part.rows).copy_(rows)
    return out, ()


def backward(problem: Problem, dout: torch.Tensor, kept: tuple) -> tuple:
    dim = problem.dim
    dq, dk, dv = (torch.zeros_like(x) for x in problem.call.tensors[:3])
    going = []
    for share, heads, come in _begun(problem, True):
        k, v = come()
        douts, place = (_heads_of(x, heads, problem) for x in (dout, dq))
        seen = [(part, _seen(share, part, k, v)) for part in problem.parts]
        total: list = [None, None]
        # The part that sees most keys comes first, so that its gradients become the sums.
        for part, keys in sorted(seen, key=lambda pair: -sum(pair[1].lengths)):
            if not share.sees(part, keys.starts, keys.lengths):
                continue
            block = share.block(part, keys, share.call.q, True)
            dq_part, *grads = share.backward(block, problem.cut(douts, part.rows))
            problem.cut(place, part.rows).copy_(dq_part)
            own = slice(keys.starts[0], keys.starts[0] + keys.lengths[0]) if dim == 1 else slice(None)
            total = [_added(problem, x, own, grad, like) for x, grad, like in zip(total, grads, (k, v))]
        total = [torch.zeros_like(x, dtype=problem.wide) if y is None else y for x, y in zip((k, v), total)]
        going.append((heads, problem.cp.scattering(total, dim)))
    for heads, arrive in going:
        for x, part in zip((dk, dv), arrive()):
            x[..., heads, :].copy_(part)
    return dq, dk, dv


# A message this long takes much longer than its start. Shorter ones are not cut.
_SHORTEST_MESSAGE = 2**23
# Where the shares of the heads end. A share is computed while the keys of the next one come, which take a
# fraction of that time, and the gradients of the last one go. Nothing hides the first keys and, backward, the
# last gradients, so these shares are small.
_ENDS, _ENDS_BACKWARD = (1 / 16, 1 / 4, 1.0), (1 / 16, 1 / 4, 3 / 4, 15 / 16, 1.0)


def _begun(problem: Problem, backward: bool) -> list:
    """Begin to gather the keys and values, by shares of the heads. Returns for each share its problem, its
    key heads, and a function that waits for its k and v.
    """
    cp, k, v = problem.cp, problem.call.k, problem.call.v
    size = (k.numel() + v.numel()) * k.element_size() * (cp.world - 1)
    ends = {k.shape[-2]}
    if size >= 4 * _SHORTEST_MESSAGE:
        ends |= {max(round(end * k.shape[-2]), 1) for end in (_ENDS_BACKWARD if backward else _ENDS)}
    shares = [slice(start, stop) for start, stop in zip((0, *sorted(ends)), sorted(ends))]
    problems = [problem.of_heads(heads) for heads in shares]
    coming = [cp.gathering([x.call.k, x.call.v], problem.dim) for x in problems]
    return list(zip(problems, shares, coming))


def _heads_of(x: torch.Tensor, heads: slice, problem: Problem) -> torch.Tensor:
    """The query heads that have these key heads."""
    group = problem.call.q.shape[-2] // problem.call.k.shape[-2]
    return x[..., heads.start * group : heads.stop * group, :]


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
