"""Compute the linear-attention primitive in PyTorch, on any device, for a batch of sequences of one length.

A state, the sum of k_j^T v_j, stands for the chunks already passed. Masked products cover the current chunk.
Time grows linearly with the sequence length, and memory beside the inputs and the output does not grow.
16-bit tensors are computed in float32.
"""

from typing import Optional

import torch

from ...score import saturate_
from .form import ANTICAUSAL, CAUSAL, FULL, NOTHING, ROW, Form, Given

# Positions of one chunk. Longer chunks waste products on masked entries, shorter ones waste time on operator
# calls.
CHUNK = 128
# The full form masks nothing, so longer chunks waste no products.
FULL_CHUNK = 512


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    form: Form,
    state: Optional[torch.Tensor] = None,
    given: Given = NOTHING,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute one form of linear attention over dense sequences.

    q: (batch, rows, nheads, d); k: (batch, keys, nheads_k, d); v: (batch, keys, nheads_k, d_v); any strides.
    Either number of heads may divide the other: with more heads in q, a key head serves a group of query
    heads; with more heads in k and v, the results of a group of key heads are summed. state: (batch,
    min(nheads, nheads_k), d, d_v), the sum of k^T v over earlier keys, for the causal form with rows <= keys.
    given: the tensors that the form mentions.
    Returns out (batch, rows, nheads, d_v) in q's dtype, and the state after the last key in the compute
    dtype. A row that sees neither a key nor a given state is 0. torch.autocast has no effect.
    """
    with torch.autocast(q.device.type, enabled=False):
        chunks = _Chunks(q, k, v, form, given)
        shape = (q.shape[0], chunks.heads, q.shape[-1], v.shape[-1])
        state = (
            torch.zeros(shape, dtype=chunks.dtype, device=q.device)
            if state is None
            else state.to(chunks.dtype, copy=True)
        )
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
                    result.baddbmm_(chunks.mask(chunks.limit(torch.bmm(rows, keys.mT)), span), values)
                chunks.store(out, result, span)
            if keys is not None:
                state.baddbmm_(keys.mT, values)
        return out, state.view(shape)


class _Chunks:
    """Cuts rows and keys at the same positions (see Form). A span is a range of positions.

    Leaves out rows that see no key and keys that no row sees, where a NaN would reach results as 0 * NaN.
    """

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, given: Given = NOTHING
    ) -> None:
        self.form, self.dtype = form, torch.promote_types(q.dtype, torch.float32)
        self._row_factors = None if given.row_factors is None else given.row_factors.to(self.dtype)
        self.heads = min(q.shape[2], k.shape[2])
        self._q, self._k, self._v = (x.unflatten(2, (self.heads, -1)) for x in (q, k, v))
        total = max(q.shape[1], k.shape[1])
        self._first_row, self._first_key = total - q.shape[1], total - k.shape[1]
        self._from_row = (
            max(self._first_row, self._first_key)
            if form.mask == CAUSAL or k.shape[1] == 0
            else self._first_row
        )
        self._from_key = max(self._first_row, self._first_key) if form.mask == ANTICAUSAL else self._first_key
        self._factor = form.constant(q.shape[1], k.shape[1])
        size = FULL_CHUNK if form.mask == FULL else CHUNK
        self.spans = [range(at, min(at + size, total)) for at in range(0, total, size)]

    def has_rows(self, span: range) -> bool:
        return span.stop > self._from_row

    def has_keys(self, span: range) -> bool:
        return span.stop > self._from_key

    def rows(self, span: range) -> torch.Tensor:
        return self._cut(self._q, max(span.start, self._from_row), span.stop, self._first_row)

    def keys(self, span: range) -> torch.Tensor:
        return self._cut(self._k, max(span.start, self._from_key), span.stop, self._first_key)

    def values(self, span: range) -> torch.Tensor:
        start = max(span.start, self._from_key)
        values = self._cut(self._v, start, span.stop, self._first_key)
        if self.form.transposed:
            self._weigh(values, self._v, range(start, span.stop), self._first_key, self._first_row)
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
        offset = max(span.start, self._from_row) - max(span.start, self._from_key)
        split = (
            scores.unflatten(2, (self._k.shape[3], -1)).unflatten(1, (self._q.shape[3], -1)).transpose(2, 3)
        )
        if self.form.mask == CAUSAL:
            split.tril_(offset)
        else:
            split.triu_(offset)
        return scores

    def store(self, out: torch.Tensor, result: torch.Tensor, span: range) -> None:
        """Normalize the result of the span's rows, saturate it if the form says so, and write it to out."""
        span = range(max(span.start, self._from_row), span.stop)
        result.mul_(self._factor)
        if not self.form.transposed:
            self._weigh(result, self._q, span, self._first_row, self._first_key)
        if self._row_factors is not None and self.form.row_factors != ROW:
            result.mul_(self._row_factors.repeat_interleave(self.heads)[:, None, None])
        if self.form.output_saturates:
            result = saturate_(result, out.dtype)
        batch, _, heads, group, _ = self._q.shape
        result = result.view(batch, heads, group, len(span), -1).permute(0, 3, 1, 2, 4)
        out[:, span.start - self._first_row : span.stop - self._first_row].unflatten(2, (heads, group)).copy_(
            result
        )

    def _cut(self, x: torch.Tensor, start: int, stop: int, first: int) -> torch.Tensor:
        """Return (batch * heads, group * positions, channels) in the compute dtype, always as a copy."""
        part = x[:, start - first : stop - first].permute(0, 2, 3, 1, 4)
        part = part.to(self.dtype, memory_format=torch.contiguous_format, copy=True)
        return part.view(x.shape[0] * self.heads, -1, x.shape[-1])

    def _weigh(self, x: torch.Tensor, of: torch.Tensor, span: range, first: int, first_seen: int) -> None:
        """Multiply each query of the span, in the order of `_cut`, by its own normalization and factor, in
        place. of: the tensor that x was cut from or stands for. first, first_seen: the positions of the first
        query and of the first key.
        """
        if self.form.weighs_positions:
            seen = torch.arange(span.start - first_seen + 1, span.stop - first_seen + 1, device=x.device)
            x.mul_(seen.clamp(min=1).to(self.dtype).reciprocal().repeat(of.shape[3])[:, None])
        if self.form.row_factors == ROW:
            factors = self._row_factors[:, None, None, span.start - first : span.stop - first]
            x.mul_(factors.expand(-1, self.heads, of.shape[3], -1).reshape(x.shape[0], -1, 1))
