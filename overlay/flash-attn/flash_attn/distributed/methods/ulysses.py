"""Exchange tokens for heads: each rank gets all tokens of some heads, and runs them as on one device.

No sum is cut, so nothing but the heads' share of q, k, v and the output moves, in their own dtype, and what
the call has for each row, a factor or the intervals of a mask. Needs as many key heads as a multiple of the
ranks (DeepSpeed Ulysses, arXiv 2309.14509).
"""

from typing import Optional

import torch

from ...nosoftmax.call import Call
from ..exchange import all_to_all
from ..problem import Problem


def obstacle(problem: Problem) -> Optional[str]:
    nheads_k, world = problem.call.k.shape[-2], problem.cp.world
    if nheads_k % world:
        return f"{nheads_k} heads of k do not divide by {world} ranks"
    return None


def moved(problem: Problem, backward: bool) -> int:
    q, k, v = problem.call.tensors[:3]
    channels = q.shape[-2] * (q.shape[-1] + v.shape[-1]) + k.shape[-2] * (k.shape[-1] + v.shape[-1])
    batch, others = 1 if problem.dim == 0 else q.shape[0], problem.cp.world - 1
    rows = batch * max(problem.cp.plan.sizes)
    moved = rows * channels * q.element_size() * others // problem.cp.world
    if not backward:
        for x in _by_row(problem).values():
            moved += others * rows * x.shape[problem.dim + 1 :].numel() * x.element_size()
    return moved


def blocks(problem: Problem) -> list:
    dim, total = problem.dim, problem.cp.plan.total
    q, k, v = (
        x.new_empty(1).expand(*x.shape[:dim], total, x.shape[-2] // problem.cp.world, x.shape[-1])
        for x in problem.call.tensors[:3]
    )
    if problem.call.q.requires_grad:
        q = q.detach().requires_grad_()
    rows = {
        name: x.new_empty(1).expand(*x.shape[:dim], total, *x.shape[dim + 1 :])
        for name, x in _by_row(problem).items()
    }
    return [_share(problem, q, k, v, rows)]


def forward(problem: Problem) -> tuple:
    q, k, v = _to_heads(problem, problem.call.tensors[:3])
    rows = {name: problem.cp.gathered([x], problem.dim)[0] for name, x in _by_row(problem).items()}
    out = problem.forward(_share(problem, q, k, v, rows))
    (out,) = _to_tokens(problem, [out])
    return out, (q, k, v, *rows.values())


def backward(problem: Problem, dout: torch.Tensor, kept: tuple) -> tuple:
    q, k, v, *rows = kept
    (dout,) = _to_heads(problem, [dout])
    share = _share(problem, q, k, v, dict(zip(_by_row(problem), rows)))
    return tuple(_to_tokens(problem, problem.backward(share, dout)))


def _by_row(problem: Problem) -> dict:
    """This rank's part of what the whole call has for each row, by field."""
    given = problem.by_row
    if problem.whole.row_factors is None:
        given.pop("row_factors", None)  # they stand for a name, which the whole call still has
    return given


def _share(problem: Problem, q, k, v, rows: dict) -> Call:
    """The call of this rank's heads. rows: the tensors of _by_row for all rows."""
    rank, count = problem.cp.rank, problem.call.k.shape[-2] // problem.cp.world
    call = problem.of_heads(slice(rank * count, (rank + 1) * count)).whole
    return call._replace(q=q, k=k, v=v, **rows)


def _to_heads(problem: Problem, tensors: list) -> list:
    """Send each rank its heads of this rank's tokens. Returns this rank's heads of all tokens, in order."""
    cp, dim = problem.cp, problem.dim
    parts = list(zip(*(x.chunk(cp.world, -2) for x in tensors)))
    own = [x.shape for x in parts[cp.rank]]
    shapes = [[(*x[:dim], size, *x[dim + 1 :]) for x in own] for size in cp.plan.sizes]
    found = zip(*all_to_all(parts, shapes, cp.group))
    return [cp.in_order(torch.cat(pieces, dim), dim) for pieces in found]


def _to_tokens(problem: Problem, tensors: list) -> list:
    """Undo `_to_heads`."""
    cp, dim = problem.cp, problem.dim
    parts = list(zip(*(cp.in_ranks(x, dim).split(cp.plan.sizes, dim) for x in tensors)))
    own = [x.shape for x in parts[cp.rank]]
    return [torch.cat(pieces, -2) for pieces in zip(*all_to_all(parts, [own] * cp.world, cp.group))]
