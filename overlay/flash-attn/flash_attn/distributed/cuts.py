"""Cut a call into blocks, some of a rank's queries against some keys, as few and large ones, and add up what
they give.

A zigzag rank has two parts of a sequence. Where only the order of queries and keys counts, parts that lie one
after the other on their rank are one block, as if their tokens were neighbours: with a causal mask two blocks
for two ranks, in place of five. Each block costs a sum of float32 outputs and the end of a kernel.
"""

from typing import Optional

import torch

from ..nosoftmax.score import saturate_
from .layout import Part
from .problem import Keys, Problem


def joins(problem: Problem) -> bool:
    """Whether parts may be joined: nothing but a causal mask knows where queries and keys lie."""
    o = problem.call.options
    plain = problem.dim == 1 and not problem.positional and o.mask is None
    return plain and o.window_left < 0 and o.window_right <= 0


def own(problem: Problem) -> list:
    """Return the pairs (queries, keys) of this rank's queries and its own keys, as parts of its tokens."""
    tokens = problem.cp.tokens
    if not joins(problem):
        return of(problem, problem.cp.rank, problem.cp.rank)
    return [(Part(0, (0,), (tokens,)),) * 2] * (tokens > 0)


def own_in_two(problem: Problem) -> tuple[list, list]:
    """Return the same pairs, those of the first part of the queries and those of the others, so that messages
    can go in between.
    """
    rank, tokens = problem.cp.rank, problem.cp.tokens
    if not joins(problem):
        pairs = of(problem, rank, rank)
        first = problem.parts[0]
        return [pair for pair in pairs if pair[0] is first], [pair for pair in pairs if pair[0] is not first]
    if problem.call.options.window_right == 0:
        keys = [x.at + x.size for x in problem.parts]  # up to the part's last query
    else:
        keys = [tokens] * len(problem.parts)
    pairs = [
        [(Part(x.at, (x.at,), x.lengths), Part(0, (0,), (count,)))] * (x.size > 0)
        for x, count in zip(problem.parts, keys)
    ]
    return pairs[0], sum(pairs[1:], [])


def of(problem: Problem, rank: int, source: int) -> list:
    """Return the pairs (queries of one rank, keys of another) where a query sees a key."""
    plan = problem.cp.plan
    pairs = [
        (q, k) for q in plan.parts[rank] for k in plan.parts[source] if problem.sees(q, k.starts, k.lengths)
    ]
    if rank == source or len(pairs) < 2 or not joins(problem):
        return pairs
    # With a causal mask all queries see the first keys, or the last queries all keys. Without, all see all.
    queries, keys = (sorted(set(parts)) for parts in zip(*pairs))
    return [(_behind(queries, keys), Part(keys[0].at, (0,), (sum(k.size for k in keys),)))]


def others(problem: Problem) -> list:
    """Return [(queries, [(rank, keys), …])]: the keys of the other ranks, which lie one after the other if
    they are joined.
    """
    cp, found = problem.cp, {}
    for source in range(cp.world):
        for q, k in of(problem, cp.rank, source) if source != cp.rank else ():
            found.setdefault((q.at, q.size), []).append((q, (source, k)))
    return [
        (_behind([pairs[0][0]], [k for _, (_, k) in pairs]), [place for _, place in pairs])
        for pairs in found.values()
    ]


def _behind(queries: list, keys: list) -> Part:
    """Join queries, as if they lay behind the joined keys, which they see."""
    return Part(queries[0].at, (sum(k.size for k in keys),), (sum(q.size for q in queries),))


class Outputs:
    """The outputs of this rank's queries: a sum over blocks, in float32."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self._total = problem, None
        self._last: Optional[tuple] = None  # (rows, output) of a block that is not yet in the sum

    def add(self, part: Part, keys: Keys) -> None:
        problem, q = self._problem, self._problem.call.q
        out = problem.forward(problem.block(part, keys, q, True))
        self._add_last((*q.shape[:-1], keys.v.shape[-1]))
        self._last = part.rows, out

    def _add_last(self, shape: tuple) -> None:
        if self._last is not None:
            self._total = added(self._problem, self._total, *self._last, shape)
            self._last = None

    def result(self) -> torch.Tensor:
        """The sum in the dtype of q, saturated."""
        problem, total = self._problem, self._total
        q, v = problem.call.tensors[0], problem.call.v
        shape = *q.shape[:-1], v.shape[-1]
        if q.dtype == torch.bfloat16 and total is not None:
            # Nothing saturates: the last block is added where the sum is rounded, in one pass over memory.
            rows, out = self._last
            result = torch.empty_like(total, dtype=q.dtype)
            if out.shape != total.shape:
                result.copy_(total)
            torch.add(problem.cut(total, rows), out, out=problem.cut(result, rows))
            return result
        self._add_last(shape)
        return q.new_zeros(shape) if self._total is None else saturate_(self._total, q.dtype).to(q.dtype)


class Gradients:
    """dq of this rank's queries, a sum over blocks, in float32; None before the first."""

    def __init__(self, problem: Problem, dout: torch.Tensor) -> None:
        self.dq: Optional[torch.Tensor] = None
        self._problem, self._dout = problem, dout

    def of(self, part: Part, keys: Keys) -> list:
        """Add what the block gives to dq, and return its [dk, dv]."""
        problem, q = self._problem, self._problem.call.q
        block = problem.block(part, keys, q, True)
        dq, *grads = problem.backward(block, problem.cut(self._dout, part.rows))
        self.dq = added(problem, self.dq, part.rows, dq, q.shape)
        return grads

    def of_all(self, pairs: list, k: torch.Tensor, v: torch.Tensor, sums: Optional[list] = None) -> list:
        """Return the sums of [dk, dv] over pairs with these keys, or add them to `sums`."""
        sums = sums or [None, None]
        for part, where in pairs:
            grads = self.of(part, cut(self._problem, where, k, v))
            sums = [
                added(self._problem, x, where.rows, y, like.shape) for x, y, like in zip(sums, grads, (k, v))
            ]
        wide = self._problem.wide
        return [torch.zeros_like(y, dtype=wide) if x is None else x for x, y in zip(sums, (k, v))]

    def result(self, dk: torch.Tensor, dv: torch.Tensor) -> tuple:
        """(dq, dk, dv) in the dtypes of q, k and v."""
        q, k, v = self._problem.call.tensors[:3]
        dq = torch.zeros_like(q) if self.dq is None else self.dq.to(q.dtype)
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def cut(problem: Problem, part: Part, k: torch.Tensor, v: torch.Tensor) -> Keys:
    """The keys and values of a part of their rank's tokens."""
    return Keys(problem.cut(k, part.rows), problem.cut(v, part.rows), part.starts, part.lengths)


def added(
    problem: Problem, total: Optional[torch.Tensor], rows: slice, part: torch.Tensor, shape: tuple
) -> torch.Tensor:
    """Add to some tokens of a sum of this shape, None at first. What all tokens have becomes the sum."""
    if total is None and part.shape == shape:
        return part
    total = part.new_zeros(shape) if total is None else total
    problem.cut(total, rows).add_(part)
    return total
