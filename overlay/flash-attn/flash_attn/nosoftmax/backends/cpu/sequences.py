"""Cut a call into sequences of one length, and evaluate its options for them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

import torch

from ...call import Call, Options, compute_dtype
from ...intervals import HSTUSequence
from ...score import ACTIVATIONS, NORMALIZATIONS, Activation, Bias
from .dropout import Dropout
from .paged import gather_pages
from .visibility import HSTU, Intervals, Visibility, Window


@dataclass(frozen=True)
class Sequences:
    """Sequences of one length that are computed together: a dense batch, or one sequence of a ragged one.

    dtype: that of the call's tensors. alibi_slopes, sigmoid_biases, decay_slopes: (batch * nheads_k, group),
    row_factors: (batch * nheads_k, 1 or seqlen_q), in the compute dtype, or None. dropout: None where nothing
    is dropped.
    """

    options: Options
    dtype: torch.dtype
    visibility: Visibility
    alibi_slopes: Optional[torch.Tensor]
    sigmoid_biases: Optional[torch.Tensor]
    decay_slopes: Optional[torch.Tensor]
    row_factors: Optional[torch.Tensor]
    dropout: Optional[Dropout]
    use_softmax: bool

    @classmethod
    def of(
        cls,
        call: Call,
        batch: range,
        seqlens: tuple[int, int],
        seed: int,
        use_softmax: bool,
        rows: Optional[slice] = None,
    ) -> "Sequences":
        """Make Sequences of the entries in `batch`, which have one diagonal. seqlens: (seqlen_q, seqlen_k).
        rows: the queries of a packed sequence.
        """
        o, nheads, nheads_k = call.options, call.q.shape[-2], call.k.shape[-2]
        dtype = compute_dtype(call.q.dtype)

        def by_head(x: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
            if x is None:
                return None
            x = (x.expand(batch.stop, nheads) if x.dim() == 1 else x)[batch.start : batch.stop]
            return x.to(dtype).reshape(len(batch) * nheads_k, nheads // nheads_k)

        factors = call.row_factors
        if factors is not None:
            if rows is not None and len(factors) == len(call.q):
                factors = factors[None, rows]
            else:
                factors = factors[batch.start : batch.stop]
                factors = factors[:, None] if factors.dim() == 1 else factors
            factors = factors.to(dtype).repeat_interleave(nheads_k, dim=0)
        dropout = Dropout(seed, o.dropout_p, batch.start * nheads) if o.dropout_p > 0.0 else None
        visibility = _visibility(call, batch, seqlens, rows)
        by_heads = map(by_head, (call.alibi_slopes, call.sigmoid_biases, call.decay_slopes))
        return cls(o, call.q.dtype, visibility, *by_heads, factors, dropout, use_softmax)

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.dtype)

    @property
    def f(self) -> Activation:
        return ACTIVATIONS[self.options.activation]

    def bias(self, heads: range, rows: int) -> Bias:
        """Return the bias of these key heads, to be added to their scores (heads, group * rows, keys)."""
        if self.sigmoid_biases is not None:
            biases = self.sigmoid_biases[heads.start : heads.stop]
            return biases.repeat_interleave(rows, dim=1)[:, :, None]
        bias = self.options.sigmoid_bias
        return -math.log(max(self.visibility.seqlen_k, 1)) if bias is None else bias

    def norm(self, heads: range, rows: range) -> Optional[torch.Tensor]:
        """Return the factor of each row in the compute dtype, broadcastable to (heads, group, rows,
        channels); None is 1.
        """
        o = self.options
        if o.normalization is None and o.factor == 1.0 and self.row_factors is None:
            return None
        normalization, n = NORMALIZATIONS[o.normalization], max(self.visibility.seqlen_k, 1)
        seen = (
            self.visibility.counts(rows).clamp(min=1).to(self.compute_dtype) if normalization.by_row else None
        )
        norm = torch.as_tensor(
            normalization.factor(n, seen) * o.factor, dtype=self.compute_dtype, device="cpu"
        )
        if self.row_factors is None:
            return norm
        factors = self.row_factors[heads.start : heads.stop]
        if factors.shape[1] > 1:
            factors = factors[:, rows.start : rows.stop]
        return norm * factors[:, None, :, None]


def _visibility(call: Call, batch: range, seqlens: tuple[int, int], rows: Optional[slice]) -> Visibility:
    """Return what the queries see. A mask is that of one sequence."""
    o = call.options
    window = Window.of(o.window_left, o.window_right)
    diagonal = None if call.diagonal is None else int(call.diagonal[batch.start])
    if o.mask is None:
        return Visibility(*seqlens, window, diagonal)
    if o.mask == "intervals":
        of_rows = batch.start if rows is None else rows
        listed = call.interval_starts[of_rows], call.interval_ends[of_rows]
        return Intervals(*seqlens, window, diagonal, *listed)
    targets, contexts = (
        count if given is None else given[batch.start].item()
        for given, count in ((call.target_counts, o.num_targets), (call.context_counts, o.num_contexts))
    )
    sequence = HSTUSequence(
        *seqlens, targets, contexts, o.max_attn_len, o.min_full_attn_seq_len, o.target_group_size, diagonal
    )
    return HSTU(*seqlens, window, diagonal, *sequence.intervals(), sequence)


@dataclass(frozen=True)
class Part:
    """Sequences, and their place in the tensors of the call. rows, keys: the range of a packed sequence, None
    for a dense batch.
    """

    sequences: Sequences
    batch: range
    rows: Optional[slice]
    keys: Optional[slice]
    table: Optional[torch.Tensor]  # the pages of its keys

    def _of_batch(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.batch.start : self.batch.stop]

    def of_queries(self, x: torch.Tensor) -> torch.Tensor:
        return self._of_batch(x) if self.rows is None else x[None, self.rows]

    def of_keys(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is not None:
            return gather_pages(x, self.table, self.keys.stop)[None]
        return self._of_batch(x) if self.keys is None else x[None, self.keys]

    def of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Cut this part from x, which has a number for each head and query: (batch, nheads, seqlen_q), packed
        (nheads, total_q)."""
        return self._of_batch(x) if self.rows is None else x[None, :, self.rows]


def parts(call: Call, seed: int, use_softmax: bool = False) -> Iterator[Part]:
    """Cut a checked call without a cache into its sequences. A dense batch with one mask and one diagonal is
    one part."""
    if not call.varlen:
        seqlens = call.q.shape[1], call.k.shape[1]
        alike = call.options.mask is None and (call.diagonal is None or len(set(call.diagonal.tolist())) == 1)
        at_once = max(call.batch, 1) if alike else 1
        for b in range(0, call.batch, at_once):
            batch = range(b, b + at_once)
            yield Part(Sequences.of(call, batch, seqlens, seed, use_softmax), batch, None, None, None)
        return
    starts_q, starts_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    used, skipped = (None if x is None else x.tolist() for x in (call.seqused_k, call.leftpad_k))
    for b in range(call.batch):
        start = 0 if call.block_table is not None else starts_k[b]
        stop = start + (starts_k[b + 1] - starts_k[b] if used is None else used[b])
        rows, keys = (
            slice(starts_q[b], starts_q[b + 1]),
            slice(start + (0 if skipped is None else skipped[b]), stop),
        )
        seqlens = rows.stop - rows.start, keys.stop - keys.start
        table = None if call.block_table is None else call.block_table[b]
        yield Part(
            Sequences.of(call, range(b, b + 1), seqlens, seed, use_softmax, rows),
            range(b, b + 1),
            rows,
            keys,
            table,
        )
