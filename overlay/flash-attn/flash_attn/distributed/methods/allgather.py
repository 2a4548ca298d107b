"""Gather the keys and values of all ranks, and add up their gradients, in float32.

Where blocks can be joined (cuts.joins), a rank runs its queries against its own keys while the others come,
then against these, and adds the outputs in float32. Backward, a part of its own keys waits for the end, while
the gradients of the others' keys go.

Elsewhere it runs its queries against all keys that they may see: one call for a contiguous layout, two for a
zigzag one, for each share of the heads. So no output is a sum, and a mask finds all keys that it names. While
a share is computed, the keys and values of the next ones come, and the gradients of those before it go.
"""

from typing import Optional

import torch

from ...nosoftmax.call import needs_grad
from .. import cuts
from ..exchange import Passing
from ..layout import Part
from ..problem import Keys, Problem

_GRADIENTS = 1  # a tag


def obstacle(problem: Problem) -> Optional[str]:
    return None


def moved(problem: Problem, backward: bool) -> int:
    """Of joined blocks, the gradients of those keys alone come that another rank's queries see."""
    k, v = problem.call.k, problem.call.v
    others = (problem.cp.world - 1) * max(problem.cp.plan.sizes)
    numbers = others * k.shape[-2] * (k.shape[-1] + v.shape[-1]) * (1 if problem.dim == 0 else k.shape[0])
    return numbers * (k.element_size() + (problem.wide.itemsize if backward else 0))


def blocks(problem: Problem) -> list:
    """Blocks with the rank's own keys if they are joined, else all, with keys and values without memory."""
    if cuts.joins(problem):
        q, k, v = problem.call.tensors[:3]
        return [
            problem.block(part, cuts.cut(problem, where, k, v), q, True) for part, where in cuts.own(problem)
        ]
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
    if not cuts.joins(problem):
        return _forward_by_heads(problem), ()
    k, v = problem.call.tensors[1:3]
    come, outputs = problem.cp.gathering_by_rank([k, v], problem.dim), cuts.Outputs(problem)
    for part, where in cuts.own(problem):
        outputs.add(part, cuts.cut(problem, where, k, v))
    gathered = come()
    for part, places in cuts.others(problem):
        outputs.add(part, _joined(problem, places, gathered))
    return outputs.result(), ()


def backward(problem: Problem, dout: torch.Tensor, kept: tuple) -> tuple:
    return (_backward if cuts.joins(problem) else _backward_by_heads)(problem, dout)


def _backward(problem: Problem, dout: torch.Tensor) -> tuple:
    cp, dim, (k, v) = problem.cp, problem.dim, problem.call.tensors[1:3]
    come, grads = cp.gathering_by_rank([k, v], dim), cuts.Gradients(problem, dout)
    first, rest = cuts.own_in_two(problem)
    own = grads.of_all(first, k, v)
    gathered, going = come(), {}
    for part, places in cuts.others(problem):
        pair = grads.of(part, _joined(problem, places, gathered))
        sizes = [where.size for _, where in places]
        going |= {rank: list(x) for (rank, _), x in zip(places, zip(*(y.split(sizes, dim) for y in pair)))}
    # At most one block of a rank's queries sees keys of this one.
    met = {rank: cuts.of(problem, rank, cp.rank) for rank in range(cp.world) if rank != cp.rank}
    regions = {rank: pairs[0][1] for rank, pairs in met.items() if pairs}
    shapes = {rank: problem.shapes_of_keys(where.size) for rank, where in regions.items()}
    passing = Passing(going, shapes, own[0], cp.group, _GRADIENTS)
    own = grads.of_all(rest, k, v, own)
    for rank, arrived in passing.wait().items():
        rows = regions[rank].rows
        own = [cuts.added(problem, x, rows, y, x.shape) for x, y in zip(own, arrived)]
    return grads.result(*own)


def _joined(problem: Problem, places: list, gathered: list) -> Keys:
    """The keys and values of several ranks' tokens, one after the other."""
    found = []
    for parts in gathered:
        pieces = [problem.cut(parts[rank], where.rows) for rank, where in places]
        found.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces, problem.dim))
    return Keys(*found, (0,), (sum(where.size for _, where in places),))


def _forward_by_heads(problem: Problem) -> torch.Tensor:
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
    return out


def _backward_by_heads(problem: Problem, dout: torch.Tensor) -> tuple:
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
            total = [
                cuts.added(problem, x, own, grad, like.shape) for x, grad, like in zip(total, grads, (k, v))
            ]
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
