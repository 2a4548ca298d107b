"""The primitive in PyTorch, for tensors on any device: one batch of sequences that have the same length.

Between chunks a state, the sum of k_j^T v_j over the chunks already passed; inside a chunk the masked products. Time grows
with the sequence, and memory beside the inputs and the output does not. 16-bit tensors are computed in float32.
"""

from typing import Optional

import torch

from .form import ANTICAUSAL, CAUSAL, FULL, Form

# Positions of one chunk. Longer ones waste products on masked entries, shorter ones time on starting operators.
CHUNK = 128


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, state: Optional[torch.Tensor] = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One form of linear attention over dense sequences.

    q: (batch, rows, nheads, d); k: (batch, keys, nheads_k, d); v: (batch, keys, nheads_k, d_v); any strides. Either
    number of heads may divide the other: with more heads in q a key head serves a group of them, with more heads in k
    and v a group of them is summed. state: (batch, min(nheads, nheads_k), d, d_v), the sum of k^T v over earlier keys,
    for the causal form with rows <= keys.
    Returns out (batch, rows, nheads, d_v) in q's dtype, and the state after the last key in the compute dtype. A row
    that sees neither a key nor a given state is 0.
    """
    chunks = _Chunks(q, k, v, form)
    shape = (q.shape[0], chunks.heads, q.shape[-1], v.shape[-1])
    state = torch.zeros(shape, dtype=chunks.dtype, device=q.device) if state is None else state.to(chunks.dtype, copy=True)
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    if q.shape[0] == 0:
        return out, state
    state = state.reshape(-1, *shape[2:])
    if form.mask == FULL:
        for span in chunks.spans:
            if chunks.has_keys(span):
                state.baddbmm_(chunks.keys(span).mT, chunks.values(span))
        for span in chunks.spans:
            if chunks.has_rows(span):
                chunks.store(out, torch.bmm(chunks.rows(span), state), span)
        return out, state.view(shape)
    for span in reversed(chunks.spans) if form.mask == ANTICAUSAL else chunks.spans:
        rows = chunks.rows(span) if chunks.has_rows(span) else None
        keys, values = (chunks.keys(span), chunks.values(span)) if chunks.has_keys(span) else (None, None)
        if rows is not None:
            result = torch.bmm(rows, state)
            if keys is not None:
                result.baddbmm_(chunks.mask(torch.bmm(rows, keys.mT), span), values)
            chunks.store(out, result, span)
        if keys is not None:
            state.baddbmm_(keys.mT, values)
    return out, state.view(shape)


class _Chunks:
    """Cuts rows and keys at the same positions (see Form). A span is a range of positions."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form) -> None:
        self.form, self.dtype = form, torch.promote_types(q.dtype, torch.float32)
        self.heads = min(q.shape[2], k.shape[2])
        self._q, self._k, self._v = (x.unflatten(2, (self.heads, -1)) for x in (q, k, v))
        total = max(q.shape[1], k.shape[1])
        self._first_row, self._first_key = total - q.shape[1], total - k.shape[1]
        self._factor = form.constant(q.shape[1], k.shape[1])
        self.spans = [range(at, min(at + CHUNK, total)) for at in range(0, total, CHUNK)]

    def has_rows(self, span: range) -> bool:
        """Whether a row of the span sees anything. A row that doesn't is left 0, even if it is NaN."""
        seen = span.stop > self._first_key if self.form.mask == CAUSAL else self._k.shape[1] > 0
        return seen and span.stop > self._first_row

    def has_keys(self, span: range) -> bool:
        return span.stop > self._first_key

    def rows(self, span: range) -> torch.Tensor:
        return self._cut(self._q, span, self._first_row)

    def keys(self, span: range) -> torch.Tensor:
        return self._cut(self._k, span, self._first_key)

    def values(self, span: range) -> torch.Tensor:
        values = self._cut(self._v, span, self._first_key)
        if self.form.weighs_positions and self.form.transposed:
            values.mul_(self._weights(self._k, span, self._first_key, self._first_row))
        return values

    def mask(self, scores: torch.Tensor, span: range) -> torch.Tensor:
        """scores (batch * heads, group of rows, group of keys) with 0, in place, where the row does not see the key."""
        first_row, first_key = max(span.start, self._first_row), max(span.start, self._first_key)
        split = scores.unflatten(2, (self._k.shape[3], -1)).unflatten(1, (self._q.shape[3], -1)).transpose(2, 3)
        if self.form.mask == CAUSAL:
            split.tril_(first_row - first_key)
        else:
            split.triu_(first_row - first_key)
        return scores

    def store(self, out: torch.Tensor, result: torch.Tensor, span: range) -> None:
        """Normalize, saturate and put the result of the span's rows in its place."""
        result.mul_(self._factor)
        if self.form.weighs_positions and not self.form.transposed:
            result.mul_(self._weights(self._q, span, self._first_row, self._first_key))
        if result.dtype != out.dtype:
            limit = torch.finfo(out.dtype).max
            result.clamp_(-limit, limit)
        batch, _, heads, group, _ = self._q.shape
        result = result.view(batch, heads, group, -1, result.shape[-1]).permute(0, 3, 1, 2, 4)
        if self.form.mask == CAUSAL and span.start < self._first_key:  # the rows before the first key stay 0
            result = result[:, -(span.stop - max(self._first_key, self._first_row)) :]
        stop = span.stop - self._first_row
        out[:, stop - result.shape[1] : stop].unflatten(2, (heads, group)).copy_(result)

    def _cut(self, x: torch.Tensor, span: range, first: int) -> torch.Tensor:
        """(batch * heads, group * positions, channels) in the compute dtype: always a copy."""
        part = x[:, max(span.start - first, 0) : span.stop - first].permute(0, 2, 3, 1, 4)
        part = part.to(self.dtype, memory_format=torch.contiguous_format, copy=True)
        return part.view(x.shape[0] * self.heads, -1, x.shape[-1])

    def _weights(self, x: torch.Tensor, span: range, first: int, first_seen: int) -> torch.Tensor:
        """1 / (number of keys that a query sees) of the span's queries x, in the order of `_cut`."""
        positions = torch.arange(max(span.start, first), span.stop, device=x.device)
        counts = (positions - first_seen + 1).clamp(min=1).to(self.dtype)
        return counts.reciprocal().repeat(x.shape[3])[:, None]
