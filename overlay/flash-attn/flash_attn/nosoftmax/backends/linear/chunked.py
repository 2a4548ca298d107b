"""Compute the linear-attention primitive in PyTorch, on any device, for a batch of sequences of one length.

A state, the sum of k_j^T v_j, stands for the chunks already passed. Masked products cover the current chunk.
With a decay, each product in the state is decayed to the distance from the position passed last, and a row
decays the state by its own distance from there: factors are exp of numbers that are not positive, for slopes
of any size. The full form then takes two walks, one from each end.

Time grows linearly with the sequence length, and memory beside the inputs and the output does not grow.
16-bit tensors are computed in float32.
"""

from typing import Callable, Optional

import torch

from ...call import compute_dtype
from ...score import saturate_
from .form import ANTICAUSAL, CAUSAL, FULL, NOTHING, ROW, Form, Given

# Positions of one chunk. Longer chunks waste products on masked entries, shorter ones waste time on operator
# calls.
CHUNK = 128
# The full form masks nothing, so longer chunks waste no products.
FULL_CHUNK = 512
# Above this exponent, a decay near 1, what is lost is subtracted: the rounding of 1 - loss would be the same
# for each chunk, and add up.
_GENTLE = -0.5


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    form: Form,
    state: Optional[torch.Tensor] = None,
    given: Given = NOTHING,
    diagonal: Optional[int] = None,
    behind: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute one form of linear attention over dense sequences.

    q: (batch, rows, nheads, d); k: (batch, keys, nheads_k, d); v: (batch, keys, nheads_k, d_v); any strides.
    Either number of heads may divide the other: with more heads in q, a key head serves a group of query
    heads; with more heads in k and v, the results of a group of key heads are summed. state: (batch,
    heads, d, d_v) for the fewer heads, or those of the decay, a sum of k^T v over other keys. Causal, with
    rows <= keys: over earlier keys, decayed to the last of them. Anticausal, with rows >= keys: over later
    keys, decayed to the first of them. Full: over all other keys, with a decay over earlier ones; `behind`
    is the sum over later ones. given: the tensors that the form mentions. diagonal: the key of the attention
    that its query 0 is aligned with; None aligns both at their end.
    Returns out (batch, rows, nheads, d_v) in the form's dtype, and in the compute dtype the state after the
    last key, or before the first one for the anticausal form. A row that sees neither a key nor a given state
    is 0. torch.autocast has no effect.
    """
    with torch.autocast(q.device.type, enabled=False):
        chunks = _Chunks(q, k, v, form, given, diagonal)
        shape = (q.shape[0], chunks.heads, q.shape[-1], v.shape[-1])
        state = (
            torch.zeros(shape, dtype=chunks.dtype, device=q.device)
            if state is None
            else state.to(chunks.dtype, copy=True)
        )
        out = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=form.out_dtype(q.dtype))
        if q.shape[0] == 0:
            return out, state
        state = state.reshape(-1, *shape[2:])
        if form.mask == FULL and chunks.decays:
            seen: dict = {}
            chunks.walk(state, False, True, lambda result, span: seen.update({span: result}))
            chunks.walk(
                torch.zeros_like(state)
                if behind is None
                else behind.to(chunks.dtype, copy=True).view_as(state),
                True,
                False,
                lambda result, span: chunks.store(out, result.add_(seen.pop(span)), span),
            )
            return out, state.view(shape)
        if form.mask == FULL:
            for span in chunks.spans:
                if chunks.has_keys(span):
                    state.baddbmm_(chunks.keys(span).mT, chunks.values(span))
            for span in chunks.spans:
                if chunks.has_rows(span):
                    chunks.store(out, torch.bmm(chunks.rows(span), state), span)
            return out, state.view(shape)
        chunks.walk(
            state, form.mask == ANTICAUSAL, True, lambda result, span: chunks.store(out, result, span)
        )
        return out, state.view(shape)


def decay_of(exponents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (factor, loss), with which x * factor + x * factor * loss is x * exp(exponents), and gentle
    decays do not round the same way each time.
    """
    gentle = exponents > _GENTLE
    return torch.where(gentle, 1.0, exponents.exp()), torch.where(gentle, exponents.expm1(), 0.0)


