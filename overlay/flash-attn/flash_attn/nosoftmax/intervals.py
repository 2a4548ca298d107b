"""Give the keys that the queries of a sequence see under flash_attn.masks.HSTU, in closed form.

generative-recommenders and FBGEMM define the mask by comparing positions; the docstring of flash_attn.masks
says what it means. Here it is two half-open intervals for each query: of contextual keys and history, and of
candidates. The bounds of a block of queries follow from its first and last query, in a few integer
operations, so that hidden blocks of keys are skipped and blocks that all its queries see need no mask.
"""

from typing import NamedTuple, Optional

import torch


class HSTUSequence(NamedTuple):
    """One sequence under the mask. Query i has position i + offset; diagonal: the offset, None for seqlen_k -
    seqlen_q. The numbers before it are those of flash_attn.masks.HSTU, checked.
    """

    seqlen_q: int
    seqlen_k: int
    num_targets: int
    num_contexts: int
    max_attn_len: int
    min_full_attn_seq_len: int
    target_group_size: int
    diagonal: Optional[int] = None

    @property
    def offset(self) -> int:
        return self.seqlen_k - self.seqlen_q if self.diagonal is None else self.diagonal

    @property
    def history_end(self) -> int:
        return self.seqlen_k - self.num_targets

    def intervals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (starts, ends), int32 (seqlen_q, 2) on the CPU. An interval that is not used is [0, 0)."""
        row = torch.arange(self.seqlen_q, dtype=torch.int32, device="cpu") + self.offset
        end, group = self.history_end, self.target_group_size
        is_contextual, is_target, exists = row < self.num_contexts, row >= end, row >= 0
        starts = torch.zeros(self.seqlen_q, 2, dtype=torch.int32, device="cpu")
        ends = torch.zeros_like(starts)
        if self.max_attn_len:
            starts[:, 0] = self._window(row)
        ends[:, 0] = (row + 1).masked_fill_(is_contextual | is_target, end) * exists
        if self.num_targets:
            starts[:, 1] = (end + (row - end) // group * group) * is_target
            ends[:, 1] = (row + 1) * is_target
        return starts, ends

    def _window(self, row: torch.Tensor) -> torch.Tensor:
        """Return the first key that rows see, 0 if their window reaches the contextual keys."""
        at = row.clamp(max=self.history_end)  # where the distances of a candidate count from
        start = (at - self.max_attn_len).clamp(min=self.num_contexts)
        start.masked_fill_(at <= self._sees_contexts_until, 0)
        if self.min_full_attn_seq_len:
            start.masked_fill_(at >= self.history_end - self.min_full_attn_seq_len, 0)
        return start

    def _first(self, row: int) -> int:
        """Return what `_window` does for one row that does not see everything."""
        at = min(row, self.history_end)
        return 0 if at <= self._sees_contexts_until else max(at - self.max_attn_len, self.num_contexts)

    @property
    def _sees_contexts_until(self) -> int:
        """The last position whose window reaches the contextual keys, all of which have one position."""
        return self.max_attn_len + max(self.num_contexts - 1, 0)

    @property
    def _whole_from(self) -> int:
        """The first position from which on rows see the whole history before them, window or not."""
        if not self.max_attn_len:
            return 0
        return self.history_end - self.min_full_attn_seq_len if self.min_full_attn_seq_len else self.seqlen_k

    def _positions(self, rows: range) -> tuple[int, int]:
        """Return the positions of the first query and of the one after the last; none is below 0."""
        return max(rows.start + self.offset, 0), max(rows.stop + self.offset, 0)

    def seen_by_any(self, rows: range) -> list[range]:
        """Return the keys that at least one of the queries sees, as at most two ranges, ascending and apart:
        a window moves by one, and groups follow each other, so nothing between is hidden from all.
        """
        first, stop = self._positions(rows)
        if first >= stop:
            return []
        end = self.history_end
        # The window moves with the rows, so the first of them sees farthest, unless a later one sees all.
        start = 0 if first < self.num_contexts or stop > self._whole_from else self._first(first)
        history = range(start, end if first < self.num_contexts else min(stop, end))
        if stop <= end:
            return [history] if history else []
        group = end + max(first - end, 0) // self.target_group_size * self.target_group_size
        if not history:
            return [range(group, stop)]
        return [range(start, stop)] if group <= history.stop else [history, range(group, stop)]

    def seen_by_all(self, rows: range) -> range:
        """Return the range of contextual keys and history that every query sees, in which no score is
        hidden. Candidates are not in it, but for those that end a row of the history.
        """
        first, stop = self._positions(rows)
        if rows.start + self.offset < 0 or first >= stop:
            return range(0)
        last_windowed = min(stop, self._whole_from) - 1
        start = self._first(last_windowed) if last_windowed >= max(first, self.num_contexts) else 0
        after_contexts = max(first, self.num_contexts)
        end = after_contexts + 1 if after_contexts < min(stop, self.history_end) else self.history_end
        return range(start, max(start, min(end, self.history_end)))
