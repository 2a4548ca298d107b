"""Which keys a query sees: causal masks and sliding windows, aligned at the bottom right."""

from dataclasses import dataclass
from typing import Optional

import torch

from .masks import is_negative, keep_where


@dataclass(frozen=True)
class Window:
    """How far a query sees to the left and right of its own position, in keys; None is without limit."""

    left: Optional[int] = None
    right: Optional[int] = None

    @classmethod
    def resolve(cls, causal: bool, left: int, right: int, max_seqlen_k: int) -> "Window":
        """The window that the compiled extension makes of its arguments (-1 or any negative number: no limit).

        As there, a limit of max_seqlen_k or more is none, and beside a limit on one side the other side is limited to
        max_seqlen_k; that matters only where seqlen_q > seqlen_k.
        """
        if causal:
            right = 0
        left = left if 0 <= left < max_seqlen_k else None
        right = right if 0 <= right < max_seqlen_k else None
        if left is not None and right is None:
            right = max_seqlen_k
        return cls(left, right)

    @property
    def is_limited(self) -> bool:
        return self.left is not None or self.right is not None


@dataclass(frozen=True)
class Visibility:
    """The keys that each query of one sequence sees. Query i is aligned with key i + seqlen_k - seqlen_q.

    Every query sees one contiguous range, and the ranges of successive queries move by one: the keys seen by any
    query of a block are again a range, and so are those seen by all of them.
    """

    seqlen_q: int
    seqlen_k: int
    window: Window

    @property
    def offset(self) -> int:
        return self.seqlen_k - self.seqlen_q

    @property
    def first_seeing(self) -> int:
        """The first query that sees any key, if there are keys: those before the window's first contact see none."""
        return 0 if self.window.right is None else max(0, -self.offset - self.window.right)

    def _bounds(self, first_row: int, last_row: int) -> tuple[int, int]:
        """Keys from the left limit of first_row up to (not including) the right limit of last_row."""
        left, right = self.window.left, self.window.right
        start = 0 if left is None else max(0, first_row + self.offset - left)
        stop = self.seqlen_k if right is None else min(self.seqlen_k, last_row + self.offset + right + 1)
        return start, max(start, stop)

    def seen_by_any(self, rows: range) -> range:
        """The keys that at least one of the queries sees: nothing else is read for them."""
        return range(*self._bounds(rows[0], rows[-1])) if rows else range(0)

    def seen_by_all(self, rows: range) -> range:
        return range(*self._bounds(rows[-1], rows[0]))

    def widest(self, rows: int) -> int:
        """An upper bound for the number of keys that a block of that many queries sees."""
        left, right = self.window.left, self.window.right
        if left is None or right is None:
            return self.seqlen_k
        return min(self.seqlen_k, left + right + rows)

    def counts(self, rows: range) -> torch.Tensor:
        """The number of keys that each of the queries sees, int32, (len(rows), 1)."""
        aligned, _ = self._positions(rows, range(0))
        left, right = self.window.left, self.window.right
        start = torch.zeros_like(aligned) if left is None else (aligned - left).clamp(min=0)
        stop = torch.full_like(aligned, self.seqlen_k)
        if right is not None:
            stop = torch.minimum(stop, aligned + right + 1)
        return (stop - start).clamp(min=0)

    def fill_hidden(self, block: torch.Tensor, rows: range, keys: range, value: float) -> None:
        """Assign value to the entries of block (..., len(rows), len(keys)) that the query does not see."""
        common = self.seen_by_all(rows)
        edges = [range(keys.start, min(common.start, keys.stop)), range(max(common.stop, keys.start), keys.stop)]
        if not common:
            edges = [keys]
        for edge in edges:
            if edge:
                part = block[..., edge.start - keys.start : edge.stop - keys.start]
                keep_where(part, self._visible(rows, edge), value)

    def _visible(self, rows: range, keys: range) -> torch.Tensor:
        """The mask (see masks.py) of the keys inside the window of each query, (len(rows), len(keys))."""
        aligned, key = self._positions(rows, keys)
        mask = torch.full((len(rows), len(keys)), -1, dtype=torch.int32, device="cpu")
        if self.window.left is not None:
            mask &= is_negative(aligned - (self.window.left + 1) - key)
        if self.window.right is not None:
            mask &= is_negative(key - (aligned + (self.window.right + 1)))
        return mask

    def _positions(self, rows: range, keys: range) -> tuple[torch.Tensor, torch.Tensor]:
        """int32: the keys that the queries are aligned with, (len(rows), 1), and the keys, (len(keys),)."""
        aligned = torch.arange(rows.start, rows.stop, dtype=torch.int32, device="cpu")[:, None] + self.offset
        return aligned, torch.arange(keys.start, keys.stop, dtype=torch.int32, device="cpu")

    def distances(self, rows: range, keys: range, dtype: torch.dtype) -> torch.Tensor:
        """|i + seqlen_k - seqlen_q - j|, the distance that ALiBi weighs, (len(rows), len(keys))."""
        aligned, key = self._positions(rows, keys)
        return (aligned - key).abs_().to(dtype)