class _Chunks:
    """Cuts rows and keys at the same positions (see Form). A span is a range of positions.

    Leaves out rows that see no key and keys that no row sees, where a NaN would reach results as 0 * NaN.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        form: Form,
        given: Given = NOTHING,
        diagonal: Optional[int] = None,
    ) -> None:
        self.form, self.dtype = form, compute_dtype(q.dtype)
        self._row_factors = None if given.row_factors is None else given.row_factors.to(self.dtype)
        slopes, self.heads = given.decay_slopes, min(q.shape[2], k.shape[2])
        self.decays = slopes is not None
        if self.decays:
            self.heads = slopes.shape[-1]
            self._exponents = (
                -slopes.to(self.dtype).expand(q.shape[0], -1).reshape(-1, 1)
            )  # of a distance of 1
        self._q, self._k, self._v = (self._by_head(x) for x in (q, k, v))
        self._group_q, self._group_k = (max(x.shape[2] // self.heads, 1) for x in (q, k))
        rows, keys = q.shape[1], k.shape[1]
        self._most_seen = rows if form.transposed else keys
        if diagonal is None:
            diagonal = keys - rows
        elif form.transposed:
            diagonal = -diagonal
        self._first_row, self._first_key = max(diagonal, 0), max(-diagonal, 0)
        self._to_row, self._to_key = self._first_row + rows, self._first_key + keys
        self._from_row, self._from_key = self._first_row, self._first_key
        size = FULL_CHUNK if form.mask == FULL and not self.decays else CHUNK
        self.spans = self._spans(size)
        if form.mask == CAUSAL or keys == 0:
            self._from_row = max(self._first_row, self._first_key)
        if form.mask == ANTICAUSAL:
            self._from_key = max(self._first_row, self._first_key)
            self._to_row = min(self._to_row, self._to_key)
        if form.mask == CAUSAL:
            self._to_key = min(self._to_key, self._to_row)
        self._factor = form.constant(rows, keys)

    def _spans(self, size: int) -> list:
        """Cut the positions into spans of at most `size`, and of one span where neither rows nor keys are."""
        total = max(self._to_row, self._to_key)
        first, second = min(self._to_row, self._to_key), max(self._first_row, self._first_key)
        pieces = [(0, total)] if second <= first else [(0, first), (second, total)]
        spans = [
            [range(at, min(at + size, stop)) for at in range(start, stop, size)] for start, stop in pieces
        ]
        return spans[0] if len(spans) == 1 else [*spans[0], range(first, second), *spans[1]]

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        """View x as (batch, positions, heads, group, d). A head that serves several states stands in each."""
        if x.shape[2] >= self.heads:
            return x.unflatten(2, (self.heads, -1))
        return x.unsqueeze(3).expand(-1, -1, -1, self.heads // x.shape[2], -1)

    def walk(self, state: torch.Tensor, backwards: bool, within: bool, receive: Callable) -> None:
        """Go through the chunks from the first or from the last one on, with the state of those passed, which
        ends as that of all. receive(result, span): gets the sum for the span's rows. within: whether the sum
        contains the products within the chunk.
        """
        for span in reversed(self.spans) if backwards else self.spans:
            rows = self.rows(span) if self.has_rows(span) else None
            keys, values = (self.keys(span), self.values(span)) if self.has_keys(span) else (None, None)
            if rows is not None:
                result = torch.bmm(rows, state)
                if self.decays:
                    result.mul_(self._from_state(span, backwards))
                if keys is not None and within:
                    scores = self.mask(self.limit(self.decay(torch.bmm(rows, keys.mT), span)), span)
                    result.baddbmm_(scores, values)
                receive(result, span)
            if self.decays:
                self.pass_over(state, len(span))
            if keys is not None:
                if self.decays:
                    keys.mul_(self._to_state(span, backwards))
                state.baddbmm_(keys.mT, values)

    def pass_over(self, state: torch.Tensor, length: int) -> None:
        """Decay the state by a number of positions, in place."""
        factor, loss = decay_of(self._exponents[:, :, None] * length)
        state.mul_(factor).addcmul_(state, loss)

    def _from_state(self, span: range, backwards: bool) -> torch.Tensor:
        """Return the decay of each of the span's rows, in the order of `_cut`, from the position of the
        state: the last one before the span, or the first one behind it.
        """
        at = self._positions(self._rows_in(span))
        return self._decays(span.stop - at if backwards else at - (span.start - 1), self._group_q)

    def _to_state(self, span: range, backwards: bool) -> torch.Tensor:
        """Return the decay of each of the span's keys to the next position of the state: the span's last one,
        or its first one.
        """
        at = self._positions(self._keys_in(span))
        return self._decays(at - span.start if backwards else (span.stop - 1) - at, self._group_k)

    def _decays(self, distances: torch.Tensor, group: int) -> torch.Tensor:
        return (self._exponents * distances).exp().repeat(1, group)[:, :, None]

    def _positions(self, span: range) -> torch.Tensor:
        return torch.arange(span.start, span.stop, device=self._q.device).to(self.dtype)

    def decay(self, scores: torch.Tensor, span: range) -> torch.Tensor:
        """Multiply scores (batch * heads, group of rows, group of keys) in place by the decay of their
        distances, if there is one.
        """
        if self.decays:
            rows, keys = self._positions(self._rows_in(span)), self._positions(self._keys_in(span))
            decays = (self._exponents[:, :, None] * (rows[:, None] - keys).abs()).exp()
            self._split(scores).mul_(decays[:, None, None])
        return scores

    def _split(self, scores: torch.Tensor) -> torch.Tensor:
        """View scores as (batch * heads, group_q, group_k, rows, keys)."""
        return scores.unflatten(2, (self._group_k, -1)).unflatten(1, (self._group_q, -1)).transpose(2, 3)

    def _rows_in(self, span: range) -> range:
        return range(max(span.start, self._from_row), min(span.stop, self._to_row))

    def _keys_in(self, span: range) -> range:
        return range(max(span.start, self._from_key), min(span.stop, self._to_key))

    def has_rows(self, span: range) -> bool:
        return len(self._rows_in(span)) > 0

    def has_keys(self, span: range) -> bool:
        return len(self._keys_in(span)) > 0

    def rows(self, span: range) -> torch.Tensor:
        return self._cut(self._q, self._rows_in(span), self._first_row)

    def keys(self, span: range) -> torch.Tensor:
        return self._cut(self._k, self._keys_in(span), self._first_key)

    def values(self, span: range) -> torch.Tensor:
        span = self._keys_in(span)
        values = self._cut(self._v, span, self._first_key)
        if self.form.transposed:
            self._weigh(values, self._group_k, span, self._first_key, self._first_row)
        return values

    def limit(self, scores: torch.Tensor) -> torch.Tensor:
        """Clamp scores in place so that they fit float16 once scaled, if they are the weights of float16
        inputs. They stay in float32. A clamp alone would turn Inf into the limit."""
        if self.form.weights_saturate and self._q.dtype == torch.float16 and self.form.softmax_scale != 0.0:
            limit = torch.finfo(torch.float16).max / abs(self.form.softmax_scale)
            not_finite = scores - scores
            scores.clamp_(-limit, limit).add_(not_finite)
        return scores

    def mask(self, scores: torch.Tensor, span: range) -> torch.Tensor:
        """Zero scores (batch * heads, group of rows, group of keys) in place where the row does not see the
        key.
        """
        offset = self._rows_in(span).start - self._keys_in(span).start
        if self.form.mask == CAUSAL:
            self._split(scores).tril_(offset)
        elif self.form.mask == ANTICAUSAL:
            self._split(scores).triu_(offset)
        return scores

    def store(self, out: torch.Tensor, result: torch.Tensor, span: range) -> None:
        """Normalize the result of the span's rows, saturate it if the form says so, and write it to out."""
        span = self._rows_in(span)
        result.mul_(self._factor)
        if not self.form.transposed:
            self._weigh(result, self._group_q, span, self._first_row, self._first_key)
        if self._row_factors is not None and self.form.row_factors != ROW:
            result.mul_(self._row_factors.repeat_interleave(self.heads)[:, None, None])
        batch, _, heads, group, _ = self._q.shape
        result = result.view(batch, heads, group, len(span), -1)
        if self.heads > heads:  # each of the states of a row has its own part of the sum
            result, group = result.sum(2, keepdim=True), 1
        if self.form.output_saturates:
            result = saturate_(result, out.dtype)
        result = result.permute(0, 3, 1, 2, 4)
        out[:, span.start - self._first_row : span.stop - self._first_row].unflatten(2, (heads, group)).copy_(
            result
        )

    def _cut(self, x: torch.Tensor, span: range, first: int) -> torch.Tensor:
        """Return (batch * heads, group * positions, channels) in the compute dtype, always as a copy."""
        part = x[:, span.start - first : span.stop - first].permute(0, 2, 3, 1, 4)
        part = part.to(self.dtype, memory_format=torch.contiguous_format, copy=True)
        return part.view(x.shape[0] * self.heads, -1, x.shape[-1])

    def _weigh(self, x: torch.Tensor, group: int, span: range, first: int, first_seen: int) -> None:
        """Multiply each query of the span, in the order of `_cut`, by its own normalization and factor, in
        place. group: the heads of x that share a state. first, first_seen: the positions of the first query
        and of the first key.
        """
        if self.form.weighs_positions:
            seen = torch.arange(span.start - first_seen + 1, span.stop - first_seen + 1, device=x.device)
            x.mul_(
                seen.clamp(min=1, max=max(self._most_seen, 1))
                .to(self.dtype)
                .reciprocal()
                .repeat(group)[:, None]
            )
        if self.form.row_factors == ROW:
            factors = self._row_factors[:, None, None, span.start - first : span.stop - first]
            x.mul_(factors.expand(-1, self.heads, group, -1).reshape(x.shape[0], -1, 1))
