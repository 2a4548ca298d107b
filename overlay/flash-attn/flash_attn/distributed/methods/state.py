"""Gather states in place of keys and values, in linear time.

A state is the sum of k^T v over a piece of a sequence, head_dim * head_dim_v numbers a head, however long the
piece is. Each rank computes those of its pieces, gathers those of all, and adds up the states before its own
pieces; without a causal mask those of all other pieces. Then it walks through its own tokens from there. The
backward pass does the same from the other end with the sums of q^T dO, for dk and dv.

With a decay, a state is decayed to the end of its piece that it leaves from, and again by the length of each
piece that it passes. Without a mask there are then two, one for each direction.
"""

from typing import Any, Optional

import torch

from ...nosoftmax.backends import linear
from ...nosoftmax.backends.linear import chunked, primitive
from ...nosoftmax.backends.linear.form import ROW, SEQUENCE, Form, Given
from ..exchange import gather
from ..layout import Piece
from ..problem import Problem


def obstacle(problem: Problem) -> Optional[str]:
    if "linear" not in problem.among.names:
        forced = problem.among.forced or f'algorithm="{problem.algorithm}"'
        return f"{forced} excludes linear time"
    return linear.obstacle(problem.whole)


def moved(problem: Problem, backward: bool) -> int:
    q, k, v = problem.call.tensors[:3]
    heads = _heads(problem)
    batch = 1 if problem.dim == 0 else q.shape[0]
    numbers = batch * heads * q.shape[-1] * v.shape[-1] * len(_directions(problem, backward))
    return (problem.cp.world - 1) * _slots(problem, backward) * numbers * problem.wide.itemsize


def blocks(problem: Problem) -> list:
    return []


def forward(problem: Problem) -> tuple:
    q, k, v = problem.call.tensors[:3]
    form = _form(problem)
    own = problem.cp.plan.pieces(problem.cp.rank)
    states = _States(problem, False, lambda piece, late: _state(problem, form, piece, q, k, v, late))
    out, kept = q.new_empty(*q.shape[:-1], v.shape[-1]), []
    for piece in own:
        before, behind = states.around(piece)
        here = (_take(problem, x, piece) for x in (q, k, v))
        place = _take(problem, out, piece)
        result = primitive.attend_between(
            *here, form, _given(problem, form, piece), before, behind, states.inside(piece), _direct(place)
        )
        _put(place, result)
        kept += [before, behind]
    return out, kept


def backward(problem: Problem, dout: torch.Tensor, kept: tuple) -> tuple:
    q, k, v = problem.call.tensors[:3]
    form = _form(problem)
    own = problem.cp.plan.pieces(problem.cp.rank)
    states = _States(
        problem, True, lambda piece, late: _state(problem, form.of_dv(), piece, k, q, dout, late)
    )
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
    for i, piece in enumerate(own):
        here = (_take(problem, x, piece) for x in (dout, q, k, v))
        places = tuple(_take(problem, x, piece) for x in grads)
        results = primitive.gradients_between(
            *here, form, _given(problem, form, piece), kept[2 * i : 2 * i + 2], states.around(piece),
            states.inside(piece), tuple(map(_direct, places)),
        )  # fmt: skip
        for place, result in zip(places, results):
            _put(place, result)
    return grads


# ---- One piece ----


def _form(problem: Problem) -> Form:
    o, call = problem.call.options, problem.call
    factors, slopes = call.row_factors, call.decay_slopes
    by_row = factors is not None and (problem.dim == 0 or factors.dim() == 2)
    return Form(
        o.softmax_scale, o.window_right == 0, factor=o.factor,
        row_factors=None if factors is None else ROW if by_row else SEQUENCE,
        decay=None if slopes is None else tuple(slopes.shape),
    )  # fmt: skip


def _take(problem: Problem, x: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The tokens of a piece, with the batch as the first axis."""
    return x[None, piece.rows] if problem.dim == 0 else x[:, piece.rows]


def _direct(place: torch.Tensor) -> Optional[torch.Tensor]:
    """Where a result may be written without a copy."""
    return place if place.is_contiguous() else None


def _put(place: torch.Tensor, result: torch.Tensor) -> None:
    if result is not place:
        place.copy_(result)


def _slopes(problem: Problem, piece: Piece) -> Optional[torch.Tensor]:
    slopes = problem.call.decay_slopes
    if slopes is None or slopes.dim() == 1 or problem.dim == 1:
        return slopes
    return slopes[piece.sequence : piece.sequence + 1]


def _given(problem: Problem, form: Form, piece: Piece) -> Given:
    factors = problem.call.row_factors
    return Given(
        _take(problem, factors, piece) if form.row_factors == ROW else factors, _slopes(problem, piece)
    )


def _state(problem: Problem, form: Form, piece: Piece, rows, keys, values, late: bool) -> tuple:
    """Return what primitive.state_of does for a piece. rows: a tensor with the heads of the rows."""
    here = (_take(problem, x, piece) for x in (rows, keys, values))
    return primitive.state_of(*here, form, _given(problem, form, piece), late)


# ---- The states of all pieces ----


def _heads(problem: Problem) -> int:
    slopes = problem.call.decay_slopes
    return problem.call.k.shape[-2] if slopes is None else slopes.shape[-1]


def _directions(problem: Problem, backward: bool) -> tuple:
    """The ends to which states are decayed: True is the last token, from where a state goes on to later
    pieces."""
    o = problem.call.options
    if o.window_right == 0:
        return (not backward,)
    return (True, False) if problem.call.decay_slopes is not None else (True,)


def _published(problem: Problem, rank: int, backward: bool) -> list:
    """The pieces of a rank whose states other ranks, or other pieces of its own, need."""
    plan, causal = problem.cp.plan, problem.call.options.window_right == 0
    lengths = plan.lengths
    return [
        piece
        for piece in plan.pieces(rank)
        if (piece.start > 0 and (backward or not causal))
        or (piece.stop < lengths[piece.sequence] and (not backward or not causal))
    ]


def _slots(problem: Problem, backward: bool) -> int:
    return max(len(_published(problem, rank, backward)) for rank in range(problem.cp.world))


class _States:
    """The states of all published pieces, gathered from all ranks."""

    def __init__(self, problem: Problem, backward: bool, make) -> None:
        """make(piece, late): computes the state of one of this rank's pieces, and what it spares a walk."""
        self._problem, self._directions = problem, _directions(problem, backward)
        self._causal = problem.call.options.window_right == 0
        cp, slots = problem.cp, _slots(problem, backward)
        self._of: dict = {}
        self._inside: dict = {}
        if slots == 0:
            return
        q, v = problem.call.q, problem.call.v
        batch = 1 if problem.dim == 0 else q.shape[0]
        shape = (len(self._directions), slots, batch, _heads(problem), q.shape[-1], v.shape[-1])
        message = torch.zeros(shape, dtype=problem.wide, device=q.device)
        published = _published(problem, cp.rank, backward)
        for i, piece in enumerate(published):
            for room, late in zip(message, self._directions):
                room[i], inside = make(piece, late)
                self._keep(piece, inside)
        if self._causal and primitive.has_kernels(q):
            # What the others' states are not needed for goes before the wait for them.
            for piece in cp.plan.pieces(cp.rank):
                if piece not in published:
                    self._keep(piece, make(piece, *self._directions)[1])
        found = gather(message, cp.group) if cp.world > 1 else message[None]
        for rank in range(cp.world):
            for i, piece in enumerate(_published(problem, rank, backward)):
                states = dict(zip(self._directions, found[rank, :, i]))
                self._of.setdefault(piece.sequence, []).append((piece, states))
        for pieces in self._of.values():
            pieces.sort(key=lambda pair: pair[0].start)

    def _keep(self, piece: Piece, inside: Any) -> None:
        """Keep what spares a walk through the piece. A walk without a causal mask needs other sums."""
        if self._causal:
            self._inside[piece.sequence, piece.start] = inside

    def inside(self, own: Piece) -> Any:
        return self._inside.get((own.sequence, own.start))

    def around(self, own: Piece) -> tuple:
        """Return the states before and behind a piece, as chunked.attend takes them: a causal walk has one,
        and so has a full one without a decay, for all other pieces.
        """
        pieces, slopes = self._of.get(own.sequence, []), _slopes(self._problem, own)
        earlier = [(piece, states) for piece, states in pieces if piece.stop <= own.start]
        later = [(piece, states) for piece, states in pieces if piece.start >= own.stop]
        if self._causal:
            (late,) = self._directions
            return _total(earlier if late else later[::-1], late, slopes), None
        if slopes is None:
            return _total(earlier + later, True, None), None
        return _total(earlier, True, slopes), _total(later[::-1], False, slopes)


def _total(pieces: list, late: bool, slopes: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """Add up the states of successive pieces, the nearest one last; None if there are none."""
    total = None
    for piece, states in pieces:
        state = states[late]
        if total is None:
            total = state.clone()
            continue
        if slopes is not None:
            exponents = -slopes.to(state.dtype)[..., None, None] * (piece.stop - piece.start)
            factor, loss = chunked.decay_of(exponents)
            total.mul_(factor).addcmul_(total, loss.expand_as(total))
        total.add_(state)
    return total
